"""Suites: tables of speed that one command reproduces, row by row, and goes on with where it was interrupted."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from sparsepipe.artefact import digest_file, read_json, write_json
from sparsepipe.benchmark import networks
from sparsepipe.benchmark.harness import EXTENSION, WARMUP_SHARE
from sparsepipe.benchmark.int8 import METHOD as INT8_METHOD
from sparsepipe.benchmark.peers.registry import chosen
from sparsepipe.benchmark.records import INT8, SPARSE, SparseForm
from sparsepipe.errors import ArtefactError, RecipeError
from sparsepipe.graph.prune import block_shape
from sparsepipe.progress import bar
from sparsepipe.recipe import Bench, Fraction
from sparsepipe.reporting import units
from sparsepipe.runtime.library import library_path
from sparsepipe.stages import bench, peers_row, suite_row
from sparsepipe.stages.peers import Peers, tell_licences

log = logging.getLogger("sparsepipe")

SCHEMA_VERSION = 2
METHOD = (
    "cpu: all files of a row in one process with one thread, blocks of calls in random order, CPU time of the "
    "thread; ratios of best deciles, and of medians of rounds with 95% bootstrap intervals. processes: each file in a "
    "process of its own, one running at a time, wall time; memory is resident memory above that before loading."
)
PEERS_METHOD = (
    "Each runtime in a process of its own, one running at a time, in blocks in random order; wall time. Random weights "
    "and zeros, so errors tell of arithmetic and not of a task: unstructured zeros, and blocks of output x input "
    "channels where a runtime is named after them, each compared with dense fp32 onnxruntime on the same weights. int8 "
    "is calibrated on random values."
)
COMPARABLE = ("cpu", "architecture", "isa", "versions", "kernel_library")
"""What rows must share to stand in one table."""


class Kernels(Bench):
    """Settings of the suite `kernels`: which settings of which networks, and as of `bench` for the processes.

    `pattern` names the zeros of fp32 files, or of int8 ones with `int8-` in front.
    """

    sparsity: tuple[Fraction, ...] = (0.8, 0.9, 0.95, 0.98)
    pattern: tuple[str, ...] = ("unstructured", "4x1", "int8-4x4")
    networks: tuple[str, ...] = tuple(name for name in networks.NETWORKS if name != "resnet50-cifar")


class PeersSuite(Peers):
    """Settings of the suite `peers`: which networks at which sparsities, in which runtimes."""

    seconds: Annotated[float, Field(gt=0)] = 1.0
    samples: PositiveInt = 32
    sparsity: tuple[Fraction, ...] = (0.8, 0.9, 0.95, 0.98)
    networks: tuple[str, ...] = ("resnet50", "mobilenet-v1", "vgg19", "resnet50-cifar", "mlp", "encoder")


def peers(config: PeersSuite, out: Path | None = None, *, force: bool = False) -> dict[str, Any]:
    """Whole networks with random weights in sparsepipe and in other runtimes.

    Args:
        config: networks, sparsities, runtimes, threads and time.
        out: as of `kernels`.
        force: start the file anew.

    Returns:
        `rows`, one for each network and sparsity (`peers_row.measure`), the `method`, the `settings` and the
        `environment`.

    Raises:
        RecipeError: no such network or peer.
        ArtefactError: `out` holds something else, or rows of other settings or of another machine or version.
        GraphError: a sparse file computes something else than the dense one.
    """
    _check_networks(config.networks)
    tell_licences(config)
    settings = "; ".join(f"{name}: {peer.settings}" for name, peer in chosen(config.peers).items())
    result = _empty(config, "peers", f"{PEERS_METHOD} Set to: {settings}.")
    result["settings"] |= {"peers": list(config.peers), "samples": config.samples}
    if out is not None and out.exists() and not force:
        result["rows"] = _earlier(out, result)
    rows: dict[tuple[str, float], dict[str, Any]] = {(row["network"], row["sparsity"]): row for row in result["rows"]}
    missing = [(name, one) for name in config.networks for one in config.sparsity if (name, one) not in rows]
    if missing:
        log.info("%s", _estimate(config, len(missing), result["rows"]))
    steps = bench.rounds(config.model_copy(update={"batch": (1,)}))
    with bar("Suite", steps * len(missing)) as running:
        for name in dict.fromkeys(name for name, _ in missing):
            model = networks.build(name, seed=suite_row.SEED)
            for sparsity in [one for network, one in missing if network == name]:
                with tempfile.TemporaryDirectory(prefix="sparsepipe-") as folder:
                    row = peers_row.measure(name, model, sparsity, config, Path(folder), running.advance)
                rows[name, sparsity] = row
                order = list(networks.NETWORKS)
                result["rows"] = [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1]))]
                if out is not None:
                    write_json(out, result)
    return result


def _estimate(config: PeersSuite, rows: int, earlier: Sequence[Mapping[str, Any]]) -> str:
    """How long the suite `peers` will take, in a sentence or two: from its settings, and from rows that are there."""
    runtimes = len(chosen(config.peers)) + 2 + len(peers_row.BLOCKS)
    turns = (runtimes + 1) * len(config.threads) * config.seconds * rows  # dense onnxruntime runs twice
    least, most = turns * (1 + WARMUP_SHARE), turns * (EXTENSION + WARMUP_SHARE)
    text = (
        f"{units.plural(rows, 'row')} in {runtimes} runtimes: {units.duration(least)} to {units.duration(most)} of "
        "calls; exporting, converting and calibrating come on top."
    )
    taken = [row["took_s"] for row in earlier if "took_s" in row]
    return f"{text} Rows that are there took {units.duration(sum(taken) / len(taken))} on average." if taken else text


def kernels(config: Kernels, out: Path | None = None, *, force: bool = False) -> dict[str, Any]:
    """The speed of the kernels on whole networks with random weights, beside dense and int8 onnxruntime.

    Args:
        config: networks, patterns, sparsities, threads and time.
        out: a JSON file that is written after each row. Rows of the same settings that it holds already are not
            measured again; other rows stay in it.
        force: start the file anew.

    Returns:
        `rows`, one for each network, precision and pattern (`suite_row.measure`), the `method`, the `settings` and the
        `environment`.

    Raises:
        RecipeError: no such network.
        ArtefactError: `out` holds something else, or rows of other settings or of another machine or version.
        GraphError: no such pattern, or a sparse file computes something else than the dense one.
    """
    forms = [SparseForm.parse(name) for name in config.pattern]
    for form in forms:
        block_shape(form.pattern)
    _check_networks(config.networks)
    result = _empty(config, "kernels", METHOD)
    if out is not None and out.exists() and not force:
        result["rows"] = _earlier(out, result)
    rows: dict[tuple[str, SparseForm], dict[str, Any]] = {
        (row["network"], SparseForm.of(row)): row for row in result["rows"]
    }
    wanted = [(name, form) for name in config.networks for form in forms]
    missing = [key for key in wanted if _sparsities(rows.get(key)) != list(config.sparsity)]
    if len(missing) < len(wanted):
        log.info("%d of %d rows are in %s already.", len(wanted) - len(missing), len(wanted), out)
    steps = suite_row.steps(len(config.sparsity), config.model_copy(update={"batch": (1,)}))
    with bar("Suite", steps * len(missing)) as running:
        for name in dict.fromkeys(name for name, _ in missing):
            with tempfile.TemporaryDirectory(prefix="sparsepipe-") as folder:
                running.advance(0, note=f"{name}: building")
                base = suite_row.prepare(name, Path(folder))
                for form in [form for network, form in missing if network == name]:
                    rows[name, form] = suite_row.measure(
                        base, form, config.sparsity, config, Path(folder), running.advance
                    )
                    result["rows"] = [rows[key] for key in sorted(rows, key=_place)]
                    if out is not None:
                        write_json(out, result)
    return result


SUITES: Mapping[str, Callable[..., dict[str, Any]]] = {"kernels": kernels, "peers": peers}


def read(path: Path) -> dict[str, Any]:
    """The result of a suite that a JSON file holds.

    Raises:
        ArtefactError: it is not there, is not JSON, or holds something else.
    """
    result = read_json(path)
    if not isinstance(result, dict) or result.get("suite") not in SUITES:
        raise ArtefactError("The file holds no result of a suite.", where=str(path))
    if result.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            f"The file has version {result.get('schema_version')} of the format, not {SCHEMA_VERSION}.",
            where=str(path),
            advice="Measure again with --force.",
        )
    return result


def _check_networks(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in networks.NETWORKS]
    if unknown:
        raise RecipeError(
            f"The suite has no network '{unknown[0]}'.",
            where="networks",
            advice=f"It has: {', '.join(networks.NETWORKS)}.",
        )


def _empty(config: Bench, suite: str, method: str) -> dict[str, Any]:
    described = bench.environment(config)
    library = library_path()
    settings = {key: described["settings"][key] for key in ("seconds", "threads", "pin", "rounds", "cold_starts")}
    shared = {key: value for key, value in described.items() if key not in ("settings", "measured", "load_average")}
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": suite,
        "method": method,
        "int8": INT8_METHOD,
        "settings": settings,
        "environment": {**shared, "kernel_library": digest_file(Path(library)) if library else None},
        "rows": [],
    }


def _earlier(out: Path, fresh: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file, which must have been measured as those to come will be."""
    before = read(out)
    differ = [key for key in fresh["settings"] if before["settings"].get(key) != fresh["settings"][key]]
    differ += [key for key in COMPARABLE if before["environment"].get(key) != fresh["environment"][key]]
    differ += ["method"] if before["method"] != fresh["method"] else []
    if differ:
        raise ArtefactError(
            f"It holds rows that were measured otherwise: not the same {', '.join(differ)}.",
            where=str(out),
            advice="Name another file, or measure all anew with --force.",
        )
    return list(before["rows"])


def _sparsities(row: Mapping[str, Any] | None) -> list[float] | None:
    """The sparsities of a row, in its order."""
    return None if row is None else [file["sparsity"] for file in row["files"] if file["kind"] == SPARSE]


def _place(key: tuple[str, SparseForm]) -> tuple[Any, ...]:
    """Rows stand in the order of the registry of networks, fp32 before int8, unstructured zeros before blocks."""
    name, (precision, pattern) = key
    return list(networks.NETWORKS).index(name), precision == INT8, block_shape(pattern)[0], pattern
