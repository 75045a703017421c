"""One row of the suite `peers`: a network with random zeros in every runtime, beside sparsepipe in several forms."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onnx import ModelProto

from sparsepipe.benchmark import networks
from sparsepipe.graph.finish import serialise
from sparsepipe.graph.prune import prune
from sparsepipe.runtime.inputs import inputs_of, random_inputs
from sparsepipe.runtime.sessions import session
from sparsepipe.stages.peers import SPARSEPIPE, Network, Peers, compare
from sparsepipe.stages.peers_work import SEED, random_calls
from sparsepipe.stages.variants import export_sparse, export_sparse_int8

BLOCKS = {f"{SPARSEPIPE}-4x1": ("4x1", False), f"{SPARSEPIPE}-int8-4x4": ("4x4", True)}
"""Further forms of a row: runtime -> pattern of the zeros, and whether the file is int8."""


def measure(
    name: str,
    model: ModelProto,
    sparsity: float,
    config: Peers,
    folder: Path,
    advance: Callable[[int, str], None],
) -> dict[str, Any]:
    """Measure the network `name` of `benchmark.networks`, whose dense form is `model`, at one sparsity.

    Unstructured zeros go into a dense file, which onnxruntime and the peers run, and into a universal one for
    sparsepipe. Blocks of zeros go into universal files of their own (`BLOCKS`), each compared with a dense fp32 form of
    its own weights. All of them take turns in one race.

    Raises:
        GraphError: a universal file computes something else than the dense one.
    """
    started = time.monotonic()
    network = networks.NETWORKS[name]
    config = config.model_copy(update={"batch": (network.input_shape[0],)})
    advance(0, f"{name} {sparsity:.4g}: exporting")
    pruned, _ = prune(model, sparsity, "unstructured")
    dense = folder / f"{name}.onnx"
    dense.write_bytes(serialise(pruned, where=name))
    inputs = inputs_of(session(dense, library=False))
    feeds = random_inputs(inputs, network.input_shape[0], SEED)
    variant = export_sparse(model, "unstructured", sparsity, folder / SPARSEPIPE, feeds)
    compared = [Network(name, dense, pruned), Network(name, variant.path, pruned, SPARSEPIPE)]
    for runtime, (pattern, int8) in BLOCKS.items():
        advance(0, f"{name} {sparsity:.4g}: exporting for {runtime}")
        if int8:
            samples = random_calls(inputs, config.samples, SEED)
            variant = export_sparse_int8(model, pattern, sparsity, folder / runtime, samples)
        else:
            variant = export_sparse(model, pattern, sparsity, folder / runtime, feeds)
        compared.append(Network(name, variant.path, prune(model, sparsity, pattern)[0], runtime, int8))
    result = compare(compared, config, lambda count, note: advance(count, f"{name} {sparsity:.4g}: {note}"))
    return {
        "network": name,
        "title": network.title,
        "input": list(network.input_shape),
        "sparsity": sparsity,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "took_s": time.monotonic() - started,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "samples": result["samples"],
        "results": result["results"],
        "verdicts": result["verdicts"],
        # A library's place on this machine is of no use elsewhere.
        "runtimes": [
            {key: value for key, value in one.items() if key != "kernel_library"}
            for one in result["environment"]["runtimes"]
        ],
    }
