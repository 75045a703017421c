"""The operators and the malformed models again, in a library built with AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = 400
MALFORMED = ("test_malformed.py", "test_quantized_malformed.py")

pytestmark = pytest.mark.gate


@pytest.fixture(scope="module")
def sanitized(build: Callable[..., Path]) -> Path:
    """A folder with the library and the test programs."""
    # Checks by calls instead of inline halve the time of the compiler.
    folder = build(
        "g++",
        "-DSPARSEPIPE_SANITIZE=ON",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1 --param asan-instrumentation-with-call-threshold=0",
        f"-DSPARSEPIPE_EMULATED={HERE}",
    )
    symbols = subprocess.run(["nm", "-D", folder / "libsparsepipe_ops.so"], check=True, capture_output=True, text=True)
    assert "__asan_report" in symbols.stdout or "__asan_load" in symbols.stdout
    assert "__ubsan_handle" in symbols.stdout
    return folder


def runtime_library(name: str) -> str:
    """The full path of a library of the compiler, to be loaded before Python."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return path


@pytest.mark.parametrize("command", [["kernel_test"], ["operator_test", str(CASES), "1"]])
def test_kernels_and_operators(sanitized: Path, command: list[str]) -> None:
    """A finding ends the program with another code than 0."""
    command = [str(sanitized / command[0]), *command[1:]]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    if os.uname().machine == "x86_64":
        ran = {"avx512: passed", f"avx512: 0 of {CASES} cases differ"}  # it is emulated
        assert ran & set(done.stdout.splitlines())


@pytest.mark.parametrize("corpus", [MALFORMED, ("test_quantized.py",)], ids=["malformed", "int8"])
def test_models(sanitized: Path, corpus: tuple[str, ...]) -> None:
    """A finding ends that Python at once, so that pytest there cannot report success."""
    environment = {
        **os.environ,
        "SPARSEPIPE_LIBRARY": str(sanitized / "libsparsepipe_ops.so"),
        "LD_PRELOAD": " ".join(runtime_library(name) for name in ("libasan.so", "libstdc++.so.6")),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python has its own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # Without the capture of output (-s), as a finding would not be seen then.
    command = [sys.executable, "-m", "pytest", "-qsx", "-p", "no:cacheprovider", *(str(HERE / name) for name in corpus)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    # The int8 operators skip the instructions that this machine lacks.
    assert corpus != MALFORMED or "skipped" not in done.stdout
