"""Going on from a state: in a Sparsifier made before the weights are loaded, or made with the state after that."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from sparse_bench import dst_ee, network, train  # noqa: E402

from sparsepipe.errors import ArtefactError  # noqa: E402
from sparsepipe.sparsity.method import Method  # noqa: E402
from sparsepipe.sparsity.methods.gmp import GMP  # noqa: E402
from sparsepipe.sparsity.methods.rigl import RigL  # noqa: E402
from sparsepipe.sparsity.methods.snfs import SNFS  # noqa: E402
from sparsepipe.sparsity.sparsifier import Sparsifier  # noqa: E402

STEPS = 30
METHODS = {
    "dst-ee": lambda: dst_ee(),
    "dst-ee with sparse_init": lambda: dst_ee(sparse_init=True),
    "rigl with 4x1 blocks, global": lambda: RigL(sparsity=0.8, pattern="4x1", distribution="global", update_every=3),
    "snfs": lambda: SNFS(sparsity=0.8, update_every=3),
    "gmp": lambda: GMP(sparsity=0.8, update_every=3),
}


def made(method: Method, state: dict[str, Any] | None = None) -> tuple[Any, torch.optim.Optimizer, Sparsifier]:
    """A new training, or with `state` one whose weights and optimizer are loaded before the Sparsifier is made."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    masks = state["sparsifier"] if state else None
    return model, optimizer, Sparsifier(model, optimizer, method, total_steps=STEPS, state=masks)


def saved(model: Any, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier) -> dict[str, Any]:
    parts = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


@pytest.mark.parametrize("cut", [1, 13])
@pytest.mark.parametrize("name", METHODS)
def test_a_sparsifier_made_with_a_state_goes_on_with_the_loaded_weights_bit_for_bit(name: str, cut: int) -> None:
    whole = made(METHODS[name]())
    train(*whole[:2], range(STEPS))

    first = made(METHODS[name]())
    train(*first[:2], range(cut))
    state = saved(*first)
    second = made(METHODS[name](), state)
    loaded = second[0].state_dict()
    assert all(torch.equal(loaded[key], state["model"][key]) for key in loaded), "loading changes no weight"
    moments = second[1].state_dict()["state"]
    assert all(torch.equal(moments[key]["exp_avg"], state["optimizer"]["state"][key]["exp_avg"]) for key in moments)
    train(*second[:2], range(cut, STEPS))

    expected, found = whole[0].state_dict(), second[0].state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert second[2].mask_set.digest() == whole[2].mask_set.digest()
    counters = whole[2].mask_set.counters
    assert counters.keys() == second[2].mask_set.counters.keys()
    assert all(torch.equal(counters[key], second[2].mask_set.counters[key]) for key in counters)
    assert second[2].step == STEPS


def test_a_state_without_its_weights_is_refused_by_the_name_of_the_layer() -> None:
    first = made(dst_ee())
    train(*first[:2], range(5))
    state = first[2].state_dict()
    model = network()
    with pytest.raises(ArtefactError, match=r"weights of '0\.weight' are not zero.*[Ll]oad model and optimizer"):
        Sparsifier(model, torch.optim.SGD(model.parameters()), dst_ee(), total_steps=STEPS, state=state)


def test_a_layer_that_was_dense_is_dense_again_whatever_the_new_weights_suggest() -> None:
    """`global` makes a layer of large weights dense; in the new network another one is large."""

    def large(layer: int) -> Any:
        model = network()
        with torch.no_grad():
            model[layer].weight.copy_(torch.full_like(model[layer].weight, 100.0))
        return model

    def sparse(model: Any) -> Sparsifier:
        method = RigL(sparsity=0.5, distribution="global", update_every=2)
        return Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), method, total_steps=STEPS)

    theirs, ours = sparse(large(6)), sparse(large(0))
    assert theirs.masks["6.weight"].all()
    assert not ours.masks["6.weight"].all()
    ours.load_state_dict(theirs.state_dict())
    assert ours.mask_set.digest() == theirs.mask_set.digest()
    assert ours.mask_set.counters.keys() == theirs.mask_set.counters.keys()
