"""What this machine can do at most: arithmetic, memory and the price of one operator, each measured in a second.

The roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009): a layer that computes F operations on B bytes
takes at least the longer of F / peak and B / bandwidth. All three figures are the best of many short tries, so that
other processes spoil them least; they are what a program reaches, not what a data sheet promises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsepipe.environment import describe_machine
from sparsepipe.native import operators
from sparsepipe.runtime.library import library_path
from sparsepipe.runtime.sessions import session

SIDE, ROWS = 512, 256
"""Of the matrices that measure arithmetic: large enough to hide every overhead, small enough for the L2 cache."""
STREAM_BYTES = 64 << 20
"""Of an array that stands for memory, unless the last cache is larger than a quarter of it."""
MOST_STREAM_BYTES = 256 << 20
PIECE_BYTES = 4 << 20
"""Of one copy."""
CACHE_BYTES = 512 << 10
"""Of an L2 cache that the system says nothing of."""
CHAIN = 64  # operators in a row, to see what one costs
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Roofline:
    """The limits of the machine with so many threads.

    Attributes:
        threads: how many worked together.
        peak_gflops: 10^9 float32 operations a second; a fused multiply-add counts as two.
        peak_by: what reached it.
        memory_gbs: 10^9 bytes a second, read and written, from and to memory.
        cache_gbs: the same from and to the L2 cache of one core, times `threads`.
        cache_bytes: of that cache; what a layer reads and writes stays there if it is not more than half of it.
        overhead_us: microseconds that an operator costs before it computes anything.
        method: how the figures were found, in words.
    """

    threads: int
    peak_gflops: float
    peak_by: str
    memory_gbs: float
    cache_gbs: float
    cache_bytes: int
    overhead_us: float
    method: str = (
        "peak: best call of a product of matrices in the L2 cache; memory and cache: best numpy.copyto, bytes read and "
        "written; overhead: one of 64 operators on one number"
    )

    @property
    def ridge(self) -> float:
        """Operations a byte from which on arithmetic is the limit, not memory."""
        return self.peak_gflops / self.memory_gbs

    def in_cache(self, size: int) -> bool:
        """Whether so many bytes are still in the cache when a layer reads what the one before it wrote."""
        return size <= self.cache_bytes // 2

    def bandwidth_gbs(self, size: int) -> float:
        """10^9 bytes a second at which a layer of so many bytes can read and write them."""
        return self.cache_gbs if self.in_cache(size) else self.memory_gbs

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def measure(threads: int = 1, seconds: float = 1.0) -> Roofline:
    """Measure the limits of this machine.

    Args:
        threads: that work together.
        seconds: wall time, about; a third of it for arithmetic, memory and caches each.
    """
    products = {"a dense MatMul of onnxruntime": _product()}
    if library_path() is not None:
        products["a SparseLinear without zeros, in blocks of 4x1"] = _full_blocks()
    flops = 2 * ROWS * SIDE * SIDE
    values = {"x": np.random.default_rng(0).standard_normal((ROWS, SIDE)).astype(np.float32)}
    peaks = {}
    for name, model in products.items():
        call = _call(model, values, threads)
        peaks[name] = flops / _best(call, seconds / 3 / len(products))
    best = max(peaks, key=lambda name: peaks[name])
    return Roofline(
        threads=threads,
        peak_gflops=peaks[best] / 1e9,
        peak_by=best,
        memory_gbs=_copy_rate(stream_bytes(), threads, seconds / 3) / 1e9,
        cache_gbs=threads * _copy_rate(cache_bytes() // 4, 1, seconds / 6) / 1e9,
        cache_bytes=cache_bytes(),
        overhead_us=_overhead(threads, seconds / 6) * 1e6,
    )


def stream_bytes() -> int:
    """Bytes of an array that does not stay in the last cache."""
    return min(max(STREAM_BYTES, 4 * max(_cache_sizes().values(), default=0)), MOST_STREAM_BYTES)


def cache_bytes() -> int:
    """Bytes of the L2 cache of one core, as far as the system tells them."""
    return _cache_sizes().get("L2", CACHE_BYTES)


def _cache_sizes() -> dict[str, int]:
    found = {}
    for level, text in describe_machine()["caches"].items():
        number, unit = text[:-1], text[-1:]
        if number.isdigit() and unit in UNITS:
            found[level] = int(number) * UNITS[unit]
    return found


def _best(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest call."""
    call()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter_ns()
        call()
        best = min(best, (time.perf_counter_ns() - before) / 1e9)
    return best


def _copy_rate(size: int, threads: int, seconds: float) -> float:
    """Bytes a second that copies read and write: pieces of arrays of `size` bytes, one array for each thread.

    All of it was written before, so that the system gives out no pages meanwhile. Pieces are short, so that some of
    them meet a quiet moment; before one of them comes again, all others have.
    """
    pairs = [(np.full(size // 4, 2, np.float32), np.ones(size // 4, np.float32)) for _ in range(threads)]
    piece = min(size, PIECE_BYTES) // 4
    starts = cycle(range(0, size // 4 - piece + 1, piece))

    def copy(pair: tuple[Any, Any], start: int) -> None:
        np.copyto(pair[0][start : start + piece], pair[1][start : start + piece])

    if threads == 1:
        return 8 * piece / _best(lambda: copy(pairs[0], next(starts)), seconds)
    with ThreadPoolExecutor(threads) as pool:  # copyto lets other threads run
        together = _best(lambda: list(pool.map(partial(copy, start=next(starts)), pairs)), seconds)
        return 8 * piece * threads / together


def _overhead(threads: int, seconds: float) -> float:
    """Seconds of one of many operators in a row that compute as good as nothing."""
    values = {"x": np.zeros((1, 1), np.float32)}
    long, short = (_best(_call(_chain(count), values, threads), seconds / 2) for count in (CHAIN, 1))
    return max(long - short, 0.0) / (CHAIN - 1)


def _call(model: ModelProto, values: dict[str, Any], threads: int) -> Callable[[], Any]:
    """A call that copies nothing in or out."""
    opened = session(model.SerializeToString(), threads=threads)
    binding = opened.io_binding()
    for name, value in values.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("y", "cpu")
    opened.run_with_iobinding(binding)
    output: onnxruntime.OrtValue = binding.get_outputs()[0]
    binding.bind_ortvalue_output("y", output)
    return lambda: opened.run_with_iobinding(binding)


def _weight() -> Any:
    return np.random.default_rng(1).standard_normal((SIDE, SIDE)).astype(np.float32)


def _product() -> ModelProto:
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": _weight()})


def _full_blocks() -> ModelProto:
    values, deltas = operators.encode(_weight(), 4)
    node = operators.sparse_linear(["x", "values", "deltas"], "y", weight_shape=(SIDE, SIDE), block=4)
    return _model([node], {"values": values, "deltas": deltas})


def _chain(length: int) -> ModelProto:
    names = ["x", *(f"t{position}" for position in range(1, length)), "y"]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)]
    return _model(nodes, {})


def _model(nodes: list[Any], weights: dict[str, Any]) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "roofline",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    ours = [node for node in nodes if node.domain == operators.DOMAIN]
    opsets = [
        helper.make_opsetid("", 17),
        *([helper.make_opsetid(operators.DOMAIN, operators.VERSION)] if ours else []),
    ]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=8, functions=[operators.function_for(node) for node in ours]
    )
