"""A training that is killed, at any moment and as often as one likes, ends with the bits of one that is not."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import pytest
import tomli_w

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from sparsepipe.artefact import Artefact  # noqa: E402
from sparsepipe.spec import MASKS_FILE, WEIGHTS_FILE  # noqa: E402
from sparsepipe.training import checkpoint, metrics  # noqa: E402

WORKERS = Path(__file__).parents[1] / "workers"
RECIPE = {
    "seed": 3,
    "model": "killed_training:network",
    "data": "killed_training:images",
    "method": {"name": "dst-ee", "sparsity": 0.6, "update_every": 3, "c": 1e-3},
    "augment": {"crop": 1, "flip": True},
    "train": {
        "epochs": 4,
        "batch_size": 16,
        "threads": 1,
        "validation": 0.2,
        "checkpoint_every": 2,
        "precision": "fp16",
        "ema": 0.9,
    },
}
KILLS = 20
LAST_CHANGE = 120
"""More changes to files than one whole training makes, as the tests find out."""


@dataclass(frozen=True)
class Outcome:
    code: int
    seconds: float

    @property
    def killed(self) -> bool:
        assert self.code in (0, -SIGKILL), "see the log beside the folder"
        return self.code == -SIGKILL


class Server:
    """The process of tests/workers/killed_training.py, which trains in forks of its own."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(WORKERS), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import killed_training; killed_training.run()"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, folder: Path, *overrides: str, **kill: float) -> Outcome:
        """Train into `folder`, or go on with what was killed there."""
        assert self._process.stdin
        assert self._process.stdout
        folder.mkdir(exist_ok=True)
        recipe = folder / "killed.toml"
        recipe.write_text(tomli_w.dumps(RECIPE))
        arguments = [str(recipe), *(part for override in overrides for part in ("--set", override))]
        order = {"arguments": arguments, "out": str(folder), "log": str(folder.with_suffix(".log")), **kill}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="module")
def straight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nobody killed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert not server.train(folder).killed
    return folder


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Every tensor and every plain value of two states is the same; the time they took may differ."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds", "cpu_seconds"}:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{where}/{index}")
    else:
        assert one == other, where


def assert_same_result(one: Path, other: Path) -> None:
    artefacts = [Artefact.read(folder / "train", "train") for folder in (one, other)]
    for name in (WEIGHTS_FILE, MASKS_FILE):
        contents = [artefact.file(name).read_bytes() for artefact in artefacts]
        assert contents[0] == contents[1], name
    assert_same(*(checkpoint.load(artefact.folder) for artefact in artefacts), where="checkpoint")
    assert_same(*(metrics.read(artefact.file(metrics.FILE)) for artefact in artefacts), where=metrics.FILE)
    assert_same(*(artefact.metrics for artefact in artefacts), where="metrics")
    for artefact in artefacts:
        artefact.verify()
        hidden = [path.name for path in artefact.folder.rglob(".*")]
        assert not hidden, "temporary files of killed runs are left"


def kill_at_random(server: Server, straight: Path, folder: Path, kills: int, *overrides: str) -> int:
    """Kill trainings at random moments, resume them until each is done, and compare; returns how many resumed."""
    moments = random.Random(7)
    # Other programs may slow the machine down while the kills go on.
    duration = 1.3 * server.train(folder / "timed", *overrides).seconds
    done = chains = resumed = 0
    while done < kills:
        chain = folder / f"chain{chains}"
        while done < kills and server.train(chain, *overrides, seconds=moments.uniform(0, duration)).killed:
            done += 1
        if not (chain / "train").exists():
            assert not server.train(chain, *overrides).killed
        assert_same_result(chain, straight)
        resumed += chain.with_suffix(".log").read_text().count("Resuming after step")
        chains += 1
    return resumed


def test_twenty_kills_at_random_moments_change_no_bit(server: Server, straight: Path, tmp_path: Path) -> None:
    assert kill_at_random(server, straight, tmp_path, KILLS), "all kills came before the first checkpoint"


@pytest.mark.parametrize("change", random.Random(1).sample(range(1, 80), 5))
def test_a_kill_before_a_change_to_any_file_changes_no_bit(
    server: Server, straight: Path, tmp_path: Path, change: int
) -> None:
    assert server.train(tmp_path / "run", change=change).killed
    assert not server.train(tmp_path / "run").killed
    assert_same_result(tmp_path / "run", straight)


@pytest.mark.parametrize("write", [1, 2, 5])
def test_a_kill_in_the_middle_of_a_checkpoint_changes_no_bit(
    server: Server, straight: Path, tmp_path: Path, write: int
) -> None:
    assert server.train(tmp_path / "run", write=write).killed
    assert list((tmp_path / "run" / "train.partial").glob(".checkpoint*")), "it was not killed while it wrote"
    assert server.train(tmp_path / "run", write=2).killed
    assert len(list((tmp_path / "run" / "train.partial").glob(".checkpoint*"))) == 1, "temporary files pile up"
    assert not server.train(tmp_path / "run").killed
    assert_same_result(tmp_path / "run", straight)


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_a_signal_saves_the_last_step_says_how_to_go_on_and_shows_in_the_exit_code(
    server: Server, straight: Path, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    outcome = server.train(run, "train.checkpoint_every=4", change=20, signal=number)
    assert outcome.code == 128 + number
    said = run.with_suffix(".log").read_text()
    (step,) = re.findall(r"Stopped after step (\d+) of 24; all is saved", said)
    assert "Error: Interrupted. `sparsepipe train --resume`" in said
    assert "Traceback" not in said
    assert not server.train(run).killed
    assert f"Resuming after step {step} of 24" in run.with_suffix(".log").read_text()
    assert_same_result(run, straight)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_before_every_single_change_to_a_file_changes_no_bit(
    server: Server, straight: Path, tmp_path: Path
) -> None:
    killed = 0
    for change in range(1, LAST_CHANGE):
        folder = tmp_path / str(change)
        killed += server.train(folder, change=change).killed
        if not (folder / "train").exists():
            assert not server.train(folder).killed
        assert_same_result(folder, straight)
    assert 60 < killed < LAST_CHANGE - 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_while_a_new_result_takes_the_place_of_an_old_one_loses_neither(server: Server, tmp_path: Path) -> None:
    options = ("seed=4", "train.checkpoint_every=12")
    old, straight = tmp_path / "old", tmp_path / "straight"
    assert not server.train(old).killed
    assert not server.train(straight, *options).killed
    kills = 0
    for change in range(25, LAST_CHANGE):
        folder = tmp_path / str(change)
        shutil.copytree(old, folder)
        killed = server.train(folder, *options, change=change).killed
        assert any((folder / name / "manifest.json").is_file() for name in ("train", "train.partial"))
        assert not server.train(folder, *options).killed
        assert_same_result(folder, straight)
        kills += killed
        if not killed:
            break
    assert kills > 10
    assert not killed, "the last changes were not reached"


METHODS = [
    ("method=snfs", "optimizer={name='adamw', lr=0.01}"),
    ("method=dsr", "method.pattern='2x1'", "optimizer.nesterov=false"),
    ("method=gmp", "schedule.warmup=1", "train.precision='bf16'"),
    ("method=magnitude-oneshot", "train.select='last'"),
    ("method=set", "method.distribution='uniform'", "train.label_smoothing=0.1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", METHODS)
def test_kills_change_no_bit_with_an_average_a_scaler_and_any_method(
    server: Server, tmp_path: Path, options: tuple[str, ...]
) -> None:
    options = ("augment.cutout=2", *options)
    straight = tmp_path / "straight"
    assert not server.train(straight, *options).killed
    assert kill_at_random(server, straight, tmp_path, KILLS, *options)
