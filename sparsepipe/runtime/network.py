"""An ONNX file as something that can be run, and whose intermediate tensors can be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from sparsepipe.errors import GraphError, one_line
from sparsepipe.runtime.inputs import Input, inputs_of
from sparsepipe.runtime.sessions import run, session

Array = NDArray[Any]

WITHOUT_LIBRARY = "without the kernel library"
PROTOBUF_LIMIT = 2**31 - 1


class OnnxNetwork:
    """One ONNX file in onnxruntime.

    Args:
        path: the file.
        threads: threads of one operator; 0 leaves the number to onnxruntime.
        library: whether to register the kernel library, where it was built.

    Raises:
        GraphError: onnxruntime cannot load the file, or it takes inputs that are not tensors of numbers.
    """

    def __init__(self, path: Path, *, threads: int = 0, library: bool = True) -> None:
        self.path = path
        self._threads, self._library = threads, library
        self._session = session(path, threads=threads, library=library)
        self.inputs: list[Input] = inputs_of(self._session)
        self.outputs: list[str] = [node.name for node in self._session.get_outputs()]
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def name(self) -> str:
        return self.path.name if self._library else f"{self.path.name} {WITHOUT_LIBRARY}"

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The file itself, with its external data."""
        try:
            return onnx.load(self.path)
        except Exception as error:  # protobuf, onnx and the file system each raise their own
            raise GraphError(f"The file cannot be read: {one_line(error)}", where=self.name) from error

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that the nodes of the graph make, in the order in which they are made."""
        return [name for node in self.model.graph.node for name in node.output if name]

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs, in the order of `outputs`.

        Raises:
            GraphError: an input does not fit, or an operator fails.
        """
        return run(self._session, inputs, where=self.name)

    def trace(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """The values of intermediate tensors.

        What is looked at is computed by the same onnxruntime at the same optimisation level, but an operator whose
        result is looked at is not fused with the next one.

        Args:
            inputs: input name -> array.
            names: which of `tensors` to return; names that are none are passed over.

        Raises:
            GraphError: the model is too large to be rewritten in memory, or it fails to run.
        """
        present = set(self.tensors)
        wanted = [name for name in names if name in present]
        exposed = onnx.ModelProto()
        exposed.CopyFrom(self.model)
        del exposed.graph.output[:]
        exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        if exposed.ByteSize() > PROTOBUF_LIMIT:
            raise GraphError("The model is larger than 2 GB, so its layers cannot be looked at.", where=self.name)
        opened = session(exposed.SerializeToString(), threads=self._threads, library=self._library)
        return dict(zip(wanted, run(opened, inputs, where=self.name), strict=True))

    def index_bounds(self) -> dict[str, int]:
        """Integer inputs that pick rows of a table of weights (`Gather`): name -> number of rows."""
        graph = self.model.graph
        tables = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        tables |= {tensor.values.name: tuple(tensor.dims) for tensor in graph.sparse_initializer}
        casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
        bounds: dict[str, int] = {}
        for node in graph.node:
            if node.op_type == "Gather" and node.input[0] in tables:
                axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
                name = casts.get(node.input[1], node.input[1])
                rows = tables[node.input[0]][axis]
                bounds[name] = min(rows, bounds.get(name, rows))
        return bounds
