"""The page of a benchmark: records and profiles -> plain data (`page`), and that as HTML and as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from sparsepipe.benchmark import records as measured
from sparsepipe.benchmark.records import CPU, DENSE, INT8, OURS, SPARSE, Group, Record, SparseForm
from sparsepipe.reporting import bench_plots, html, layer_table, roofline, units, verdicts, views
from sparsepipe.reporting.contents import Estimate
from sparsepipe.reporting.figures import Figure
from sparsepipe.reporting.markdown import Table

SCHEMA_VERSION = 1
MOST_BARS, SHOWN = 16, 0.9
HEADERS = (
    "network", "file", "threads", "batch", "clock", "latency", "p99", "speed-up", "memory", "size", "load", "accuracy",
)  # fmt: skip
OPTIONS = ("network", "sparsity", "pattern", "precision", "peers", "threads", "batch", "seconds")
"""Settings that are options of the command of the same name."""
Row = Mapping[str, Any]


def page(
    sources: Mapping[str, Row],
    *,
    title: str,
    accuracy: Mapping[str, Mapping[str, Row]] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What the page shows, as JSON-able data.

    Args:
        sources: name of a file of results -> its JSON: any result of `bench`, and profiles.
        title: heading of the page.
        accuracy: name of a source -> label of a file in it -> `value`, `low` and `high` of its test accuracy.
        notes: sentences that a reader must know.

    Returns:
        `schema_version`, `kind` "report", `title`, `sources`, `rows` (records, with `accuracy` and `best`), `profiles`,
        `commands`, `environment` (source -> keys and values), `notes`, and `noisy`, whether any measurement was, or two
        processes of one file differed too much.

    Raises:
        ArtefactError: a source is no result.
    """
    rows, profiles, commands = [], [], []
    for name, result in sources.items():
        if measured.kind_of(result) == "profile":
            profiles.append(dict(result))
        else:
            known = (accuracy or {}).get(name, {})
            rows += [
                {**record.as_dict(), "source": name, "accuracy": known.get(record.label)}
                for record in measured.read(result, where=name)
            ]
        commands.append(_command(result))
    found = [*notes, *_notes(rows)]
    for name, result in sources.items():
        found += [f"{_short(name)}: {sentence}" if len(sources) > 1 else sentence for sentence in _quiet(result)]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "report",
        "title": title,
        "sources": list(sources),
        "rows": rows,
        "profiles": profiles,
        "commands": commands,
        "environment": {name: dict(_environment(result)) for name, result in sources.items()},
        "notes": found,
        "noisy": any(one["noisy"] for one in (*rows, *chain.from_iterable(map(_verdicts, sources.values())))),
    }


def render(data: Row) -> str:
    """The page as HTML; equal data gives equal text."""
    rows = [Record(**{key: value for key, value in row.items() if key != "accuracy"}) for row in data["rows"]]
    profiles = [
        {
            "figure": roofline.figure(profile, name=f"roofline-{number}"),
            "tables": layer_table.tables(profile),
            "remarks": layer_table.remarks(profile),
        }
        for number, profile in enumerate(data["profiles"])
    ]
    return html.fill(
        "bench.html",
        {
            "title": data["title"],
            "headline": _headline(rows),
            "table": table(data),
            "latency": [*_latencies(rows)],
            "speedups": [*_speedups(rows)],
            "pareto": [*_pareto(data["rows"])],
            "memory": [*_memory(rows)],
            "profiles": profiles,
            "environment": data["environment"],
            "commands": data["commands"],
            "notes": data["notes"],
            "noisy": data["noisy"],
        },
    )


def table(data: Row) -> Table:
    """A row for each record, in the order of the data; further columns where there is something to show in them."""
    rows = data["rows"]
    further: dict[str, Callable[[Row], str]] = {}
    if any(row["speedup_over_int8"] for row in rows):
        further["over dense int8"] = lambda row: _gain(row["speedup_over_int8"])
    if _several(rows):
        further["source"] = lambda row: _short(row["source"])
    lines = [[*_cells(row), *(cell(row) for cell in further.values())] for row in rows]
    return Table("Measurements", (*HEADERS, *further), lines)


def markdown(data: Row) -> str:
    """The same data for a document."""
    parts = [f"# {data['title']}"]
    if data["rows"]:
        parts.append(table(data).markdown())
    parts += [layer_table.markdown(profile) for profile in data["profiles"]]
    parts += ["\n".join(f"- {note}" for note in data["notes"])] if data["notes"] else []
    parts.append("\n".join(["```bash", *data["commands"], "```"]))
    parts += [
        "\n".join([f"{source}:", "", *(f"- {key}: {value}" for key, value in lines.items())])
        for source, lines in data["environment"].items()
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> list[str]:
    clock = "CPU, best decile" if row["clock"] == CPU else "wall, median"
    return [
        row["network"] or units.MISSING,
        row["label"],
        str(row["threads"]),
        str(row["batch"]),
        clock,
        _with_interval(row["latency_ms"], units.milliseconds, units.milliseconds_interval),
        _with_interval(row["tail_ms"], units.milliseconds, units.milliseconds_interval),
        _gain(row["speedup"]),
        units.size(row["memory_bytes"]),
        units.size(row["file_bytes"]),
        units.milliseconds(row["load_ms"]),
        _with_interval(row["accuracy"], units.percent, units.percent_interval),
    ]


def _gain(estimate: Row | None) -> str:
    return _with_interval(estimate, units.ratio, units.ratio_interval)


def _with_interval(estimate: Row | None, value: Any, interval: Any) -> str:
    if estimate is None:
        return units.MISSING
    parsed = Estimate(value=estimate["value"], low=estimate.get("low"), high=estimate.get("high"))
    bounds = interval(parsed)
    return f"{value(parsed.value)} ({bounds})" if bounds else str(value(parsed.value))


def _headline(rows: Sequence[Record]) -> str | None:
    """The largest speed-up of sparsepipe whose interval excludes 1, of those on a quiet machine, and what it is of."""
    ours = [
        row for row in rows if row.speedup and row.kind == SPARSE and (not row.runtime or row.runtime.startswith(OURS))
    ]
    sure = [row for row in ours if row.speedup and (row.speedup.get("low") or 0) > 1 and not row.noisy]
    if not sure:
        return None
    best = max(sure, key=lambda row: row.speedup["value"] if row.speedup else 0.0)
    assert best.speedup is not None
    where = f"{best.network}, {best.label}" if best.network else best.label
    return (
        f"The largest of {units.plural(len(ours), 'speed-up')}: {_gain(best.speedup)} over "
        f"{best.baseline or 'its dense file'}, of {where} ({units.plural(best.threads, 'thread')}, batch {best.batch})."
    )


def _several(rows: Sequence[Row]) -> bool:
    """Whether the rows stand in several results, so that they need to be told apart."""
    return len({row["source"] for row in rows}) > 1


def _title(key: Group, several: bool) -> str:
    name = f"{key.network}: " if key.network else ""
    text = (
        f"{name}{units.plural(key.threads, 'thread')}, batch {key.batch}, {'CPU' if key.clock == CPU else 'wall'} time"
    )
    return f"{text} ({_short(key.source)})" if several else text


def _short(source: str) -> str:
    return "/".join(PurePath(source).parts[-2:])


def _slug(kind: str, number: int) -> str:
    return f"{kind}-{number}"


def _latencies(rows: Sequence[Record]) -> Iterator[Figure]:
    several = len({row.source for row in rows}) > 1
    for number, (key, group) in enumerate(measured.groups(rows).items()):
        known = [row for row in group if row.latency_ms]
        if not known:
            continue
        shown = _fewer(known)
        # Of dense files that stand beside several sparse ones, one is enough for a picture.
        repeated = {row.label for row in shown if row.kind != SPARSE} - {
            next((row.label for row in shown if row.kind == kind), "") for kind in (DENSE, INT8)
        }
        shown = [row for row in shown if row.label not in repeated or " beside " not in row.label][:MOST_BARS]
        bars = [
            bench_plots.Bar(
                row.label.partition(" beside ")[0],
                row.kind,
                row.latency_ms or {},
                units.milliseconds((row.latency_ms or {})["value"]) + (", noisy" if row.noisy else ""),
            )
            for row in shown
        ]
        title = _title(key, several)
        alt = f"Latency, {title}. " + "; ".join(f"{bar.label}: {bar.text}" for bar in bars) + "."
        axis = "CPU time of one call, ms (best decile)" if key.clock == CPU else "latency of one call, ms (median)"
        svg = bench_plots.bars(bars, name=_slug("latency", number), alt=alt, x_label=axis)
        left = len(known) - len(shown)
        yield Figure(title, Markup(svg), f"{left} more are in the table." if left else "")


def _fewer(rows: Sequence[Record]) -> list[Record]:
    """Where there are more than a picture of bars holds, those of the sparsity that is next to `SHOWN`."""
    sparsities = {row.sparsity for row in rows if row.sparsity is not None}
    if len(rows) > MOST_BARS and sparsities:
        chosen = min(sparsities, key=lambda sparsity: abs(sparsity - SHOWN))
        return [row for row in rows if row.sparsity in (None, chosen)]
    return list(rows)


def _speedups(rows: Sequence[Record]) -> Iterator[Figure]:
    several = len({row.source for row in rows}) > 1
    for number, (key, group) in enumerate(measured.groups(rows).items()):
        patterns: dict[str, list[Record]] = {}
        for row in group:
            if row.pattern and row.sparsity is not None and row.speedup:
                patterns.setdefault(row.pattern, []).append(row)
        if not patterns:
            continue
        lines = []
        for pattern, found in patterns.items():
            found.sort(key=lambda row: row.sparsity or 0.0)
            lines.append(
                bench_plots.Series(
                    pattern, [row.sparsity or 0.0 for row in found], [row.speedup or {} for row in found]
                )
            )
        plain = (row for row in group if row.kind == INT8 and not row.pattern)
        int8 = next((row.speedup["value"] for row in plain if row.speedup), None)
        said = "; ".join(
            f"{line.label}: "
            + ", ".join(
                f"{units.ratio(estimate['value'])} at {100 * share:.4g}%"
                for share, estimate in zip(line.sparsity, line.speedup, strict=True)
            )
            for line in lines
        )
        alt = f"Speed-up over dense, {_title(key, several)}. {said}."
        svg = bench_plots.speedups(lines, int8, name=_slug("speedup", number), alt=alt)
        yield Figure(_title(key, several), Markup(svg), f"{said}.")


def _pareto(rows: Sequence[Row]) -> Iterator[Figure]:
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        if row["accuracy"] and row["latency_ms"]:
            groups.setdefault(Group(*(row[name] for name in Group._fields)), []).append(row)
    for number, (key, group) in enumerate(groups.items()):
        at = [(row["latency_ms"]["value"], row["accuracy"]["value"]) for row in group]
        points = [
            bench_plots.Point(
                row["label"],
                row["kind"],
                row["latency_ms"],
                row["accuracy"],
                not any(x <= mine[0] and y >= mine[1] and (x, y) != mine for x, y in at),
            )
            for row, mine in zip(group, at, strict=True)
        ]
        said = "; ".join(
            f"{point.label}: {units.percent(point.accuracy['value'])} in {units.milliseconds(point.latency['value'])}"
            for point in points
        )
        title = _title(key, _several(rows))
        alt = f"Accuracy against latency, {title}. {said}. Filled marks: no other is faster and as accurate."
        yield Figure(title, Markup(bench_plots.pareto(points, name=_slug("pareto", number), alt=alt)), alt)


def _memory(rows: Sequence[Record]) -> Iterator[Figure]:
    several = len({row.source for row in rows}) > 1
    for number, (key, group) in enumerate(measured.groups(rows).items()):
        known = [row for row in group if row.memory_bytes and " beside " not in row.label] or [
            row for row in group if row.memory_bytes
        ]
        dense = next((row for row in group if row.kind == DENSE and row.memory_bytes), None)
        known = _fewer(known)
        known = ([dense, *(row for row in known if row is not dense)] if dense else known)[:MOST_BARS]
        if not known:
            continue
        bars = [
            bench_plots.Bar(
                row.label.partition(" beside ")[0],
                row.kind,
                {"value": (row.memory_bytes or 0) / 1e6},
                f"{units.size(row.memory_bytes)}, file {units.size(row.file_bytes)}",
            )
            for row in known
        ]
        title = _title(key, several)
        alt = f"Resident memory, {title}. " + "; ".join(f"{bar.label}: {bar.text}" for bar in bars) + "."
        svg = bench_plots.bars(
            bars, name=_slug("memory", number), alt=alt, x_label="resident memory of the process, MB"
        )
        yield Figure(title, Markup(svg), "")


def _notes(rows: Sequence[Row]) -> list[str]:
    noisy = sum(row["noisy"] for row in rows)
    found = [f"The machine was noisy in {noisy} of {len(rows)} measurements: small differences are noise."] * bool(
        noisy
    )
    for row in rows:
        if row["note"] and row["latency_ms"] is None:
            found.append(f"{row['label']}, {row['threads']} threads, batch {row['batch']}: {row['note']}")
    return found


def _quiet(result: Row) -> list[str]:
    """What a result says of the noise, the clock and the heat of its machine."""
    found = _verdicts(result)
    if measured.kind_of(result) == "files":
        return [verdicts.sentence(verdict, result["results"]) for verdict in found]
    return [verdicts.summary(found)] if found else []


def _verdicts(result: Row) -> list[Row]:
    """On two processes of one file, of every race of a result; results from before there were any have none."""
    races = result["rows"] if measured.kind_of(result) == "suite" else [result]
    return [verdict for race in races for verdict in race.get("verdicts", [])]


def _environment(result: Row) -> Iterable[tuple[str, str]]:
    table = {**result.get("environment", {})}
    if result.get("settings"):
        table["settings"] = result["settings"]
    return views.flatten(table)


def _command(result: Row) -> str:
    """What to type to make a result again."""
    kind = measured.kind_of(result)
    settings = result.get("settings") or result.get("environment", {}).get("settings") or {}
    if kind == "profile":
        words = ["profile", result["file"], *(["--against", result["against"]] if result["against"] else [])]
        settings = {**settings, "threads": [result["threads"]], "batch": [result["batch"]]}
    elif kind == "whatif":
        words = ["bench", "--model", result["model"]]
    elif kind == "suite":
        words = ["bench", "--suite", result.get("suite", "kernels")]
        rows = result["rows"]
        files = [file for row in rows for file in row.get("files", [row]) if file.get("sparsity") is not None]
        settings = {
            **settings,
            "network": list(dict.fromkeys(row["network"] for row in rows)),
            "pattern": list(dict.fromkeys(str(SparseForm.of(row)) for row in rows if "pattern" in row)),
            "sparsity": sorted({file["sparsity"] for file in files}),
        }
    else:
        names = (row["file"].removesuffix(f", {row.get('runtime')}") for row in result["results"])
        words = ["bench", *dict.fromkeys(names)]
    shown: tuple[str, ...] = OPTIONS
    if profile := result.get("profile"):
        words += ["--profile", profile]
        limits = [row["limit"]["bytes"] for row in result["results"] if row["limit"]]
        words += ["--memory-limit", str(limits[0])] if limits else []
        shown = ("seconds",)
    if settings.get("calibrate"):
        words += ["--calibrate", settings["calibrate"]["name"]]
    for name, shape in (settings.get("input") or {}).items():
        words += ["--input", f"{name}={'x'.join(map(str, shape))}".removeprefix("=")]
        shown = tuple(key for key in shown if key != "batch")
    for key in shown:
        value = settings.get(key)
        if value not in (None, [], ()) and not (kind == "suite" and key == "batch"):
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{key}", ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)]
    return shlex.join(["sparsepipe", *words, *["--no-pin"] * (settings.get("pin") is False and not profile)])
