"""What is logged of each epoch, and that a resumed training logs no epoch twice."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorboard")

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsepipe.errors import ArtefactError
from sparsepipe.sparsity.history import MaskHistory
from sparsepipe.sparsity.masks import MaskSet
from sparsepipe.training.metrics import EVENTS, FILE, MetricsLog, read


def record(epoch: int, loss: float | None = 0.5) -> dict[str, object]:
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": loss, "density": {"conv.weight": 0.25, "fc.weight": 1.0}}


def test_each_epoch_is_one_line_and_events_by_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        for epoch in (1, 2):
            metrics.write(record(epoch, 1 / epoch))
        assert metrics.records == [record(1, 1.0), record(2, 0.5)]
    assert [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()] == metrics.records
    events = EventAccumulator(str(tmp_path / EVENTS)).Reload()  # type: ignore[no-untyped-call]
    assert set(events.Tags()["scalars"]) == {"epoch", "train_loss", "density/conv.weight", "density/fc.weight"}
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(10, 1.0), (20, 0.5)]


def test_a_resumed_log_forgets_what_comes_after_its_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        for epoch in (1, 2, 3):
            metrics.write(record(epoch, 9.0))
    with MetricsLog(tmp_path, 25) as metrics:  # in the middle of epoch 3
        assert [entry["epoch"] for entry in metrics.records] == [1, 2]
        metrics.write(record(3, 1.0))
    assert [entry["train_loss"] for entry in read(tmp_path / FILE)] == [9.0, 9.0, 1.0]
    events = EventAccumulator(str(tmp_path / EVENTS)).Reload()  # type: ignore[no-untyped-call]
    assert [event.step for event in events.Scalars("train_loss")] == [10, 20, 30]


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(record(1)) + "\n" + '{"epoch": 2, "st')
    with MetricsLog(tmp_path, 10) as metrics:
        metrics.write(record(2))
    assert [entry["epoch"] for entry in read(tmp_path / FILE)] == [1, 2]


def test_what_a_full_disk_kept_out_is_written_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.write(record(1))
        try:  # room for half a line
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE).stat().st_size + 20, before[1]))
            metrics.write(record(2))
            metrics.write(record(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        metrics.write(record(4))
    assert [entry["epoch"] for entry in read(tmp_path / FILE)] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / EVENTS)).Reload()  # type: ignore[no-untyped-call]
    assert [event.step for event in events.Scalars("train_loss")] == [10, 20, 30, 40]
    (told,) = [entry.getMessage() for entry in caplog.records if entry.name == "sparsepipe"]
    assert told == "The log of step 20 could not be written (File too large)."


@pytest.mark.parametrize("line", ["[1, 2]", '{"epoch": 2}', '{"step": "10"}', "7", "null"])
def test_a_line_that_is_no_record_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(json.dumps(record(1)) + "\n" + line + "\n")
    with pytest.raises(ArtefactError, match=r"metrics\.jsonl, line 2: .* integer 'step'"):
        MetricsLog(tmp_path, 10)


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read(tmp_path / FILE) == []


def test_unknown_values_are_null_and_no_event(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.write(record(1, None))
    assert read(tmp_path / FILE)[0]["train_loss"] is None
    events = EventAccumulator(str(tmp_path / EVENTS)).Reload()  # type: ignore[no-untyped-call]
    assert "train_loss" not in events.Tags()["scalars"]


def test_ages_and_the_mask_of_the_film_are_shown(tmp_path: Path) -> None:
    masks = MaskSet({})
    mask = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    mask[0, 0], mask[1, 1, 0, 0] = True, True  # 10 of 72 weights
    masks.start({"conv.weight": mask.float()}, {"conv.weight": mask})
    history = MaskHistory(masks)
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.write({"step": 5}, history)  # nothing happened yet: the first frame
        metrics.write({"step": 7}, history)  # no new frame
        moved = mask.clone()
        moved[0, 0, 0, 0], moved[3, 1, 2, 2] = False, True
        history.change("conv.weight", moved, None)
        masks.change(mask.float(), "conv.weight", moved)
        masks.count()
        history.end_round(9, {})
        metrics.write({"step": 10}, history)
    every = {"histograms": 0, "images": 0}
    events = EventAccumulator(str(tmp_path / EVENTS), every).Reload()  # type: ignore[no-untyped-call]
    assert [event.step for event in events.Images("mask/conv.weight")] == [5, 10]
    image = np.asarray(Image.open(io.BytesIO(events.Images("mask/conv.weight")[-1].encoded_image_string)))[..., 0]
    assert np.array_equal(image < 128, moved.reshape(4, 18).numpy())
    histograms = {event.step: event.histogram_value for event in events.Histograms("age/conv.weight")}
    assert (histograms[5].num, histograms[5].max) == (10, 0)
    assert (histograms[10].num, histograms[10].min, histograms[10].max, histograms[10].sum) == (10, 0, 1, 9)
    assert list(histograms[10].bucket) == [1, 9]


def test_a_large_mask_is_shown_by_its_density(tmp_path: Path) -> None:
    masks = MaskSet({})
    mask = torch.zeros(512, 2048, dtype=torch.bool)
    mask[:2, :2] = True
    masks.start({"fc.weight": mask.float()}, {"fc.weight": mask})
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.write({"step": 1}, MaskHistory(masks))
    events = EventAccumulator(str(tmp_path / EVENTS)).Reload()  # type: ignore[no-untyped-call]
    image = np.asarray(Image.open(io.BytesIO(events.Images("mask/fc.weight")[0].encoded_image_string)))[..., 0]
    assert image.shape == (256, 1024)
    assert image[0, 0] == 0
    assert (np.delete(image.ravel(), 0) == 255).all()
