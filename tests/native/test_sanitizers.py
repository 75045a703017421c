"""The malformed models and the operators again, in a library built with AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsepipe.native

HERE = Path(__file__).parent
SOURCES = Path(sparsepipe.native.__file__).parent

pytestmark = pytest.mark.gate


def runtime_library(name: str) -> str:
    """The full path of a library of the compiler, to be loaded before Python."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What makes a Python run the sanitized library; leaks are not looked for, as Python has its own."""
    for tool in ("g++", "cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    preload = [runtime_library(name) for name in ("libasan.so", "libstdc++.so.6")]
    build = tmp_path_factory.mktemp("sanitized")
    options = ["-DSPARSEPIPE_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    subprocess.run(["cmake", "-S", SOURCES, "-B", build, "-G", "Ninja", *options], check=True, capture_output=True)
    done = subprocess.run(["ninja", "-C", build, "sparsepipe_ops"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    library = build / "libsparsepipe_ops.so"
    symbols = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True).stdout
    assert "__asan_report" in symbols
    assert "__ubsan_handle" in symbols
    return {
        **os.environ,
        "SPARSEPIPE_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.parametrize("corpus", ["test_malformed.py", "test_operators.py"])
def test_no_access_out_of_bounds_and_no_undefined_behaviour(environment: dict[str, str], corpus: str) -> None:
    """A finding ends that Python at once, so that pytest there cannot report success."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / corpus)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
