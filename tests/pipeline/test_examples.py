"""The examples of the README run as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_an_own_network_and_dataset_go_through_the_chain(tmp_path: Path) -> None:
    arguments = [
        *("run", "quickstart.toml", "--out", tmp_path / "own", "--json"),
        *("--set", "model=own_network:network", "--set", "data=own_network:dataset", "--set", "data.samples=600"),
        *(
            "--set",
            "model.width=8",
            "--set",
            "train.epochs=2",
            "--set",
            "train.threads=1",
            "--set",
            "train.dense_twin=false",
        ),
        *("--set", "bench.seconds=0.2", "--set", "augment.crop=0"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", "from sparsepipe.cli.main import main; main()", *map(str, arguments)],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["summary"]["valid"] is True
    assert result["summary"]["accuracy"]["sparse"]["samples"] == 120
