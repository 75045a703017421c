"""One build of the library, and the same files, in old and new versions of onnxruntime, each installed by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

PROGRAM = Path(__file__).with_name("run_networks.py")
TOLERANCE = 1e-5
TOO_OLD = "1.16.3"
VERSIONS = ["1.17.3", "1.20.1", "1.24.4", "newest"]

Networks = dict[str, tuple[Path, Path]]

pytestmark = pytest.mark.gate


def install(version: str, folder: Path) -> None:
    """onnxruntime and numpy alone in a folder; skips where this version was never built for this Python."""
    wanted = "onnxruntime" if version == "newest" else f"onnxruntime=={version}"
    # The wheels before 1.19 are built for the first numpy.
    numpy = "numpy<2" if version.startswith(("1.16.", "1.17.")) else "numpy"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-cache-dir", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--target", folder, wanted, numpy], check=False, capture_output=True, text=True)
    if "No matching distribution" in done.stderr:
        pytest.skip(f"{wanted} has no wheel for Python {sys.version.split()[0]} on this machine")
    assert done.returncode == 0, done.stderr


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The program with nothing but that folder and the standard library on its path."""
    return subprocess.run(
        [sys.executable, "-S", str(PROGRAM), *map(str, arguments)], check=False, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def inputs(networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A file of inputs, and the outputs of the dense networks for them."""
    random = np.random.default_rng(1)
    feeds, expected = {}, {}
    for name, (dense, _) in networks.items():
        session = onnxruntime.InferenceSession(str(dense), providers=["CPUExecutionProvider"])
        shape = [3, *session.get_inputs()[0].shape[1:]]
        feeds[name] = random.standard_normal(shape).astype(np.float32)
        expected[name] = session.run(None, {"x": feeds[name]})[0]
    path = tmp_path_factory.mktemp("inputs") / "inputs.npz"
    np.savez(path, **feeds)
    return path, expected


@pytest.mark.parametrize("version", VERSIONS)
def test_files_run_with_and_without_the_library(
    networks: Networks, library: Path, inputs: tuple[Path, dict[str, Any]], tmp_path: Path, version: str
) -> None:
    path, expected = inputs
    install(version, tmp_path / "installed")
    models = [f"{name}={universal}" for name, (_, universal) in networks.items()]
    done = run(tmp_path / "installed", library, path, tmp_path / "outputs.npz", *models)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version or version == "newest"
    found = np.load(tmp_path / "outputs.npz")
    assert len(found.files) == 3 * len(expected)
    for key in found.files:
        wanted = expected[key.split("/")[0]]
        assert found[key].shape == wanted.shape
        assert np.abs(found[key] - wanted).max() <= TOLERANCE * np.abs(wanted).max(), key


def test_an_onnxruntime_that_is_too_old_is_told_the_version_it_needs(
    networks: Networks, library: Path, inputs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    install(TOO_OLD, tmp_path / "installed")
    arguments = (library, inputs[0], tmp_path / "outputs.npz", f"conv={networks['conv'][1]}")
    done = run(tmp_path / "installed", *arguments)
    assert done.returncode == 1
    assert f"sparsepipe's kernels need onnxruntime 1.17 or newer; this is onnxruntime {TOO_OLD}" in done.stderr
