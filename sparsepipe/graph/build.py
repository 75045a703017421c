"""From a torch network to an ONNX model whose tensors have the names of the network's parameters and modules."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from threading import get_ident
from typing import Any

import onnx_ir
import torch
from onnx import ModelProto
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import nn

from sparsepipe.errors import GraphError, first_line
from sparsepipe.graph import opset as opsets
from sparsepipe.graph.load import LIMIT_BYTES, too_large
from sparsepipe.graph.naming import name_results

INPUT, OUTPUT = "input", "logits"
NATIVE_OPSET = 18
"""The oldest opset that torch's exporter writes; older ones are converted from it."""
CHATTER = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")


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
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_should_fold)
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
            program: Any = torch.onnx.export(
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
    outputs = program.model.graph.outputs
    if len(outputs) != 1 or not outputs[0].shape or isinstance(outputs[0].shape[0], int):
        found = f"has {len(outputs)} outputs" if len(outputs) != 1 else "does not keep the batch as its first dimension"
        raise GraphError(
            f"The network {found}.", where=where, advice="It must give one tensor whose first dimension is the batch."
        )
    return program


class _Muted:
    """Stands for a stream and swallows what one thread writes; a progress bar of another thread goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        written: int = len(text) if get_ident() == self._thread else self._stream.write(text)
        return written


@contextmanager
def _quiet() -> Iterator[None]:
    """Let nothing of what the exporter prints, logs and warns of reach the user."""
    loggers = [logging.getLogger(name) for name in CHATTER]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    muted: Any = (_Muted(sys.stdout), _Muted(sys.stderr))
    try:
        with warnings.catch_warnings(), redirect_stdout(muted[0]), redirect_stderr(muted[1]):
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
    for weight in list(graph.initializers.values()):
        users = list(weight.consumers())
        if not users or weight.const_value is None or len(weight.const_value.shape) != 2 or weight.is_graph_output():
            continue
        if all(user.op_type == "Transpose" for user in users):
            turned = weight.const_value.numpy().T.copy()
            weight.const_value = onnx_ir.tensor(turned, name=weight.name)
            weight.shape = onnx_ir.Shape(turned.shape)
            for user in users:
                user.outputs[0].replace_all_uses_with(weight)
                graph.remove(user, safe=True)


def _should_fold(node: onnx_ir.Node) -> bool | None:
    """No second, nameless copy of a weight that is used both ways round; None leaves it to the default rules."""
    source = node.inputs[0] if node.op_type == "Transpose" else None
    return False if source is not None and source.is_initializer() else None


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
