"""A stand-in for the converter inside MNN's wheel."""

from __future__ import annotations

from pathlib import Path

import peer_stub

FLAGS = ("--detectSparseSpeedUp", "--fp16", "--optimizeLevel")


def mnnconvert(arguments: list[str]) -> int:
    program, *rest = arguments
    options, flags = {}, []
    while rest:
        name = rest.pop(0)
        if name in FLAGS:
            flags.append(name)
        elif name in ("-f", "--framework", "--modelFile", "--MNNModel", "--bizCode"):
            options[name] = rest.pop(0)
        else:
            raise SystemExit(f"{program}: unknown option {name}")
    peer_stub.note("mnnconvert", options=options, flags=flags)
    if not peer_stub.fault("mnn: convert"):
        Path(options["--MNNModel"]).write_bytes(Path(options["--modelFile"]).read_bytes())
    return 0  # whatever happened, as the converter does
