"""`sparsepipe doctor`."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Any

import click

from sparsepipe.cli import common
from sparsepipe.reporting import units

SETS = ("all", "test")
"""Extras that only gather others, or are for those who work on sparsepipe itself."""


@click.command("doctor")
@common.output_options
def command(as_json: bool) -> None:
    """Show versions, the processor and its vector extensions, threads, and whether the kernel library loads."""
    from sparsepipe.environment import describe_machine, package_versions
    from sparsepipe.runtime import library

    result: dict[str, Any] = {
        "versions": package_versions(),
        "extras": _extras(),
        "machine": describe_machine(),
        "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "cuda": _cuda(),
        "kernel_library": library.status(),
    }
    if as_json:
        common.print_json(result)
        return
    common.print_table(["package", "version"], result["versions"].items())
    common.print_table(
        ["extra", "state"],
        [
            [name, "installed" if not missing else f"missing: {', '.join(missing)}"]
            for name, missing in result["extras"].items()
        ],
    )
    machine = {**result["machine"], "memory_bytes": units.size(result["machine"]["memory_bytes"])}
    rows = [[key.removesuffix("_bytes").replace("_", " "), _flat(value)] for key, value in machine.items()]
    rows += [[name, value or "not set"] for name, value in result["threads"].items()]
    rows += [
        ["CUDA", result["cuda"]],
        *[[f"kernel library: {key}", _flat(value)] for key, value in result["kernel_library"].items()],
    ]
    common.print_table(["machine", ""], rows)


def _extras() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed, read from the metadata of the installed sparsepipe."""
    extras = metadata("sparsepipe").get_all("Provides-Extra") or []
    missing: dict[str, list[str]] = {name: [] for name in extras if name not in SETS}
    for requirement in requires("sparsepipe") or []:
        parts = re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if parts and parts[2] in missing:
            try:
                version(parts[1])
            except PackageNotFoundError:
                missing[parts[2]].append(parts[1])
    return missing


def _cuda() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "not available"


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items()) or None
    return " ".join(map(str, value)) if isinstance(value, list) else value
