"""What a benchmark worker can run a model in. Each runtime imports its own package, and nothing else does.

A further runtime is one class and one line in `RUNTIMES`, or a name of the form `package.module:Class`, as the peers of
`sparsepipe.benchmark.peers` have. It may live in an environment of its own: a worker needs only the standard library,
this package's folder, numpy, and what its runtime imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sparsepipe.benchmark.calls import Feeds


@dataclass(frozen=True)
class Preparation:
    """What a runtime makes its own file from.

    Attributes:
        source: an ONNX file of standard operators whose inputs have fixed sizes.
        folder: an empty folder for what is made.
        samples: a file of `sparsepipe.benchmark.calls` to calibrate int8 with; None where nothing is quantised.
        inputs: names of the inputs of the file, in order.
        outputs: names of its outputs, in order.
    """

    source: Path
    folder: Path
    samples: Path | None
    inputs: Sequence[str]
    outputs: Sequence[str]


class Runtime(Protocol):
    """One model in one runtime. Its package is imported, and nothing loaded, when it is made."""

    def prepare(self, work: Preparation) -> Path:
        """The file to load: a conversion of the ONNX file, or the ONNX file itself."""

    def load(self, model: str, threads: int) -> None:
        """Open the model file: this is what the load time measures."""

    def feed(self, batch: int, seed: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        """Make the inputs of all later calls; their names, each with its type and shape.

        Args:
            batch: the batch size.
            seed: of random values.
            shapes: shapes of inputs by name, where the file leaves sizes open; the name "" is the only input.
        """
        raise NotImplementedError("this runtime takes its inputs from a file")

    def give(self, feeds: Feeds) -> None:
        """Take these inputs, by name, for all later calls. Sizes are always the same."""

    def run(self) -> Any:
        """One call, from inputs in memory to outputs in memory: this is what the latency measures.

        Returns:
            The outputs in the order of the ONNX file, as numpy arrays.
        """

    def describe(self) -> dict[str, Any]:
        """Name, version and exact settings."""


class OnnxRuntime(Runtime):
    """onnxruntime on the CPU, with the kernel library registered where it was built."""

    exact_int8 = True

    def __init__(self) -> None:
        import onnxruntime

        from sparsepipe.runtime import library_path

        self._version: str = onnxruntime.__version__
        self._library = library_path()
        self._feeds: dict[str, Any] = {}

    def prepare(self, work: Preparation) -> Path:
        return work.source

    def load(self, model: str, threads: int) -> None:
        from sparsepipe.runtime import session

        self._session = session(Path(model), threads=threads, exact_int8=self.exact_int8)

    def feed(self, batch: int, seed: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        from sparsepipe.runtime.inputs import inputs_of, random_inputs, sized

        self._feeds = random_inputs(sized(inputs_of(self._session), shapes), batch, seed)
        return {name: [value.dtype.name, list(value.shape)] for name, value in self._feeds.items()}

    def give(self, feeds: Feeds) -> None:
        self._feeds = dict(feeds)

    def run(self) -> Any:
        return self._session.run(None, self._feeds)

    def describe(self) -> dict[str, Any]:
        from sparsepipe.runtime.sessions import EXACT_INT8

        options = self._session.get_session_options()
        return {
            "runtime": "onnxruntime",
            "version": self._version,
            "providers": self._session.get_providers(),
            "optimisation": options.graph_optimization_level.name,
            "exact_int8": self.exact_int8 and options.get_session_config_entry(EXACT_INT8) == "1",
            "kernel_library": str(self._library) if self._library else None,
        }


class FastInt8(OnnxRuntime):
    """onnxruntime as it is by default, for dense int8 files whose weights `sparsepipe.benchmark.int8` chose for it."""

    exact_int8 = False


FAST_INT8 = "onnxruntime-fast-int8"
RUNTIMES: dict[str, Callable[[], Runtime]] = {"onnxruntime": OnnxRuntime, FAST_INT8: FastInt8}


def find(name: str) -> Runtime:
    """The runtime of that name in `RUNTIMES`, or of the class `package.module:Class`."""
    if name in RUNTIMES:
        return RUNTIMES[name]()
    module, _, kind = name.partition(":")
    made: Runtime = getattr(import_module(module), kind)()
    return made
