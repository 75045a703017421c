"""What a benchmark worker can run a model in. Each runtime imports its own package, and nothing else does.

A further runtime is one class and one line in `RUNTIMES`. It may live in an environment of its own: a worker needs
only the standard library, this package's folder on its path, and what its runtime imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Runtime(Protocol):
    """One model in one runtime. Its package is imported, and nothing loaded, when it is made."""

    def load(self, model: str, threads: int) -> None:
        """Open the model file: this is what the load time measures."""

    def feed(self, batch: int, seed: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        """Make the inputs of all later calls; their names, each with its type and shape.

        Args:
            batch: the batch size.
            seed: of random values.
            shapes: shapes of inputs by name, where the file leaves sizes open; the name "" is the only input.
        """

    def run(self) -> Any:
        """One call, from inputs in memory to outputs in memory: this is what the latency measures."""

    def describe(self) -> dict[str, Any]:
        """Name, version and exact settings."""


class OnnxRuntime:
    """onnxruntime on the CPU, with the kernel library registered where it was built."""

    def __init__(self) -> None:
        import onnxruntime

        from sparsepipe.runtime import library_path

        self._version: str = onnxruntime.__version__
        self._library = library_path()
        self._feeds: dict[str, Any] = {}

    def load(self, model: str, threads: int) -> None:
        from sparsepipe.runtime import session

        self._session = session(Path(model), threads=threads)

    def feed(self, batch: int, seed: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        from sparsepipe.runtime.inputs import inputs_of, random_inputs, sized

        self._feeds = random_inputs(sized(inputs_of(self._session), shapes), batch, seed)
        return {name: [value.dtype.name, list(value.shape)] for name, value in self._feeds.items()}

    def run(self) -> Any:
        return self._session.run(None, self._feeds)

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "onnxruntime",
            "version": self._version,
            "providers": self._session.get_providers(),
            "optimisation": self._session.get_session_options().graph_optimization_level.name,
            "kernel_library": str(self._library) if self._library else None,
        }


RUNTIMES: dict[str, Callable[[], Runtime]] = {"onnxruntime": OnnxRuntime}
