"""Names that a person can read for what the exporter of torch calls `val_5` and `node_conv2d_3`."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules that a node comes from, outermost first, and then the name of the operation."""


def name_results(program: Any, paths: Collection[str]) -> None:
    """Rename the nodes and tensors of an exported network after the modules that they come from, in place.

    The one tensor that a module's own operations hand to the outside is the module's result, and has its path as its
    name; other tensors become `path/operation`.

    Args:
        program: a `torch.onnx.ONNXProgram`, as exported: without folding.
        paths: the paths of the network's modules, without the network itself.
    """
    _rename(program.model.graph, _calls(program, paths))


def _calls(program: Any, paths: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    """Operation name -> the module calls that it happens in, outermost first.

    A call has the path of its module, and `@n` behind it from the second call of that module on.
    """
    numbers: dict[str, dict[str, int]] = {}
    calls: dict[str, tuple[str, ...]] = {}
    for operation in program.exported_program.graph.nodes:
        chain = []
        for key, (path, *_) in operation.meta.get("nn_module_stack", {}).items():
            if path in paths:
                number = numbers.setdefault(path, {}).setdefault(key, len(numbers[path]))
                chain.append(f"{path}@{number}" if number else path)
        calls[operation.name] = tuple(chain)
    return calls


def _rename(graph: onnx_ir.Graph, calls: Mapping[str, tuple[str, ...]]) -> None:
    homes = {node: calls.get(_operation(node), ()) for node in graph}
    results: dict[str, list[onnx_ir.Value]] = {}
    for node in _dynamic(graph):
        home = homes[node]
        for value in node.outputs if home else ():
            if value.is_graph_output() or any(home[-1] not in homes[user] for user in value.consumers()):
                results.setdefault(home[-1], []).append(value)
    names = {values[0]: home for home, values in results.items() if len(values) == 1}
    taken = {value.name for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]}
    for node, home in homes.items():
        for value in node.outputs:
            name = names.get(value) or f"{home[-1] if home else ''}/{value.name}"
            if value is node.outputs[0]:
                node.name = name
            if not value.is_graph_output():
                while name in taken:
                    name += "_"
                taken.add(name)
                value.name = name


def _dynamic(graph: onnx_ir.Graph) -> list[onnx_ir.Node]:
    """The nodes whose results depend on the network's input; the others are constants that any module may share."""
    values, nodes = set(graph.inputs), []
    for node in graph:
        if not values.isdisjoint(node.inputs):
            values.update(node.outputs)
            nodes.append(node)
    return nodes


def _operation(node: onnx_ir.Node) -> str:
    """Name of the operation in the exported program that `node` is a part of."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return scopes[-1] if scopes else ""
