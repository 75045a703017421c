"""Several processes that train one network: the same masks everywhere, those of one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from torch import distributed, nn  # noqa: E402

import sparsepipe  # noqa: E402
from sparsepipe.errors import ModelError  # noqa: E402

WORKER = Path(__file__).parents[1] / "workers" / "replicas.py"
Results = dict[int, dict[str, Any]]
CASES = [
    *((2, method) for method in ("dst-ee, sgd", "dst-ee, adamw, DDP first", "rigl, global", "set", "gmp")),
    *((4, method) for method in ("dst-ee, sgd", "rigl, global")),
]


def under_torchrun(processes: int, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *(str(WORKER), str(folder / "result.json")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Number of processes -> what they found."""
    return {count: under_torchrun(count, tmp_path_factory.mktemp("replicas")) for count in (2, 4)}


@pytest.mark.parametrize(("processes", "method"), CASES)
def test_weights_masks_and_counters_are_the_same_bits_on_every_process(
    results: Results, processes: int, method: str
) -> None:
    assert results[processes][method]["identical"] is True


@pytest.mark.parametrize(("processes", "method"), CASES)
def test_many_processes_train_what_one_process_trains_on_the_whole_batch(
    results: Results, processes: int, method: str
) -> None:
    found = results[processes][method]
    assert found["differing_masks"] == 0
    assert found["same_counters"] is True
    assert found["moved"] > 0.1
    assert found["largest_difference"] < 1e-5, "only the order of sums may differ"
    weights = 12 * 2 * 9 + 20 * 192 + 4 * 20
    assert found["sparse"] == weights - round(0.3 * weights)
    assert (found["grown"] > 100) == (method != "gmp")


@pytest.mark.parametrize(
    ("method", "sparsity"),
    [
        *((name, 0.7) for name in ("snip", "grasp", "synflow", "lottery", "gap", "top-kast")),
        *((name, None) for name in ("autosparse", "l0-constrained", "xrda")),
    ],
)
def test_scores_rewinding_transforms_and_own_steps_are_those_of_one_process_on_the_whole_batch(
    results: Results, method: str, sparsity: float | None
) -> None:
    found = results[2]["frozen"][method]
    assert found["identical"] is True
    assert found["differing_masks"] == 0
    assert found["largest_difference"] < 1e-5, "only the order of sums may differ"
    assert found["sparsity"] > 0
    if sparsity is not None:
        assert found["sparsity"] == pytest.approx(sparsity, abs=1e-4)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_whose_gradients_are_not_averaged_are_told_at_the_first_update(
    results: Results, processes: int
) -> None:
    said = results[processes]["errors"]["without_averaging"]
    assert "'0.weight' are not the same" in said
    assert "after step 4" in said
    assert "DistributedDataParallel" in said


@pytest.mark.parametrize("processes", [2, 4])
def test_one_differing_mask_bit_is_found_at_the_next_comparison(results: Results, processes: int) -> None:
    said = results[processes]["errors"]["one_differing_bit"]
    assert "'3.weight'" in said
    assert "after step 16" in said  # updates follow every fourth step, and the fourth of them is compared
    assert f"process {processes - 1} differs" in said


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_other_options_are_told_before_the_first_step(results: Results, processes: int) -> None:
    assert "after step 0" in results[processes]["errors"]["other_options"]


def test_accumulated_gradients_are_scored_as_their_mean_over_all_processes(results: Results) -> None:
    assert results[2]["accumulated"] == {"identical": True, "differing_masks": 0}


def test_fabric_needs_nothing_else(results: Results) -> None:
    assert results[2]["fabric"] == {"identical": True, "differing_masks": 0}


def test_the_state_of_the_first_process_resumes_all(results: Results) -> None:
    assert results[2]["resumed"] is True


def test_each_process_extrapolates_by_its_own_gradient_and_resumes_with_it(results: Results) -> None:
    """Against the recursion w_k = w - rate lr zeta_k, g = mean of the gradients at w_k, written out in one process."""
    for found in results[2]["extrapolated"].values():
        assert found["moved"] > 0.01
        assert found["difference"] < 1e-6
    assert results[2]["resumed, extrapolated"] is True


@pytest.fixture
def _one_process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process_group")
def test_parameters_that_fsdp2_shards_are_refused_by_name() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match=r"'0\.weight' is sharded.*not supported.*DistributedDataParallel"):
        sparsepipe.Sparsifier(model, optimizer, sparsepipe.DSTEE(), total_steps=1000)


@pytest.mark.usefixtures("_one_process_group")
@pytest.mark.parametrize(
    ("part", "original", "named"),
    [("all", True, "0.weight"), ("all", False, "_flat_param"), ("2", True, "2.weight"), ("2", False, "2._flat_param")],
)
@pytest.mark.filterwarnings("ignore:.*FSDP will not shard:UserWarning", "ignore:.*`NO_SHARD`:FutureWarning")
def test_parameters_that_fsdp1_flattens_are_refused_by_name(part: str, original: bool, named: str) -> None:
    """Also where the caller gives the bare model, as he does with DDP: its parameters are parts of a flat one."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    options = {"use_orig_params": original, "device_id": torch.device("cpu")}
    if part == "all":
        wrapped: nn.Module = FullyShardedDataParallel(model, **options)
    else:
        wrapped = model
        model[2] = FullyShardedDataParallel(model[2], **options)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for given in (model, wrapped):
        with pytest.raises(ModelError, match=rf"'{named}' is sharded.*DistributedDataParallel"):
            sparsepipe.Sparsifier(given, optimizer, sparsepipe.DSTEE(), total_steps=1000)


@pytest.mark.usefixtures("_one_process_group")
def test_state_that_the_zero_redundancy_optimizer_keeps_in_another_one_starts_anew() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    model = nn.Linear(10, 10, bias=False)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    method = sparsepipe.RigL(sparsity=0.7, update_every=3, drop_fraction=0.5)
    sparsifier = sparsepipe.Sparsifier(model, optimizer, method, total_steps=100)
    mask = sparsifier.masks["weight"]
    before = mask.clone()
    for seed in range(3):
        model.weight.grad = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    changed = mask ^ before
    assert changed.any()
    state = optimizer.optim.state[model.weight]
    for moment in (state["exp_avg"], state["exp_avg_sq"]):
        assert not moment[~mask | changed].any()
        assert moment[mask & before].all()
