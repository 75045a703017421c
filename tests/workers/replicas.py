"""Run under torchrun: trains small networks over several processes, and writes what process 0 found as JSON.

torchrun --nproc-per-node=2 replicas.py RESULT.json
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import sparsepipe
from sparsepipe import launch
from sparsepipe.errors import ModelError
from sparsepipe.sparsity.modifiers.extrapolation import Extrapolation
from sparsepipe.sparsity.sparsifier import Sparsifier

STEPS, BATCH = 24, 6
Make = Callable[[nn.Module], torch.optim.Optimizer]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 4))


def samples(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of one step."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (BATCH * world,), generator=generator)
    return torch.randn(BATCH * world, 2, 6, 6, generator=generator) + labels[:, None, None, None], labels


def mine(step: int) -> tuple[Tensor, Tensor]:
    inputs, labels = samples(step)
    return inputs[rank::world], labels[rank::world]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def dst_ee() -> sparsepipe.DSTEE:
    return sparsepipe.DSTEE(sparsity=0.7, c=1e-3, update_every=4)


def rigl() -> sparsepipe.RigL:
    return sparsepipe.RigL(sparsity=0.7, distribution="global", update_every=4)


def set_() -> sparsepipe.SET:
    return sparsepipe.SET(sparsity=0.7, update_every=4)


def gmp() -> sparsepipe.GMP:
    return sparsepipe.GMP(sparsity=0.7, update_every=4)


METHODS_OF_THEIR_OWN: dict[str, Callable[[], Any]] = {
    "snip": lambda: sparsepipe.SNIP(sparsity=0.7),
    "grasp": lambda: sparsepipe.GraSP(sparsity=0.7),
    "synflow": lambda: sparsepipe.SynFlow(sparsity=0.7),
    "lottery": lambda: sparsepipe.Lottery(sparsity=0.7, rounds=2, rewind_to=0.0),
    "gap": lambda: sparsepipe.GaP(sparsity=0.7, partitions=2, rounds=2, parallel=True),
    "top-kast": lambda: sparsepipe.TopKAST(sparsity=0.7, update_every=4),
    "autosparse": lambda: sparsepipe.AutoSparse(threshold_init=-3.0),
    "l0-constrained": lambda: sparsepipe.L0Constrained(sparsity=0.5),
    "xrda": lambda: sparsepipe.XRDA(lam=1e-3),
}
"""Methods that score batches, go back in time, change forward passes, add losses or take the step themselves."""


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Callable[[int], tuple[Tensor, Tensor]], steps: int
) -> None:
    for step in range(steps):
        inputs, labels = batches(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def snapshot(model: nn.Module, sparsifier: Sparsifier) -> dict[str, Any]:
    return {
        "weights": {name: value.detach().clone() for name, value in model.named_parameters()},
        "masks": {name: mask.clone() for name, mask in sparsifier.masks.items()},
        "counters": {name: counter.clone() for name, counter in sparsifier.mask_set.counters.items()},
    }


def together(make_method: Callable[[], Any], make: Make, *, wrap_first: bool = False) -> tuple[nn.Module, Sparsifier]:
    """A training over all processes, which start with different weights and give different seeds."""
    model = network(100 + rank)
    trained = DistributedDataParallel(model) if wrap_first else model
    optimizer = make(model)
    sparsifier = Sparsifier(
        model, optimizer, make_method(), total_steps=STEPS, seed=7 + rank, check_every=1, samples=[mine(99)]
    )
    train(trained if wrap_first else DistributedDataParallel(model), optimizer, mine, STEPS)
    return model, sparsifier


def alone(make_method: Callable[[], Any], make: Make) -> tuple[nn.Module, Sparsifier]:
    """The same training in one process, with the global batch."""
    model = network(100)
    optimizer = make(model)
    sparsifier = Sparsifier(
        model, optimizer, make_method(), total_steps=STEPS, seed=7, process_group=ALONE[rank], samples=[samples(99)]
    )
    train(model, optimizer, samples, STEPS)
    return model, sparsifier


def identical(state: dict[str, Any]) -> bool:
    """Whether all processes hold the same bits."""
    states: list[Any] = [None] * world
    distributed.all_gather_object(states, state)
    first = states[0]
    return all(
        torch.equal(value, other[kind][name])
        for other in states[1:]
        for kind in first
        for name, value in first[kind].items()
    )


def compare(make_method: Callable[[], Any], make: Make, **how: Any) -> dict[str, Any]:
    ours = snapshot(*together(make_method, make, **how))
    expected = snapshot(*alone(make_method, make))
    names = expected["masks"]
    return {
        "identical": identical(ours),
        "differing_masks": sum(int((names[name] != ours["masks"][name]).sum()) for name in names),
        "same_counters": all(torch.equal(value, ours["counters"][n]) for n, value in expected["counters"].items()),
        "largest_difference": max(
            float((value - ours["weights"][name]).abs().max()) for name, value in expected["weights"].items()
        ),
        "moved": max(
            float((value - start).abs().max())
            for (name, value), start in zip(
                expected["weights"].items(), network(100).state_dict().values(), strict=True
            )
        ),
        "sparse": sum(int((~mask).sum()) for mask in ours["masks"].values()),
        "grown": sum(
            int((ours["masks"][name] & (counter < int(counter.max()))).sum())
            for name, counter in ours["counters"].items()
        ),
    }


def frozen(make_method: Callable[[], Any]) -> dict[str, Any]:
    """What training leaves, over all processes and in one."""
    (model, sparsifier), (other, whole) = together(make_method, sgd), alone(make_method, sgd)
    sparsifier.freeze()
    whole.freeze()
    ours, expected = snapshot(model, sparsifier), snapshot(other, whole)
    return {
        "identical": identical(ours),
        "differing_masks": sum(int((m != ours["masks"][n]).sum()) for n, m in expected["masks"].items()),
        "largest_difference": max(
            float((value - ours["weights"][name]).abs().max()) for name, value in expected["weights"].items()
        ),
        "sparsity": sparsifier.mask_set.sparsity,
    }


def extrapolated(local: bool) -> dict[str, float]:
    """Training at points of each process's own, beside the recursion written out for all of them in one process."""
    rate, lr = 2.0, 0.05
    model = network(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    modifier = Extrapolation(rate=rate, local=local)
    Sparsifier(model, optimizer, sparsepipe.Dense(), total_steps=STEPS, modifiers=[modifier])
    train(DistributedDataParallel(model), optimizer, mine, STEPS)
    oracle = network(100)
    state = {name: value.detach().clone() for name, value in oracle.named_parameters()}
    past: list[dict[str, Tensor]] = [{} for _ in range(world)]
    for step in range(STEPS):
        inputs, labels = samples(step)
        for number in range(world):
            shifted = {
                name: (value - rate * lr * past[number].get(name, torch.zeros(()))).requires_grad_()
                if value.ndim > 1
                else value.clone().requires_grad_()
                for name, value in state.items()
            }
            logits = torch.func.functional_call(oracle, shifted, (inputs[number::world],))
            loss = functional.cross_entropy(logits, labels[number::world])
            past[number] = dict(zip(shifted, torch.autograd.grad(loss, list(shifted.values())), strict=True))
        mean = {name: torch.stack([own[name] for own in past]).mean(0) for name in state}
        state = {name: value - lr * mean[name] for name, value in state.items()}
        if not local:
            past = [mean] * world
    found = dict(model.named_parameters())
    return {
        "difference": max(float((value - found[name]).detach().abs().max()) for name, value in state.items()),
        "moved": max(
            float((value - start).abs().max())
            for value, start in zip(state.values(), network(100).state_dict().values(), strict=True)
        ),
    }


def accumulated() -> dict[str, Any]:
    """Two micro-batches for each step, of which DDP averages the sum only in the second."""
    model = network(100)
    wrapped, optimizer = DistributedDataParallel(model), sgd(model)
    sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=STEPS, seed=7, check_every=1)
    for step in range(STEPS):
        inputs, labels = mine(step)
        halves = list(zip(inputs.chunk(2), labels.chunk(2), strict=True))
        optimizer.zero_grad()
        with wrapped.no_sync():
            (functional.cross_entropy(wrapped(halves[0][0]), halves[0][1]) / 2).backward()
        (functional.cross_entropy(wrapped(halves[1][0]), halves[1][1]) / 2).backward()
        optimizer.step()
    ours, expected = snapshot(model, sparsifier), snapshot(*alone(dst_ee, sgd))
    return {
        "identical": identical(ours),
        "differing_masks": sum(int((m != ours["masks"][n]).sum()) for n, m in expected["masks"].items()),
    }


def fabric() -> dict[str, Any]:
    from lightning_fabric import Fabric

    runner = Fabric(accelerator="cpu", devices=world, strategy="ddp")
    runner.launch()
    model = network(100 + rank)
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=STEPS, seed=7 + rank, check_every=1)
    wrapped, stepping = runner.setup(model, optimizer)
    for step in range(STEPS):
        inputs, labels = mine(step)
        stepping.zero_grad()
        runner.backward(functional.cross_entropy(wrapped(inputs), labels))
        stepping.step()
    ours, expected = snapshot(model, sparsifier), snapshot(*alone(dst_ee, sgd))
    return {
        "identical": identical(ours),
        "differing_masks": sum(int((m != ours["masks"][n]).sum()) for n, m in expected["masks"].items()),
    }


def message(failing: Callable[[], Any]) -> str:
    """What the ModelError says, which must be the same on all processes."""
    found = "no error"
    try:
        failing()
    except ModelError as error:
        found = str(error)
    heard: list[Any] = [None] * world
    distributed.all_gather_object(heard, found)
    return found if len(set(heard)) == 1 else f"not the same: {heard}"


def without_averaging() -> None:
    model = network(100)
    optimizer = sgd(model)
    Sparsifier(model, optimizer, dst_ee(), total_steps=STEPS)
    train(model, optimizer, mine, STEPS)


def one_differing_bit() -> None:
    """A mask that is spoilt on the last process in the fourth round, and compared after the rounds 1, 4, 7, ..."""
    model = network(100)
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=400, check_every=3)
    wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer, mine, 15)
    if rank == world - 1:
        mask = sparsifier.mask_set["3.weight"].view(-1)
        mask[mask.nonzero()[0]] = False
    train(wrapped, optimizer, mine, 40)


def other_options() -> None:
    model = network(100)
    method = sparsepipe.DSTEE(sparsity=0.7 + 0.1 * (rank > 0), update_every=4)
    Sparsifier(model, sgd(model), method, total_steps=STEPS)


def resumed(modifiers: Callable[[], list[Any]] = list) -> bool:
    """A state of process 0, and what each process alone remembers, go on as if nothing had happened."""

    def begin(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = network(seed)
        optimizer = sgd(model)
        return (
            model,
            optimizer,
            Sparsifier(
                model, optimizer, dst_ee(), total_steps=STEPS, seed=7 + rank, check_every=1, modifiers=modifiers()
            ),
        )

    model, optimizer, sparsifier = begin(100 + rank)
    train(DistributedDataParallel(model), optimizer, mine, STEPS)
    expected = snapshot(model, sparsifier)
    model, optimizer, sparsifier = begin(100 + rank)
    train(DistributedDataParallel(model), optimizer, mine, STEPS // 2)
    own = copy.deepcopy(sparsifier.local_state())
    states = [copy.deepcopy([model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()])]
    distributed.broadcast_object_list(states, src=0)
    model, optimizer, sparsifier = begin(500 + rank)
    for target, state in zip((model, optimizer, sparsifier), states[0], strict=True):
        target.load_state_dict(state)
    sparsifier.load_local_state(own)
    train(DistributedDataParallel(model), optimizer, lambda step: mine(step + STEPS // 2), STEPS - STEPS // 2)
    found = snapshot(model, sparsifier)
    return all(torch.equal(value, found[kind][name]) for kind in found for name, value in expected[kind].items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    ALONE = [distributed.new_group([one]) for one in range(world)]
    results: dict[str, Any] = {"dst-ee, sgd": compare(dst_ee, sgd), "rigl, global": compare(rigl, adamw)}
    if world == 2:
        results["dst-ee, adamw, DDP first"] = compare(dst_ee, adamw, wrap_first=True)
        results["set"] = compare(set_, sgd)
        results["gmp"] = compare(gmp, sgd)
        results["accumulated"] = accumulated()
        results["fabric"] = fabric()
        results["resumed"] = resumed()
        results["resumed, extrapolated"] = resumed(lambda: [Extrapolation(rate=2.0)])
        results["extrapolated"] = {str(local): extrapolated(local) for local in (True, False)}
        results["frozen"] = {name: frozen(make) for name, make in METHODS_OF_THEIR_OWN.items()}
    results["errors"] = {
        "without_averaging": message(without_averaging),
        "one_differing_bit": message(one_differing_bit),
        "other_options": message(other_options),
    }
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    distributed.destroy_process_group()
    launch.leave(0)
