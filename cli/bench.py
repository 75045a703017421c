"""`sparsepipe bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import bench_tables, common

SUITES = ("kernels", "peers")
BELONGS = {
    "sparsity": ("--model", "--suite"),
    "pattern": ("--model", "--suite"),
    "precision": ("--model",),
    "input_": ("--model", "ONNX files"),
    "network": ("--suite",),
    "force": ("--suite",),
    "peers": ("ONNX files", "--suite"),
    "install_peers": ("ONNX files", "--suite"),
    "calibrate": ("ONNX files",),
    "profile": ("ONNX files",),
    "memory_limit": ("ONNX files",),
}
"""Options that only some forms of the command have."""
COMPARES = ("compare", "as_json", "verbose", "quiet")
"""All that `--compare` has."""


@click.command("bench")
@click.argument("onnx", nargs=-1, type=common.existing_path(dir_okay=False))
@click.option("--model", metavar="NAME|FILE.onnx", help="What-if: a dense network to measure with random zeros.")
@click.option("--suite", type=click.Choice(SUITES), help="Print a table of speed: the kernels on whole networks.")
@click.option(
    "--sparsity", multiple=True, callback=common.list_of(float), metavar="LIST",
    help="With --model or --suite. Default: 0.8,0.9,0.95,0.98.",
)  # fmt: skip
@click.option(
    "--pattern", multiple=True, callback=common.list_of(str), metavar="LIST",
    help="With --model or --suite: unstructured, or blocks of output x input channels such as 2x1 and 4x1. With "
    "--suite also int8-4x4: blocks in int8.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "int8"]),
    help="With --model: int8 also times a dense int8 file, and makes the sparse files int8. Default: fp32.",
)  # fmt: skip
@common.input_option
@click.option(
    "--network", multiple=True, callback=common.list_of(str), metavar="LIST",
    help="With --suite: the networks to measure. Default: all.",
)  # fmt: skip
@click.option(
    "--peers", multiple=True, callback=common.list_of(str), metavar="LIST",
    help="Run the network in other runtimes, too: onnxruntime-int8, openvino, openvino-int8, mnn, and deepsparse, "
    "whose licence allows evaluation only. With --suite peers the default is all but the last.",
)  # fmt: skip
@click.option(
    "--install-peers", is_flag=True,
    help="With --peers or --suite peers: put those that are named and not here into environments of their own under "
    "$SPARSEPIPE_CACHE.",
)  # fmt: skip
@click.option(
    "--calibrate", metavar="DATA",
    help="With --peers: the dataset to calibrate int8 on and to compare outputs on. Default: random values.",
)  # fmt: skip
@click.option(
    "--threads", multiple=True, callback=common.list_of(int), metavar="LIST", help="Threads, as 1,2. Default: 1."
)
@click.option("--batch", multiple=True, callback=common.list_of(int), metavar="LIST", help="Batch sizes. Default: 1.")
@click.option("--seconds", type=float, help="Measuring time for each file at each setting. Default: 6.")
@click.option(
    "--timeout", type=float,
    help="Seconds after which a process that does not answer counts as hanging. Default: 60, ten times --seconds, and "
    "one for every 10 MB of the file.",
)  # fmt: skip
@click.option(
    "--compare", nargs=2, type=common.existing_path(dir_okay=False), metavar="OLD NEW",
    help="Measure nothing: which rows of two results (JSON files) got slower beyond noise; exit code 1 if any did.",
)  # fmt: skip
@click.option(
    "--profile", type=click.Choice(["edge"]),
    help="edge: one pinned thread, batch 1, and also the size by gzip and the energy of a call.",
)  # fmt: skip
@click.option(
    "--memory-limit", metavar="SIZE",
    help="With --profile edge: whether each file loads and runs in a process with so much memory, as 256M.",
)  # fmt: skip
@click.option("--pin/--no-pin", default=None, help="Pin each process to as many cores as it has threads.")
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Also write the result into this folder. With --suite a JSON file: it is written row by row, and a second "
    "call goes on with the rows that it lacks.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="With --suite: measure what the file --out holds already anew.")
@common.overrides_option
@common.output_options
def command(
    onnx: tuple[Path, ...],
    model: str | None,
    suite: str | None,
    out: Path | None,
    compare: tuple[Path, Path] | None,
    force: bool,
    overrides: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Measure latency, memory and size of ONNX files, side by side.

    Every file runs in a process of its own; the processes take turns in short blocks, so that a change in the
    machine's speed meets all of them. The dense export, or else the first file, is the baseline of the speed-ups.

    \b
    sparsepipe bench ONNX...              these files
    sparsepipe bench ONNX... --peers LIST the same network in other runtimes, checked against dense onnxruntime
    sparsepipe bench --model resnet50     what if: the speed of a network on this machine at several sparsities,
                                          with random weights, before any training; any dense ONNX file will do
    sparsepipe bench --suite peers        sparsepipe beside the other runtimes on six networks
    sparsepipe bench --suite kernels      the speed table of the kernels, beside dense and int8 onnxruntime
    sparsepipe bench --compare OLD NEW    what got slower from one result to the next
    """
    if compare:
        if rest := [flag for name, flag in common.on_command_line().items() if name not in COMPARES]:
            raise click.UsageError(f"--compare takes two results and measures nothing; leave {', '.join(rest)} out.")
        from sparsepipe.cli import bench_compare

        bench_compare.run(*compare, as_json=as_json)
        return
    options["input"] = options.pop("input_")
    form = _form(onnx, model, suite, out, {**options, "force": force})
    shared = {key: options[key] for key in ("threads", "batch", "seconds", "pin", "timeout")}
    if options["input"]:
        shared["input"] = options["input"]
    config = common.section(onnx[0] if onnx else None, "bench", overrides, shared)
    common.check_threads(config.threads)
    if form == "--model":
        from sparsepipe.stages import whatif

        keys = ("sparsity", "pattern", "precision", "batch")
        what_if = _extended(whatif.WhatIf, config, {"model": model, **{key: options[key] for key in keys}})
        result = whatif.measure(what_if) if out is None else whatif.record(what_if, out).metrics
    elif form == "--suite":
        from sparsepipe.stages import suite as suites

        assert suite is not None
        chosen = {"sparsity": options["sparsity"], "pattern": options["pattern"], "networks": options["network"]}
        kind: Any = suites.Kernels
        if suite == "peers":
            kind = suites.PeersSuite
            chosen = {**chosen, "peers": options["peers"], "install_peers": options["install_peers"]}
            del chosen["pattern"]
        result = suites.SUITES[suite](_extended(kind, config, chosen), out, force=force)
    elif options["peers"]:
        from sparsepipe.stages import peers

        beside = _extended(peers.Peers, config, {key: options[key] for key in ("peers", "install_peers", "calibrate")})
        result = peers.measure(onnx, beside) if out is None else peers.record(onnx, beside, out).metrics
        form = "--peers"
    else:
        result = _files(onnx, config, out, options["profile"], options["memory_limit"])
        form = options["profile"] or form
    if as_json:
        common.print_json(result)
    else:
        bench_tables.SHOW[form](result)


def _files(
    onnx: Sequence[Path], config: Any, out: Path | None, profile: str | None, memory_limit: str | None
) -> dict[str, Any]:
    from sparsepipe.stages import bench, edge

    if memory_limit and not profile:
        raise click.UsageError("--memory-limit belongs to --profile edge.")
    if profile:
        limit = edge.parse_bytes(memory_limit) if memory_limit else None
        return edge.measure(onnx, config, limit) if out is None else edge.record(onnx, config, out, limit).metrics
    return bench.measure(onnx, config) if out is None else bench.record(onnx, config, out).metrics


def _form(
    onnx: Sequence[Path], model: str | None, suite: str | None, out: Path | None, options: Mapping[str, Any]
) -> str:
    """Which of the three forms of the command was given, a key of `bench_tables.SHOW`."""
    given = [name for name, value in (("ONNX files", onnx), ("--model", model), ("--suite", suite)) if value]
    if not given:
        raise click.UsageError("Name ONNX files, or --model NAME|FILE.onnx, or --suite kernels.")
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude one another; give one of them.")
    common.refuse_idle(BELONGS, given)
    if not options["peers"] and not suite and (options["install_peers"] or options["calibrate"]):
        raise click.UsageError("--install-peers and --calibrate belong to --peers.")
    if options["profile"] and options["peers"]:
        raise click.UsageError("--profile edge and --peers exclude one another; give one of them.")
    if options["profile"] and (options["threads"] or options["batch"]):
        raise click.UsageError("--profile edge is one thread and batch 1; leave --threads and --batch out.")
    if options["input"] and options["batch"]:
        raise click.UsageError("--input names the batch size, too, as its first number; leave --batch out.")
    if suite and out is not None and out.suffix != ".json":
        raise click.UsageError("With --suite, --out names a file: FILE.json.")
    for option, owner in (("pattern", "kernels"), ("peers", "peers"), ("install_peers", "peers")):
        if suite and suite != owner and options[option]:
            raise click.UsageError(f"--{option.replace('_', '-')} does not belong to --suite {suite}.")
    if suite and options["batch"]:
        raise click.UsageError("--batch does not belong to --suite: its networks have batch sizes of their own.")
    return given[0]


def _extended(kind: Any, config: Any, options: Mapping[str, Any]) -> Any:
    """The settings `config` and further ones as a `kind`; what was not given keeps the default of that."""
    from sparsepipe.settings import check

    given = {key: value for key, value in options.items() if value}
    return check(kind, {**config.model_dump(exclude_defaults=True), **given}, where="bench")
