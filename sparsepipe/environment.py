"""What a result depends on besides its inputs: package versions, and the processor and its settings."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("sparsepipe", "numpy", "scipy", "onnx", "onnxruntime", "torch", "lightning-fabric", "onnxscript")


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that results depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """The machine as a flat JSON-able dict: processor, its vector extensions, cores, caches, memory, kernel."""
    import psutil

    model, flags = _cpu_info()
    known = (
        "sse4_2",
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx_vnni",
        "amx_int8",
        "asimd",
        "asimddp",
        "i8mm",
        "sve",
    )
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "isa": [flag for flag in known if flag in flags],
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "cores_usable": usable_cores(),
        "cpu_quota": cpu_quota(),
        "caches": _caches(),
        "memory_bytes": psutil.virtual_memory().total,
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "virtual": "hypervisor" in flags,
        "os": platform.platform(),
    }


def usable_cores() -> int:
    """Cores, logical ones, that this process may keep busy: those it may run on, and no more than its quota allows."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(min(allowed, int(quota)), 1)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many processors' time the control groups of this process allow, as containers have it; None: no limit.

    A process that uses more is stopped for the rest of a period, of 100 ms mostly.

    Args:
        root: where the files of the system begin.
    """
    found = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):  # version 2 names none
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = top / path.lstrip("/")
        found += [_quota(one) for one in (folder, *folder.parents) if one.is_relative_to(top)]
    return min((quota for quota in found if quota), default=None)


def _quota(folder: Path) -> float | None:
    """Of one control group, of version 2 or else 1: time that it may use in a period, over the period."""
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    text = _read(folder / "cpu.max") or " ".join(_read(folder / name) or "" for name in names)
    numbers = [int(part) for part in text.split() if part.isdigit()]  # "max", or -1, is no limit
    return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] else None


def int8_saturates() -> bool:
    """Whether onnxruntime's int8 operators saturate here: x86 without VNNI adds pairs of products in 16 bits.

    Two products of a uint8 and an int8 fit only if the int8 one has 7 bits; onnxruntime's session option
    `session.x64quantprecision` takes an exact, slower way.
    """
    return platform.machine().lower() in ("x86_64", "amd64") and not _cpu_info()[1] & {"avx512_vnni", "avx_vnni"}


def _cpu_info(root: Path = Path("/")) -> tuple[str, set[str]]:
    """Name and vector extensions of the processor; of an Arm one without a name, the numbers of its kinds of cores."""
    model, flags, cores = "", set[str](), dict[str, None]()
    facts: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        facts[key] = value
        if key in ("model name", "Model") and value:
            model = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
        elif key == "CPU part":  # it stands behind that of its maker
            cores[f"{facts.get('CPU implementer', '')}:{value}"] = None
    unnamed = platform.processor() or platform.machine()
    return model or " ".join([unnamed, *cores]), flags


def _caches() -> dict[str, str]:
    found: dict[str, str] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
