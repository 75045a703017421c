"""The stage `train`: what it writes, and what it refuses."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from safetensors.torch import load_file  # noqa: E402
from small_training import (  # noqa: E402
    EPOCHS,
    SAMPLES,
    STEPS,
    STEPS_PER_EPOCH,
    assert_same_result,
    config,
    run,
    small_images,
    small_network,  # noqa: F401  (a recipe names it)
)
from torch import nn  # noqa: E402

from sparsepipe import data  # noqa: E402
from sparsepipe.artefact import Artefact  # noqa: E402
from sparsepipe.data import Dataset, Split, prepare  # noqa: E402
from sparsepipe.data.split import IntArray, Raw  # noqa: E402
from sparsepipe.errors import (  # noqa: E402
    DataError,
    MissingExtraError,
    ModelError,
    RecipeError,
)
from sparsepipe.formats.film import load_film  # noqa: E402
from sparsepipe.formats.masks import load_masks  # noqa: E402
from sparsepipe.models.registry import create  # noqa: E402
from sparsepipe.progress import Bar  # noqa: E402
from sparsepipe.sparsity.registry import METHODS  # noqa: E402
from sparsepipe.spec import FILM_FILE, MASKS_FILE, SPEC_FILE, WEIGHTS_FILE, ModelSpec  # noqa: E402
from sparsepipe.stages import assembly, trainer  # noqa: E402
from sparsepipe.training import checkpoint, metrics  # noqa: E402
from sparsepipe.training.loop import DivergedError  # noqa: E402

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


def diverging_network(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), classes))


@pytest.fixture(autouse=True)
def _user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "small", sys.modules[__name__])


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
