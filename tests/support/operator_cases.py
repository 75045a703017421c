"""Single operators of the kernel library against dense onnxruntime, which runs the fallback body of the same file."""

from __future__ import annotations

import threading
from collections.abc import Sequence
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


def agree_at_once(native: Any, feeds: Sequence[dict[str, Any]], expected: Sequence[np.ndarray[Any, Any]]) -> None:
    """Eight threads call one session with these inputs, each in an order of its own, and get the expected bits."""
    failures: list[str] = []

    def work(shift: int) -> None:
        for i in range(40):
            which = (i + shift) % len(feeds)
            if not np.array_equal(native.run(None, feeds[which])[0], expected[which]):
                failures.append(f"thread {shift}, call {i}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
