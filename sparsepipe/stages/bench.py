"""The stage `bench`: latency, memory and size of ONNX files, measured side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from sparsepipe.artefact import Artefact, digest_file, draft, write_json
from sparsepipe.benchmark.conditions import Watch
from sparsepipe.benchmark.harness import COLD_STARTS, ROUNDS, Ask, Contestant, Measurement, Setting, choose_cpus
from sparsepipe.benchmark.harness import measure as race
from sparsepipe.benchmark.results import file_facts, rows, same_file
from sparsepipe.benchmark.runtimes import FAST_INT8
from sparsepipe.environment import describe_machine, package_versions
from sparsepipe.errors import ArtefactError, GraphError
from sparsepipe.progress import bar
from sparsepipe.recipe import Bench
from sparsepipe.stages.forms import INT8

RESULT_FILE = "bench.json"
BASELINE_TARGET = "dense"


def run(config: BaseModel, inputs: Mapping[str, Artefact], out: Path) -> Artefact:
    """Measure every file of the export, the dense one being the baseline.

    Args:
        config: the recipe's `bench` section.
        inputs: `export`.
        out: folder of the new artefact, with `bench.json`.

    Raises:
        ArtefactError: a file of the export is missing.
        GraphError: no file could be measured.
    """
    assert isinstance(config, Bench)
    export = inputs["export"]
    paths = [export.file(file["name"]) for file in export.metric("files").values()]
    return _write(paths, config, {"export": export.digest}, out)


def measure(paths: Sequence[Path], config: Bench) -> dict[str, Any]:
    """Measure ONNX files from anywhere; the dense export in fp32, or else in int8, or the first file is the baseline.

    Args:
        paths: the files.
        config: threads and batch sizes, each pair of which is measured, time and pinning. Where it gives shapes of
            inputs, the first number of these is the batch size.

    Returns:
        `baseline`, `results` (a row for each file and setting, with `speedup_over_int8` where there is a dense int8
        export beside the baseline), `verdicts` (for each setting, whether the machine was
        noisy) and `environment`.

    Raises:
        ArtefactError: a file is missing.
        GraphError: no file could be measured.
    """
    config = with_batch_of_input(config)
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None or not paths:
        raise ArtefactError("There is no such ONNX file.", where=str(missing) if missing else "bench")
    names = labels(paths)
    facts = [file_facts(path) for path in paths]
    dense = [number for number, one in enumerate(facts) if one.target == BASELINE_TARGET]
    int8 = next((number for number in dense if facts[number].precision == INT8), None)
    baseline = next((number for number in dense if facts[number].precision != INT8), int8 or 0)
    with bar("Measuring", rounds(config)) as running:
        measured = take_turns(
            paths,
            names,
            baseline,
            config,
            lambda note: running.advance(note=note),
            int8=None if int8 == baseline else int8,
        )
    return {
        "baseline": names[baseline],
        "results": measured.results,
        "verdicts": measured.verdicts,
        "environment": {**environment(config), "runtimes": measured.runtimes},
    }


BenchT = TypeVar("BenchT", bound=Bench)


def with_batch_of_input(config: BenchT) -> BenchT:
    """The settings with the batch size that the shapes of inputs name, their first number."""
    batches = dict.fromkeys(shape[0] for shape in config.input.values())
    return config.model_copy(update={"batch": tuple(batches)[:1]}) if batches else config


@dataclass(frozen=True)
class Race:
    """What processes that took turns gave.

    Attributes:
        results: a row for each setting and file.
        runtimes: the different runtimes and settings that the workers described.
        verdicts: for each setting what `results.same_file` says of the baseline, with the `conditions` that
            `Watch.summary` describes.
    """

    results: list[dict[str, Any]]
    runtimes: list[dict[str, Any]]
    verdicts: list[dict[str, Any]]


def take_turns(
    paths: Sequence[Path],
    labels: Sequence[str],
    baseline: int,
    config: Bench,
    advance: Callable[[str], None],
    *,
    int8: int | None = None,
    fast_int8: bool = False,
) -> Race:
    """Measure files at every setting of `config`, each in a process of its own, one running at a time.

    Args:
        paths: the files.
        labels: what to call them in the rows.
        baseline: index of the file that speed-ups are relative to.
        config: threads and batch sizes, time and pinning.
        advance: called `rounds(config)` times.
        int8: index of the dense int8 file; with it each row also has `speedup_over_int8`.
        fast_int8: whether that file is one of `benchmark.int8`, which onnxruntime's fast operators compute exactly.

    Raises:
        GraphError: no file could be measured.
    """
    contestants = [
        Contestant(path, FAST_INT8 if fast_int8 and index == int8 else "onnxruntime")
        for index, path in enumerate(paths)
    ]
    results, reasons, workers, verdicts = [], [], [], []
    for setting in settings(config):
        measured, verdict = judged(contestants, baseline, setting, advance)
        own = rows(labels, measured, setting, baseline)
        if int8 is not None:
            over = rows(labels, measured, setting, int8)
            own = [row | {"speedup_over_int8": other["speedup"]} for row, other in zip(own, over, strict=True)]
        results += own
        reasons += [one.failure for one in measured if one.failure is not None]
        workers += [one.settings for one in measured if one.settings]
        verdicts.append(verdict)
    if len(reasons) == len(results):
        raise GraphError(f"No file could be measured: {reasons[0]}", where=labels[0])
    return Race(results, list({str(one): one for one in workers}.values()), verdicts)


def judged(
    contestants: Sequence[Contestant],
    baseline: int,
    setting: Setting,
    advance: Callable[[str], None],
    admit: Callable[[int, Ask], str | None] = lambda index, ask: None,
) -> tuple[list[Measurement], dict[str, Any]]:
    """Measure, and tell whether the machine was quiet enough: the baseline runs in two processes.

    Args:
        contestants: as `harness.measure` takes them.
        baseline: index of the one that runs twice.
        setting: threads, batch, time and processors.
        advance: called `ROUNDS` times.
        admit: as `harness.measure` takes it; the second process of the baseline is not asked about.

    Returns:
        A measurement for each contestant, and an entry of `Race.verdicts`.
    """
    watch = Watch(setting.cpus)

    def look(note: str) -> None:
        watch.look()
        advance(note)

    twin = contestants[baseline]
    measured = race(
        [*contestants, twin], setting, look, lambda index, ask: admit(index, ask) if index < len(contestants) else None
    )
    verdict = same_file(measured[baseline], measured.pop(), setting)
    return measured, {**verdict, "conditions": watch.summary()}


def rounds(config: Bench) -> int:
    """How many steps of progress `take_turns` has."""
    return len(settings(config)) * ROUNDS


def environment(config: Bench) -> dict[str, Any]:
    """The machine, the versions and the settings that a result was measured with."""
    return {
        **describe_machine(),
        "versions": package_versions(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {**config.model_dump(mode="json"), "rounds": ROUNDS, "cold_starts": COLD_STARTS},
    }


def record(paths: Sequence[Path], config: Bench, out: Path) -> Artefact:
    """`measure` files from anywhere, and keep the result in the folder `out`."""
    digests = {label: digest_file(path) for label, path in zip(labels(paths), paths, strict=True)}
    return _write(paths, config, digests, out)


def _write(paths: Sequence[Path], config: Bench, inputs: Mapping[str, str], out: Path) -> Artefact:
    with draft(out, "bench", config, inputs) as building:
        result = measure(paths, config)
        write_json(building.folder / RESULT_FILE, result)
        building.metrics.update(result)
    return Artefact.read(out)


def labels(paths: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two files have the same name."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(set(paths)) else [str(path) for path in paths]


def settings(config: Bench) -> list[Setting]:
    """Each number of threads with each batch size."""
    return [
        Setting(
            threads,
            batch,
            config.seconds,
            choose_cpus(threads) if config.pin else None,
            shapes=config.input,
            timeout=config.timeout,
        )
        for threads in config.threads
        for batch in config.batch
    ]
