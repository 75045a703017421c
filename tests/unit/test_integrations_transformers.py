"""The callback of Hugging Face's Trainer: exact masks that are saved and restored with its checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from sparse_bench import batch, dst_ee, inactive_are_positive_zero, network  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from sparsepipe.errors import ArtefactError, ModelError  # noqa: E402
from sparsepipe.integrations.transformers import SparseCallback  # noqa: E402

EPOCHS, STEPS = 6, 6  # optimizer steps in an epoch, of two batches each


class Model(nn.Module):
    """What the Trainer wants: a mapping with the loss. Any module will do, a configuration is not needed."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, inputs: Any, labels: Any) -> dict[str, Any]:
        logits = self.network(inputs)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Samples:
    def __init__(self, fail_after: int = -1) -> None:
        inputs, labels = zip(*(batch(step, 8) for step in range(2 * STEPS)), strict=True)
        self.inputs, self.labels = torch.cat(inputs), torch.cat(labels)
        self._left = fail_after

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._left -= 1
        if self._left == 0:
            raise KeyError("interrupted")
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


def trainer(folder: Path, callback: SparseCallback, samples: Samples | None = None, **options: Any) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    measured = {"compute_metrics": lambda _: next(options["scores"])} if "scores" in options else {}
    arguments = TrainingArguments(**settings | {key: value for key, value in options.items() if key != "scores"})
    samples = samples or Samples()
    return Trainer(Model(), arguments, train_dataset=samples, eval_dataset=Samples(), callbacks=[callback], **measured)


def sparse(**options: Any) -> SparseCallback:
    return SparseCallback(dst_ee(update_every=2), **options)


def test_a_training_that_resumes_from_a_checkpoint_ends_in_the_same_bits(tmp_path: Path) -> None:
    callback = sparse()
    whole = trainer(tmp_path / "whole", callback, bf16=True)
    whole.train()
    assert callback.sparsifier.step == EPOCHS * STEPS
    weights = 8 * 2 * 9 + 32 * 128 + 4 * 32
    assert callback.sparsifier.mask_set.nnz == weights - round(0.8 * weights)
    assert inactive_are_positive_zero(whole.model, callback.sparsifier)

    with pytest.raises(KeyError, match="interrupted"):
        trainer(tmp_path / "cut", sparse(), Samples(fail_after=3 * 16 * STEPS + 40), bf16=True).train()
    resumed = sparse()
    again = trainer(tmp_path / "cut", resumed, bf16=True)
    again.train(resume_from_checkpoint=True)

    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.sparsifier.mask_set.digest() == callback.sparsifier.mask_set.digest()
    for name, counter in callback.sparsifier.mask_set.counters.items():
        assert torch.equal(counter, resumed.sparsifier.mask_set.counters[name])


def test_masks_follow_the_weights_of_the_best_checkpoint(tmp_path: Path) -> None:
    callback = sparse()
    scores = iter({"score": float(-epoch)} for epoch in range(EPOCHS))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "epoch"}
    fitted = trainer(tmp_path, callback, scores=scores, **best)
    fitted.train()
    assert fitted.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{STEPS}")
    assert callback.sparsifier.step == STEPS
    assert inactive_are_positive_zero(fitted.model, callback.sparsifier)
    stored = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in fitted.model.state_dict().items())


def test_another_folder_to_resume_from_is_named_to_the_callback(tmp_path: Path) -> None:
    trainer(tmp_path / "first", sparse(), num_train_epochs=2).train()
    folder = tmp_path / "first" / f"checkpoint-{STEPS}"
    with pytest.raises(ArtefactError, match="checkpoint=FOLDER"):
        trainer(tmp_path / "other", sparse(), num_train_epochs=2).train(resume_from_checkpoint=str(folder))
    callback = sparse(checkpoint=folder)
    trainer(tmp_path / "other", callback, num_train_epochs=2).train(resume_from_checkpoint=str(folder))
    assert callback.sparsifier.step == 2 * STEPS


def test_a_damaged_state_is_refused_by_its_path(tmp_path: Path) -> None:
    trainer(tmp_path, sparse(), num_train_epochs=1).train()
    state = tmp_path / f"checkpoint-{STEPS}" / "sparsifier.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ArtefactError, match=r"sparsifier\.pt: The file is damaged"):
        trainer(tmp_path, sparse(), num_train_epochs=2).train(resume_from_checkpoint=True)


def test_another_training_of_the_model_goes_on_from_its_masks(tmp_path: Path) -> None:
    callback = sparse()
    fitted = trainer(tmp_path, callback, num_train_epochs=1, save_strategy="no")
    fitted.train()
    first = callback.sparsifier.mask_set.digest()
    fitted.train()
    assert callback.sparsifier.step == 2 * STEPS
    assert callback.sparsifier.mask_set.digest() == first, "its updates are over"
    assert inactive_are_positive_zero(fitted.model, callback.sparsifier)
    with pytest.raises(ModelError, match="before the training"):
        _ = sparse().sparsifier
