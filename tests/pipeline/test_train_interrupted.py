"""The stage `train` after an interruption: it resumes bit for bit, or refuses, and loses nothing unasked."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from small_training import (  # noqa: E402
    STEPS,
    KilledError,
    assert_same_result,
    at_step,
    interrupt,
    kill,
    run,
    small_images,
    small_network,
    terminate,
)
from torch import nn  # noqa: E402

from sparsepipe import data, folders  # noqa: E402
from sparsepipe.artefact import Artefact  # noqa: E402
from sparsepipe.errors import ArtefactError, SparsepipeError  # noqa: E402
from sparsepipe.training import checkpoint  # noqa: E402


@pytest.fixture(autouse=True)
def _user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "small", sys.modules[__name__])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "small", sys.modules[__name__])
        return run(tmp_path_factory.mktemp("finished") / "train")


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


def test_a_training_told_to_end_while_it_cleans_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discard, asked = folders.discard, []

    def interrupted(folder: Path) -> None:
        if folder.name == "train.partial":
            asked.append(folder)
            signal.raise_signal(signal.SIGTERM)
        discard(folder)

    monkeypatch.setattr(folders, "discard", interrupted)
    at_step(monkeypatch, 2, fail)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # an exception, as in the command
    try:
        with pytest.raises(SparsepipeError, match="no luck"):
            run(tmp_path / "train")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked
    assert list(tmp_path.iterdir()) == []


def fail() -> None:
    raise SparsepipeError("no luck")


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
