"""Layer by layer: what each takes, how near it comes to what the machine can do, and why not nearer."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import onnx
from pydantic import Field, PositiveInt

from sparsepipe.artefact import Artefact, digest_file, draft, write_json, write_text
from sparsepipe.benchmark import roofline
from sparsepipe.benchmark.gaps import Measured, legend, reasons
from sparsepipe.benchmark.layer_work import LayerWork, layers_of, sparsity_of
from sparsepipe.benchmark.node_times import WARM_UP_CALLS, NodeTime, Profile, Profiler, named
from sparsepipe.environment import describe_machine, package_versions
from sparsepipe.errors import GraphError, one_line
from sparsepipe.graph.load import load, load_with_rows
from sparsepipe.graph.sizes import sizes_of
from sparsepipe.recipe import Shapes
from sparsepipe.runtime.inputs import aligned, inputs_of, merge, random_inputs, rename, sized
from sparsepipe.runtime.sessions import session
from sparsepipe.settings import Section

SCHEMA_VERSION = 1
RESULT_FILE, TABLE_FILE, PICTURE_FILE = "profile.json", "profile.md", "roofline.svg"
SEED = 0
FEWEST_CALLS = 20
LAYOUT = ("ReorderInput", "ReorderOutput", "Transpose")
METHOD = (
    "Times of operators by onnxruntime's profiler, mean of the calls between the first decile and the median; files "
    "take turns call by call (one after the other with several threads). Operations are 2 for each nonzero weight and "
    "output position; bytes are the weights as stored, activations and outputs of the operator, each once."
)


class ProfileConfig(Section):
    """How files are profiled."""

    threads: PositiveInt = 1
    batch: PositiveInt = 1
    seconds: Annotated[float, Field(gt=0)] = 3.0
    """Time for the calls of each file, about; at least 20 calls are made."""
    input: Shapes = {}  # noqa: RUF012 - pydantic copies it
    """Where the files leave sizes open."""


@dataclass(frozen=True)
class _File:
    path: Path
    layers: list[LayerWork]
    model: onnx.ModelProto
    feeds: dict[str, Any]


def measure(path: Path, config: ProfileConfig, against: Path | None = None) -> dict[str, Any]:
    """Profile an ONNX file, perhaps beside a dense one of the same network.

    Args:
        path: a dense, portable or universal file, or any other ONNX file.
        config: threads, batch and time.
        against: the dense file; its layers are found by the names of their weights, or by their order and shapes.

    Returns:
        `schema_version`, `file`, `against`, `roofline`, `layers` (a row for each), `reasons` (what they mean), `other`
        (the remaining work by operator), `total`, `method` and `environment`.

    Raises:
        GraphError: a file cannot be read or run, or the two take different inputs.
    """
    roof = roofline.measure(config.threads)
    batch = next((shape[0] for shape in config.input.values()), config.batch)
    files = [_read(path, config, batch)]
    if against is not None:
        files.append(_read(against, config, batch, like=files[0]))
    profiles = _run(files, config)
    rows = _rows(files[0], profiles[0], roof)
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "profile",
        "file": path.name,
        "against": against.name if against else None,
        "threads": config.threads,
        "batch": batch,
        "settings": {"seconds": config.seconds, "input": {name: list(shape) for name, shape in config.input.items()}},
        "input": {name: list(value.shape) for name, value in files[0].feeds.items()},
        "sparsity": sparsity_of(files[0].layers),
        "roofline": {**roof.as_dict(), "ridge": roof.ridge},
        "layers": rows,
        "reasons": legend(reason for row in rows for reason in row["reasons"]),
        "other": _other(profiles[0]),
        "total": _total(profiles[0], rows),
        "method": METHOD,
        "environment": {
            **describe_machine(),
            "versions": package_versions(),
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    if against is not None:
        dense = _rows(files[1], profiles[1], roof)
        _compare(rows, dense)
        result["dense"] = {"total": _total(profiles[1], dense), "other": _other(profiles[1])}
    return result


def record(path: Path, config: ProfileConfig, out: Path, against: Path | None = None) -> Artefact:
    """`measure`, and keep the result, its table and, where matplotlib is installed, the picture in the folder `out`."""
    from sparsepipe.reporting import layer_table

    inputs = {one.name if not index else f"against {one.name}": digest_file(one)
              for index, one in enumerate((path, against)) if one}  # fmt: skip
    with draft(out, "profile", config, inputs) as building:
        result = measure(path, config, against)
        write_json(building.folder / RESULT_FILE, result)
        write_text(building.folder / TABLE_FILE, layer_table.markdown(result) + "\n")
        try:
            from sparsepipe.reporting import roofline as picture
        except ImportError:
            pass  # `record` has no console of its own: the command says what is missing
        else:
            write_text(building.folder / PICTURE_FILE, picture.document(result))
        building.metrics.update(result)
    return Artefact.read(out)


def _read(path: Path, config: ProfileConfig, batch: int, like: _File | None = None) -> _File:
    load(path)  # trusts nothing; what follows may
    try:
        model = named(onnx.load(path))
    except Exception as error:  # protobuf, onnx and the file system each raise their own
        raise GraphError(f"The file cannot be read: {one_line(error)}", where=str(path)) from error
    with tempfile.TemporaryDirectory(prefix="sparsepipe-") as folder:
        copy = Path(folder) / path.name
        onnx.save(model, copy)
        plain, compact = load_with_rows(copy)
        opened = inputs_of(session(copy, threads=1))
    if like is None:
        feeds = random_inputs(sized(opened, config.input), batch, SEED)
    else:
        theirs = inputs_of(session(like.path, threads=1))
        merge(theirs, opened)
        feeds = rename(like.feeds, theirs, aligned(theirs, opened))
    sizes = sizes_of(plain, {name: value.shape for name, value in feeds.items()}).sizes
    return _File(path, layers_of(plain, compact, sizes), model, feeds)


def _run(files: list[_File], config: ProfileConfig) -> list[Profile]:
    # Pools of threads spin for a while after a call, and would disturb one another.
    groups = [files] if config.threads == 1 else [[one] for one in files]
    results = []
    for group in groups:
        with ExitStack() as stack:
            profilers = [
                stack.enter_context(
                    Profiler(one.model, {layer.key: layer.name for layer in one.layers}, config.threads)
                )
                for one in group
            ]
            started, calls = time.perf_counter(), 0
            enough = FEWEST_CALLS + WARM_UP_CALLS
            while calls < enough or time.perf_counter() - started < config.seconds * len(group):
                for profiler, one in zip(profilers, group, strict=True):
                    profiler.call(one.feeds)
                calls += 1
            results += [profiler.result() for profiler in profilers]
    return results


def _rows(file: _File, profile: Profile, roof: roofline.Roofline) -> list[dict[str, Any]]:
    ran: dict[str, list[NodeTime]] = defaultdict(list)
    for node in profile.nodes:
        if node.layer is not None:
            ran[node.layer].append(node)
    whole = profile.us
    return [_row(layer, ran.get(layer.key, []), whole, roof) for layer in file.layers]


def _row(layer: LayerWork, nodes: list[NodeTime], whole: float, roof: roofline.Roofline) -> dict[str, Any]:
    us, moved = sum(node.us for node in nodes), sum(node.bytes for node in nodes) + layer.parameter_bytes
    row: dict[str, Any] = {
        "name": layer.name,
        "node": layer.key,
        "op": nodes[0].op if nodes else layer.op,
        "shape": list(layer.shape),
        "nnz": layer.nnz,
        "size": layer.size,
        "density": layer.density,
        "stored_as": layer.stored_as,
        "positions": layer.positions,
        "flops": layer.flops,
        "bytes": moved,
        "us": us if nodes else None,
        "share": us / whole if nodes and whole else None,
        "gflops": None,
        "peak_share": None,
        "intensity": None,
        "bandwidth_gbs": None,
        "bandwidth_share": None,
        "attainable_us": None,
        "bound": None,
        "reasons": [],
        "dense": None,
    }
    if not nodes or not us or layer.flops is None:
        row["reasons"] = [] if nodes else ["onnxruntime did not run it as an operator of its own"]
        return row
    measured = Measured(layer, us, moved, any(node.op.startswith("Sparse") for node in nodes), roof)
    gflops, bandwidth = layer.flops / us / 1e3, moved / us / 1e3
    return row | {
        "gflops": gflops,
        "peak_share": gflops / roof.peak_gflops,
        "intensity": layer.flops / moved if moved else None,
        "bandwidth_gbs": bandwidth,
        "bandwidth_share": bandwidth / roof.memory_gbs,
        "attainable_us": measured.attainable_us,
        "bound": "memory" if measured.moving_us > measured.arithmetic_us else "arithmetic",
        "reasons": reasons(measured),
    }


def _other(profile: Profile) -> list[dict[str, Any]]:
    """What is not part of a layer, by operator, the longest first; and the time between operators."""
    found: dict[str, list[NodeTime]] = defaultdict(list)
    for node in profile.nodes:
        if node.layer is None:
            found[node.op].append(node)
    rows = [
        {
            "op": op,
            "what": "change of layout" if op in LAYOUT else "operator",
            "count": len(nodes),
            "us": sum(node.us for node in nodes),
            "bytes": sum(node.bytes for node in nodes),
        }
        for op, nodes in found.items()
    ]
    rows.append(
        {
            "op": "",
            "what": "between operators, and the profiler itself",
            "count": 1,
            "us": profile.between_us,
            "bytes": 0,
        }
    )
    return sorted(rows, key=lambda row: -row["us"])


def _total(profile: Profile, rows: list[dict[str, Any]]) -> dict[str, Any]:
    flops = [row["flops"] for row in rows if row["flops"] is not None]
    return {
        "us": profile.us,
        "layers_us": sum(row["us"] or 0.0 for row in rows),
        "other_us": sum(node.us for node in profile.nodes if node.layer is None),
        "between_us": profile.between_us,
        "flops": sum(flops),
        "gflops": sum(flops) / profile.us / 1e3 if profile.us else None,
        "calls": profile.calls,
    }


def _compare(rows: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    """Write the dense layer beside each layer, where there is one."""
    for row, other in zip(rows, _partners(rows, dense), strict=True):
        if other is None or not row["us"] or not other["us"]:
            continue
        speedup, possible = other["us"] / row["us"], other["size"] / max(row["nnz"], 1)
        row["dense"] = {
            "name": other["name"],
            "us": other["us"],
            "gflops": other["gflops"],
            "speedup": speedup,
            "fewer_operations": possible,
            "gap": possible / speedup,
        }


def _partners(rows: list[dict[str, Any]], dense: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    by_name: Mapping[str, dict[str, Any]] = {_stem(row["name"]): row for row in dense}
    if len(rows) == len(dense) and not all(_stem(row["name"]) in by_name for row in rows):
        return [one if one["size"] == row["size"] else None for row, one in zip(rows, dense, strict=True)]
    return [by_name.get(_stem(row["name"])) for row in rows]


def _stem(name: str) -> str:
    return name.rstrip("_").removesuffix("_quantized").removesuffix(".weight")
