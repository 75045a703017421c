"""Static, GMP, one-shot pruning and dense training; the registry; counting multiply-accumulates."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sparsepipe
from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import distribution, redistribution, registry
from sparsepipe.sparsity.flops import count_macs, inference_multiple, training_multiple
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.gmp import GMP
from sparsepipe.sparsity.methods.magnitude_oneshot import MagnitudeOneShot
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.sparsifier import Sparsifier


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 8))


def run(method: Method, steps: int = 40) -> tuple[Any, Sparsifier, list[dict[str, Tensor]], list[bool]]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=steps)
    masks, final = [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 20, generator=generator), torch.randint(0, 8, (32,), generator=generator)
        optimizer.zero_grad()
        loss: Any = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        masks.append({name: mask.clone() for name, mask in sparsifier.masks.items()})
        final.append(sparsifier.masks_final)
    return model, sparsifier, masks, final


def sparsity_of(masks: dict[str, Tensor]) -> float:
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def test_static_masks_never_change() -> None:
    _, sparsifier, masks, final = run(Static(sparsity=0.9))
    assert all(torch.equal(masks[0][name], masks[-1][name]) for name in masks[0])
    assert all(final)
    assert sparsifier.metrics()["exploration_rate"] == pytest.approx(0.1, abs=1e-3)


def test_dense_masks_nothing() -> None:
    model, sparsifier, _, final = run(registry.create("dense"))
    assert sparsifier.metrics()["sparsity"] == 0.0
    assert sparsifier.metrics()["exploration_rate"] == 1.0
    assert list(sparsifier.metrics()["density"]) == ["0.weight", "2.weight"]
    assert all(final)
    assert sparsifier.mask_set.size == sum(p.numel() for p in model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_gmp_follows_the_cubic_schedule_and_never_brings_a_weight_back(distribution: str) -> None:
    method = GMP(sparsity=0.9, distribution=distribution, update_every=5, start_at=0.25, stop_at=0.8)
    _, sparsifier, masks, final = run(method)
    for step in range(1, 41):
        pruned_at = min(step // 5 * 5, 32) if step < 32 else 32
        progress = min(max((pruned_at - 10) / 22, 0), 1)
        expected = 0.9 * (1 - (1 - progress) ** 3)
        assert sparsity_of(masks[step - 1]) == pytest.approx(expected, abs=3 / 1120)
    for before, after in itertools.pairwise(masks):
        assert not any((after[name] & ~before[name]).any() for name in after)
    assert final == [step >= 32 for step in range(1, 41)]
    assert sparsifier.mask_set.nnz == 112


def test_gmp_removes_the_smallest_weights_of_each_layer() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = Sparsifier(model, optimizer, GMP(sparsity=0.75, distribution="uniform", update_every=1), total_steps=8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(8):
        model(torch.ones(1, 20)).sum().backward()
        optimizer.step()
    for name, mask in sparsifier.masks.items():
        kept = before[name].abs().flatten().argsort(descending=True)[: mask.numel() // 4]
        assert set(mask.flatten().nonzero().flatten().tolist()) == set(kept.tolist())


def test_one_shot_trains_dense_then_prunes_once_then_fine_tunes() -> None:
    _, sparsifier, masks, final = run(MagnitudeOneShot(sparsity=0.8, prune_at=0.5))
    assert [sparsity_of(mask) for mask in masks[:19]] == [0.0] * 19
    assert all(torch.equal(masks[19][name], masks[-1][name]) for name in masks[0])
    assert final == [step >= 20 for step in range(1, 41)]
    assert sparsifier.mask_set.nnz == 224


def test_one_shot_prunes_globally_by_magnitude() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Sparsifier(model, optimizer, MagnitudeOneShot(sparsity=0.9, distribution="global", prune_at=1.0), total_steps=1)
    weights = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])
    largest = weights.abs().sort(descending=True).values
    model(torch.ones(1, 20)).sum().backward()
    optimizer.step()
    kept = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])
    assert int((kept != 0).sum()) == 112
    assert float(kept[kept != 0].abs().min()) == float(largest[111])


@pytest.mark.parametrize("pattern", ["4x1", "2x2", "channel", "constant-fan-in"])
@pytest.mark.parametrize("method", [GMP, MagnitudeOneShot])
def test_pruning_keeps_whole_groups(method: Any, pattern: str) -> None:
    _, sparsifier, masks, _ = run(method(sparsity=0.75, pattern=pattern, distribution="global"))
    chosen = sparsepipe.sparsity.pattern.parse(pattern)
    for mask in masks[-1].values():
        assert torch.equal(chosen.unfold(chosen.rows(mask), tuple(mask.shape)), mask)
    assert sparsifier.mask_set.sparsity == pytest.approx(0.75, abs=0.03)


def test_the_registry_lists_every_method_with_its_class() -> None:
    assert [info.name for info in registry.available()] == list(registry.METHODS)
    assert [info.name for info in registry.available("*set*")] == ["set", "set-itop"]
    for name in registry.METHODS:
        assert registry.create(name).name == name


def test_listed_distributions_and_redistributions_are_those_that_there_are() -> None:
    assert [*distribution.NAMES, "{GLOB = DENSITY, ...}"] == list(registry.SPREADS)
    assert ["none", *redistribution.REDISTRIBUTIONS] == list(registry.EXCHANGES)


def test_listing_methods_loads_no_torch() -> None:
    code = (
        "import sys; from sparsepipe.sparsity import registry; registry.available(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_reach_the_method() -> None:
    method: Any = registry.create("dst-ee", {"sparsity": 0.95, "c": 0.1, "update_every": 7, "pattern": "4x1"})
    assert (method.target.sparsity, method.c, method.update_every, str(method.target.pattern)) == (0.95, 0.1, 7, "4x1")
    assert registry.options_of("dst-ee")[0] == "sparsity"
    own = ["c", "eps", "relative_c", "score", "c_schedule", "c_factor", "c_decay_every"]
    assert registry.options_of("dst-ee")[-7:] == own


def test_options_of_other_methods_are_passed_over_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sparsepipe"):
        registry.create("dense", {"sparsity": 0.9, "c": 1e-3, "prune_at": 0.5})
    assert [record.getMessage() for record in caplog.records] == [
        "The method 'dense' has no use for: sparsity, c, prune_at."
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dst_ee", {}, r"no method 'dst_ee' \(did you mean 'dst-ee'\?\).*magnitude-oneshot"),
        ("rigl", {"sparsty": 0.9}, r"'sparsty' \(did you mean 'sparsity'\?\).*Options of rigl: sparsity"),
        ("dense", {"colour": 1}, "takes no options"),
        ("dst-ee", {"eps": 0}, "'eps' must be greater than 0"),
        ("dst-ee", {"c": -1}, "'c'"),
        ("set", {"update_every": 0}, "'update_every' must be an integer"),
        ("set", {"drop_fraction": 1.5}, r"'drop_fraction' must be a number in \[0, 1\]"),
        ("set", {"drop_schedule": "cubic"}, "cosine, linear, constant"),
        ("set", {"exclude_just_dropped": "yes"}, "true or false"),
        ("gmp", {"start_at": 0.8}, "'start_at'"),
        ("magnitude-oneshot", {"prune_at": "half"}, "'prune_at'"),
    ],
)
def test_bad_names_and_options_are_refused_with_what_is_allowed(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        registry.create(name, options)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.head(self.mix(x, x, x, need_weights=False)[0])
        return mixed


def test_macs_are_positions_times_weights_for_each_weight() -> None:
    conv: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8, stride=2, padding=1),
        nn.Conv2d(8, 16, 1),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )
    statistics = conv[1].running_mean.clone()
    conv[2].eval()
    assert count_macs(conv, (3, 8, 8)) == {
        "0.weight": 64 * 8 * 27,
        "2.weight": 16 * 8 * 9,
        "3.weight": 16 * 8 * 16,
        "5.weight": 2560,
    }
    assert torch.equal(conv[1].running_mean, statistics)
    assert [module.training for module in conv] == [True, True, False, True, True, True]
    assert count_macs(Attention(), (7, 16)) == {
        "mix.in_proj_weight": 7 * 48 * 16,
        "mix.out_proj.weight": 7 * 256,
        "head.weight": 7 * 80,
    }


def test_a_weight_used_twice_counts_twice() -> None:
    layer = nn.Linear(8, 8)
    assert count_macs(nn.Sequential(layer, nn.ReLU(), layer), (8,)) == {"0.weight": 128}


def test_multiples_of_known_cases() -> None:
    assert inference_multiple({"a": 100, "b": 300}, {"a": 0.5}) == 0.875
    assert training_multiple(0.2) == 0.2
    assert training_multiple([1.0, 0.5, 0.25, 0.25]) == 0.5
    assert training_multiple(1.0, dense_gradient_every=100) == pytest.approx(1.0)
    assert training_multiple(0.1, dense_gradient_every=1) == pytest.approx((0.3 + 0.2 + 1) / 6)
    assert registry.create("dst-ee").dense_gradient_every == 100
    assert registry.create("set").dense_gradient_every is None
    assert registry.create("gmp").dense_gradient_every is None
