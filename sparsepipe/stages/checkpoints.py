"""State dicts from other tools, read as plain arrays: what a file holds is data, never code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsepipe.errors import ArtefactError, MissingExtraError
from sparsepipe.formats.layout import Array
from sparsepipe.formats.tensors import DTYPES, read_tensors

if TYPE_CHECKING:
    import torch

TORCH_SUFFIXES = (".pt", ".pth")
HOLDERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the state dict, beside the state of the optimizer and such."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile put before every name."""
MEMBER = "model."
"""Prefix of every name where a module of Lightning holds the network as its `model`."""


def read(path: Path) -> dict[str, Array]:
    """Read the tensors of a .safetensors, .pt or .pth file by name.

    A .pt file holds a state dict, or a dict with one under `state_dict`, `model_state_dict` or `model`. Prefixes
    of DataParallel and torch.compile are removed. A pair `weight_orig`, `weight_mask` of torch.nn.utils.prune (or
    `weight`, `weight_mask`) becomes the masked `weight`. bfloat16 becomes float32.

    Raises:
        ArtefactError: the file is missing, damaged or of another kind; an entry is not a dense tensor of a type that
            numpy has; a mask has no weight, another shape, or values besides 0 and 1; a pruned weight has no mask.
        MissingExtraError: a .pt or .pth file where torch is not installed.
    """
    if path.suffix == ".safetensors":
        state = read_tensors(path).tensors
    elif path.suffix in TORCH_SUFFIXES:
        state = _read_torch(path)
    else:
        raise ArtefactError(
            f"A checkpoint of the type '{path.suffix}' is not known.",
            where=str(path),
            advice=f"Name a file that ends in .safetensors, {' or '.join(TORCH_SUFFIXES)}.",
        )
    if not state:
        raise ArtefactError("The checkpoint holds no tensors.", where=str(path))
    return fold_masks(_unwrap(state), str(path))


def without_member(state: Mapping[str, Array]) -> dict[str, Array]:
    """Remove Lightning's prefix `model.`, if all names have it, and then what torch.compile put behind it."""
    if all(name.startswith(MEMBER) for name in state):
        return _unwrap({name.removeprefix(MEMBER): array for name, array in state.items()})
    return dict(state)


def fold_masks(state: Mapping[str, Array], where: str) -> dict[str, Array]:
    """Multiply the masks of torch.nn.utils.prune into their weights, and name those as if they had never been pruned.

    Raises:
        ArtefactError: a mask has no weight, another shape, or values besides 0 and 1; a pruned weight has no mask.
    """
    folded = dict(state)
    for key in state:
        # torch.nn.utils.prune names the pair after the parameter; a mask for attention is a tensor of its own.
        if not re.search(r"(weight|bias)_(orig|mask)$", key):
            continue
        name, _, role = key.rpartition("_")
        if role == "orig":
            if f"{name}_mask" not in state:
                raise ArtefactError(
                    f"The pruned weight '{key}' has no mask '{name}_mask'.",
                    where=where,
                    advice="Save the whole state dict, buffers included.",
                )
            continue
        source = next((found for found in (f"{name}_orig", name) if found in state), None)
        if source is None:
            raise ArtefactError(f"The mask '{key}' has no weight '{name}_orig' or '{name}'.", where=where)
        weight, mask = state[source], state[key]
        if weight.shape != mask.shape:
            raise ArtefactError(
                f"The weight '{source}' has shape {list(weight.shape)}, its mask {list(mask.shape)}.", where=where
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ArtefactError(f"The mask '{key}' has values besides 0 and 1.", where=where)
        del folded[source], folded[key]
        folded[name] = np.where(mask != 0, weight, weight.dtype.type(0))
    return dict(sorted(folded.items()))


def _unwrap(state: dict[str, Array]) -> dict[str, Array]:
    while prefix := next((wrapper for wrapper in WRAPPERS if all(name.startswith(wrapper) for name in state)), None):
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def _read_torch(path: Path) -> dict[str, Array]:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "train", f"Reading '{path.name}'") from error
    if not path.is_file():
        raise ArtefactError("There is no such file.", where=str(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler stumbles over
        raise _unreadable(path, error) from error
    state = _find_state(content, torch.Tensor)
    if state is None:
        raise ArtefactError(
            f"The file holds {_describe(content)}, not a state dict.",
            where=str(path),
            advice=f"Save model.state_dict(), or a dict that holds it under {' or '.join(map(repr, HOLDERS))}.",
        )
    return {name: _to_array(tensor, f"{path}: {name}") for name, tensor in state.items()}


def _find_state(content: object, tensor_type: type) -> dict[str, Any] | None:
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(name, str) and isinstance(value, tensor_type) for name, value in content.items()):
        return dict(content)
    held = (_find_state(content[key], tensor_type) for key in HOLDERS if key in content)
    return next((state for state in held if state is not None), None)


def _to_array(tensor: torch.Tensor, where: str) -> Array:
    import torch

    if tensor.is_quantized or tensor.is_meta:
        raise ArtefactError(f"A tensor of type {tensor.dtype} on '{tensor.device}' has no plain values.", where=where)
    plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    if plain.dtype == torch.bfloat16:
        plain = plain.to(torch.float32)
    try:
        array = np.array(plain.numpy())
    except TypeError:  # a type that numpy lacks
        array = np.empty(0, np.void)
    if array.dtype.name not in DTYPES.values():
        raise ArtefactError(
            f"A tensor of type {tensor.dtype} cannot be read here.", where=where, advice="Save it as float32."
        )
    return array


def _unreadable(path: Path, error: Exception) -> ArtefactError:
    # torch's own message advises to switch the protection off.
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return ArtefactError(
            f"The file is refused: to load it would run code ('{found[1]}').",
            where=str(path),
            advice="Save the state dict alone: torch.save(model.state_dict(), FILE).",
        )
    return ArtefactError("This is not a PyTorch checkpoint, or it is damaged.", where=str(path))


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        keys = ", ".join(repr(key) for key in list(content)[:8])
        return f"a dict with the keys {keys}" if keys else "an empty dict"
    return f"an object of type {type(content).__name__}"
