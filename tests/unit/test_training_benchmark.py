"""What sparse training costs: the arithmetic of the table, the memory it counts, and what it compares with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from torch import nn  # noqa: E402

from sparsepipe.benchmark.interleaved import Timing  # noqa: E402
from sparsepipe.sparsity.methods.dst_ee import DSTEE  # noqa: E402
from sparsepipe.sparsity.methods.static import Static  # noqa: E402
from sparsepipe.sparsity.sparsifier import Sparsifier  # noqa: E402
from sparsepipe.training import benchmark, overhead  # noqa: E402

SETTING: dict[str, Any] = {"network": "resnet8", "batch": 2, "optimizer": "sgd", "device": "cpu"}


def timing(*rounds: float) -> Timing:
    return Timing(tuple(np.full(3, value) for value in rounds))


def test_an_update_is_shared_out_over_the_steps_between_two() -> None:
    """By hand, in rounds of a machine that becomes twice as slow: (11 + (111 - 11) / 100) / 10 = 1.2."""
    slow = np.array([1.0, 1, 1, 2, 2, 2])
    base, plain, update = (timing(*(value * slow)) for value in (10.0, 11.0, 111.0))
    assert benchmark._overhead(benchmark._with_updates(plain, update), base) == pytest.approx(
        {"value": 0.2, "low": 0.2, "high": 0.2}
    )


@pytest.mark.parametrize("install", overhead.REJECTED.values(), ids=list(overhead.REJECTED))
def test_rejected_masking_trains_the_same_weights(install: overhead.Install) -> None:
    """So that it is the same work that is timed; masks are fixed."""
    rejected = overhead.RejectedSteps(install, 0.9, **SETTING)
    ours = overhead.Steps(**SETTING)
    sparsifier = Sparsifier(ours.model, ours.optimizer, Static(sparsity=0.9), total_steps=10)
    assert 0.85 < sparsifier.mask_set.sparsity < 0.95
    for _ in range(3):
        rejected()
        ours()
    theirs = dict(rejected.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        if install is overhead.tensor_hooks and name in sparsifier.masks:  # the next forward pass would mask it
            assert torch.equal(theirs[name] * sparsifier.masks[name], weight)
        else:
            assert torch.equal(theirs[name], weight)
    assert len(rejected.masking) == 3
    assert min(rejected.masking) > 0


def test_every_step_updates_or_none_does() -> None:
    for update_every, changed in ((1, True), (overhead.NEVER, False)):
        steps = overhead.SparseSteps(0.9, update_every, **SETTING)
        digests = {steps.sparsifier.mask_set.digest()}
        for _ in range(3):
            steps()
            digests.add(steps.sparsifier.mask_set.digest())
        assert len(digests) == (4 if changed else 1)
        assert len(steps.masking) == 3
        assert min(steps.masking) > 0


def test_memory_of_masks_is_three_bytes_for_each_weight_of_a_sparse_layer() -> None:
    steps = overhead.SparseSteps(0.9, 1, **SETTING)
    masks = steps.sparsifier.mask_set
    sparse = sum(mask.numel() for mask in masks.values() if not mask.all())
    assert 3 * sparse <= steps.mask_bytes <= 3 * sparse + len(masks)
    weights = sum(weight.numel() for weight in steps.model.parameters() if weight.ndim >= 2)
    assert steps.weights == weights


def test_the_peak_counts_what_lives_at_the_same_time() -> None:
    """By hand: 4000 and 8000 bytes together, then 2000 in place of the first; views and in-place writes add nothing."""

    class Script:
        model = nn.Linear(1, 1)

        def __call__(self) -> None:
            first = torch.ones(1000)
            second = torch.ones(2000)
            first.add_(1).view(10, 100).t()
            del first
            third = torch.ones(500)
            torch._foreach_mul_([second, third], 2.0)

    script: Any = Script()
    assert overhead.peak_bytes(script) == 12_000


def test_the_peak_of_a_step_holds_its_gradients() -> None:
    steps = overhead.Steps(**SETTING)
    steps()
    steps.optimizer.zero_grad()
    assert overhead.peak_bytes(steps) >= sum(4 * weight.numel() for weight in steps.model.parameters())


@pytest.mark.parametrize(("layers", "most"), [(1, 17), (8, 7)])
def test_an_update_takes_16_bytes_for_each_weight_of_one_layer_at_a_time(layers: int, most: float) -> None:
    """Beside the masks: the gradients of all, and copies of the gradients and scores of the layer whose turn it is."""
    model = nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Sparsifier(model, optimizer, DSTEE(sparsity=0.9, update_every=1), total_steps=100)
    model(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    with overhead._Allocations() as allocations:
        optimizer.step()
    assert 4 * 200 * 200 * layers < allocations.peak < most * 200 * 200 * layers


def test_the_benchmark_prints_a_table_and_writes_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(benchmark.CASES, "resnet20", benchmark.Case("resnet8", 1, "adamw"))
    out = tmp_path / "overhead.json"
    arguments = ["--network", "resnet20", "--seconds", "0", "--batch", "2", "--out", str(out)]
    done = CliRunner().invoke(benchmark.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "resnet8" in done.output
    result = json.loads(out.read_text())
    row = result["rows"][0]
    assert (row["network"], row["batch"], row["optimizer"], row["device"]) == ("resnet8", 2, "adamw", "cpu")
    assert result["machine"]["cpu"]
    assert set(row["rejected"]) == {"full masking", "tensor hooks"}
    for entry in (row["dst-ee"], *row["rejected"].values()):
        assert entry["overhead"]["low"] <= entry["overhead"]["value"] <= entry["overhead"]["high"]
        assert entry["masking"] > 0
    assert row["bytes_per_weight"]["held"] <= 3.5
    assert row["bytes_per_weight"]["held"] <= row["bytes_per_weight"]["at_peak"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_one_sentence() -> None:
    done = CliRunner().invoke(benchmark.main, ["--device", "cuda"])
    assert done.exit_code == 2
    assert "no CUDA device" in done.output
