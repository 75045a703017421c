"""The edge profile of `bench`: what matters on a small device, one thread and one sample at a time."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsepipe.artefact import Artefact, digest_file, draft, write_json
from sparsepipe.benchmark import energy, limited
from sparsepipe.benchmark.harness import Contestant, Setting, choose_cpus, patience
from sparsepipe.benchmark.results import files_of
from sparsepipe.errors import RecipeError
from sparsepipe.recipe import Bench
from sparsepipe.stages import bench

SCHEMA_VERSION = 1
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
GZIP_LEVEL = 9


def measure(paths: Sequence[Path], config: Bench, memory_limit: int | None = None) -> dict[str, Any]:
    """Measure files as `bench.measure`, with one thread that is pinned and batch 1, and what else a device asks for.

    Args:
        paths: the files.
        config: time, and shapes of inputs; threads, batch and pinning are those of the profile.
        memory_limit: bytes; each file is also run in a process with so much memory.

    Returns:
        The result of `bench.measure` with `profile` "edge"; each row has `gzip_bytes`, `energy` (`joules` a call, or
        None with a `note`) and `limit` (None, or `fits`, `bytes`, `how` and perhaps a `reason`).

    Raises:
        ArtefactError: a file is missing.
        GraphError: no file could be measured.
    """
    config = config.model_copy(update={"threads": (1,), "batch": (1,), "pin": True})
    result = bench.measure(paths, config)
    shapes = {name: list(shape) for name, shape in config.input.items()}
    cpus = choose_cpus(1)
    setting = Setting(1, 1, config.seconds, cpus, timeout=config.timeout)
    batch = next((shape[0] for shape in config.input.values()), 1)
    for path, row in zip(paths, result["results"], strict=True):
        timeout = patience(Contestant(path), setting)
        model = str(path.absolute())
        row["gzip_bytes"] = sum(len(gzip.compress(file.read_bytes(), GZIP_LEVEL, mtime=0)) for file in files_of(path))
        row["energy"] = energy.per_call(model, batch, shapes, list(cpus) if cpus else None, config.seconds, timeout)
        row["limit"] = limited.fits(model, memory_limit, batch, shapes, timeout) if memory_limit else None
    return {"schema_version": SCHEMA_VERSION, "profile": "edge", **result}


def record(paths: Sequence[Path], config: Bench, out: Path, memory_limit: int | None = None) -> Artefact:
    """`measure`, and keep the result in the folder `out`, as `bench` does."""
    digests = {label: digest_file(path) for label, path in zip(bench.labels(paths), paths, strict=True)}
    with draft(out, "bench", config, digests) as building:
        result = measure(paths, config, memory_limit)
        write_json(building.folder / bench.RESULT_FILE, result)
        building.metrics.update(result)
    return Artefact.read(out)


def parse_bytes(text: str) -> int:
    """`256M` as bytes; K, M and G are powers of 1024.

    Raises:
        RecipeError: it is no size.
    """
    found = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise RecipeError(
            f"'{text}' is no amount of memory.", where="--memory-limit", advice="Write 256M, for example."
        )
    return int(found[1]) * UNITS[found[2].upper()]
