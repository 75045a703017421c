"""The same network in other runtimes: each checked against dense onnxruntime, then measured side by side."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto
from pydantic import PositiveInt

from sparsepipe.artefact import Artefact, digest_file, draft, write_json
from sparsepipe.benchmark import calls
from sparsepipe.benchmark.client import WorkerError, WorkerProcess
from sparsepipe.benchmark.harness import ROUNDS, Ask, Contestant, Measurement, Setting
from sparsepipe.benchmark.peers.environments import NotInstalled, install
from sparsepipe.benchmark.peers.registry import DEFAULT, Peer, chosen
from sparsepipe.benchmark.results import rows
from sparsepipe.errors import ArtefactError, GraphError
from sparsepipe.graph.load import load
from sparsepipe.native.operators import DOMAIN
from sparsepipe.progress import bar
from sparsepipe.recipe import Bench
from sparsepipe.runtime.compare import Tally, finite
from sparsepipe.runtime.sessions import session
from sparsepipe.settings import NamedChoice
from sparsepipe.stages import bench
from sparsepipe.stages.peers_work import Work, work_of

log = logging.getLogger("sparsepipe")

SCHEMA_VERSION = 1
ONNXRUNTIME, SPARSEPIPE = "onnxruntime", "sparsepipe"
INT8_OPERATORS = ("QuantizeLinear", "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger")
MAX_RELATIVE, MAX_RELATIVE_INT8 = 1e-3, 0.5
"""A runtime whose outputs are further from those of dense onnxruntime computes something else, and is not timed."""
PREPARE_SECONDS = 600.0


class Peers(Bench):
    """What is measured: as `bench`, and the runtimes."""

    peers: tuple[str, ...] = DEFAULT
    install_peers: bool = False
    calibrate: NamedChoice | None = None
    """int8 is calibrated on its training split, outputs are compared on its test split. None: random values."""
    samples: PositiveInt = 64
    """How many samples int8 is calibrated on, and how many outputs are compared on."""


@dataclass(frozen=True)
class Network:
    """A file, and what its outputs are compared with.

    Attributes:
        label: what the file is called.
        path: the file as it was given.
        model: its weights as a dense model of standard operators, which other runtimes get.
        runtime: what rows call the file itself, run by onnxruntime; None where it is no more than `model`.
        int8: whether it computes in int8.
    """

    label: str
    path: Path
    model: ModelProto
    runtime: str | None = None
    int8: bool = False

    @classmethod
    def read(cls, path: Path, label: str) -> Network:
        import onnx

        model = load(path)
        nodes = onnx.load(path, load_external_data=False).graph.node
        sparse = any(node.domain == DOMAIN for node in nodes)
        int8 = any(node.op_type in INT8_OPERATORS for node in nodes)
        own = f"{SPARSEPIPE if sparse else ONNXRUNTIME}{'-int8' * int8}"
        return cls(label, path, model, own if sparse or int8 else None, int8)


@dataclass
class Entry:
    """A network in a runtime; `failure` says why it cannot run."""

    label: str
    runtime: str
    contestant: Contestant
    expected: Sequence[Sequence[Any]]
    checks: Path
    int8: bool = False
    failure: str | None = None
    fidelity: dict[str, Any] | None = field(default=None)


def measure(paths: Sequence[Path], config: Peers) -> dict[str, Any]:
    """Measure ONNX files in onnxruntime, with sparsepipe's kernels where a file has them, and in other runtimes.

    Every runtime gets the same inputs, and its outputs are compared with those of dense onnxruntime before anything is
    timed. The other runtimes run the dense fp32 files; where there are none, the dense form of the first file. int8
    files are compared with the first fp32 network, where there is one.

    Returns:
        `baseline`, `results` (as `bench.measure`, each row with its `runtime` and its `fidelity`), `verdicts`,
        `samples`, `peers` (name -> what it is set to) and `environment`.

    Raises:
        RecipeError: there is no such peer.
        ArtefactError: a file is missing.
        GraphError: a file cannot be read, or none could be measured, as where all batch sizes are fixed at other ones.
        DataError: the dataset cannot be read, or does not fit the network.
    """
    config = bench.with_batch_of_input(config)
    tell_licences(config)
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None or not paths:
        raise ArtefactError("There is no such ONNX file.", where=str(missing) if missing else "bench")
    networks = [Network.read(path, label) for path, label in zip(paths, bench.labels(paths), strict=True)]
    fp32 = next((network.model for network in networks if not network.int8), None)
    if fp32 is not None:
        networks = [replace(network, model=fp32) if network.int8 else network for network in networks]
    with bar("Measuring", bench.rounds(config)) as running:
        return compare(networks, config, lambda count, note: running.advance(count, note=note))


def tell_licences(config: Peers) -> None:
    """Warn, a line for each, of the peers among those named whose licence does not allow any use."""
    for peer in chosen(config.peers).values():
        if peer.licence:
            log.warning("%s: %s.", peer.title, peer.licence)


def record(paths: Sequence[Path], config: Peers, out: Path) -> Artefact:
    """`measure`, and keep the result in the folder `out` as `bench` does."""
    digests = {label: digest_file(path) for label, path in zip(bench.labels(paths), paths, strict=True)}
    with draft(out, "bench", config, digests) as building:
        result = measure(paths, config)
        write_json(building.folder / bench.RESULT_FILE, result)
        building.metrics.update(result)
    return Artefact.read(out)


def compare(networks: Sequence[Network], config: Peers, advance: Callable[[int, str], None]) -> dict[str, Any]:
    """`measure` for files that were read; `advance` is called with a number of steps and a note."""
    peers = chosen(config.peers)
    absent = _install(peers, advance) if config.install_peers else {}
    results: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    runtimes: dict[str, dict[str, Any]] = {}
    for batch in config.batch:
        with tempfile.TemporaryDirectory(prefix="sparsepipe-") as name:
            entries = _entries(networks, peers, absent, config, batch, Path(name), advance)
            for planned in bench.settings(config.model_copy(update={"batch": (batch,)})):
                setting = replace(planned, cold_starts=1)  # loading is not compared; starts would take most of the time
                measured, verdict = _race(entries, setting, Path(name), advance)
                found = rows([entry.label for entry in entries], measured, setting, 0)
                results += [
                    # The largest memory is that of the calls whose outputs are compared, not of those that are timed.
                    {**row, "runtime": entry.runtime, "fidelity": entry.fidelity, "peak_rss_bytes": None}
                    for row, entry in zip(found, entries, strict=True)
                ]
                verdicts += [verdict] if verdict else []
                runtimes |= {str(one.settings): one.settings for one in measured if one.settings}
    if not any(row["samples"] for row in results):
        raise GraphError(f"No file could be measured: {results[0]['note']}.", where=results[0]["file"])
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline": results[0]["file"],
        "results": results,
        "verdicts": verdicts,
        "samples": config.calibrate.name if config.calibrate else "random values",
        "peers": {name: peer.settings for name, peer in peers.items()},
        "environment": {**bench.environment(config), "runtimes": list(runtimes.values())},
    }


def _install(peers: Mapping[str, Peer], advance: Callable[[int, str], None]) -> dict[str, str]:
    """Make the environments of the peers; name of a peer -> why its environment cannot be made."""
    reasons: dict[str, str] = {}
    environments = {peer.environment.name: peer.environment for peer in peers.values() if peer.environment}
    for environment in environments.values():
        advance(0, f"installing {environment.name}")
        try:
            install(environment)
        except NotInstalled as error:
            log.warning("%s cannot be installed: %s.", environment.name, error)
            reasons |= {name: str(error) for name, peer in peers.items() if peer.environment == environment}
    return reasons


def _entries(
    networks: Sequence[Network],
    peers: Mapping[str, Peer],
    absent: Mapping[str, str],
    config: Peers,
    batch: int,
    folder: Path,
    advance: Callable[[int, str], None],
) -> list[Entry]:
    """Everything that takes part at one batch size; the first is dense onnxruntime, the baseline."""
    dense = [network for network in networks if network.runtime is None] or networks[:1]
    works: dict[int, Work] = {}  # by network: some files hold the same one
    plain: list[Entry] = []
    others: list[Entry] = []
    for number, here in enumerate(networks):
        is_dense = any(here is one for one in dense)
        taking: dict[str, Peer | None] = {}
        if is_dense:
            taking[ONNXRUNTIME] = None
        if here.runtime:
            taking[here.runtime] = None
        if is_dense:
            taking |= peers
        place = folder / str(number)
        place.mkdir()
        try:
            work = works.get(id(here.model)) or work_of(here.model, here.label, config, batch, place)
            works[id(here.model)] = work
        except GraphError as error:  # as where its batch size is fixed at another one
            unfit = [
                Entry(f"{here.label}, {name}", name, Contestant(here.path), (), place, failure=error.what.rstrip("."))
                for name in taking
            ]
            plain, others = plain + unfit[: int(is_dense)], others + unfit[int(is_dense) :]
            continue
        for name, peer in taking.items():
            path = here.path if name == here.runtime else work.source
            entry = Entry(f"{here.label}, {name}", name, Contestant(path, feeds=work.feeds), work.expected, work.checks)
            entry.int8 = here.int8 and name == here.runtime
            if peer is not None:
                advance(0, f"preparing {name}")
                entry.int8 = peer.int8
                try:
                    if name in absent:
                        raise NotInstalled(absent[name])
                    entry.contestant = _prepare(peer, name, work, config)
                except (NotInstalled, WorkerError) as error:
                    entry.failure = str(error)
            (plain if name == ONNXRUNTIME else others).append(entry)
    return [*plain, *others]


def _prepare(peer: Peer, name: str, work: Work, config: Peers) -> Contestant:
    """Have a runtime make its own file in a process of its own."""
    opened = session(work.source, library=False)
    folder = work.source.parent / name
    folder.mkdir()
    with WorkerProcess(peer.command(), peer.variables) as worker:
        answer = worker.ask(
            "prepare",
            config.timeout or PREPARE_SECONDS,
            runtime=peer.runtime,
            model=str(work.source),
            folder=str(folder),
            samples=str(work.calibration) if peer.int8 else None,
            inputs=[node.name for node in opened.get_inputs()],
            outputs=[node.name for node in opened.get_outputs()],
        )
    return Contestant(Path(answer["model"]), peer.runtime, peer.command(), peer.variables, work.feeds)


def _race(
    entries: Sequence[Entry], setting: Setting, folder: Path, advance: Callable[[int, str], None]
) -> tuple[list[Measurement], dict[str, Any] | None]:
    """Compare, then time, those that can run; a measurement for each entry, and the verdict on the machine, if any."""
    racing = [entry for entry in entries if entry.failure is None]
    if not racing:
        advance(ROUNDS, "")
        return [Measurement(entry.contestant, failure=entry.failure) for entry in entries], None

    def admit(index: int, ask: Ask) -> str | None:
        entry, out = racing[index], folder / f"outputs-{index}.npz"
        ask("outputs", calls=str(entry.checks), out=str(out))
        entry.fidelity, reason = _fidelity(entry.expected, calls.read_outputs(out), entry.int8)
        return reason

    contestants = [entry.contestant for entry in racing]
    found, verdict = bench.judged(contestants, 0, setting, lambda note: advance(1, note), admit)
    measured = iter(found)
    return [
        Measurement(entry.contestant, failure=entry.failure) if entry.failure else next(measured) for entry in entries
    ], verdict


def _fidelity(
    expected: Sequence[Sequence[Any]], found: Sequence[Sequence[Any]], int8: bool
) -> tuple[dict[str, Any], str | None]:
    """How far outputs are from those of dense onnxruntime, and why they are too far to be timed."""
    tally = Tally()
    for reference, outputs in zip(expected, found, strict=True):
        tally.add(reference, outputs)
    facts = {
        "max_relative_error": finite(tally.max_relative),
        "top1_agreement": tally.agreement,
        "samples": tally.samples,
    }
    if tally.passed(MAX_RELATIVE_INT8 if int8 else MAX_RELATIVE, min_agreement=0.0):
        return facts, None
    agreement = "" if tally.agreement is None else f", top-1 agreement {tally.agreement:.1%}"
    reason = tally.note or (
        f"its outputs differ from those of dense onnxruntime by {tally.max_relative:.2g} of the largest one{agreement}"
    )
    return facts, f"not timed: {reason}"
