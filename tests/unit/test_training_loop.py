"""The loop against a plain PyTorch loop, its evaluation against sums by hand, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from sparsepipe.data import ArraySplit  # noqa: E402
from sparsepipe.errors import RecipeError  # noqa: E402
from sparsepipe.sparsity.method import Method  # noqa: E402
from sparsepipe.sparsity.methods.dense import Dense  # noqa: E402
from sparsepipe.sparsity.methods.gmp import GMP  # noqa: E402
from sparsepipe.sparsity.methods.set import SET  # noqa: E402
from sparsepipe.sparsity.sparsifier import Sparsifier  # noqa: E402
from sparsepipe.spec import Preprocessing  # noqa: E402
from sparsepipe.training import device, rates  # noqa: E402
from sparsepipe.training.augment import Augmentation  # noqa: E402
from sparsepipe.training.batches import EvaluationBatches, Normalise, TrainingBatches, source  # noqa: E402
from sparsepipe.training.loop import DivergedError, Epoch, Loop, evaluate  # noqa: E402

CPU = torch.device("cpu")
NORMALISE = Normalise(Preprocessing(mean=(0.0,) * 4, std=(2.0,) * 4), CPU)
EPOCHS, BATCH = 3, 8


def split(count: int = 40, seed: int = 0) -> ArraySplit:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    inputs = generator.normal(size=(count, 4)) + labels[:, None]
    return ArraySplit(inputs.astype(np.float32), labels.astype(np.int64))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def training() -> TrainingBatches:
    return TrainingBatches(source(split(), CPU), NORMALISE, Augmentation(), batch_size=BATCH, seed=5)


def validation() -> EvaluationBatches:
    return EvaluationBatches(source(split(20, 1), CPU), NORMALISE, batch_size=7)


def loop(
    model: nn.Module,
    method: Method | None = None,
    lr: float = 0.2,
    smoothing: float = 0.1,
    precision: str = "fp32",
    ema: float = 0.0,
) -> Loop:
    batches = training()
    total = EPOCHS * batches.steps
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-2)
    return Loop(
        device.fabric("cpu", precision),
        model,
        optimizer,
        Sparsifier(model, optimizer, method or Dense(), total_steps=total),
        training=batches,
        validation=validation(),
        lr=lr,
        rate=rates.cosine(total),
        epochs=EPOCHS,
        label_smoothing=smoothing,
        ema=ema,
    )


def finish(running: Loop, stop: Callable[[], bool] = lambda: False) -> list[Epoch]:
    epochs: list[Epoch] = []
    running.run(on_step=lambda: None, on_epoch=epochs.append, stop=stop)
    return epochs


def test_dense_training_equals_a_plain_pytorch_loop_bit_for_bit() -> None:
    model, plain = network(), network()
    epochs = finish(loop(model))
    batches = training()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates.cosine(EPOCHS * batches.steps))
    losses: list[list[float]] = []
    for epoch in range(EPOCHS):
        losses.append([])
        for inputs, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            loss = nn.CrossEntropyLoss(label_smoothing=0.1)(plain(inputs), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses[-1].append(loss.item())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [epoch.train.loss for epoch in epochs] == pytest.approx([np.mean(values) for values in losses])
    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    assert [epoch.step for epoch in epochs] == [5, 10, 15]


def test_the_logged_rate_is_that_of_the_last_step() -> None:
    running = loop(network())
    epochs = finish(running)
    expected = [0.2 * rates.cosine(15)(step) for step in (4, 9, 14)]
    assert [epoch.lr for epoch in epochs] == expected
    assert running.optimizer.param_groups[0]["lr"] == expected[-1]


def test_evaluation_counts_every_sample_once_in_evaluation_mode() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.9)).train()
    score = evaluate(device.fabric("cpu", "fp32"), model, validation())
    samples = split(20, 1)
    logits = model[0](torch.from_numpy(samples.inputs) / 2)
    labels = torch.from_numpy(samples.labels)
    assert score.samples == 20
    assert score.correct == int((logits.argmax(1) == labels).sum())
    assert score.accuracy == score.correct / 20
    assert score.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert not model.training


def test_of_two_classes_evaluation_also_tells_how_well_they_are_ranked() -> None:
    data = split(50)
    two = ArraySplit(data.inputs, (data.labels > 0).astype(np.int64))
    batches = EvaluationBatches(source(two, CPU), NORMALISE, batch_size=7)
    torch.manual_seed(3)
    model = nn.Linear(4, 2)
    with device.connected("cpu", "fp32") as fabric:
        found = evaluate(fabric, model, batches).auc
        assert evaluate(fabric, network(), validation()).auc is None  # three classes
    scores = model(NORMALISE(torch.from_numpy(data.inputs))).diff(dim=1).detach().numpy().ravel()
    positive, negative = scores[two.labels == 1], scores[two.labels == 0]
    assert found == pytest.approx((positive[:, None] > negative).mean())


def test_train_accuracy_is_that_of_the_steps_as_they_were_taken() -> None:
    class Fixed(nn.Module):
        """Always sure of class 0, whatever it learns."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.layer(x) * 0
            return logits + torch.tensor([1.0, 0.0, 0.0])

    batches = training()
    zeros = [int((labels == 0).sum()) for _, labels in batches.epoch(0)]
    first = finish(loop(Fixed()))[0]
    assert first.train.correct == sum(zeros)
    assert first.train.samples == batches.steps * BATCH


def test_the_best_epoch_is_the_most_accurate_and_then_the_one_of_lowest_loss() -> None:
    running = loop(network())
    epochs = finish(running)
    assert running.best is not None
    best = max(epochs, key=lambda epoch: (epoch.validation.accuracy, -epoch.validation.loss))
    assert running.best["epoch"] == best.number
    running.model.load_state_dict(running.best["weights"])
    assert running.evaluate(validation()) == best.validation


def test_epochs_before_the_masks_are_final_are_no_candidates() -> None:
    running = loop(network(), GMP(sparsity=0.5, update_every=1, stop_at=1.0))
    best: list[bool] = []
    running.run(on_step=lambda: None, on_epoch=lambda epoch: best.append(running.best is not None))
    assert best == [False, False, True]


def test_stopping_ends_between_two_steps_and_running_again_goes_on() -> None:
    straight, halting = network(), network()
    finish(loop(straight))
    running = loop(halting)
    epochs: list[Epoch] = []
    for limit in (3, 5, 11, 15):
        epochs += finish(running, stop=lambda limit=limit: running.step >= limit)
        assert running.step == limit
    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(halting.parameters(), straight.parameters(), strict=True)
    )


def test_state_loads_into_a_fresh_loop_in_the_memory_format_of_the_weights() -> None:
    def convolutional() -> nn.Module:
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 2), nn.Conv2d(6, 4, 1), nn.Flatten())
        return nn.Sequential(layers, nn.Linear(4, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    first = loop(convolutional())
    finish(first, stop=lambda: first.step >= 7)
    state = first.state_dict()
    second = loop(convolutional())
    second.load_state_dict({**state, "model": {name: value.contiguous() for name, value in state["model"].items()}})
    for parameter, values in second.optimizer.state.items():
        assert values["momentum_buffer"].stride() == parameter.stride()
    finish(first)
    finish(second)
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_average_is_what_is_validated_and_kept() -> None:
    running, plain = loop(network(), ema=0.9), loop(network())
    epochs, without = finish(running), finish(plain)
    assert running.average is not None
    # The network itself is trained as without an average.
    for ours, theirs in zip(running.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [epoch.train for epoch in epochs] == [epoch.train for epoch in without]
    assert epochs[-1].validation == evaluate(device.fabric("cpu", "fp32"), running.average.network, validation())
    assert epochs[-1].validation != without[-1].validation
    assert running.best is not None
    running.model.load_state_dict(running.best["weights"])
    assert running.evaluate(validation()) == epochs[running.best["epoch"] - 1].validation


def scaled(monkeypatch: pytest.MonkeyPatch, first: float) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=first))


def test_a_step_that_the_scaler_skips_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(monkeypatch, 2.0**22)
    running = loop(network(), SET(sparsity=0.5, update_every=2, stop_at=1.0), precision="fp16", ema=0.9)
    seen: list[tuple[float, int, int, bool]] = []
    before = [parameter.detach().clone() for parameter in running.model.parameters()]

    def look() -> None:
        nonlocal before
        after = [parameter.detach().clone() for parameter in running.model.parameters()]
        moved = any(not torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True))
        before = after
        state = running.state_dict()
        rounds = running.sparsifier.mask_set.rounds
        seen.append((state["precision"]["scale"], state["average"]["updates"], rounds, moved))

    running.run(on_step=look, on_epoch=lambda epoch: None)
    scales = [2.0**22, *(entry[0] for entry in seen)]
    taken = [after == before for before, after in pairwise(scales)]  # the scaler halves its scale where it skips
    assert 2 <= taken.count(False) <= 10, "2^22 times the gradients of this network overflows, and less does not"
    assert [entry[3] for entry in seen] == taken
    counts = list(accumulate(map(int, taken)))
    assert [entry[1] for entry in seen] == counts
    first = seen[0][2]
    assert [entry[2] - first for entry in seen] == [min(count, 14) // 2 for count in counts]
    assert running.sparsifier.step == counts[-1]
    assert running.step == running.total_steps


def test_fp16_trains_nearly_as_fp32_with_weights_in_fp32() -> None:
    half, full = loop(network(), precision="fp16"), loop(network())
    losses = [[epoch.train.loss for epoch in finish(running)] for running in (half, full)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


def test_gradients_that_overflow_at_any_scale_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.layer(x)
            if self.training:
                logits.register_hook(lambda gradient: gradient * float("inf"))
            return logits

    scaled(monkeypatch, 2.0**-28)
    with pytest.raises(DivergedError, match="overflow fp16 at any scale"):
        finish(loop(Failing(), precision="fp16"))


def test_state_resumes_the_average_and_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(monkeypatch, 2.0**22)
    first, second = (loop(network(), SET(sparsity=0.5, update_every=2), precision="fp16", ema=0.9) for _ in range(2))
    finish(first, stop=lambda: first.step >= 7)
    second.load_state_dict(first.state_dict())
    epochs = [finish(running) for running in (first, second)]
    assert [epoch.validation for epoch in epochs[0]] == [epoch.validation for epoch in epochs[1]]
    for name, value in first.candidate.state_dict().items():
        assert torch.equal(value, second.candidate.state_dict()[name])
    assert first.state_dict()["precision"] == second.state_dict()["precision"]
    assert first.state_dict()["average"]["updates"] == first.sparsifier.step


def test_a_loss_that_is_not_finite_names_the_step_and_what_to_try() -> None:
    class Failing(nn.Module):
        """Infinite from the eighth training batch on."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            logits: Tensor = self.layer(x)
            return logits * float("inf") if self.calls >= 8 else logits

    model = Failing()
    with pytest.raises(DivergedError) as caught:
        finish(loop(model))
    assert "step 8, epoch 2" in str(caught.value)
    assert "lower optimizer.lr" in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in model.parameters()), "the step must not be taken"


def test_a_validation_loss_that_is_not_finite_is_an_error_too() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.layer(x)
            return logits if self.training else logits * float("nan")

    with pytest.raises(DivergedError, match=r"epoch 1.*validation loss"):
        finish(loop(Failing()))


def test_cuda_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"train\.device"):
        device.fabric("cuda", "fp32")
    assert device.fabric("auto", "fp32").device.type == "cpu"


def test_threads_are_set_inside_the_block_only() -> None:
    before = torch.get_num_threads()
    with device.threads(1):
        assert torch.get_num_threads() == 1
    with device.threads(0):
        assert torch.get_num_threads() == device.usable_cores()
    assert torch.get_num_threads() == before


def test_more_threads_than_cores_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "usable_cores", lambda: 3)
    for count, expected in ((64, 3), (2, 2), (3, 3), (0, 3)):
        caplog.clear()
        with caplog.at_level("WARNING", "sparsepipe"), device.threads(count):
            assert torch.get_num_threads() == expected
        assert len(caplog.messages) == (count > 3)
    monkeypatch.setattr(device.launch, "local_world_size", lambda: 2)
    with caplog.at_level("WARNING", "sparsepipe"), device.threads(2):
        assert torch.get_num_threads() == 1
    assert "train.threads = 2 is more than the 1 cores" in caplog.text
