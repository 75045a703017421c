"""What several tests of int8 share: the digits, a network that was trained on them, and its int8 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the digits."""
    import int8_digits

    return int8_digits.write_digits(tmp_path_factory.mktemp("data") / "digits.npz")


@pytest.fixture(scope="session")
def prepared(digits: Path) -> tuple[Any, Any]:
    """Test images as the network takes them, and their labels."""
    import int8_digits

    return int8_digits.prepared_test(digits)


@pytest.fixture(scope="session")
def fp32(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block-sparse network that was trained on the digits, as an ordinary ONNX file."""
    import int8_digits

    return int8_digits.train(digits, tmp_path_factory.mktemp("fp32") / "export")


@pytest.fixture(scope="session")
def int8(fp32: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with its int8 files."""
    import int8_digits

    out = tmp_path_factory.mktemp("int8") / "out"
    int8_digits.main_ok(["export", str(fp32), "--precision", "int8", "--calibrate", f"npz:{digits}", "--out", str(out)])
    return out
