"""Densities against published and independently computed tables; exact counts; overrides."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsepipe.errors import RecipeError
from sparsepipe.recipe import Recipe
from sparsepipe.sparsity import registry
from sparsepipe.sparsity.distribution import apportion, er, erk, global_magnitude, uniform
from sparsepipe.sparsity.flops import inference_multiple, training_multiple
from sparsepipe.sparsity.pattern import Unstructured
from sparsepipe.sparsity.sparsifier import Sparsifier
from sparsepipe.sparsity.target import Target
from sparsepipe.sparsity.weights import maskable

Shape = tuple[int, ...]


def vgg19_cifar(classes: int) -> Iterator[tuple[str, Shape, int]]:
    """(name, weight shape, output positions) of the sixteen convolutions and the classifier."""
    inputs, side = 3, 32
    plan = [64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4]
    number = 0
    for outputs in plan:
        if outputs == 0:
            side //= 2
            continue
        yield f"conv{number}", (outputs, inputs, 3, 3), side * side
        inputs, number = outputs, number + 1
    yield "fc", (classes, 512), 1


def resnet50(classes: int, stem: int, side: int) -> Iterator[tuple[str, Shape, int]]:
    """(name, weight shape, output positions); `side` is that of the first bottleneck's input."""
    yield "conv1", (64, 3, stem, stem), (side * 2 if stem == 7 else side) ** 2
    inputs = 64
    for stage, blocks in enumerate([3, 4, 6, 3], start=1):
        width = 64 * 2 ** (stage - 1)
        for block in range(blocks):
            wide = side * side
            if stage > 1 and block == 0:
                side //= 2
            name, positions = f"l{stage}.{block}", side * side
            yield f"{name}.conv1", (width, inputs, 1, 1), wide
            yield f"{name}.conv2", (width, width, 3, 3), positions
            yield f"{name}.conv3", (4 * width, width, 1, 1), positions
            if block == 0:
                yield f"{name}.down", (4 * width, inputs, 1, 1), positions
            inputs = 4 * width
    yield "fc", (classes, 2048), 1


NETWORKS = {
    "resnet50-imagenet": list(resnet50(1000, stem=7, side=56)),
    "resnet50-cifar10": list(resnet50(10, stem=3, side=32)),
    "resnet50-cifar100": list(resnet50(100, stem=3, side=32)),
    "vgg19-cifar10": list(vgg19_cifar(10)),
    "vgg19-cifar100": list(vgg19_cifar(100)),
}


def shapes_of(network: str) -> dict[str, Shape]:
    return {name: shape for name, shape, _ in NETWORKS[network]}


def macs_of(network: str) -> dict[str, int]:
    return {name: math.prod(shape) * positions for name, shape, positions in NETWORKS[network]}


@pytest.mark.parametrize(
    ("network", "millions", "gmacs"),
    [
        ("resnet50-imagenet", 25.503, 4.089),
        ("resnet50-cifar10", 23.468, 1.298),
        ("resnet50-cifar100", 23.652, None),
        ("vgg19-cifar10", 20.024, 0.398),
        ("vgg19-cifar100", 20.070, None),
    ],
)
def test_the_tables_of_shapes_are_those_networks(network: str, millions: float, gmacs: float | None) -> None:
    assert sum(map(math.prod, shapes_of(network).values())) / 1e6 == pytest.approx(millions, abs=6e-4)
    if gmacs is not None:
        assert sum(macs_of(network).values()) / 1e9 == pytest.approx(gmacs, abs=6e-4)


VGG_90 = {"conv0": 1, "conv1": 0.689, "conv2": 0.509, "conv3": 0.337, "conv4": 0.251, "conv8": 0.124, "fc": 1}
VGG_90 |= {f"conv{i}": 0.167 for i in (5, 6, 7)} | {f"conv{i}": 0.0828 for i in range(9, 16)}
VGG_98 = {"conv0": 1, "conv1": 0.136, "conv2": 0.1005, "conv3": 0.0665, "conv4": 0.0495, "conv8": 0.0245, "fc": 1}
VGG_98 |= {f"conv{i}": 0.0329 for i in (5, 6, 7)} | {f"conv{i}": 0.0163 for i in range(9, 16)}
RESNET_80 = {"conv1": 0.857, "l1.0.conv1": 1, "l1.0.conv3": 1, "l1.0.down": 1, "l1.0.conv2": 0.362, "l2.0.down": 0.585}
RESNET_80 |= {"l3.0.conv2": 0.0874, "l3.0.down": 0.292, "l4.0.conv2": 0.0435, "l4.0.down": 0.146, "l4.2.conv1": 0.243}
RESNET_80 |= {"fc": 0.148}


@pytest.mark.parametrize(
    ("network", "sparsity", "table"),
    [
        ("vgg19-cifar10", 0.90, VGG_90),
        ("vgg19-cifar10", 0.98, VGG_98),
        ("resnet50-imagenet", 0.80, RESNET_80),
        ("resnet50-imagenet", 0.90, {"conv1": 0.42, "fc": 0.073}),
    ],
)
def test_erk_densities_are_those_of_the_table(network: str, sparsity: float, table: dict[str, float]) -> None:
    densities = erk(shapes_of(network), sparsity)
    for name, density in table.items():
        digits = len(str(density).partition(".")[2])
        assert densities[name] == pytest.approx(density, abs=0.6 * 10**-digits if digits else 0), name


@pytest.mark.parametrize(
    ("network", "sparsity", "dense"),
    [
        ("vgg19-cifar10", 0.90, {"conv0", "fc"}),
        ("vgg19-cifar10", 0.95, {"conv0", "fc"}),
        ("vgg19-cifar10", 0.98, {"conv0", "fc"}),
        ("vgg19-cifar100", 0.98, {"conv0"}),
        ("resnet50-cifar10", 0.90, {"conv1", "fc", "l1.0.conv1"}),
        ("resnet50-cifar10", 0.95, {"fc"}),
        ("resnet50-cifar10", 0.98, set()),
        ("resnet50-cifar100", 0.90, {"conv1", "l1.0.conv1"}),
        ("resnet50-imagenet", 0.90, {"l1.0.conv1"}),
        ("resnet50-imagenet", 0.95, set()),
    ],
)
def test_erk_clamps_exactly_the_layers_that_exceed_their_capacity(
    network: str, sparsity: float, dense: set[str]
) -> None:
    assert {name for name, density in erk(shapes_of(network), sparsity).items() if density == 1} == dense


def test_erk_at_80_percent_clamps_the_seven_first_stage_convolutions_and_one_more() -> None:
    dense = {name for name, density in erk(shapes_of("resnet50-imagenet"), 0.8).items() if density == 1}
    first_stage = {name for name in dense if name.startswith("l1.") and "conv2" not in name}
    assert len(first_stage) == 7
    assert dense - first_stage == {"l2.0.conv1"}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
@pytest.mark.parametrize("rule", [er, erk])
def test_clamping_loses_no_density_and_counts_are_exact(network: str, sparsity: float, rule: object) -> None:
    shapes = shapes_of(network)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    densities = rule(shapes, sparsity)  # type: ignore[operator]
    kept = apportion({name: densities[name] * size for name, size in sizes.items()}, sizes, dict.fromkeys(sizes, 1))
    assert sum(kept.values()) == round((1 - sparsity) * sum(sizes.values()))
    assert all(0 < kept[name] <= size for name, size in sizes.items())


FLOPS = [
    ("resnet50-imagenet", 0.80, 0.4138, 0.4140, 0.2231, 0.2233),
    ("resnet50-imagenet", 0.90, 0.2418, 0.2421, 0.1260, 0.1263),
    ("resnet50-imagenet", 0.95, 0.1217, 0.1220, 0.0774, 0.0777),
    ("resnet50-cifar10", 0.90, 0.2306, None, 0.1012, None),
    ("resnet50-cifar10", 0.95, 0.1156, None, 0.0513, None),
    ("resnet50-cifar10", 0.98, 0.0452, None, 0.0213, None),
    ("resnet50-cifar100", 0.90, 0.2247, None, 0.1012, None),
    ("vgg19-cifar10", 0.90, 0.2225, None, 0.1040, None),
    ("vgg19-cifar10", 0.95, 0.1131, None, 0.0542, None),
    ("vgg19-cifar10", 0.98, 0.0475, None, 0.0244, None),
    ("vgg19-cifar100", 0.98, 0.0458, None, 0.0244, None),
]


@pytest.mark.parametrize(
    ("network", "sparsity", "inference", "training", "uniform_inference", "uniform_training"), FLOPS
)
def test_flops_multiples_are_those_of_the_table(
    network: str,
    sparsity: float,
    inference: float,
    training: float | None,
    uniform_inference: float,
    uniform_training: float | None,
) -> None:
    shapes, macs = shapes_of(network), macs_of(network)
    for densities, forward, whole in (
        (erk(shapes, sparsity), inference, training),
        (uniform(shapes, sparsity, dense={next(iter(shapes))}), uniform_inference, uniform_training),
    ):
        multiple = inference_multiple(macs, densities)
        assert multiple == pytest.approx(forward, abs=6e-5)
        if whole is not None:
            assert training_multiple(multiple, dense_gradient_every=1000) == pytest.approx(whole, abs=6e-5)


def test_dense_training_of_resnet50_costs_what_was_published() -> None:
    epochs, images, flops_per_sample = 100, 1.281e6, 2 * sum(macs_of("resnet50-imagenet").values())
    assert 3 * flops_per_sample * images * epochs == pytest.approx(3.15e18, rel=0.01)


def test_er_ignores_the_kernel() -> None:
    densities = er({"a": (64, 64, 3, 3), "b": (64, 64, 1, 1)}, 0.9)
    assert densities["a"] == pytest.approx(densities["b"])


def test_a_layer_forced_dense_is_made_up_for_by_the_others() -> None:
    shapes = {"a": (64, 64), "b": (64, 64), "c": (8, 64)}
    densities = erk(shapes, 0.8, dense={"c"})
    assert densities["c"] == 1
    assert sum(densities[name] * math.prod(shape) for name, shape in shapes.items()) == pytest.approx(0.2 * 8704)


def test_dense_layers_beyond_the_target_are_an_error_that_names_them() -> None:
    with pytest.raises(RecipeError, match=r"hold more.*big"):
        erk({"big": (100, 100), "small": (10, 10)}, 0.9, dense={"big"})


@pytest.mark.parametrize("rule", [uniform, er, erk])
def test_a_sparsity_with_nothing_to_make_sparse_is_an_error_that_says_why(rule: Any) -> None:
    shapes, why = {"a": (10, 10), "b": (5, 5)}, {"a": "too odd", "b": "too small"}
    with pytest.raises(RecipeError, match=r"0\.9 cannot be reached.* a \(too odd\); b \(too small\)"):
        rule(shapes, 0.9, why)
    assert rule(shapes, 0.0, why) == {"a": 1.0, "b": 1.0}


def test_global_with_nothing_to_make_sparse_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"0\.9 cannot be reached.* a\."):
        global_magnitude({"a": torch.ones(10)}, 0.9, {"a"})
    assert global_magnitude({"a": torch.ones(10)}, 0.0, {"a"}) == {"a": 1.0}


@pytest.mark.parametrize("sparsity", [0.9, 0.7, 0.3])  # 1 - 0.9 and 1 - 0.7 are not 0.1 and 0.3 in binary
def test_dense_layers_that_are_just_the_budget_are_none(sparsity: float) -> None:
    size = round(100 * (1 - sparsity))
    densities = erk({"kept": (size, 10), "cut": (100 - size, 10)}, sparsity, dense={"kept"})
    assert densities["kept"] == 1
    assert 0 <= densities["cut"] < 1e-12


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=8), st.integers(1, 8))
def test_apportion_meets_the_rounded_total(layers: list[tuple[int, float]], unit: int) -> None:
    limits = {str(index): limit for index, (limit, _) in enumerate(layers)}
    shares = {str(index): limit * part for index, (limit, part) in enumerate(layers)}
    units = dict.fromkeys(limits, unit)
    counts = apportion(shares, limits, units)
    assert all(1 <= counts[name] <= limits[name] for name in limits)
    target = max(round(sum(share * unit for share in shares.values())), unit * len(limits))
    missing = target - sum(counts.values()) * unit
    assert missing == 0 if unit == 1 else abs(missing) < unit


def test_global_takes_the_largest_magnitudes_of_the_whole_network() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {"a": torch.rand(50, generator=generator), "b": 2 * torch.rand(30, generator=generator)}
    merged = np.sort(np.concatenate([score.numpy() for score in scores.values()]))[::-1]
    densities = global_magnitude(scores, 0.75)
    for name, score in scores.items():
        assert densities[name] == pytest.approx(int((score >= float(merged[19])).sum()) / score.numel())


def test_global_counts_ties_exactly() -> None:
    densities = global_magnitude({"a": torch.ones(10), "b": torch.ones(10)}, 0.45)
    assert densities == {"a": 1.0, "b": 0.1}


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16 * 16, 10)
    )


def plan(**options: object) -> tuple[dict[str, int], dict[str, object]]:
    model = small()
    weights = maskable(model, torch.optim.SGD(model.parameters()))
    settings = {"sparsity": 0.8, "distribution": "uniform", "pattern": "unstructured", "overrides": []} | options
    target = Target.of(**settings)  # type: ignore[arg-type]
    layers = target.plan(weights)
    kept = target.kept(layers, {name: weight.parameter.detach().abs() for name, weight in weights.items()})
    return {name: kept[name] * layer.unit for name, layer in layers.items()}, dict(layers)


def test_uniform_keeps_the_first_convolution_dense_and_says_so() -> None:
    nnz, layers = plan()
    assert nnz["0.weight"] == 8 * 3 * 9
    assert "first convolution" in layers["0.weight"].dense_because  # type: ignore[attr-defined]
    assert nnz["4.weight"] == round(0.2 * 2560)


def test_the_first_matching_override_wins() -> None:
    overrides = [{"layers": "1", "sparsity": 0.5}, {"layers": "?", "sparsity": 0.25}, {"layers": "4", "dense": True}]
    nnz, _ = plan(overrides=(table for table in overrides))
    assert nnz == {"0.weight": 162, "1.weight": 576, "2.weight": 192, "4.weight": 1920}


def test_an_override_may_name_the_parameter_and_make_a_layer_dense() -> None:
    nnz, layers = plan(overrides=[{"layers": "4.weight", "dense": True}], distribution="erk")
    assert nnz["4.weight"] == 2560
    assert "override" in layers["4.weight"].dense_because  # type: ignore[attr-defined]
    others = 8 * 27 + 16 * 72 + 256
    assert sum(nnz.values()) - 2560 == round(0.2 * others)


def test_a_pattern_that_does_not_fit_leaves_the_layer_dense_with_a_reason_and_the_target_holds() -> None:
    nnz, layers = plan(pattern="1x4", distribution="erk")
    assert nnz["0.weight"] == 8 * 27
    assert "3 input channels" in layers["0.weight"].dense_because  # type: ignore[attr-defined]
    assert layers["0.weight"].pattern == Unstructured()  # type: ignore[attr-defined]
    assert abs(sum(nnz.values()) - 0.2 * (8 * 27 + 16 * 72 + 256 + 2560)) < 4


def test_a_layer_that_must_stay_dense_gives_nothing_where_large_blocks_exceed_the_target() -> None:
    """One 16x16 block in each of two layers is more than 1% of the weights; the first layer cannot make up for it."""
    nnz, layers = plan(pattern="16x16", sparsity=0.99, overrides=[{"layers": "4", "dense": True}])
    assert layers["0.weight"].dense_because  # type: ignore[attr-defined]
    assert nnz["0.weight"] == 8 * 3 * 9
    assert nnz["2.weight"] == 256


def test_n_of_m_fixes_the_density() -> None:
    nnz, _ = plan(pattern="2:4", sparsity=0.5)
    assert nnz == {"0.weight": 216, "1.weight": 576, "2.weight": 128, "4.weight": 1280}
    with pytest.raises(RecipeError, match=r"fixes the sparsity at 0\.5"):
        plan(pattern="2:4")
    nnz, _ = plan(overrides=[{"layers": "4", "pattern": "1:4"}])
    assert nnz["4.weight"] == 640


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global", {"*": 1}])
def test_a_pattern_that_fits_no_layer_is_refused_with_layers_and_reasons(distribution: object) -> None:
    reason = r"0\.weight \(8 output channels are not divisible by 7 \(7x3 blocks\)\); 1\.weight, 2\.weight \(16 out"
    with pytest.raises(RecipeError, match=rf"0\.8 cannot be reached.*{reason}"):
        plan(pattern="7x3", distribution=distribution)
    with pytest.raises(RecipeError, match="cannot be reached"):  # an override of one layer does not excuse the others
        plan(pattern="7x3", distribution=distribution, overrides=[{"layers": "4", "sparsity": 0.5, "pattern": "1x1"}])
    with pytest.raises(RecipeError, match="cannot be reached"):
        plan(pattern="5:7", sparsity=1 - 5 / 7, distribution=distribution)
    nnz, _ = plan(pattern="7x3", distribution=distribution, overrides=[{"layers": "*", "dense": True}])
    assert sum(nnz.values()) == 8 * 27 + 16 * 72 + 256 + 2560


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": "high"}, "sparsity"),
        ({"sparsity": True}, "sparsity"),
        ({"sparsity": math.nan}, "sparsity"),
        ({"distribution": "gaussian"}, "uniform, er, erk, global"),
        ({"pattern": "3d"}, "pattern"),
        ({"overrides": {"layers": "1"}}, "list of tables"),
        ({"overrides": 3}, "list of tables"),
        ({"overrides": [3]}, "list of tables"),
        ({"overrides": [{"layers": "1"}]}, "not an override"),
        ({"overrides": [{"sparsity": 0.5}]}, "not an override"),
        ({"overrides": [{"layers": "1", "sparsty": 0.5}]}, "sparsty"),
        ({"overrides": [{"layers": "1", "sparsity": 2}]}, r"overrides\.sparsity"),
        ({"overrides": [{"layers": "*.conv9", "dense": True}]}, r"No maskable layer .*conv9"),
        ({"overrides": [{"layers": "1", "pattern": "2:4", "sparsity": 0.9}]}, "fixes the sparsity"),
    ],
)
def test_bad_targets_are_refused_with_the_key_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(**options)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"overrides": [{"layers": "0", "pattern": "4x4"}]}, True),
        ({"overrides": [{"layers": "0", "sparsity": 0.5}], "pattern": "4x4"}, True),
        ({"overrides": [{"layers": "0", "dense": True}], "pattern": "4x4"}, False),
        ({"pattern": "4x4"}, False),  # many layers may not fit the pattern of all: `reasons` holds them
    ],
)
def test_an_override_that_a_layer_cannot_follow_is_told_with_the_layer(
    options: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    nnz, _ = plan(**options)
    assert nnz["0.weight"] == 8 * 3 * 9
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = "'0.weight' stays dense in spite of the override '0': 3 input channels are not divisible by 4"
    assert [text[: len(expected)] for text in told] == [expected] * warned


def test_an_override_that_would_leave_nothing_leaves_one_weight() -> None:
    nnz, _ = plan(
        overrides=[{"layers": "0", "sparsity": 0.9999}, {"layers": "4", "sparsity": 0.9999, "pattern": "2x1"}]
    )
    assert (nnz["0.weight"], nnz["4.weight"]) == (1, 2)


def test_a_distribution_may_be_given_as_relative_densities() -> None:
    """By hand: 3 x density in the first two layers; 8*27 + 16*72 = 1368 weights and 256 + 2560 = 2816 others."""
    nnz, layers = plan(distribution={"[01]": 3, "*.weight": 1})
    scale = 0.2 * (1368 + 2816) / (3 * 1368 + 2816)
    exact = {
        "0.weight": 3 * scale * 216,
        "1.weight": 3 * scale * 1152,
        "2.weight": scale * 256,
        "4.weight": scale * 2560,
    }
    assert sum(nnz.values()) == round(0.2 * 4184)
    assert all(abs(nnz[name] - share) < 1 for name, share in exact.items())
    assert layers["0.weight"].dense_because is None  # type: ignore[attr-defined]


def test_given_densities_above_one_are_made_up_for_by_the_others() -> None:
    nnz, _ = plan(distribution={"0": 100, "*": 1}, overrides=[{"layers": "4", "sparsity": 0.9}])
    assert nnz["0.weight"] == 216
    assert nnz["4.weight"] == 256
    assert nnz["0.weight"] + nnz["1.weight"] + nnz["2.weight"] == round(0.2 * (216 + 1152 + 256))


def test_given_densities_come_from_a_recipe_and_are_part_of_the_identity() -> None:
    text = """
        model = "mlp"
        data = "mnist5k"
        [method]
        name = "rigl"
        sparsity = 0.8
        distribution = {"0" = 2.5, "*" = 1}
        first_conv = "dense"
        redistribution = "global"
    """
    choice = Recipe.model_validate(tomllib.loads(text)).method
    method = registry.create(choice.name, choice.options)
    assert method.describe()["distribution"] == {"0": 2.5, "*": 1.0}
    assert json.loads(json.dumps(method.describe())) == method.describe()
    model = small()
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters()), method, total_steps=1)
    assert sparsifier.masks["0.weight"].all()
    assert sparsifier.mask_set.nnz == round(0.2 * sparsifier.mask_set.size)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ({"0": 1}, r"says nothing of '1\.weight'"),
        ({"9": 1, "*": 1}, "No maskable layer is called '9'"),
        ({"*": 0}, r"distribution\.\*"),
        ({"*": "all"}, r"distribution\.\*"),
        ({}, r"'distribution' must be one of uniform, er, erk, global, or a table"),
        ("magnitude", r"must be one of uniform, er, erk, global, or a table.*'magnitude'.*stem"),
        (0.5, r"must be one of"),
    ],
)
def test_bad_relative_densities_are_refused(distribution: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(distribution=distribution)


@given(st.floats(0, 0.99), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_a_gradual_method_never_takes_weights_back(sparsity: float, moments: list[float]) -> None:
    model = small()
    target = Target.of(sparsity, "erk", "unstructured", [])
    layers = target.plan(maskable(model, torch.optim.SGD(model.parameters())))
    steps = [target.kept(layers, {}, moment) for moment in sorted(moments)]
    assert all(before[name] >= after[name] for before, after in itertools.pairwise(steps) for name in layers)
    assert target.kept(layers, {}, 0.0) == {name: layer.groups for name, layer in layers.items()}
