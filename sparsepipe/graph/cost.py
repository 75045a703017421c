"""Whether a sparse kernel beats the dense one: the time of a layer, relative to dense onnxruntime.

    relative = ENTRY[r] * stored + ROW / K + PACK / O

for a weight of O outputs and K columns (inputs times kernel positions) of which a share `stored` is kept in blocks of
r x 1. Each stored number multiplies a tile of positions that is read from the cache once for all r rows of its block;
each output row costs about a column more; each input is laid out again once, which the O outputs share. The factors
are fitted to the whole networks of `sparsepipe/native/NOTES.md`: VGG-19 and the MLP at 80 to 98%, on one core.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ENTRY = {1: 2.6, 2: 2.0, 4: 1.5}
ROW = 2.0
PACK = 2.0
PAYS_BELOW = 0.7
"""A layer goes sparse where it is predicted to take less than this share of the dense time. At 0.8 a MobileNetV1 on
images of 32 x 32 with 70% zeros took 1.16 of the dense time: small planes and other machines need room."""
FEWEST_VALUES = 256
"""Smaller weights take microseconds either way."""
FEWEST_CHANNELS = 8
"""Convolutions of fewer input channels (of images, as a rule) stay dense: they were not measured."""


def relative_time(shape: Sequence[int], stored: float, block: int) -> float:
    """Predicted time of a sparse layer, in times of the dense one.

    Args:
        shape: of the weight, [O, I, *kernel].
        stored: share of the weight's values that is stored, zeros inside of blocks included.
        block: rows of a block: 1, 2 or 4.
    """
    return ENTRY[block] * stored + ROW / int(np.prod(shape[1:])) + PACK / shape[0]
