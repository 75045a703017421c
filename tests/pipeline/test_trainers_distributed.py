"""The callbacks of the Trainers in two processes: the same masks in both, and bit for bit the same after resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

WORKER = Path(__file__).parents[1] / "workers" / "trainers.py"
WEIGHTS = 12 * 64 + 64 * 32 + 32 * 4


@pytest.mark.parametrize(
    ("trainer", "needs"),
    [("lightning", "lightning"), pytest.param("transformers", "accelerate", marks=pytest.mark.gate)],
)
def test_two_processes_train_and_resume_with_the_same_masks(trainer: str, needs: str, tmp_path: Path) -> None:
    pytest.importorskip(trainer)
    pytest.importorskip(needs)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(WORKER), trainer, str(tmp_path)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "masks, counters and weights of the two processes"
    assert first["whole"] == first["resumed"]
    whole = first["whole"]
    assert whole["step"] == 32
    assert sum(whole["nonzeros"].values()) == WEIGHTS - round(0.8 * WEIGHTS)
    updates = len(range(2, 24, 2))  # every second step before three quarters of all
    assert whole["counters"] == {name: (updates + 1) * nonzeros for name, nonzeros in whole["nonzeros"].items()}
