"""The stage `train`: what it writes, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from sparsepipe import data  # noqa: E402
from sparsepipe.artefact import Artefact  # noqa: E402
from sparsepipe.data import Dataset, Split, prepare  # noqa: E402
from sparsepipe.data.split import IntArray, Raw  # noqa: E402
from sparsepipe.errors import (  # noqa: E402
    ArtefactError,
    DataError,
    MissingExtraError,
    ModelError,
    RecipeError,
    SparsepipeError,
)
from sparsepipe.formats.film import load_film  # noqa: E402
from sparsepipe.formats.masks import load_masks  # noqa: E402
from sparsepipe.models.registry import create  # noqa: E402
from sparsepipe.progress import Bar  # noqa: E402
from sparsepipe.recipe import parse  # noqa: E402
from sparsepipe.sparsity.registry import METHODS  # noqa: E402
from sparsepipe.spec import FILM_FILE, MASKS_FILE, SPEC_FILE, WEIGHTS_FILE, ModelSpec  # noqa: E402
from sparsepipe.stages import assembly, train, trainer  # noqa: E402
from sparsepipe.training import checkpoint, metrics  # noqa: E402
from sparsepipe.training.loop import DivergedError  # noqa: E402

SAMPLES, STEPS_PER_EPOCH, EPOCHS = 120, 6, 4
STEPS = STEPS_PER_EPOCH * EPOCHS
LOGGED = {
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "sparsity",
    "exploration_rate",
    "drop_fraction",
    "density",
    "mask_updates",
    "churn",
    "age",
    "dropped",
    "grown",
    "exploration",
    "age_median",
    "age_p90",
    "inactive_gradient_norm",
    "inactive_gradient_mean",
    "inference_flops",
    "inference_flops_multiple",
    "mean_density",
    "mean_inference_flops_multiple",
    "training_flops",
    "training_flops_multiple",
    "seconds",
}


def small_network(input_shape: tuple[int, ...], classes: int, extra: int = 0) -> nn.Module:
    """A network with all that has state: convolutions, batch norm, and dropout, which draws from torch's generator."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, classes + extra),
    )


def diverging_network(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), classes))


def small_images(samples: int = SAMPLES) -> dict[str, Any]:
    """Images [N, 6, 6, 2] of three classes that differ in brightness; no two images are the same."""
    generator = np.random.default_rng(0)
    labels = np.arange(samples + 30) % 3
    images = generator.integers(0, 80, (samples + 30, 6, 6, 2)) + 60 * labels[:, None, None, None]
    x, y = images.astype(np.uint8), labels
    return {"x_train": x[:samples], "y_train": y[:samples], "x_test": x[samples:], "y_test": y[samples:]}


@pytest.fixture(autouse=True)
def _user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "small", sys.modules[__name__])


def config(*overrides: str) -> train.TrainConfig:
    table = {
        "seed": 3,
        "model": "small:small_network",
        "data": "small:small_images",
        "method": {"name": "dst-ee", "sparsity": 0.6, "update_every": 3, "c": 1e-3},
        "augment": {"crop": 1, "flip": True},
        "train": {
            "epochs": EPOCHS,
            "batch_size": 16,
            "threads": 1,
            "validation": 0.2,
            "checkpoint_every": STEPS_PER_EPOCH,
        },
    }
    return train.TrainConfig.from_recipe(parse(table, overrides))


def run(out: Path, *overrides: str, resume: bool = False, restart: bool = False) -> Artefact:
    return train.run(config(*overrides), {}, out, resume=resume, restart=restart)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Call `action` once, right after training step `step` of the next run."""
    done = 0
    advance = Bar.advance

    def counting(bar: Bar, count: int = 1, note: str | None = None) -> None:
        nonlocal done
        advance(bar, count, note)
        done += count
        if done == step:
            action()

    monkeypatch.setattr(Bar, "advance", counting)


class KilledError(Exception):
    pass


def kill() -> None:
    raise KilledError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same_result(one: Artefact, other: Artefact) -> None:
    """Weights, masks, and the whole state of the training are the same bits; times may differ."""
    film = {FILM_FILE} & {*one.manifest.outputs, *other.manifest.outputs}  # no film of a network that is always dense
    for name in (WEIGHTS_FILE, MASKS_FILE, *film):
        assert one.file(name).read_bytes() == other.file(name).read_bytes(), name
    states = [load_file(artefact.file(checkpoint.FILE)) for artefact in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    logs = [metrics.read(artefact.file(metrics.FILE)) for artefact in (one, other)]
    for log in logs:
        assert [record.pop("seconds") > 0 for record in log] == [True] * EPOCHS
    assert logs[0] == logs[1]
    times = {"seconds": 0, "cpu_seconds": 0}
    assert {**one.metrics, **times} == {**other.metrics, **times}


# What a finished training leaves


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_the_digits(tmp_path: Path, method: str) -> None:
    artefact = run(
        tmp_path / "train",
        f"method={method}",
        "method.sparsity=0.8",
        # Scores over all layers leave the last one of so small a network almost nothing.
        *(["method.distribution=erk"] if method == "grasp" else []),
        "model={name='mlp', hidden=1, width=48}",
        "data={name='digits'}",
        "augment={}",
        "train.epochs=6",
        "train.batch_size=32",
    )
    found = artefact.metrics
    assert found["test_accuracy"] > 0.8
    assert found["test_accuracy"] == found["test_correct"] / found["test_samples"]
    if METHODS[method].exact or method == "random":  # without a convolution, random is exact, too
        assert found["sparsity"] == pytest.approx(0 if method == "dense" else 0.8, abs=1e-3)
    assert 0 <= found["sparsity"] < 1
    assert found["weights"] == found["dense_macs"] == 64 * 48 + 48 * 10
    assert found["parameters"] == found["weights"] + 48 + 10
    assert found["nnz"] == round(found["weights"] * (1 - found["sparsity"]))
    assert found["data"] == {"name": "digits", "train": 1150, "validation": 288, "test": 359}
    assert found["nnz"] / found["weights"] - 1e-3 <= found["exploration_rate"] <= 1
    if method in ("static", "random", "erk-static", "snip", "grasp", "synflow"):
        assert found["exploration_rate"] == pytest.approx(0.2, abs=1e-3)
    if method in ("dst-ee", "rigl", "set", "snfs", "dsr"):
        assert 0.21 < found["exploration_rate"] < 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "small", sys.modules[__name__])
        return run(tmp_path_factory.mktemp("finished") / "train")


def test_the_artefact_holds_the_files_and_figures_that_later_stages_read(finished: Artefact) -> None:
    outputs = {name.partition("/")[0] for name in finished.manifest.outputs}
    expected = {SPEC_FILE, WEIGHTS_FILE, MASKS_FILE, FILM_FILE, metrics.FILE, metrics.EVENTS, checkpoint.FILE}
    assert outputs == expected
    assert finished.manifest.inputs["data"] == data.fingerprint("small:small_images")
    assert set(finished.metrics) == {
        "test_accuracy",
        "test_correct",
        "test_samples",
        "validation_accuracy",
        "epoch_selected",
        "sparsity",
        "nnz",
        "weights",
        "parameters",
        "exploration_rate",
        "mask_updates",
        "inference_flops",
        "inference_flops_multiple",
        "training_flops",
        "training_flops_multiple",
        "dense_gradient_every",
        "dense_macs",
        "seconds",
        "cpu_seconds",
        "processes",
        "data",
    }
    finished.verify()


def test_inactive_weights_are_exact_zeros_and_active_ones_are_not(finished: Artefact) -> None:
    weights, masks = load_file(finished.file(WEIGHTS_FILE)), load_masks(finished.file(MASKS_FILE))
    assert set(masks) == {"0.weight", "3.weight", "9.weight"}
    for name, mask in masks.items():
        values = weights[name].numpy()
        assert not values[~mask].view(np.int32).any(), "not +0.0"
        assert np.count_nonzero(values) == mask.sum()
    assert sum(int(mask.sum()) for mask in masks.values()) == finished.metrics["nnz"]


def test_the_saved_network_scores_what_the_manifest_says(finished: Artefact) -> None:
    spec = ModelSpec.read(finished.file(SPEC_FILE))
    assert (spec.input_shape, len(spec.classes), spec.method, spec.pattern) == ((2, 6, 6), 3, "dst-ee", "unstructured")
    network = create(spec.model.name, input_shape=spec.input_shape, classes=3, options=spec.model.options)
    network.load_state_dict(load_file(finished.file(WEIGHTS_FILE)))
    arrays = small_images()
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(prepare(arrays["x_test"], spec.preprocessing)))
    assert int((logits.argmax(1).numpy() == arrays["y_test"]).sum()) == finished.metrics["test_correct"]


def test_each_epoch_is_logged_with_all_keys(finished: Artefact) -> None:
    records = metrics.read(finished.file(metrics.FILE))
    assert [set(record) for record in records] == [LOGGED] * EPOCHS
    assert [record["step"] for record in records] == [STEPS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
    assert all(record["sparsity"] == pytest.approx(0.6, abs=2e-3) for record in records)
    assert set(records[0]["density"]) == {"0.weight", "3.weight", "9.weight"}
    for key in ("training_flops", "training_flops_multiple", "inference_flops"):
        assert records[-1][key] == finished.metrics[key]


def test_the_masks_are_followed_to_the_end(finished: Artefact) -> None:
    """Updates come every 3 steps before step 18 of 24, so after steps 3, 6, 9, 12 and 15."""
    records = metrics.read(finished.file(metrics.FILE))
    updates = [record["mask_updates"] for record in records]
    assert updates == [
        len([step for step in range(3, 18, 3) if start < step <= start + STEPS_PER_EPOCH])
        for start in range(0, STEPS_PER_EPOCH * EPOCHS, STEPS_PER_EPOCH)
    ]
    film, masks = load_film(finished.file(FILM_FILE)), load_masks(finished.file(MASKS_FILE))
    assert film.steps == (0, 3, 6, 9, 12, 15)
    assert np.array_equal(film.masks[-1], masks[film.layer])
    explored = np.logical_or.reduce(film.masks).mean()
    assert records[-1]["exploration"][film.layer] == pytest.approx(explored)
    dense = 2 * finished.metrics["dense_macs"]
    assert finished.metrics["inference_flops"] == pytest.approx(dense * finished.metrics["inference_flops_multiple"])
    samples = STEPS_PER_EPOCH * EPOCHS * 16
    spent = 3 * dense * samples * finished.metrics["training_flops_multiple"]
    assert finished.metrics["training_flops"] == pytest.approx(spent)


def test_training_flops_count_the_steps_before_each_pruning(tmp_path: Path) -> None:
    """Pruned after steps 2, 4, ..., 18 of 24, so that a mean over the ends of epochs would be too low."""
    artefact = run(tmp_path / "train", "method={name='gmp', sparsity=0.9, update_every=2, stop_at=0.75}")
    records = metrics.read(artefact.file(metrics.FILE))
    ends = [1.0, *(record["inference_flops_multiple"] for record in records)]
    means = [record["mean_inference_flops_multiple"] for record in records]
    pruned = [
        (before, mean, after) for before, mean, after in zip(ends, means, ends[1:], strict=False) if before > after
    ]
    assert len(pruned) >= 3
    assert all(before > mean > after for before, mean, after in pruned)
    assert means[-1] == ends[-1]
    assert artefact.metrics["training_flops_multiple"] == pytest.approx(np.mean(means))


def test_the_best_epoch_is_selected_among_those_with_final_masks(finished: Artefact) -> None:
    records = metrics.read(finished.file(metrics.FILE))
    settled = [record for record in records if record["step"] >= 15]  # updates every 3 steps before 0.75 * 24 = 18
    best = max(settled, key=lambda record: (record["validation_accuracy"], -record["validation_loss"]))
    assert finished.metrics["epoch_selected"] == best["epoch"]
    assert finished.metrics["validation_accuracy"] == best["validation_accuracy"]


def test_select_last_takes_the_last_epoch(tmp_path: Path) -> None:
    artefact = run(tmp_path / "train", "train.select='last'", "optimizer.lr=0.5", "schedule=constant")
    last = metrics.read(artefact.file(metrics.FILE))[-1]
    assert artefact.metrics["epoch_selected"] == EPOCHS
    assert artefact.metrics["validation_accuracy"] == last["validation_accuracy"]


def test_the_dense_method_may_select_any_epoch(tmp_path: Path) -> None:
    artefact = run(tmp_path / "train", "method=dense", "optimizer.lr=0.5", "schedule=constant", "seed=1")
    records = metrics.read(artefact.file(metrics.FILE))
    best = max(records, key=lambda record: (record["validation_accuracy"], -record["validation_loss"]))
    assert artefact.metrics["epoch_selected"] == best["epoch"]
    assert artefact.metrics["sparsity"] == 0
    assert artefact.metrics["inference_flops_multiple"] == artefact.metrics["training_flops_multiple"] == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_weights_in_fp32(tmp_path: Path, finished: Artefact, precision: str) -> None:
    artefact = run(tmp_path / "train", f"train.precision={precision}")
    weights = load_file(artefact.file(WEIGHTS_FILE))
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}
    losses = [metrics.read(run.file(metrics.FILE))[-1]["train_loss"] for run in (artefact, finished)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_with_an_average_its_weights_are_selected_with_exact_zeros(tmp_path: Path, finished: Artefact) -> None:
    for select in ("best", "last"):
        artefact = run(tmp_path / select, "train.ema=0.9", f"train.select={select}")
        weights, masks = load_file(artefact.file(WEIGHTS_FILE)), load_masks(artefact.file(MASKS_FILE))
        state = checkpoint.load(artefact.folder)
        assert state is not None
        kept = {"best": state["loop"]["best"]["weights"], "last": state["loop"]["average"]["network"]}[select]
        plain = load_file(finished.file(WEIGHTS_FILE))
        for name, value in weights.items():
            mask = torch.from_numpy(masks[name]) if name in masks else torch.tensor(True)
            assert torch.equal(value, kept[name] * mask), name
            assert name.endswith("num_batches_tracked") or not torch.equal(value, plain[name])
        for name, mask in masks.items():
            assert not weights[name].numpy()[~mask].view(np.int32).any(), "not +0.0"
        record = metrics.read(artefact.file(metrics.FILE))[artefact.metrics["epoch_selected"] - 1]
        assert artefact.metrics["validation_accuracy"] == record["validation_accuracy"]
        # The average looks on: the network trains, and chooses its masks, as without one.
        assert artefact.file(MASKS_FILE).read_bytes() == finished.file(MASKS_FILE).read_bytes()
        assert record["train_loss"] == metrics.read(finished.file(metrics.FILE))[record["epoch"] - 1]["train_loss"]


def test_the_same_recipe_gives_the_same_bits_and_another_seed_others(tmp_path: Path, finished: Artefact) -> None:
    assert_same_result(run(tmp_path / "again"), finished)
    other = run(tmp_path / "other", "seed=4")
    assert other.file(WEIGHTS_FILE).read_bytes() != finished.file(WEIGHTS_FILE).read_bytes()


def test_the_random_state_of_the_caller_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(tmp_path / "train", "train.epochs=1", "method=dense")
    assert torch.equal(torch.get_rng_state(), before)


# Data


class CountingSplit:
    """A split that counts how often each of its samples is loaded, and when."""

    def __init__(self, split: Split, now: Callable[[], int]) -> None:
        self._split = split
        self._now = now
        self.labels = split.labels
        self.loaded: list[int] = []
        self.times: set[int] = set()

    def __len__(self) -> int:
        return len(self._split)

    def load(self, indices: IntArray) -> Raw:
        self.loaded += indices.tolist()
        self.times.add(self._now())
        return self._split.load(indices)

    def subset(self, indices: IntArray) -> Split:
        raise AssertionError("no part of the test split is to be taken")


def test_the_test_split_is_read_once_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    counted: list[CountingSplit] = []

    def load(name: str, options: dict[str, Any]) -> Dataset:
        whole = data.load(name, options)
        counted.append(CountingSplit(whole.test, lambda: steps))
        return Dataset(whole.name, whole.classes, whole.train, counted[0], whole.input_shape, whole.preprocessing)

    def count(bar: Bar, count: int = 1, note: str | None = None) -> None:
        nonlocal steps
        steps += count

    monkeypatch.setattr(trainer, "data", type("data", (), {"load": load}))
    monkeypatch.setattr(Bar, "advance", count)
    artefact = run(tmp_path / "train")
    assert sorted(counted[0].loaded) == list(range(30))
    assert counted[0].times == {STEPS}
    assert artefact.metrics["test_samples"] == 30


def test_training_validation_and_test_samples_are_disjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[set[bytes]] = []
    source = assembly.source

    def recording(split: Split, device: torch.device) -> Any:
        parts.append({sample.tobytes() for sample in split.load(np.arange(len(split)))})
        return source(split, device)

    monkeypatch.setattr(assembly, "source", recording)
    run(tmp_path / "train", "train.epochs=1", "method=static")
    assert sorted(map(len, parts)) == [24, 30, 96]
    assert len(set.union(*parts)) == SAMPLES + 30


# Resuming


@pytest.mark.parametrize(
    ("action", "step", "overrides"),
    [
        (kill, 7, ()),
        (kill, 19, ()),
        (kill, STEPS, ()),
        (kill, 14, ("method=rigl", "optimizer={name='adamw', lr=0.01}", "train.precision=fp16")),
        (kill, 11, ("method=gmp",)),
        (kill, 17, ("method=magnitude-oneshot", "train.checkpoint_every=5")),
        (kill, 20, ("method=set", "method.pattern='2x1'", "train.precision=bf16")),
        (kill, 15, ("method=dsr", "train.precision=fp16", "train.ema=0.9", "train.checkpoint_every=4")),
        (interrupt, 1, ()),
        (interrupt, 9, ()),
        (interrupt, 12, ("method=dense",)),
        (terminate, 16, ("method=gmp", "schedule.warmup=2", "train.label_smoothing=0.1")),
    ],
)
def test_an_interrupted_training_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None], step: int, overrides: tuple[str, ...]
) -> None:
    straight = run(tmp_path / "straight", *overrides)
    with monkeypatch.context() as patch, pytest.raises((KilledError, KeyboardInterrupt)):
        at_step(patch, step, action)
        run(tmp_path / "resumed", *overrides)
    assert not (tmp_path / "resumed").exists()
    torch.manual_seed(12345)  # nothing may depend on what the process did before
    resumed = run(tmp_path / "resumed", *overrides, resume=True)
    assert not (tmp_path / "resumed.partial").exists()
    assert_same_result(resumed, straight)


def test_a_training_may_be_interrupted_many_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Artefact
) -> None:
    for action, step in ((kill, 8), (interrupt, 5), (kill, 1), (interrupt, 4), (kill, 2)):
        with monkeypatch.context() as patch, pytest.raises((KilledError, KeyboardInterrupt)):
            at_step(patch, step, action)
            run(tmp_path / "train", resume=True)
    assert_same_result(run(tmp_path / "train", resume=True), finished)


def test_ctrl_c_keeps_the_steps_done_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 9, interrupt)
        run(tmp_path / "train")
    assert "Stopped after step 9 of 24" in caplog.text
    assert checkpoint.load(tmp_path / "train.partial")["loop"]["step"] == 9  # type: ignore[index]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finished: Artefact
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        at_step(patch, 20, kill)
        run(tmp_path / "train")
    newest = tmp_path / "train.partial" / checkpoint.FILE
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.INFO, "sparsepipe"):
        resumed = run(tmp_path / "train", resume=True)
    assert "going on from the one before" in caplog.text
    assert "Resuming after step 12 of 24" in caplog.text
    assert_same_result(resumed, finished)


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Limits the bytes of any file that this process writes, as a disk does that is almost full; 0 is no limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (count or before[0], before[1]))

    yield limit
    limit(0)


def test_training_goes_on_while_the_disk_has_no_room_for_checkpoints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    finished: Artefact,
    largest_file: Callable[[int], None],
) -> None:
    size = finished.file(checkpoint.FILE).stat().st_size
    at_step(monkeypatch, 11, lambda: largest_file(size // 2))
    at_step(monkeypatch, 23, lambda: largest_file(0))
    with caplog.at_level(logging.INFO, "sparsepipe"):
        artefact = run(tmp_path / "train")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert "checkpoint of step 12 could not be written" in told[0]
    assert "that of step 6 is kept" in told[0]
    assert "that of step 24 is" in told[1]
    assert_same_result(artefact, finished)


def test_a_disk_that_is_full_to_the_end_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    finished: Artefact,
    largest_file: Callable[[int], None],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(ArtefactError) as caught:
        at_step(patch, 11, lambda: largest_file(600))  # not even for another line of the log
        run(tmp_path / "train")
    largest_file(0)
    assert "could not be written (File too large)" in str(caught.value)
    assert "--resume" in str(caught.value)
    with caplog.at_level(logging.INFO, "sparsepipe"):
        resumed = run(tmp_path / "train", resume=True)
    assert "Resuming after step 6 of 24" in caplog.text
    assert_same_result(resumed, finished)


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        at_step(patch, 13, kill)
        run(out, *overrides)


def _step(state: dict[str, Any]) -> None:
    state["loop"]["step"] = 25


def _weight(state: dict[str, Any]) -> None:
    del state["loop"]["model"]["0.weight"]


def _loop(state: dict[str, Any]) -> None:
    del state["loop"]


@pytest.mark.parametrize(("spoil", "words"), [(_step, "outside 0..24"), (_weight, "0.weight"), (_loop, "'loop'")])
def test_a_checkpoint_that_lacks_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    interrupted(tmp_path / "train", monkeypatch)
    partial = tmp_path / "train.partial"
    state = checkpoint.load(partial)
    assert state is not None
    spoil(state)
    checkpoint.save(partial, state)
    with pytest.raises(ArtefactError) as caught:
        run(tmp_path / "train", resume=True)
    assert words in str(caught.value)


def unmasked_network(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(96, classes))
    network.register_parameter("table", nn.Parameter(torch.zeros(3, 7)))
    return network


def test_what_stays_dense_is_told_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparsepipe"):
        run(tmp_path / "train", "model=small:unmasked_network", "method.pattern=1x4", "train.epochs=1")
    misfit, unmasked = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert misfit == "These layers stay dense (2 input channels are not divisible by 4 (1x4 blocks)): 0.weight."
    assert "table" in unmasked
    assert "4.9%" in unmasked  # 21 of 108 + 6 + 21 + 288 + 3 parameters


def test_a_checkpoint_of_another_configuration_is_refused_with_the_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "train", monkeypatch)
    with pytest.raises(ArtefactError) as caught:
        run(tmp_path / "train", "method.sparsity=0.7", "optimizer.lr=0.2", resume=True)
    message = str(caught.value)
    assert "method.sparsity = 0.6 (now 0.7)" in message
    assert "optimizer.lr = 0.1 (now 0.2)" in message
    assert "update_every" not in message
    assert (tmp_path / "train.partial" / checkpoint.FILE).is_file(), "a refused checkpoint must be kept"


def wide_network(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return small_network(input_shape, classes)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model=small:wide_network", "model.name = 'small:small_network' (now 'small:wide_network')"),
        ("method=rigl", "method.name = 'dst-ee' (now 'rigl')"),
        ("method.sparsity=0.9", "method.sparsity = 0.6 (now 0.9)"),
        ("method.pattern=2x1", "method.pattern = None (now '2x1')"),
        ("data=small:other_images", "data.name = 'small:small_images' (now 'small:other_images')"),
        ("optimizer=adamw", "optimizer.name = 'sgd' (now 'adamw')"),
        ("train.precision=fp16", "train.precision = 'fp32' (now 'fp16')"),
        ("train.ema=0.9", "train.ema = 0.0 (now 0.9)"),
        ("seed=4", "seed = 3 (now 4)"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_and_left_as_it_is(
    tmp_path: Path, halted: Path, override: str, difference: str
) -> None:
    partial = tmp_path / "train.partial"
    shutil.copytree(halted, partial)
    before = {path: path.read_bytes() for path in sorted(partial.rglob("*")) if path.is_file()}
    with pytest.raises(ArtefactError) as caught:
        run(tmp_path / "train", override, resume=True)
    assert difference in str(caught.value)
    assert "Resume it with the same recipe" in str(caught.value)
    assert {path: path.read_bytes() for path in sorted(partial.rglob("*")) if path.is_file()} == before


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed training left."""
    folder = tmp_path_factory.mktemp("halted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "small", sys.modules[__name__])
        interrupted(folder / "train", patch)
    return folder / "train.partial"


def other_images() -> dict[str, Any]:
    return small_images(90)


def test_a_checkpoint_made_with_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "train", monkeypatch)
    with pytest.raises(ArtefactError, match=r"data\.samples = None \(now 150\)"):
        run(tmp_path / "train", "data.samples=150", resume=True)
    monkeypatch.setattr(data, "fingerprint", lambda name, options: "sha256:other")
    with pytest.raises(ArtefactError, match="the data = "):
        run(tmp_path / "train", resume=True)


def test_settings_that_change_no_result_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Artefact
) -> None:
    interrupted(tmp_path / "train", monkeypatch)
    resumed = run(tmp_path / "train", "train.checkpoint_every=0", "train.device=cpu", resume=True)
    assert_same_result(resumed, finished)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_an_interrupted_training_is_neither_resumed_nor_discarded_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finished: Artefact
) -> None:
    interrupted(tmp_path / "train", monkeypatch)
    before = contents(tmp_path)
    with pytest.raises(ArtefactError, match=r"would be lost.* --resume; or start over: with --restart"):
        run(tmp_path / "train")
    assert contents(tmp_path) == before
    with caplog.at_level(logging.INFO, "sparsepipe"):
        again = run(tmp_path / "train", restart=True)
    assert "is discarded" in caplog.text
    assert "Resuming" not in caplog.text
    assert_same_result(again, finished)


@pytest.mark.parametrize("override", ["model=resnet999", "method.pattern=3y1", "data=npz:none.npz", "modifiers=nope"])
def test_a_training_that_cannot_begin_costs_an_interrupted_one_nothing(
    tmp_path: Path, halted: Path, override: str
) -> None:
    shutil.copytree(halted, tmp_path / "train.partial")
    before = contents(tmp_path)
    with pytest.raises(SparsepipeError):
        run(tmp_path / "train", override, restart=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_somebody_else_is_not_taken_for_an_interrupted_training(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "train.partial").mkdir()
    (tmp_path / "train.partial" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ArtefactError, match="sparsepipe did not make it"):
        run(tmp_path / "train", resume=resume, restart=not resume)
    assert contents(tmp_path) == before


def test_nothing_to_resume_is_a_fresh_start_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparsepipe"):
        run(tmp_path / "train", "train.epochs=1", "method=static", resume=True)
    assert "no interrupted training to resume" in caplog.text


# Refusals


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (("model.extra=2",), ModelError, ["(2, 5)", "3 classes"]),
        (("data={name='digits'}", "model={name='vgg19'}"), ModelError, ["at least 16x16"]),
        (("model={name='resnet20', widht=4}",), ModelError, ["widht", "width"]),
        (("method=dstee",), RecipeError, ["dstee", "dst-ee"]),
        (("method.sparsty=0.5",), RecipeError, ["sparsty", "sparsity"]),
        (("data=small:no_images",), DataError, ["no_images"]),
        (("schedule.warmup=9",), RecipeError, ["schedule.warmup", "54 steps"]),
        (("optimizer.lr=1e30", "method=dense"), DivergedError, ["step", "epoch 1", "lower optimizer.lr"]),
    ],
)
def test_what_does_not_fit_is_one_clear_error_and_leaves_nothing_behind(
    tmp_path: Path, overrides: tuple[str, ...], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        run(tmp_path / "train", *overrides)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def features() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {"x_train": generator.normal(size=(60, 5)).astype(np.float32), "y_train": np.arange(60) % 3}


def test_features_train_a_perceptron_but_neither_augmentation_nor_convolutions(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"augment.*5 features"):
        run(tmp_path / "train", "data=small:features", "model={name='mlp'}")
    with pytest.raises(ModelError, match=r"does not take samples of the shape \(5,\)"):
        run(tmp_path / "train", "data=small:features", "augment={}", "model=small:fixed_network")
    artefact = run(tmp_path / "train", "data=small:features", "augment={}", "model={name='mlp'}", "train.epochs=1")
    assert ModelSpec.read(artefact.file(SPEC_FILE)).input_shape == (5,)


def fixed_network(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A user's network that does not look at its arguments."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sparsepipe.stages.trainer", "sparsepipe.training.device"):
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr(module)
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(MissingExtraError, match=r"lightning_fabric.*sparsepipe\[train\]"):
        run(tmp_path / "train")


def test_the_configuration_comes_from_the_recipe_and_ignores_what_later_stages_do() -> None:
    one, other = config(), config("train.dense_twin=true", "bench.seconds=9", "name=other")
    assert json.loads(one.model_dump_json()) == json.loads(other.model_dump_json())
