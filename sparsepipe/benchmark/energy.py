"""Energy of calls by the counters of the processor (RAPL), where the system lets this user read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsepipe.benchmark.client import WorkerError, WorkerProcess

POWERCAP = Path("/sys/class/powercap")
NOT_READABLE = "energy is not readable here: no readable RAPL counter under /sys/class/powercap"


@dataclass(frozen=True)
class Counter:
    """One package of the machine, in microjoules; it starts anew after `range`."""

    path: Path
    range: int

    def read(self) -> int:
        return int((self.path / "energy_uj").read_text())

    def since(self, earlier: int) -> int:
        """Microjoules since `earlier`, for less than one turn of the counter."""
        return (self.read() - earlier) % (self.range + 1)


def counters(root: Path = POWERCAP) -> list[Counter]:
    """The packages that can be read; none on virtual machines and for users without the right."""
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            # Others count a part of a package, or the platform (psys), in which the packages are counted once more.
            if not (folder / "name").read_text().startswith("package"):
                continue
            counter = Counter(folder, int((folder / "max_energy_range_uj").read_text()))
            counter.read()
        except (OSError, ValueError):
            continue
        found.append(counter)
    return found


def per_call(
    model: str, batch: int, shapes: dict[str, list[int]], cpus: list[int] | None, seconds: float, timeout: float,
    root: Path = POWERCAP,
) -> dict[str, object]:  # fmt: skip
    """Joules of one call of a file with one thread: all packages together, idle power and other processes included.

    Returns:
        `joules` (None where unknown), `calls`, and `note`, which says what was counted or why nothing was.
    """
    packages = counters(root)
    if not packages:
        return {"joules": None, "calls": 0, "note": NOT_READABLE}
    try:
        with WorkerProcess() as process:
            loaded = process.ask(
                "load", timeout, runtime="onnxruntime", model=model, threads=1, batch=batch, seed=0, shapes=shapes,
                cpus=cpus,
            )  # fmt: skip
            count = max(1, round(1e3 * seconds / max(loaded["first_call_ms"], 1e-3)))
            before = [package.read() for package in packages]
            process.ask("run", timeout, count=count, warmup=0)
            spent = sum(package.since(start) for package, start in zip(packages, before, strict=True))
    except WorkerError as error:
        return {"joules": None, "calls": 0, "note": str(error)}
    note = "energy of all packages, with idle power and whatever else ran"
    return {"joules": spent / 1e6 / count, "calls": count, "note": note}
