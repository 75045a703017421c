"""The experiment `examples/never_slower.py`, small, and the figures that it wrote."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sparsepipe.runtime import library_path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_no_file_of_the_committed_figures_is_slower_than_dense() -> None:
    found = json.loads((EXAMPLES / "results" / "never_slower.json").read_text())
    timed = [row for row in found["rows"] if row["layers_sparse"]]
    assert len(timed) > 30
    assert {row["density"] for row in found["rows"]} >= {0.02, 0.1, 0.2, 0.3, 0.5, 0.7}
    assert found["slower"] == []
    # by the definition of noise in the text that the file carries
    differences = sorted(abs(math.log(row["same"][0])) for row in timed)
    assert differences[0] <= found["noise"] <= differences[-1]
    for row in timed:
        assert row["speedup"][0] >= math.exp(-found["noise"]), row["name"]
        assert row["speedup"][1] <= row["speedup"][0] <= row["speedup"][2]
    for row in found["rows"]:
        assert (row["speedup"] is None) == (row["layers_sparse"] == 0)


@pytest.mark.skipif(library_path() is None, reason="the kernel library was not built")
def test_the_experiment_runs(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "never_slower.py", "--layers", "3", "--networks", "", "--seconds", "0", "--out", out]
    done = subprocess.run(list(map(str, command)), cwd=EXAMPLES, capture_output=True, text=True, check=False)
    result = json.loads(out.read_text())
    assert (done.returncode == 0) == (not result["slower"]), done.stderr
    assert len(result["rows"]) == 3
    assert len(done.stdout.splitlines()) == 4
    assert result["machine"]["cpu"]
    assert result["versions"]["onnxruntime"]
    assert "What the second dense session differs from the first by is noise" in result["method"]
