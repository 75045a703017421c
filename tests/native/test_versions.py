"""One build of the library, and the same files, in old and new versions of onnxruntime, each installed by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

PROGRAM = Path(__file__).with_name("run_networks.py")
TOLERANCE = 1e-5
TOO_OLD = "1.16.3"
NEWEST = "newest"
VERSIONS = ["1.17.3", "1.20.1", "1.24.4", NEWEST]

Networks = dict[str, tuple[Path, Path]]

pytestmark = pytest.mark.gate


def install(version: str, folder: Path) -> None:
    """onnxruntime and numpy alone in a folder; skips where this machine cannot download wheels for this Python."""
    wanted = "onnxruntime" if version == NEWEST else f"onnxruntime=={version}"
    # The wheels before 1.19 are built for the first numpy.
    numpy = "numpy<2" if version.startswith(("1.16.", "1.17.")) else "numpy"
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--retries", "1", "--timeout", "20"]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", str(folder), wanted, numpy]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {wanted}: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The program with nothing but that folder and the standard library on its path."""
    return subprocess.run(
        [sys.executable, "-S", str(PROGRAM), *map(str, arguments)], check=False, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(networks: Networks) -> Path:
    """The folder of the networks, with an input for each."""
    random = np.random.default_rng(1)
    for name, (dense, _) in networks.items():
        session = onnxruntime.InferenceSession(str(dense), providers=["CPUExecutionProvider"])
        shape = [3, *session.get_inputs()[0].shape[1:]]
        np.save(dense.with_name(f"{name}.npy"), random.standard_normal(shape).astype(np.float32))
    return next(iter(networks.values()))[0].parent


@pytest.mark.parametrize("version", VERSIONS)
def test_files_run_with_and_without_the_library(
    networks: Networks, library: Path, folder: Path, tmp_path: Path, version: str
) -> None:
    install(version, tmp_path / "installed")
    done = run(tmp_path / "installed", library, folder, tmp_path / "outputs.npz", *networks)
    assert done.returncode == 0, done.stderr
    used = done.stdout.strip()
    assert used == version or version == NEWEST
    print(f"onnxruntime {used}")
    found = np.load(tmp_path / "outputs.npz")
    assert len(found.files) == 4 * len(networks)
    for key in found.files:
        expected = found[f"{key.split('/')[0]}/dense"]
        scale = np.abs(expected).max()
        assert scale > 0
        assert found[key].shape == expected.shape
        assert np.abs(found[key] - expected).max() <= TOLERANCE * scale, key


def test_an_onnxruntime_that_is_too_old_is_told_the_version_it_needs(
    library: Path, folder: Path, tmp_path: Path
) -> None:
    install(TOO_OLD, tmp_path / "installed")
    done = run(tmp_path / "installed", library, folder, tmp_path / "outputs.npz", "conv")
    assert done.returncode == 1
    assert f"sparsepipe's kernels need onnxruntime 1.17 or newer; this is onnxruntime {TOO_OLD}" in done.stderr
