"""Whether a sparse kernel beats the dense one: the time of one layer, dense in onnxruntime and sparse, on one core.

With O outputs, K columns (inputs times kernel positions), P positions of the output (or rows of a linear layer), the
dense layer takes, in nanoseconds,

    dense = mac O K P + act (inputs + outputs) + far (inputs + outputs) + read O K + stream 4 O K + call

and the sparse one, of E stored blocks of r x 1 that each multiply `vectors` = P / lanes vectors in `tiles` tiles of as
many vectors as the registers hold,

    sparse = fma[r] E vectors + entry[r] E tiles + row (O / r) tiles + pack inputs + copy inputs taps + out outputs
             + far (inputs + outputs) + stream E (4 + 4 r) + call

with O K, inputs and outputs in vectors. `thin` is added to `mac` for windows of few outputs, `place` to `fma` where the
kernel may read the input where it lies; up to three rows of a linear layer are computed one by one, without tiles.
`stream` counts in networks whose weights together exceed the L2 cache, `far` for inputs and outputs that do. One to
three rows of a linear layer are mostly reading of weights: where those of the layer alone would fit the cache, the
worse of both cases counts.

The constants are in `cost.json` beside this file, a set for each instruction set, with the processor and the spread of
what they leave unexplained. `python -m sparsepipe.benchmark.fit_cost` fits them to single layers. Those of AVX-512,
AVX2 and SSE4 were timed on one core of an AVX-512 server, the latter two with the wider extensions hidden from
onnxruntime and from the kernels. NEON and portable code were not timed: they are estimates, which take the constants
of AVX2 and of SSE4 for vectors of four floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

BLOCKS = (1, 2, 4)
FEWEST_VALUES = 256
"""Smaller weights take microseconds either way."""
FEWEST_CHANNELS = 8
"""Convolutions of fewer input channels (of images, as a rule) stay dense: they were not measured."""
FEW_ROWS = 3
"""Up to so many rows a linear layer is computed row by row."""
CACHE_BYTES = 4 << 20
"""Networks with more bytes of weights stream them from beyond the L2 cache in every call."""
FAR_BYTES = 1 << 20
"""Inputs and outputs of a layer that take more than this do not stay in the L2 cache."""
THIN = 16
"""Up to so many outputs onnxruntime's convolutions of more than one position are slower for each product."""
CONSTANTS_FILE = Path(__file__).with_name("cost.json")

Constants = Mapping[str, float]


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        lanes: floats of a vector register.
        registers: how many of them there are.
        constants: key of `cost.json`.
        fused: whether a product and a sum are one instruction, as the kernels use it.
    """

    lanes: int
    registers: int
    constants: str
    fused: bool = False

    def tile(self, block: int) -> int:
        """Most vectors of a tile: its sums, and the weights of a block and one input, or one weight and all inputs."""
        weights = (self.registers - 1 - block) // block
        inputs = (self.registers - 1) // (block + 1) if self.fused else 0
        fit = self.registers - 2 if block == 1 else max(weights, inputs)
        return min(fit, 14 if block == 1 else 24 // block)


ISAS: Mapping[str, Isa] = {
    "avx512": Isa(16, 32, "avx512", fused=True),
    "avx2": Isa(8, 16, "avx2", fused=True),
    "sse4": Isa(4, 16, "sse4"),
    "neon": Isa(4, 32, "avx2"),  # an estimate
    "portable": Isa(4, 16, "sse4"),  # an estimate
}
"""As `SPARSEPIPE_ISA` names them."""
REFERENCE = "avx512"
"""The one whose times are compared with those of changes of layout."""


@dataclass(frozen=True)
class Work:
    """What a layer computes at batch 1.

    Attributes:
        kind: `conv` or `linear`.
        outputs: O.
        columns: K, inputs times kernel positions.
        positions: of the output, or rows.
        taps: positions of the kernel.
        input_positions: of a plane of the input; equal to `positions` for a linear layer.
        streamed: whether the weights of the network exceed the L2 cache.
    """

    kind: str
    outputs: int
    columns: int
    positions: int
    taps: int
    input_positions: int
    streamed: bool = True

    @property
    def inputs(self) -> int:
        return self.columns // self.taps

    @property
    def by_row(self) -> bool:
        return self.kind == "linear" and self.positions <= FEW_ROWS

    @property
    def moved(self) -> int:
        """Floats of the input and of the output."""
        return self.inputs * self.input_positions + self.outputs * self.positions

    @property
    def far(self) -> int:
        """The same, where they do not stay in the cache."""
        return self.moved if 4 * self.moved > FAR_BYTES else 0

    def in_place(self, isa: Isa) -> bool:
        """Whether the kernel may read the input where it lies: a 1 x 1 window over planes of whole vectors."""
        whole = self.positions % isa.lanes == 0 and self.positions == self.input_positions
        return self.kind == "conv" and self.taps == 1 and whole


def dense_terms(work: Work, isa: Isa) -> dict[str, float]:
    """What each constant of the dense time is multiplied by."""
    kind = f"dense.{work.kind}"
    size = work.outputs * work.columns
    # onnxruntime computes convolutions for as many outputs at once as a vector holds
    outputs = math.ceil(work.outputs / isa.lanes) * isa.lanes if work.kind == "conv" else work.outputs
    products = outputs * work.columns * work.positions / isa.lanes
    terms = {
        f"{kind}.mac": products,
        f"{kind}.act": work.moved / isa.lanes,
        "dense.far": work.far / isa.lanes,
        f"{kind}.read": size / isa.lanes,
        "dense.stream": 4.0 * size * work.streamed,
        f"{kind}.call": 1.0,
    }
    if work.taps > 1 and work.outputs <= THIN:
        terms["dense.thin"] = products
    return terms


def sparse_terms(work: Work, stored: float, block: int, isa: Isa) -> dict[str, float]:
    """What each constant of the sparse time is multiplied by; `stored` is the share of the weight's values kept."""
    entries = work.outputs * work.columns * stored / block
    streamed = entries * (4 + 4 * block) * work.streamed
    if work.by_row:
        return {
            f"row.fma{block}": entries * work.positions,
            "row.row": work.outputs / block * work.positions,
            "row.stream": streamed,
            "row.call": 1.0,
        }
    vectors = math.ceil(work.positions / isa.lanes)
    tiles = math.ceil(vectors / isa.tile(block))
    kind = "window" if work.taps > 1 else work.kind
    terms = {
        f"sparse.fma{block}": entries * vectors,
        f"sparse.entry{block}": entries * tiles,
        "sparse.row": work.outputs / block * tiles,
        f"{kind}.pack": work.inputs * math.ceil(work.input_positions / isa.lanes),
        f"{work.kind}.out": work.outputs * vectors,
        "sparse.far": work.far / isa.lanes,
        "sparse.stream": streamed,
        f"{work.kind}.call": 1.0,
    }
    if work.taps > 1:
        terms["window.copy"] = work.inputs * work.taps * vectors
    if work.in_place(isa):
        terms[f"place.fma{block}"] = entries * vectors
    return terms


def time_of(terms: Mapping[str, float], constants: Constants) -> float:
    """Nanoseconds; a constant that the fit left out counts nothing."""
    return sum(constants.get(name, 0.0) * factor for name, factor in terms.items())


def dense_time(work: Work, isa: Isa, constants: Constants | None = None) -> float:
    """Nanoseconds of the layer in onnxruntime, by default with the constants of `cost.json`."""
    return time_of(dense_terms(work, isa), fitted(isa) if constants is None else constants)


def sparse_time(work: Work, stored: float, block: int, isa: Isa, constants: Constants | None = None) -> float:
    """Nanoseconds of the layer's sparse kernel, by default with the constants of `cost.json`."""
    return time_of(sparse_terms(work, stored, block, isa), fitted(isa) if constants is None else constants)


def relative_time(
    work: Work, stored: float, block: int, isa: Isa = ISAS[REFERENCE], constants: Constants | None = None
) -> float:
    """Predicted time of the sparse layer, in times of the dense one.

    Args:
        work: what the layer computes.
        stored: share of the weight's values that is stored, zeros inside of blocks included.
        block: rows of a block: 1, 2 or 4.
        isa: the instruction set of both.
        constants: by default those of `cost.json`.
    """
    cases = [work]
    if work.by_row and work.streamed and 4 * work.outputs * work.columns <= CACHE_BYTES:
        cases.append(replace(work, streamed=False))
    return max(sparse_time(case, stored, block, isa, constants) / dense_time(case, isa, constants) for case in cases)


def layout_time(changes: Iterable[int]) -> float:
    """Nanoseconds of changes of layout, given the floats of each tensor."""
    constants = fitted(ISAS[REFERENCE])
    return sum(constants["layout.call"] + constants["layout.float"] * floats for floats in changes)


def fitted(isa: Isa) -> Constants:
    """The constants of `cost.json`."""
    found: Constants = _file()["fits"][isa.constants]["constants"]
    return found


def pays_below() -> float:
    """A layer goes sparse where it is predicted to take less than this share of the dense time.

    So far from 1 that, of the timed layers that the constants were fitted to, 98% of those that pass do pay.
    """
    return float(_file()["pays_below"])


@cache
def _file() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(CONSTANTS_FILE.read_text())
    return found
