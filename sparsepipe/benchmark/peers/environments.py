"""Virtual environments for runtimes whose pins conflict with ours: made on request, under the user's cache folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from sparsepipe.benchmark.client import WORKER_COMMAND

READY = "ready.json"
BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
INSTALL_SECONDS = 1800.0


class NotInstalled(Exception):
    """A runtime is not there, or cannot be installed; the message is a reason to show in its row."""


@dataclass(frozen=True)
class Environment:
    """Packages that are installed together.

    Attributes:
        name: of its folder.
        requirements: what pip is asked for.
        modules: what it must be able to import.
        variables: for the processes that run in it.
    """

    name: str
    requirements: tuple[str, ...]
    modules: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


def cache_folder() -> Path:
    """`$SPARSEPIPE_CACHE`, else `sparsepipe` in the user's cache folder."""
    if chosen := os.environ.get("SPARSEPIPE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsepipe"


def folder_of(environment: Environment) -> Path:
    return cache_folder() / "peers" / environment.name


def command_of(environment: Environment) -> tuple[str, ...]:
    """How to start a worker in an environment: its own Python, or else this one where this one has the packages.

    Raises:
        NotInstalled: neither has them.
    """
    folder = folder_of(environment)
    if _is_ready(folder, environment):
        return str(_python(folder)), "-I", str(BOOTSTRAP)
    if all(find_spec(module) for module in environment.modules):
        return WORKER_COMMAND
    raise NotInstalled(
        f"not installed: --install-peers puts {', '.join(environment.requirements)} into an environment of its own "
        f"under {cache_folder() / 'peers'}"
    )


def install(environment: Environment) -> None:
    """Make the environment, unless it is there already. Wheels only: nothing is built.

    Raises:
        NotInstalled: pip could not install it; what was begun is removed.
    """
    folder = folder_of(environment)
    if _is_ready(folder, environment):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(_python(folder)), "-I", "-m", "pip", "--disable-pip-version-check", "install", "--only-binary", ":all:"]
    check = "import " + ", ".join(environment.modules)
    try:
        _run([sys.executable, "-I", "-m", "venv", str(folder)], "its environment cannot be made")
        _run([*pip, *environment.requirements], "pip cannot install it")
        _run(
            [str(_python(folder)), "-I", "-c", check], "it is installed, but cannot be imported", environment.variables
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    marker = folder / f"{READY}.partial"
    marker.write_text(json.dumps({"requirements": environment.requirements}))
    marker.replace(folder / READY)


def _is_ready(folder: Path, environment: Environment) -> bool:
    try:
        held = json.loads((folder / READY).read_text())
    except (OSError, ValueError):
        return False
    return bool(held == {"requirements": list(environment.requirements)}) and _python(folder).is_file()


def _python(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python"


def _run(command: list[str], problem: str, variables: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=INSTALL_SECONDS,
            env={**os.environ, **(variables or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{problem}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        # pip's last error is the summary; before it stand all versions that it has seen.
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit code {done.returncode}"]
        raise NotInstalled(f"{problem}: {errors[-1].removeprefix('ERROR:').strip()}")
