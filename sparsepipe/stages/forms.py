"""The files that an export writes: each target in each precision that it has."""

from __future__ import annotations

from dataclasses import dataclass

from sparsepipe.recipe import INT8_TARGETS, Export

FP32, INT8 = "fp32", "int8"


@dataclass(frozen=True)
class Form:
    """A file to write: its key in the metrics, which its name follows, its target and its precision."""

    key: str
    target: str
    precision: str


def forms(config: Export) -> list[Form]:
    """The files of an export, those in fp32 first; only beside them int8 files have the precision in their names."""
    found = []
    for precision in config.precision:
        suffix = f".{precision}" if precision != config.precision[0] else ""
        for target in config.targets:
            if precision == FP32 or target in INT8_TARGETS:
                found.append(Form(f"{target}{suffix}", target, precision))
    return found
