"""Single operators of the kernel library against dense onnxruntime, which runs the fallback body of the same file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsepipe.native import operators

TOLERANCE = 1e-5


def masked(random: np.random.Generator, shape: tuple[int, ...], block: int, density: float) -> np.ndarray[Any, Any]:
    """A weight with about that density in blocks, scaled so that outputs are about 1 (clipping then hides no scale).

    Its second block row is empty where it has one.
    """
    mask = random.random((shape[0] // block, 1, int(np.prod(shape[1:])))) < density
    if density < 1 and len(mask) > 1:
        mask[1] = False
    scale = max(1.0, density * float(np.prod(shape[1:]))) ** -0.5
    weight = scale * random.standard_normal(shape) * np.repeat(mask, block, axis=1).reshape(shape)
    return weight.astype(np.float32)


def agree(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> None:
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=1e-6)
    assert np.abs(expected - actual).max(initial=0) / scale < TOLERANCE


def compare(session: Any, model: Any, node: Any, constants: Any, feeds: Any, isa: str, threads: int) -> None:
    file = model(node, constants, [operators.function_for(node)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEPIPE_ISA", isa)
        native = session(file, threads=threads)
    expected = session(file, native=False).run(None, feeds)[0]
    agree(expected, native.run(None, feeds)[0])
    # A second call takes the cached plan.
    agree(expected, native.run(None, feeds)[0])


def output_size(size: int, pads: int, kernel: int, stride: int, dilation: int) -> int:
    return (size + pads - dilation * (kernel - 1) - 1) // stride + 1
