"""The runtimes that `sparsepipe bench --peers` knows. A further one is a file with its class and an entry here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsepipe.benchmark.client import WORKER_COMMAND
from sparsepipe.benchmark.peers.environments import Environment, command_of
from sparsepipe.errors import RecipeError

HERE = "sparsepipe.benchmark.peers"

OPENVINO = Environment("openvino", ("openvino>=2025.0", "nncf>=2.14"), ("openvino", "nncf"))
MNN = Environment("mnn", ("MNN>=3.0",), ("MNN",))
# The last version with a wheel: 1.9 is a source package that refuses to be installed.
DEEPSPARSE = Environment("deepsparse", ("deepsparse==1.8.0", "numpy<2"), ("deepsparse",), {"NM_DISABLE_ANALYTICS": "1"})


@dataclass(frozen=True)
class Peer:
    """A runtime to compare with.

    Attributes:
        title: what a table calls it.
        runtime: its class, as `sparsepipe.benchmark.runtimes.find` takes it.
        environment: what it needs; None for what sparsepipe itself needs.
        int8: whether it computes in int8, and so needs samples to calibrate with.
        settings: what it is set to, for readers of its figures.
        licence: what a user must know of its licence; None for a licence that allows any use. Such a peer is neither
            installed nor run unless it is named.
    """

    title: str
    runtime: str
    environment: Environment | None = None
    int8: bool = False
    settings: str = ""
    licence: str | None = None

    def command(self) -> tuple[str, ...]:
        """How to start its worker.

        Raises:
            NotInstalled: its packages are not there.
        """
        return WORKER_COMMAND if self.environment is None else command_of(self.environment)

    @property
    def variables(self) -> dict[str, str]:
        """For the environment of its processes."""
        return dict(self.environment.variables) if self.environment else {}


PEERS: dict[str, Peer] = {
    "onnxruntime-int8-qdq": Peer(
        "onnxruntime int8 (QDQ)",
        f"{HERE}.onnxruntime_int8:Qdq",
        int8=True,
        settings="static, QDQ, weights int8 per output channel (7 bits on x86 without VNNI), activations uint8",
    ),
    "onnxruntime-int8-qoperator": Peer(
        "onnxruntime int8 (QOperator)",
        f"{HERE}.onnxruntime_int8:QOperator",
        int8=True,
        settings="static, QOperator, weights int8 per output channel (7 bits on x86 without VNNI), activations uint8",
    ),
    "openvino": Peer(
        "OpenVINO",
        f"{HERE}.openvino:OpenVino",
        OPENVINO,
        settings="latency hint, one stream, held at fp32: its default is bfloat16 where the CPU has it, as with AMX",
    ),
    "openvino-int8": Peer(
        "OpenVINO int8",
        f"{HERE}.openvino:OpenVinoInt8",
        OPENVINO,
        int8=True,
        settings="latency hint, one stream, quantised by NNCF with its default preset (weights of 7 bits on x86 "
        "without VNNI), precision left at its default: with AMX its int8 layers run on AMX, and those that are not "
        "int8 in bfloat16",
    ),
    "mnn": Peer(
        "MNN", f"{HERE}.mnn:Mnn", MNN, settings="precision high, which is fp32; zeros found by --detectSparseSpeedUp"
    ),
    "deepsparse": Peer(
        "DeepSparse",
        f"{HERE}.deepsparse:DeepSparse",
        DEEPSPARSE,
        settings="fp32, one core for each thread",
        licence="the licence of DeepSparse allows evaluation in development and testing only, and no production use",
    ),
}
DEFAULT = ("onnxruntime-int8", "openvino", "openvino-int8", "mnn")
"""What is measured where no peer is named: all that have no `licence` to tell of."""
GROUPS: dict[str, tuple[str, ...]] = {"onnxruntime-int8": ("onnxruntime-int8-qdq", "onnxruntime-int8-qoperator")}
"""Names that stand for several."""


def chosen(names: Iterable[str]) -> dict[str, Peer]:
    """The peers of these names, each once, in their order.

    Raises:
        RecipeError: there is no such peer.
    """
    wanted = [member for name in names for member in GROUPS.get(name, (name,))]
    unknown = next((name for name in wanted if name not in PEERS), None)
    if unknown is not None:
        raise RecipeError(
            f"There is no peer '{unknown}'.", where="peers", advice=f"Peers: {', '.join([*GROUPS, *PEERS])}."
        )
    return {name: PEERS[name] for name in dict.fromkeys(wanted)}
