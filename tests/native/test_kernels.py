"""The kernels alone, compiled for this machine and, where the tools are here, for AArch64 under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import sparsepipe.native

SOURCES = Path(sparsepipe.native.__file__).parent
PROGRAM = ";".join(str(Path(__file__).with_name(name)) for name in ("kernel_test.cc", "quantized_kernel_test.cc"))


def build(folder: Path, *options: str) -> Path:
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    configure = ["cmake", "-S", str(SOURCES), "-B", str(folder), "-G", "Ninja", f"-DSPARSEPIPE_KERNEL_TEST={PROGRAM}"]
    subprocess.run([*configure, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(folder), "--target", "kernel_test"], check=True, capture_output=True)
    return folder / "kernel_test"


@pytest.mark.slow
def test_kernels_of_this_machine(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    result = subprocess.run([str(build(tmp_path))], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.gate
def test_kernels_on_aarch64(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs the packages g++-aarch64-linux-gnu and qemu-user")
    program = build(
        tmp_path, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    result = subprocess.run([emulator, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    names = {"neon", "portable", "int8 neondot", "int8 neon", "int8 portable"}
    assert {f"{name}: passed" for name in names} <= set(result.stdout.splitlines())
