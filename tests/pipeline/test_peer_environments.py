"""Environments of other runtimes: made by pip from wheels that are written here, interrupted, damaged, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sparsepipe.benchmark.client import WORKER_COMMAND, WorkerProcess
from sparsepipe.benchmark.peers import environments
from sparsepipe.benchmark.peers.environments import Environment, NotInstalled

MODULE = """
import os, time
from pathlib import Path
if os.environ.get("TINY_LICENCE") != "read":
    raise ImportError("the licence was not read")
if mark := os.environ.get("TINY_HANGS"):
    Path(mark).touch()
    time.sleep(600)
class Runtime:
    def prepare(self, work):
        return Path(__file__)
"""
TINY = Environment("tiny", ("tiny-runtime>=2",), ("tiny_runtime",), {"TINY_LICENCE": "read"})


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes packages from, and no other place."""
    monkeypatch.setenv("SPARSEPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def write_wheel(index: Path, version: str = "2.1") -> None:
    described = f"tiny_runtime-{version}.dist-info"
    files = {
        "tiny_runtime.py": MODULE,
        f"{described}/METADATA": f"Metadata-Version: 2.1\nName: tiny-runtime\nVersion: {version}\n",
        f"{described}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{described}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{described}/RECORD"])
    with zipfile.ZipFile(index / f"tiny_runtime-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


def assert_not_installed(environment: Environment) -> None:
    with pytest.raises(NotInstalled, match="--install-peers puts"):
        environments.command_of(environment)


@pytest.mark.skipif(sys.platform == "win32", reason="it ends a group of processes")
def test_an_installation_that_was_killed_is_begun_anew_and_then_used(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index)
    write_wheel(index, "1.9")
    # Killed when all is installed, and only the trial of the import goes on: nobody can clean up.
    hangs = tmp_path / "hangs"
    script = (
        "from sparsepipe.benchmark.peers.environments import Environment, install\n"
        f"install(Environment('tiny', {TINY.requirements!r}, {TINY.modules!r}, "
        f"{{'TINY_LICENCE': 'read', 'TINY_HANGS': {str(hangs)!r}}}))"
    )
    begun = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        while not hangs.exists():
            assert begun.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(begun.pid, signal.SIGKILL)
        begun.wait()
    folder = environments.folder_of(TINY)
    assert [*folder.rglob("tiny_runtime.py")]
    assert_not_installed(TINY)
    (folder / "left-over").touch()

    environments.install(TINY)
    assert not (folder / "left-over").exists()
    command = environments.command_of(TINY)
    assert command != WORKER_COMMAND
    assert Path(command[0]).is_relative_to(folder)
    with WorkerProcess(command, TINY.variables) as worker:
        asked: dict[str, Any] = {"model": "m", "folder": "f", "samples": None, "inputs": [], "outputs": []}
        answer = worker.ask("prepare", 60.0, runtime="tiny_runtime:Runtime", **asked)
    assert Path(answer["model"]).is_relative_to(folder)
    assert len([*folder.rglob("tiny_runtime-2.1.dist-info")]) == 1

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was there already")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", never)
        environments.install(TINY)
    # What was installed for other requirements, or is damaged, is not taken for what is asked for.
    assert_not_installed(Environment("tiny", ("tiny-runtime>=3",), TINY.modules, TINY.variables))
    ready = folder / environments.READY
    kept = ready.read_text()
    for content in ("", kept[:-3], "[]", "null", "{}"):
        ready.write_text(content)
        assert_not_installed(TINY)
    ready.write_text(kept)
    assert environments.command_of(TINY) == command
    Path(command[0]).unlink()
    assert_not_installed(TINY)


def test_nothing_is_built_and_what_cannot_be_imported_is_removed(index: Path, tmp_path: Path) -> None:
    built = tmp_path / "built"
    (tmp_path / "setup.py").write_text(f"open({str(built)!r}, 'w')\nfrom setuptools import setup\nsetup()\n")
    with tarfile.open(index / "tiny_runtime-2.5.tar.gz", "w:gz") as source:
        source.add(tmp_path / "setup.py", "tiny_runtime-2.5/setup.py")
    with pytest.raises(NotInstalled, match=r"pip cannot install it: No matching distribution .*tiny-runtime>=2"):
        environments.install(TINY)
    assert not built.exists()
    assert not environments.folder_of(TINY).exists()
    write_wheel(index)
    with pytest.raises(NotInstalled, match=r"cannot be imported: .*the licence was not read"):
        environments.install(Environment("tiny", TINY.requirements, TINY.modules))
    assert not built.exists()
    assert not environments.folder_of(TINY).exists()
    assert_not_installed(TINY)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize(
    ("problem", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError("no space left"), NotInstalled),
        (subprocess.TimeoutExpired("pip", 1800), NotInstalled),
        (subprocess.CompletedProcess([], 1, "", "ERROR: a\nWARNING: b\nERROR: the reason\nhint: c\n"), NotInstalled),
        (subprocess.CompletedProcess([], -9, "", ""), NotInstalled),
    ],
)
def test_whatever_ends_a_step_nothing_is_left(
    step: int, problem: Any, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = environments.folder_of(TINY)
    done: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        done.append(command)
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").touch()
        if len(done) <= step:
            return subprocess.CompletedProcess(command, 0, "", "")
        if isinstance(problem, BaseException):
            raise problem
        return problem

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(raised) as caught:
        environments.install(TINY)
    assert len(done) == step + 1
    assert not folder.exists()
    assert_not_installed(TINY)
    if isinstance(problem, subprocess.CompletedProcess):
        assert str(caught.value).endswith(": the reason" if problem.stderr else ": exit code -9")
