"""What sparse training costs beside dense training, in time and memory: `python -m sparsepipe.training.benchmark`.

A step of dense training, one with DST-EE, one with DST-EE that updates the masks and one of each rejected way to apply
masks are timed in turn in one process: by the CPU time of its only thread, or on a GPU by the time until it is done.
What an update costs beyond a step is shared out over the steps from one update to the next.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from sparsepipe.artefact import write_json
from sparsepipe.benchmark.interleaved import Timing, interleave
from sparsepipe.benchmark.statistics import speedup
from sparsepipe.environment import describe_machine, package_versions
from sparsepipe.errors import MissingExtraError, SparsepipeError
from sparsepipe.progress import bar

if TYPE_CHECKING:
    from sparsepipe.training.overhead import Steps

SPARSITY = 0.9
UPDATE_EVERY = 100
"""Optimizer steps from one mask update to the next."""
SHARE = 1 / UPDATE_EVERY
"""Of updates in the steps."""
TARGETS = {"cpu": 0.05, "cuda": 0.03}
"""The most that a step may cost beyond a dense one, as a fraction of it."""
TARGET_BYTES = 3.5
"""The most memory for each weight that may be masked."""
MILLISECONDS = 1e-6  # per nanosecond
PROGRESS = 100


@dataclass(frozen=True)
class Case:
    """One row of the table: a network as it is usually trained, but for a batch that a CPU trains on in seconds.

    What masks cost depends on the number of weights alone, so in a smaller batch they have a larger share.
    """

    network: str
    batch: int
    optimizer: str


CASES = {
    case.network: case
    for case in (Case("resnet20", 128, "sgd"), Case("resnet50-cifar", 32, "sgd"), Case("vit-tiny", 16, "adamw"))
}


def measure(case: Case, *, device: str = "cpu", seconds: float = 60.0) -> dict[str, Any]:
    """One JSON-able row: times in milliseconds, overheads as fractions with 95% intervals, bytes for each weight.

    Args:
        case: what to train.
        device: cpu or cuda.
        seconds: wall time for the timing; if six rounds take longer, six.

    Raises:
        MissingExtraError: torch is not installed.
        RecipeError: there is no CUDA device.
    """
    try:
        from sparsepipe.training import overhead
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch", "train", "The training benchmark") from error
    setting = {**asdict(case), "device": device}
    clock = time.thread_time_ns if device == "cpu" else time.perf_counter_ns
    with overhead.ready(device), bar(f"Timing {case.network}", PROGRESS) as running:
        done = 0

        def show(share: float) -> None:
            nonlocal done
            running.advance(int(share * PROGRESS) - done)
            done = int(share * PROGRESS)

        dense = overhead.Steps(**setting)
        sparse = overhead.SparseSteps(SPARSITY, overhead.NEVER, **setting)
        updating = overhead.SparseSteps(SPARSITY, 1, **setting)
        rejected = [overhead.RejectedSteps(install, SPARSITY, **setting) for install in overhead.REJECTED.values()]
        timings = interleave([dense, sparse, updating, *rejected], seconds, clock=clock, progress=show)
        transient = overhead.peak_bytes(updating) - overhead.peak_bytes(dense)
    base, plain, update, *others = [_of_one_step(timing, dense.steps) for timing in timings]
    return {
        **setting,
        "weights": sparse.weights,
        "dense_ms": base.median * MILLISECONDS,
        "update_ms": (update.median - plain.median) * MILLISECONDS,
        "dst-ee": {
            "overhead": _overhead(_with_updates(plain, update), base),
            "masking": _masking(sparse, base) * (1 - SHARE) + _masking(updating, base) * SHARE,
        },
        "rejected": {
            name: {"overhead": _overhead(timing, base), "masking": _masking(steps, base)}
            for name, steps, timing in zip(overhead.REJECTED, rejected, others, strict=True)
        },
        "bytes_per_weight": {
            "held": sparse.mask_bytes / sparse.weights,
            "at_peak": (sparse.mask_bytes + max(transient, 0)) / sparse.weights,
        },
    }


def _of_one_step(timing: Timing, steps: int) -> Timing:
    return Timing(tuple(calls / steps for calls in timing.rounds))


def _with_updates(plain: Timing, update: Timing) -> Timing:
    """Steps of which one in `UPDATE_EVERY` updates the masks, round by round."""
    extra = [
        float(np.median(after) - np.median(before)) for before, after in zip(plain.rounds, update.rounds, strict=True)
    ]
    return Timing(tuple(calls + more * SHARE for calls, more in zip(plain.rounds, extra, strict=True)))


def _overhead(timing: Timing, base: Timing) -> dict[str, float]:
    """How much more a step takes than in `base`, as a fraction of that, with a 95% interval over the rounds."""
    ratio = speedup(timing.rounds, base.rounds, 0)
    assert ratio is not None, "`interleave` takes enough rounds for an interval"
    return {"value": ratio.value - 1, "low": ratio.low - 1, "high": ratio.high - 1}


def _masking(steps: Steps, base: Timing) -> float:
    """CPU time that a step spends on masks, as a fraction of a step of `base`."""
    return float(np.median(steps.masking)) / base.median


def print_table(rows: Sequence[dict[str, Any]], device: str) -> None:
    """The rows of `measure` for people, on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"A training step on {device}, {SPARSITY:.0%} sparse, masks updated every {UPDATE_EVERY} steps, "
        f"beside the dense step. "
        f"Targets: at most {TARGETS[device]:.0%} more time, {TARGET_BYTES:g} bytes per weight.\n"
        "In brackets: CPU time in the code that masks alone, which noise distorts less. Rejected ways never update.",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("network")
    others = [f"{name} (rejected)" for name in rows[0]["rejected"]]
    for header in ("batch", "weights", "dense", "DST-EE", *others, "one update", "bytes/weight", "at the peak"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row["network"],
            str(row["batch"]),
            f"{row['weights'] / 1e6:.2f} M",
            f"{row['dense_ms']:.4g} ms",
            *(_percent(entry) for entry in (row["dst-ee"], *row["rejected"].values())),
            f"{row['update_ms']:.4g} ms",
            *(f"{row['bytes_per_weight'][name]:.2f}" for name in ("held", "at_peak")),
        )
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def _percent(entry: dict[str, Any]) -> str:
    return "{value:+.1%} ({low:+.1%} to {high:+.1%})".format(**entry["overhead"]) + f" [{entry['masking']:.1%}]"


@click.command()
@click.option("--network", "networks", type=click.Choice(list(CASES)), multiple=True, help="Default: all.")
@click.option("--device", type=click.Choice(list(TARGETS)), default="cpu", show_default=True)
@click.option("--batch", type=click.IntRange(1), help="Samples in a step. Default: as the network is listed.")
@click.option("--seconds", default=60.0, show_default=True, help="Wall time for each network, about.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the result to this JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    networks: Sequence[str], device: str, batch: int | None, seconds: float, out: Path | None, as_json: bool
) -> None:
    """Measure what sparse training costs beside dense training: time and memory."""
    try:
        chosen = [CASES[name] for name in networks or CASES]
        rows = [measure(replace(case, batch=batch or case.batch), device=device, seconds=seconds) for case in chosen]
    except SparsepipeError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    result = {
        "sparsity": SPARSITY,
        "update_every": UPDATE_EVERY,
        "rows": rows,
        "machine": describe_machine(),
        "versions": package_versions(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if out is not None:
        write_json(out, result)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_table(rows, device)


if __name__ == "__main__":
    main()
