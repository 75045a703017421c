"""`sparsepipe train` under torchrun: like one process, resumable, and with one message where a process fails."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from sparsepipe.artefact import Artefact  # noqa: E402
from sparsepipe.cli.main import sparsepipe  # noqa: E402
from sparsepipe.errors import ArtefactError  # noqa: E402
from sparsepipe.recipe import load  # noqa: E402
from sparsepipe.spec import MASKS_FILE, WEIGHTS_FILE  # noqa: E402
from sparsepipe.stages import train  # noqa: E402
from sparsepipe.training import checkpoint, metrics  # noqa: E402

WORKERS = Path(__file__).parents[1] / "workers"
RECIPE = """
seed = 5
model = { name = "slow_networks:slow", dropout = 0.0 }
data = "digits"
[method]
name = "dst-ee"
sparsity = 0.8
update_every = 7
[optimizer]
lr = 0.05
[train]
epochs = 4
batch_size = 16
threads = 1
device = "cpu"
checkpoint_every = 40
"""
COMMAND = ["-c", "from sparsepipe.cli.main import main; main()", "train"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "slow.toml"
    path.write_text(RECIPE)
    return path


def start(
    recipe: Path, out: Path, *options: str, torchrun: tuple[str, ...] = ("--standalone",), **variables: str
) -> Any:
    """torchrun with two processes, in a process group of its own."""
    paths = os.pathsep.join([str(WORKERS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *torchrun, "--no-python"),
            *(sys.executable, *COMMAND, str(recipe), "--out", str(out), *options),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any) -> str:
    """What it wrote to stderr, once it has ended well."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return str(errors)


def wait_for_checkpoint(process: Any, out: Path) -> Path:
    """The folder where a checkpoint lies now."""
    partial = out / "train.partial"
    deadline = time.monotonic() + 120
    while not checkpoint.exists(partial):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return partial


@pytest.fixture(scope="module")
def both(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """Trained by two processes in one go."""
    out = tmp_path_factory.mktemp("both")
    finish(start(recipe, out))
    return Artefact.read(out / "train", "train")


def by_one(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, resume: bool = False) -> Artefact:
    monkeypatch.syspath_prepend(str(WORKERS))
    config = train.TrainConfig.from_recipe(load(recipe, overrides))
    return train.run(config, {}, out / "train", resume=resume)


def assert_close(ours: Artefact, theirs: Artefact) -> None:
    """The same masks and the same training, but for the order of sums."""
    assert ours.file(MASKS_FILE).read_bytes() == theirs.file(MASKS_FILE).read_bytes()
    expected = load_file(theirs.file(WEIGHTS_FILE))
    for name, value in load_file(ours.file(WEIGHTS_FILE)).items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)
    logs = [metrics.read(artefact.file(metrics.FILE)) for artefact in (ours, theirs)]
    for mine, other in zip(*logs, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
        assert mine["validation_loss"] == pytest.approx(other["validation_loss"], abs=1e-4)
        assert mine["train_accuracy"] == pytest.approx(other["train_accuracy"], abs=2e-3)
        assert mine["exploration_rate"] == other["exploration_rate"] > 0.25
    for name in ("test_samples", "nnz", "epoch_selected", "training_flops_multiple"):
        assert ours.metrics[name] == theirs.metrics[name], name
    assert ours.metrics["test_correct"] == pytest.approx(theirs.metrics["test_correct"], abs=1)
    assert ours.metrics["test_accuracy"] > 0.8


def test_two_processes_train_what_one_does_with_twice_the_batch(
    both: Artefact, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = by_one(recipe, tmp_path, monkeypatch, "train.batch_size=32")
    assert_close(both, one)
    assert (both.metrics["processes"], one.metrics["processes"]) == (2, 1)
    both.verify()


def test_killed_processes_resume_to_the_same_bits(
    both: Artefact, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(recipe, tmp_path, SLOW_SECONDS="0.02")
    partial = wait_for_checkpoint(process, tmp_path)
    # The workers are in sessions of their own, and the launcher's death alone would not end them at once.
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.communicate()
    assert partial.is_dir(), "it was too late to kill"
    with pytest.raises(ArtefactError, match=r"the number of processes = 2 \(now 1\)"):
        by_one(recipe, tmp_path, monkeypatch, resume=True)
    assert "Resuming after step" in finish(start(recipe, tmp_path, "--resume"))
    assert_same_bits(tmp_path, both.folder.parent)


def test_a_signal_to_one_process_stops_both_after_the_same_step(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path, SLOW_SECONDS="0.02")
    partial = wait_for_checkpoint(process, tmp_path)
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    assert len(workers) == 1
    workers[0].send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    (step,) = re.findall(r"Stopped after step (\d+) of \d+; all is saved", errors)
    assert re.search(r"exitcode +: (130|143)", errors)
    state = checkpoint.load(partial)
    assert state is not None
    assert state["loop"]["step"] == state["loop"]["sparsifier"]["step"] == int(step)


IMAGES = """
seed = 5
model = "killed_training:network"
data = "killed_training:images"
augment = { crop = 1, flip = true }
[method]
name = "snfs"
sparsity = 0.6
update_every = 3
[train]
epochs = 60
batch_size = 8
threads = 1
validation = 0.2
device = "cpu"
precision = "fp16"
ema = 0.9
checkpoint_every = 7
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_of_one_process_or_of_all_change_no_bit(tmp_path: Path) -> None:
    recipe, draws = tmp_path / "images.toml", random.Random(3)
    recipe.write_text(IMAGES)
    started = time.monotonic()
    finish(start(recipe, tmp_path / "straight"))
    duration = time.monotonic() - started
    kills = chains = resumed = 0
    while kills < 10:
        out = tmp_path / f"chain{chains}"
        chains += 1
        while kills < 10 and not (out / "train").exists():
            process = start(recipe, out, "--resume")
            time.sleep(draws.uniform(0.5, 1) * duration)  # the first half of the time is spent on imports
            try:
                workers = psutil.Process(process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                workers = []
            victims = draws.choice([workers, workers[:1], workers[1:]])
            for victim in victims:
                with suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGKILL)
            _, errors = process.communicate(timeout=300)
            kills += process.returncode != 0
            resumed += "Resuming after step" in errors
            assert "damaged" not in errors
        if not (out / "train").exists():
            finish(start(recipe, out, "--resume"))
        assert_same_bits(out, tmp_path / "straight")
    assert resumed, "all kills came before the first checkpoint"


def assert_same_bits(one: Path, other: Path) -> None:
    artefacts = [Artefact.read(out / "train", "train") for out in (one, other)]
    for name in (WEIGHTS_FILE, MASKS_FILE):
        contents = [artefact.file(name).read_bytes() for artefact in artefacts]
        assert contents[0] == contents[1], name
    states = [load_file(artefact.file(checkpoint.FILE)) for artefact in artefacts]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_error_in_one_process_ends_all_with_one_message(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path, "--set", "model={name='slow_networks:failing'}")
    _, errors = process.communicate(timeout=300)
    said = [line for line in errors.splitlines() if line.startswith("Error:")]
    assert len(said) == 1, errors
    assert said[0].startswith("Error: process 1: step 5, epoch 1: The training loss became nan")
    assert "exitcode  : 2" in errors
    assert errors.count("Traceback") == 1, "torchrun's own, of its ChildFailedError"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_two_hosts_with_two_processes_each_train_what_one_process_does(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    hosts = [
        start(
            *(recipe, tmp_path / f"host{number}", "--set", "train.batch_size=8"),
            torchrun=("--nnodes=2", f"--node-rank={number}", "--master-addr=localhost", f"--master-port={port}"),
        )
        for number in range(2)
    ]
    for host in hosts:
        finish(host)
    assert not (tmp_path / "host1").exists(), "only process 0 writes"
    four = Artefact.read(tmp_path / "host0" / "train", "train")
    assert_close(four, by_one(recipe, tmp_path / "one", monkeypatch, "train.batch_size=32"))
    assert four.metrics["processes"] == 4


def test_other_verbs_are_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(sparsepipe, ["run", "recipe.toml"])
    assert result.exit_code == 2
    assert "Only `sparsepipe train` runs in several processes" in result.output


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_search_for_a_sparsity_is_refused_under_torchrun(
    rank: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    result = CliRunner().invoke(sparsepipe, ["train", str(recipe), "--target-sparsity", "0.8", "--out", str(out)])
    assert result.exit_code == 2
    assert "--target-sparsity" in result.output
    assert not out.exists()
