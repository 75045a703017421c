"""The moving average of a network: the closed form of its weights, zeros where the masks are off, and its state."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import sparsepipe  # noqa: E402
from sparsepipe.errors import ModelError  # noqa: E402
from sparsepipe.sparsity.method import Method  # noqa: E402
from sparsepipe.sparsity.methods.dense import Dense  # noqa: E402
from sparsepipe.sparsity.sparsifier import Sparsifier  # noqa: E402
from sparsepipe.training.average import Average  # noqa: E402

STEPS = 12


def network() -> nn.Sequential:
    torch.manual_seed(0)
    tied = nn.Linear(6, 6, bias=False)
    layers = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), tied, tied)
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def trained(
    method: Method, decay: float, each: Callable[[nn.Module, Average, Sparsifier], None]
) -> tuple[nn.Module, Average]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=STEPS)
    average = Average(model, sparsifier, decay)
    for step in range(STEPS):
        inputs = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        average.update()
        each(model, average, sparsifier)
    return model, average


@pytest.mark.parametrize("decay", [0.9, 0.15])
def test_it_is_the_weighted_sum_of_all_networks_so_far(decay: float) -> None:
    states: list[dict[str, torch.Tensor]] = [{name: value.clone() for name, value in network().state_dict().items()}]

    def keep(model: nn.Module, average: Average, sparsifier: Sparsifier) -> None:
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    _, average = trained(Dense(), decay, keep)
    # The share of each network: (1 - d_n) times all later d; that of the first is what is left.
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, STEPS + 1)]
    shares = [float(torch.tensor(decays, dtype=torch.float64).prod())]
    for n, d in enumerate(decays, 1):
        shares.append((1 - d) * float(torch.tensor(decays[n:], dtype=torch.float64).prod()))
    assert sum(shares) == pytest.approx(1)
    for name, value in average.network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == STEPS
        else:
            expected = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
            torch.testing.assert_close(value, expected.float())  # type: ignore[union-attr]


def test_it_is_zero_wherever_the_network_is_masked_and_starts_grown_weights_from_zero() -> None:
    before: dict[str, torch.Tensor] = {}
    grown = 0

    def check(model: nn.Module, average: Average, sparsifier: Sparsifier) -> None:
        nonlocal grown
        copies, weights = dict(average.network.named_parameters()), dict(model.named_parameters())
        for name, mask in sparsifier.masks.items():
            assert not copies[name][~mask].view(torch.int32).any(), "not +0.0"
            new = mask & ~before.get(name, mask)
            # The update made them zero in both after the step, and one average of two zeros is zero.
            assert not copies[name][new].any()
            assert not weights[name][new].any()
            grown += int(new.sum())
            before[name] = mask.clone()

    _, average = trained(sparsepipe.SET(sparsity=0.6, update_every=2, stop_at=1), 0.9, check)
    assert grown > 20
    for name, mask in before.items():
        assert average.network.get_parameter(name)[mask].count_nonzero() > 0.5 * mask.sum()


def test_its_state_restores_it_in_its_memory_format() -> None:
    model, average = trained(Dense(), 0.9, lambda *_: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = Average(model, Sparsifier(model, optimizer, Dense(), total_steps=STEPS), 0.9)
    other.load_state_dict(average.state_dict())
    for one in (average, other):
        one.update()
    assert other.network[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index, union-attr]
    assert other.network[4] is other.network[5]  # type: ignore[index]
    for name, value in average.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name
        assert not value.requires_grad


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("no copies")

    model = nn.Sequential(Locked(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match=r"train\.ema.*no copies.*ema = 0"):
        Average(model, Sparsifier(model, optimizer, Dense(), total_steps=2), 0.9)
