"""The networks by name. Importing this module does not import torch; `create` does."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from sparsepipe.errors import ModelError, SparsepipeError
from sparsepipe.plugins import failure, is_plugin, load_plugin

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelInfo:
    """A network that can be named in a recipe.

    `home` is called as `function(input_shape=..., classes=..., **options)`; `input_shape` and `classes` are those of
    the published network, other ones work as well.
    """

    name: str
    home: str
    input_shape: tuple[int, ...]
    classes: int
    summary: str
    source: str


_CIFAR = (3, 32, 32)
_IMAGENET = (3, 224, 224)
_TABLE = (
    ModelInfo("mlp", "mlp:mlp", (784,), 10, "perceptron; options hidden (layers), width (units)", "-"),
    *(
        ModelInfo(
            f"resnet{depth}",
            f"resnet:resnet{depth}",
            _CIFAR,
            10,
            f"residual network of {depth} layers for small images; options width (16), stem_stride (1)",
            "arXiv 1512.03385",
        )
        for depth in (8, 14, 20, 32, 56)
    ),
    ModelInfo(
        "resnet50-cifar",
        "resnet:resnet50_cifar",
        _CIFAR,
        10,
        "ResNet-50 with a 3x3 stem for small images; option width (64)",
        "arXiv 1512.03385",
    ),
    ModelInfo("resnet50", "resnet:resnet50", _IMAGENET, 1000, "ResNet-50; option width (64)", "arXiv 1512.03385"),
    ModelInfo("vgg19", "vgg:vgg19", _CIFAR, 10, "VGG-19 with batch norm for small images", "arXiv 1409.1556"),
    ModelInfo("wrn-22-2", "wide_resnet:wrn_22_2", _CIFAR, 10, "wide residual network 22-2", "arXiv 1605.07146"),
    ModelInfo(
        "mobilenet-v1",
        "mobilenet:mobilenet_v1",
        _IMAGENET,
        1000,
        "depthwise separable convolutions",
        "arXiv 1704.04861",
    ),
    ModelInfo(
        "vit-tiny",
        "vit:vit_tiny",
        _IMAGENET,
        1000,
        "vision transformer; options patch (by image size), width (192), depth (12), heads (3)",
        "arXiv 2012.12877",
    ),
    ModelInfo(
        "link-mlp",
        "links:link_mlp",
        (16,),
        2,
        "scorer of pairs of nodes: perceptron with one output; option width (128)",
        "github.com/harveyp123/ICCD_SpTrn_SLR",
    ),
    ModelInfo(
        "link-gnn",
        "links:link_gnn",
        (96,),
        2,
        "graph convolution over several hops and scorer of pairs; options width (64), hidden (128)",
        "arXiv 1710.10370",
    ),
)
MODELS: Mapping[str, ModelInfo] = {info.name: info for info in _TABLE}


def available(glob: str = "*") -> list[ModelInfo]:
    """The networks whose name matches a shell pattern, such as `resnet*`."""
    return [info for info in MODELS.values() if fnmatchcase(info.name, glob)]


def create(
    name: str, *, input_shape: Sequence[int], classes: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global generator.

    A name of the form `module:function` imports and runs that code: pass such a name only if the user gave it, never
    one read from an artefact.

    Args:
        name: a name of `MODELS`, or `module:function` of the user's own.
        input_shape: shape of one sample, (C, H, W) or (F,).
        classes: number of outputs.
        options: keyword arguments for the builder.

    Raises:
        ModelError: unknown name or option, or the network cannot be built for these inputs.
    """
    options = dict(options or {})
    build = _builder(name)
    _check_options(name, build, options)
    try:
        network = build(input_shape=tuple(input_shape), classes=classes, **options)
    except SparsepipeError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        given = ", ".join(f"{key} = {value!r}" for key, value in options.items()) or "its default options"
        raise ModelError(
            f"The network cannot be built for inputs {tuple(input_shape)}, {classes} classes and {given}: "
            f"{failure(error)}.",
            where=name,
        ) from error
    _check_network(name, network)
    return network  # type: ignore[no-any-return]


def check_name(name: str) -> None:
    """Raise ModelError unless `name` is one of `MODELS` or has the form `module:function`. Imports nothing."""
    if name in MODELS or is_plugin(name):
        return
    close = difflib.get_close_matches(name.lower(), MODELS, n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise ModelError(
        f"There is no network '{name}'.",
        where="model",
        advice=f"{hint}Known: {', '.join(MODELS)}; or name your own as module:function.",
    )


def _builder(name: str) -> Callable[..., Any]:
    check_name(name)
    return load_plugin(f"sparsepipe.models.{MODELS[name].home}" if name in MODELS else name, ModelError)


def _check_options(name: str, build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(build).parameters.values()
    except ValueError:  # built in C: it will check its arguments itself
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    allowed = [parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY]
    allowed = [option for option in allowed if option not in ("input_shape", "classes")]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        listed = f"It takes: {', '.join(allowed)}." if allowed else "It takes no options."
        raise ModelError(f"This network has no option '{unknown[0]}'.", where=f"model {name}", advice=listed)


def _check_network(name: str, network: Any) -> None:
    from torch import nn
    from torch.nn.parameter import is_lazy

    if not isinstance(network, nn.Module):
        raise ModelError(
            f"The function returned {type(network).__name__}, not a torch.nn.Module.",
            where=name,
            advice="It is called as function(input_shape=..., classes=..., **options).",
        )
    lazy = [key for key, value in [*network.named_parameters(), *network.named_buffers()] if is_lazy(value)]
    if lazy:
        raise ModelError(
            f"The network has parameters without a shape: {', '.join(lazy)}.",
            where=name,
            advice="Give layers their sizes instead of using lazy ones, or run the network once before returning it.",
        )
