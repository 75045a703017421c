"""The callback of Lightning's Trainer: the same training as in a plain loop, and resumed from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from sparse_bench import batch, dst_ee, inactive_are_positive_zero, loss_of, network  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from sparsepipe.errors import ArtefactError, ModelError  # noqa: E402
from sparsepipe.integrations.lightning import SparseCallback  # noqa: E402
from sparsepipe.sparsity.methods.autosparse import AutoSparseTopK  # noqa: E402
from sparsepipe.sparsity.methods.gmp import GMP  # noqa: E402
from sparsepipe.sparsity.sparsifier import Sparsifier  # noqa: E402

EPOCHS, BATCHES = 6, 8
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers")


class Module(LightningModule):
    def __init__(self, fail_at: int = -1, optimizers: int = 1) -> None:
        super().__init__()
        self.network = network()
        self._fail_at, self._optimizers = fail_at, optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, samples: list[Any], index: int) -> Any:
        if self.trainer.current_epoch == self._fail_at:
            raise KeyError("interrupted")
        return cross_entropy(self.network(samples[0]), samples[1])

    def validation_step(self, samples: list[Any], index: int) -> None:
        self.log("epoch_number", float(self.trainer.current_epoch))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.parameters(), lr=1e-2) for _ in range(self._optimizers)]


def loader() -> Any:
    inputs, labels = zip(*(batch(step) for step in range(BATCHES)), strict=True)
    return DataLoader(TensorDataset(torch.cat(inputs), torch.cat(labels)), batch_size=16)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        **{"default_root_dir": folder, "max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, **quiet, **options},
        callbacks=list(callbacks),
    )


def sparse(**options: Any) -> SparseCallback:
    return SparseCallback(dst_ee(update_every=2, **options))


def same(ours: Any, theirs: Any) -> bool:
    first, second = ours.state_dict(), theirs.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_masks(ours: Sparsifier, theirs: Sparsifier) -> bool:
    mine, others = ours.mask_set.counters, theirs.mask_set.counters
    counted = mine.keys() == others.keys() and all(
        torch.equal(mine[name], other) for name, other in zip(mine, others.values(), strict=True)
    )
    return counted and all(torch.equal(ours.masks[name], mask) for name, mask in theirs.masks.items())


def test_accumulation_and_clipping_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    module, callback = Module(), sparse()
    fitted = trainer(tmp_path, callback, accumulate_grad_batches=2, gradient_clip_val=0.1, enable_checkpointing=False)
    fitted.fit(module, loader())

    plain = Module()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    steps = EPOCHS * BATCHES // 2
    sparsifier = Sparsifier(plain, optimizer, dst_ee(update_every=2), total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        for half in (0, 1):
            (loss_of(plain.network, (2 * step + half) % BATCHES) / 2).backward()
        sparsifier.prepare_gradients()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()

    assert callback.sparsifier.step == fitted.global_step == steps
    assert same(module, plain)
    assert same_masks(callback.sparsifier, sparsifier)
    assert inactive_are_positive_zero(module, callback.sparsifier)
    weights = 8 * 2 * 9 + 32 * 128 + 4 * 32
    assert callback.sparsifier.mask_set.nnz == weights - round(0.8 * weights)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_training_that_resumes_from_a_checkpoint_ends_in_the_same_bits(tmp_path: Path, precision: Any) -> None:
    whole, whole_callback = Module(), sparse()
    trainer(tmp_path, whole_callback, enable_checkpointing=False, precision=precision).fit(whole, loader())

    checkpoints = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(KeyError, match="interrupted"):
        trainer(tmp_path, sparse(), checkpoints, precision=precision).fit(Module(fail_at=3), loader())
    module, callback = Module(), sparse()
    trainer(tmp_path, callback, precision=precision).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")

    assert callback.sparsifier.step == EPOCHS * BATCHES
    assert same(module, whole)
    assert same_masks(callback.sparsifier, whole_callback.sparsifier)


def test_thresholds_hold_in_a_step_that_calls_the_network_inside_the_module(tmp_path: Path) -> None:
    seen = []

    class Watched(Module):
        def on_train_start(self) -> None:  # after the callback's hooks
            self.network[4].register_forward_pre_hook(lambda layer, args: seen.append(layer.weight.count_nonzero()))

    callback = SparseCallback(AutoSparseTopK(sparsity=0.8, distribution="uniform", first_conv="sparse"))
    trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False).fit(Watched(), loader())
    assert len(seen) == BATCHES
    assert set(map(int, seen)) == {819}  # of 32 x 128


def test_masks_follow_the_weights_of_the_best_checkpoint(tmp_path: Path) -> None:
    module, callback = Module(), sparse()
    best = ModelCheckpoint(tmp_path, monitor="epoch_number", mode="min", filename="first")
    fitted = trainer(tmp_path, callback, best)
    fitted.fit(module, loader(), loader())
    last = {name: mask.clone() for name, mask in callback.sparsifier.masks.items()}
    fitted.test(module, loader(), ckpt_path="best", verbose=False)
    assert not all(torch.equal(mask, last[name]) for name, mask in callback.sparsifier.masks.items())
    assert inactive_are_positive_zero(module, callback.sparsifier)


def test_another_fit_of_the_module_goes_on_and_another_module_begins_anew(tmp_path: Path) -> None:
    callback = sparse()
    module = Module()
    trainer(tmp_path, callback, max_epochs=2, enable_checkpointing=False).fit(module, loader())
    first = callback.sparsifier.mask_set.digest()
    again = trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False)
    again.fit(module, loader())
    assert callback.sparsifier.step == 3 * BATCHES
    assert callback.sparsifier.mask_set.digest() == first, "its updates are over"
    assert inactive_are_positive_zero(module, callback.sparsifier)
    trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False).fit(Module(), loader())
    assert callback.sparsifier.step == BATCHES


def test_a_training_that_ends_before_its_masks_are_final_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SparseCallback(GMP(sparsity=0.8, update_every=4), total_steps=4 * BATCHES)
    trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False).fit(Module(), loader())
    assert f"after step {BATCHES} of {4 * BATCHES}, before gmp is done" in caplog.text


def test_a_checkpoint_of_another_method_is_refused_with_the_difference(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, sparse(), max_epochs=1)
    fitted.fit(Module(), loader())
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ArtefactError, match=r"another option 'c': 0\.01 there, 0\.5 here"):
        trainer(tmp_path, sparse(c=0.5)).fit(Module(), loader(), ckpt_path=tmp_path / "one.ckpt")


def test_several_optimizers_and_a_training_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 optimizers"):
        trainer(tmp_path, sparse()).fit(Module(optimizers=2), loader())
    with pytest.raises(ModelError, match="total_steps"):
        trainer(tmp_path, sparse(), max_epochs=-1).fit(Module(), loader())
    with pytest.raises(ModelError, match="before the training"):
        _ = sparse().sparsifier
