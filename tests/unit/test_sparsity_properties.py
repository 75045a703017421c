"""What holds after each of 1,000 updates, for any shapes, density, schedule, pattern, method and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_bench import OPTIMIZERS
from torch import Tensor, nn

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import registry
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.methods.dsr import DSR
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.methods.gmp import GMP
from sparsepipe.sparsity.methods.granet import GraNet
from sparsepipe.sparsity.methods.mest import MEST
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.rigl_itop import RigLITOP
from sparsepipe.sparsity.methods.set import SET
from sparsepipe.sparsity.methods.set_itop import SETITOP
from sparsepipe.sparsity.methods.snfs import SNFS
from sparsepipe.sparsity.methods.srigl import SRigL
from sparsepipe.sparsity.pattern import NM, parse
from sparsepipe.sparsity.sparsifier import Sparsifier

UPDATES = 1000
FAMILY: list[Callable[..., DropGrow]] = [DSTEE, RigL, SET, SNFS, DSR, MEST, RigLITOP, SETITOP]
SHRINKING: list[Callable[..., DropGrow]] = [GraNet, SRigL]
"""Drop and grow, but with ever fewer weights."""
SHAPES = st.sampled_from([(4, 4), (8, 4), (4, 8), (8, 8), (12, 4), (4, 4, 2), (8, 4, 3), (4, 4, 2, 2), (1, 4), (4, 1)])
PATTERNS = st.sampled_from(
    ["unstructured"] * 3 + ["2x1", "4x1", "1x4", "2x2", "2x4", "4x4", "1:4", "2:4", "channel", "constant-fan-in"]
)
SCHEDULES = st.one_of(
    st.builds(
        lambda p, name: {"drop_fraction": p, "drop_schedule": name},
        st.floats(0, 1),
        st.sampled_from(["constant", "cosine", "linear", "cosine-floor", "halved"]),
    ),
    st.just({"drop_fraction": lambda step: (step % 7) / 6}),
)
OWN: dict[str, st.SearchStrategy[Any]] = {
    "c": st.sampled_from([0.0, 1e-5, 1e-2, 1.0, 1e30]),
    "eps": st.sampled_from([1e-30, 1e-5, 1.0, 1e6]),
    "relative_c": st.booleans(),
    "score": st.sampled_from(["magnitude", "signed"]),
    "c_schedule": st.sampled_from(["constant", "cosine", "stepped"]),
    "gradient_weight": st.sampled_from([0.0, 1.0, 1e30]),
    "momentum": st.sampled_from([0.0, 0.5, 0.9, 0.999]),
}
"""Options that only some methods take, each with its extremes."""
GRADIENTS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "normal": lambda t, mask: torch.randn(mask.shape, generator=torch.Generator().manual_seed(t)),
    "zero": lambda t, mask: torch.zeros(mask.shape),
    "equal": lambda t, mask: torch.ones(mask.shape),
    "active only": lambda t, mask: mask.float(),
    "inactive only": lambda t, mask: -(~mask).float() * 1e30,
    "one weight": lambda t, mask: (torch.arange(mask.numel()) == t % mask.numel()).float().reshape(mask.shape),
    "coarse": lambda t, mask: torch.randint(-1, 2, mask.shape, generator=torch.Generator().manual_seed(t)).float(),
    "tiny": lambda t, mask: torch.full(mask.shape, 1e-45),
    "nan where inactive": lambda t, mask: torch.where(mask, 0.1, math.nan),
    "infinite where inactive": lambda t, mask: torch.where(mask, 0.1, math.inf * (-1) ** t),
}


class Layers(nn.Module):
    """A linear layer or convolution for each shape; gradients are given by hand."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        kinds: list[Any] = [nn.Linear, nn.Conv1d, nn.Conv2d]
        torch.manual_seed(len(shapes))
        self.layers = nn.ModuleList(
            kinds[len(shape) - 2](shape[1], shape[0], *([shape[2:]] if shape[2:] else []), bias=False)
            for shape in shapes
        )


@settings(max_examples=15)
@given(
    st.sampled_from(FAMILY),
    st.lists(SHAPES, min_size=1, max_size=3),
    PATTERNS,
    st.floats(0.05, 0.98),
    st.sampled_from(["erk", "er", "uniform", "global"]),
    SCHEDULES,
    st.sampled_from(["none", "score", "magnitude", "nonzeros", "global"]),
    st.sampled_from(["layer", "global"]),
    st.booleans(),
    st.lists(st.sampled_from(sorted(GRADIENTS)), min_size=1, max_size=4),
    st.sampled_from(sorted(set(OPTIMIZERS) - {"adafactor"})),
    st.fixed_dictionaries(OWN),
)
def test_1000_updates_keep_every_count_and_every_zero(
    make: Callable[..., DropGrow],
    shapes: list[tuple[int, ...]],
    pattern: str,
    sparsity: float,
    distribution: str,
    schedule: dict[str, Any],
    redistribution: str,
    drop_scope: str,
    exclude: bool,
    gradients: list[str],
    optimizer: str,
    own: dict[str, Any],
) -> None:
    shape = parse(pattern)
    taken = registry.options_of(make.name)  # type: ignore[attr-defined]
    method = make(
        sparsity=1 - shape.n / shape.m if isinstance(shape, NM) else sparsity,
        pattern=pattern,
        distribution=distribution,
        update_every=1,
        stop_at=1.0,
        redistribution=redistribution,
        drop_scope=drop_scope,
        exclude_just_dropped=exclude,
        **schedule,
        **{key: value for key, value in own.items() if key in taken},
    )
    model = Layers(shapes)
    trainer = OPTIMIZERS[optimizer](model.parameters())
    try:
        sparsifier = Sparsifier(model, trainer, method, total_steps=UPDATES + 1)
    except RecipeError as error:  # layers that the pattern does not fit stay dense and may exceed the target
        assert "cannot be reached" in str(error)  # noqa: PT017
        return
    masks = sparsifier.mask_set
    weights = dict(model.named_parameters())
    nnz = {name: masks.nnz_of(name) for name in masks}
    total, each_keeps_its_own = masks.nnz, redistribution == "none"
    counted = sum(masks.nnz_of(name) for name in masks.counters)
    for t in range(UPDATES):
        for name, weight in weights.items():
            weight.grad = GRADIENTS[gradients[t % len(gradients)]](t, masks[name])
        trainer.step()
        assert masks.nnz == total
        for name, counter in masks.counters.items():
            assert not weights[name].detach().masked_fill(masks[name], 0).view(torch.int32).any()
            if each_keeps_its_own:
                assert masks.nnz_of(name) == nnz[name]
            if t % 100 == 99:
                layer = shape.rows(masks[name])
                assert torch.equal(shape.unfold(layer, tuple(counter.shape)), masks[name])  # whole groups
                assert len(set(layer.sum(dim=1).tolist())) == 1  # as many in every row
                assert layer.any()  # no layer is cut off
    assert sum(int(counter.sum(dtype=torch.int64)) for counter in masks.counters.values()) == (UPDATES + 1) * counted
    assert sparsifier.step == UPDATES


@settings(max_examples=6)
@given(
    st.lists(SHAPES, min_size=1, max_size=3),
    st.floats(0.05, 0.98),
    st.sampled_from(["erk", "uniform", "global"]),
    st.sampled_from(["unstructured", "2x1", "channel"]),
    st.floats(0, 0.5),
    st.sampled_from(sorted(GRADIENTS)),
)
def test_1000_prunings_only_ever_remove_and_end_at_the_target(
    shapes: list[tuple[int, ...]], sparsity: float, distribution: str, pattern: str, start: float, gradients: str
) -> None:
    method = GMP(
        sparsity=sparsity, distribution=distribution, pattern=pattern, update_every=1, start_at=start, stop_at=1.0
    )
    model = Layers(shapes)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    try:
        sparsifier = Sparsifier(model, optimizer, method, total_steps=UPDATES)
    except RecipeError as error:
        assert "cannot be reached" in str(error)  # noqa: PT017
        return
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for t in range(UPDATES):
        for name, weight in model.named_parameters():
            weight.grad = GRADIENTS[gradients](t, sparsifier.masks[name])
        optimizer.step()
        for name, mask in sparsifier.masks.items():
            assert not (mask & ~before[name]).any()
            assert not model.get_parameter(name).detach()[~mask].any()
            before[name] = mask.clone()
    assert sparsifier.masks_final
    if distribution != "uniform" and pattern == "unstructured":  # with at least one weight left in each layer
        assert sparsifier.mask_set.nnz == max(round((1 - sparsity) * sparsifier.mask_set.size), len(shapes))


def test_a_method_of_the_family_is_in_the_property_test() -> None:
    made = [type(registry.create(info.name)) for info in registry.available()]
    assert {kind for kind in made if issubclass(kind, DropGrow)} <= {*FAMILY, *SHRINKING}
