"""The kernels, and the operators, without onnxruntime, for this machine and for AArch64 under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import sparsepipe.native

CASES, SEED = 600, 1

pytestmark = pytest.mark.gate

Build = Callable[..., Path]


def passes(program: Path, *arguments: object, under: str | None = None) -> list[str]:
    """The lines that the program prints."""
    command = [*([under] if under else []), str(program), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout.splitlines()


def test_on_aarch64(build: Build) -> None:
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("needs qemu-aarch64, of the package qemu-user")
    folder = build(
        "aarch64-linux-gnu-g++", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    names = ("neon", "portable", "int8 neondot", "int8 neon", "int8 portable")
    assert {f"{name}: passed" for name in names} <= set(passes(folder / "kernel_test", under=emulator))
    lines = passes(folder / "operator_test", CASES, SEED, under=emulator)
    assert lines == [f"{isa}: 0 of {CASES} cases differ" for isa in ("neon", "portable")]


def test_operators_of_this_machine(library: Path, tmp_path: Path) -> None:
    """The library that was installed, with every instruction set that runs here."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "operator_test"
    sources = Path(sparsepipe.native.__file__).parent
    options = [
        "-std=c++17",
        "-O1",
        "-pthread",
        f"-I{sources}",
        f"-Wl,-rpath,{library.parent}",
    ]
    command = [compiler, *options, Path(__file__).with_name("operator_test.cc"), library, "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    lines = passes(program, 5 * CASES, SEED)
    assert lines[-1] == f"portable: 0 of {5 * CASES} cases differ"
