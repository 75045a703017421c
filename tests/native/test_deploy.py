"""The deployment examples in Python and C++ give the same output, with the kernel library registered by each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "deploy"
HEADER = "onnxruntime_c_api.h"
INCLUDES = [
    *[Path(root) / "include" for root in filter(None, [os.environ.get("ONNXRUNTIME_ROOT")])],
    *[Path(prefix, "include", *name) for prefix in ("/usr", "/usr/local") for name in ((), ("onnxruntime",))],
]

Networks = dict[str, tuple[Path, Path]]


def official_include() -> Path:
    found = next((folder for folder in INCLUDES if (folder / HEADER).is_file()), None)
    return found or pytest.skip(f"{HEADER} is not installed; ONNXRUNTIME_ROOT can name a folder with include/{HEADER}")


@pytest.fixture(scope="module", params=["official header", "own header"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, linked against the onnxruntime inside the wheel."""
    for tool in ("c++", "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip("this onnxruntime wheel has no libonnxruntime.so")
    include = official_include() if request.param == "official header" else Path(__file__).parent
    root, build = tmp_path_factory.mktemp("onnxruntime"), tmp_path_factory.mktemp("deploy")
    (root / "lib").mkdir()
    (root / "include").symlink_to(include)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(library)
    configure = ["cmake", "-S", str(EXAMPLE), "-B", str(build), f"-DONNXRUNTIME_ROOT={root}"]
    subprocess.run(configure, check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", str(build)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return build / "deploy"


SHAPES = {"linear": (1, 5, 256)}


def expected(model: Path, library: Path, name: str) -> str:
    """What the examples print, from a session of this process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    shape = SHAPES.get(name, (1, 64, 14, 14))
    (y,) = session.run(None, {"x": (np.arange(np.prod(shape)) % 255 / 255).astype(np.float32).reshape(shape)})
    return f"y {'x'.join(map(str, y.shape))} {zlib.adler32(y.tobytes()):08x}\n"


def test_python(networks: Networks, library: Path) -> None:
    for name, (_, model) in networks.items():
        command = [sys.executable, str(EXAMPLE / "deploy.py"), str(model), str(library)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, expected(model, library, name)), done.stderr


def test_cpp(networks: Networks, library: Path, program: Path) -> None:
    for name, (_, model) in networks.items():
        done = subprocess.run([program, model, library], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, expected(model, library, name)), done.stderr


def test_both_run_the_kernels_of_the_library(networks: Networks, library: Path, program: Path) -> None:
    """Only the kernels read this variable, and they refuse it."""
    _, model = networks["conv"]
    for command in ([sys.executable, str(EXAMPLE / "deploy.py")], [str(program)]):
        done = subprocess.run(
            [*command, str(model), str(library)], check=False, capture_output=True, text=True,
            env={**os.environ, "SPARSEPIPE_ISA": "mmx"},
        )  # fmt: skip
        assert done.returncode == 1
        assert "SPARSEPIPE_ISA=mmx" in done.stderr


def test_a_library_that_is_not_there_is_an_error(networks: Networks, program: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [program, networks["conv"][1], tmp_path / "absent.so"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "absent.so" in done.stderr
