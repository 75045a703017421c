"""Whether the layers that pay one by one pay together: changes of layout between sparse and dense layers cost time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from sparsepipe.graph import cost
from sparsepipe.graph.layout import Layout


def worth_it(
    gains: Mapping[str, float], layout: Layout, also_plain: Callable[[Collection[str]], Collection[str]]
) -> set[str]:
    """The layers that stay sparse when the changes of layout are counted.

    One layer after the other goes back to dense where that makes the network faster, those that save least first,
    until none does; where even then nothing is won, all do.

    Args:
        gains: microseconds that each layer saves which would go sparse, by the output of its node.
        layout: of the graph.
        also_plain: outputs of sparse layers -> outputs of further nodes that then keep the plain layout.
    """

    def total(sparse: Collection[str]) -> float:
        changes = layout.changes({*sparse, *also_plain(sparse)})
        return cost.layout_time(changes) / 1e3 - sum(gains[output] for output in sparse)

    kept = set(gains)
    best, changed = total(kept), bool(kept)
    while changed:
        changed = False
        for output in sorted(kept, key=lambda output: gains[output]):
            if (without := total(kept - {output})) <= best:
                kept, best, changed = kept - {output}, without, True
    return kept if best < total(()) else set()
