"""From a torch network to an ONNX model whose tensors have the names of the network's parameters and modules."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnx import ModelProto
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import nn

from sparsepipe.errors import GraphError
from sparsepipe.graph import opset as opsets
from sparsepipe.graph.load import LIMIT_BYTES, first_line, too_large
from sparsepipe.graph.naming import name_results

INPUT, OUTPUT = "input", "logits"
NATIVE_OPSET = 18
"""The oldest opset that torch's exporter writes; older ones are converted from it."""
CHATTER = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def build(network: nn.Module, input_shape: tuple[int, ...], *, opset: int = NATIVE_OPSET) -> ModelProto:
    """Export `network` in evaluation mode; the network itself is not touched.

    The input is called `input` and has the shape [batch, *input_shape] with a dynamic batch, the output `logits`.
    Initializers have the names of `named_parameters()`. The result of a module is called by its path, such as
    `layer1.0.conv1` (`layer1.0.relu@1` for the second call); what else a module computes is `path/operation`. Batch
    normalisations are not folded here.

    Args:
        network: takes one tensor [batch, *input_shape] and gives one.
        input_shape: shape of one sample, (C, H, W) or (F,).
        opset: opset of the result, 13 or newer.

    Raises:
        GraphError: the network cannot be copied or exported, fixes its batch size, has several outputs, needs an
            operator that the opset does not have, or has more than 2 GB.
    """
    where = type(network).__name__
    if sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()) > LIMIT_BYTES:
        raise too_large(where)
    try:
        frozen = copy.deepcopy(network).eval()
    except Exception as error:  # a module may refuse in its own way
        raise GraphError(
            f"The network cannot be copied: {first_line(error)}.",
            where=where,
            advice="Remove what hangs on its parameters (torch.nn.utils.prune.remove, parametrizations) first.",
        ) from error
    program = _export(frozen, input_shape, max(opset, NATIVE_OPSET), where)
    model = program.model
    with _quiet():
        passes.InlinePass()(model)
        passes.IdentityEliminationPass()(model)
        # Names first, folding after: what folding makes anew does not say which module it comes from.
        name_results(program, {path for path, _ in frozen.named_modules() if path})
        _name_tied_weights(model, frozen)
        _transpose_weights(model.graph)
        optimizer.fold_constants(model, onnx_shape_inference=True)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _drop_zero_biases(model.graph, {name for name, _ in frozen.named_parameters()})
        _fix_shapes(model.graph)
        passes.RemoveUnusedNodesPass()(model)
        passes.NameFixPass()(model)
        passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    built = opsets.convert(onnx_ir.to_proto(model), opset, where=where)
    built.graph.name = where
    built.ir_version = opsets.smallest_ir_version(built)
    return built


def _export(network: nn.Module, input_shape: tuple[int, ...], opset: int, where: str) -> Any:
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    # The exporter takes sizes 0 and 1 for constants, so the sample has a batch of two.
    sample = torch.zeros(2, *input_shape, device=device)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (sample,),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except Exception as error:  # the network's own code runs in it, so anything can come
        cause = error.__cause__ or error
        raise GraphError(
            f"torch cannot export the network to ONNX: {type(cause).__name__}: {first_line(cause)}.",
            where=where,
            advice=f"It must take one tensor [batch, {', '.join(map(str, input_shape))}] of any batch size, without "
            "branches that depend on the data.",
        ) from error
    outputs = program.model.graph.outputs if program is not None else []
    if len(outputs) != 1 or isinstance(outputs[0].shape[0] if outputs[0].shape else None, int):
        raise GraphError(
            f"The network has {len(outputs)} outputs or a fixed batch size.",
            where=where,
            advice="It must give one tensor whose first dimension is the batch.",
        )
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and log lines of the exporter to itself."""
    loggers = [logging.getLogger(name) for name in CHATTER]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_tied_weights(model: onnx_ir.Model, network: nn.Module) -> None:
    """A parameter with several names gets the one that `named_parameters()` uses; the exporter takes the last."""
    first_names = {id(parameter): name for name, parameter in network.named_parameters()}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        first = first_names[id(parameter)]
        if name != first and name in model.graph.initializers and first not in model.graph.initializers:
            model.graph.initializers[name].name = first


def _transpose_weights(graph: onnx_ir.Graph) -> None:
    """Store a weight transposed where all that happens to it is Transpose, as before a MatMul, and keep its name."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name not in graph.initializers or weight.const_value is None:
            continue
        if weight.shape is None or len(weight.shape) != 2 or len(weight.uses()) > 1 or weight.is_graph_output():
            continue
        turned = weight.const_value.numpy().T.copy()
        weight.const_value = onnx_ir.tensor(turned, name=weight.name)
        weight.shape = onnx_ir.Shape(turned.shape)
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)


def _drop_zero_biases(graph: onnx_ir.Graph, parameters: set[str]) -> None:
    """Remove the bias of zeros that the exporter gives to a convolution that has none."""
    for node in graph:
        bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) > 2 else None
        if bias is None or bias.name in parameters or bias.const_value is None or bias.const_value.numpy().any():
            continue
        node.resize_inputs(2)


def _fix_shapes(graph: onnx_ir.Graph) -> None:
    """Make the target shape of a Reshape constant where only the batch in it is not: -1 stands for that as well.

    This saves the nodes that compute the shape in every call, [Shape(input)[0], 16] for a flattening.
    """
    for node in graph:
        shape = node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] is not None else None
        if shape is None or shape.op_type != "Concat":
            continue
        sizes: list[int] = []
        for part in shape.inputs:
            known = part.const_value if part is not None else None
            if known is not None:
                sizes += known.numpy().tolist()
            elif part is not None and part.shape == (1,):
                sizes.append(-1)
        if (
            sizes.count(-1) != 1
            or min(size for size in [*sizes, 1] if size != -1) < 1
            or len(sizes) < len(shape.inputs)
        ):
            continue
        name = f"{shape.outputs[0].name}/fixed"
        if name not in graph.initializers:
            graph.register_initializer(
                onnx_ir.val(name, const_value=onnx_ir.tensor(sizes, onnx_ir.DataType.INT64, name=name))
            )
        node.replace_input_with(1, graph.initializers[name])
