"""A benchmark worker with little memory: `python -m sparsepipe.benchmark.limited BYTES`, on Linux.

The limit is that of the system on private memory that a process can write (RLIMIT_DATA): heap, stacks and buffers of
all threads. Unlike RLIMIT_AS it leaves out what is only mapped (shared libraries, address space set aside), so it comes
near to what a device of so much memory has to offer, without its own system. Files that are mapped are not counted.
"""

from __future__ import annotations

import sys

from sparsepipe.benchmark.client import PYTHON, WorkerError, WorkerProcess

HOW = "RLIMIT_DATA of a process of its own: private writable memory, Python included"
CALLS = 3


def fits(model: str, limit: int, batch: int, shapes: dict[str, list[int]], timeout: float) -> dict[str, object]:
    """Whether a file can be loaded and called in a process with so much memory.

    Args:
        model: the ONNX file.
        limit: bytes.
        batch: batch size.
        shapes: of inputs that leave sizes open.
        timeout: seconds for each request.

    Returns:
        `bytes`, `fits`, `peak_rss_bytes` where it does, `reason` where it does not, and `how` the limit was set.
    """
    result: dict[str, object] = {"bytes": limit, "fits": False, "peak_rss_bytes": None, "reason": None, "how": HOW}
    command = (*PYTHON, "-m", "sparsepipe.benchmark.limited", str(limit))
    # The buffers of numpy's BLAS, one for each core, are no part of a model.
    try:
        with WorkerProcess(command, {"OPENBLAS_NUM_THREADS": "1"}) as process:
            process.ask(
                "load", timeout, runtime="onnxruntime", model=model, threads=1, batch=batch, seed=0, shapes=shapes
            )
            process.ask("run", timeout, count=CALLS, warmup=0)
            peak = process.ask("stats", timeout)["peak_rss_bytes"]
    except WorkerError as error:
        return result | {"reason": str(error)}
    return result | {"fits": True, "peak_rss_bytes": peak}


def main() -> None:
    """Set the limit, and serve."""
    import resource

    from sparsepipe.benchmark import worker

    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    worker.serve()


if __name__ == "__main__":
    main()
