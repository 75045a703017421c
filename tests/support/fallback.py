"""An operator of the kernel library against its fallback body in dense onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsepipe.native import operators

TOLERANCE = 1e-5  # of the largest output


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
