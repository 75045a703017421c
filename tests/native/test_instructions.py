"""How many instructions the kernels take on fixed inputs, against a budget: times on shared machines say too little.

`instructions.json` holds the budget for one instruction set, which valgrind knows, and for the compiler that it was
made with. A change that makes a kernel faster, or slower for a reason, refreshes it:

    SPARSEPIPE_REFRESH_BUDGET=1 pytest -m gate tests/native/test_instructions.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sparsepipe.native
from sparsepipe.artefact import write_json

BUDGET = Path(__file__).with_name("instructions.json")
ISA = "avx2"
REFRESH = "SPARSEPIPE_REFRESH_BUDGET"
FEW, MANY = 1, 5
"""Calls of two runs: what the calls between them take is neither the plan's nor the program's start."""

pytestmark = pytest.mark.gate


@pytest.fixture(scope="module")
def program(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("g++", "valgrind"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if os.uname().machine != "x86_64":
        pytest.skip(f"the budget is one of {ISA}")
    made = tmp_path_factory.mktemp("instructions") / "instruction_test"
    sources = Path(sparsepipe.native.__file__).parent
    source = Path(__file__).with_name("instruction_test.cc")
    options = ["-std=c++17", "-O1", "-pthread", f"-I{sources}", f"-Wl,-rpath,{library.parent}"]
    subprocess.run(["g++", *options, str(source), str(library), "-o", str(made)], check=True, capture_output=True)
    return made


def collected(program: Path, case: str, calls: int) -> int:
    """Instructions of a whole run."""
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program), case, str(calls)],
        check=False, capture_output=True, text=True, env={**os.environ, "SPARSEPIPE_ISA": ISA},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None, done.stderr[-2000:]
    return int(found[1])


def instructions(program: Path, case: str) -> int:
    """Of one call."""
    return round((collected(program, case, MANY) - collected(program, case, FEW)) / (MANY - FEW))


def too_many(measured: dict[str, int], budget: dict[str, int], tolerance: float) -> list[str]:
    """What is over the budget, or not in it."""
    return [
        f"{case}: {count} instructions of a call, budget {budget.get(case)}"
        for case, count in measured.items()
        if case not in budget or count > (1 + tolerance) * budget[case]
    ]


def test_kernels_keep_to_their_budget_of_instructions(program: Path) -> None:
    cases = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
    measured = {case: instructions(program, case) for case in cases}
    assert min(measured.values()) > 0
    stored = json.loads(BUDGET.read_text())
    if os.environ.get(REFRESH):
        write_json(BUDGET, {**stored, "instructions": measured})
        pytest.skip(f"the budget was written anew: {BUDGET}")
    over = too_many(measured, stored["instructions"], stored["tolerance"])
    assert not over, "\n".join([*over, f"If that is meant: {REFRESH}=1 pytest -m gate {Path(__file__).name}"])
    assert set(stored["instructions"]) == set(cases)


def test_a_kernel_that_takes_more_would_be_seen(program: Path) -> None:
    """Twice the nonzeros, in the same blocks, are about twice the instructions: the count is of the kernel."""
    stored = json.loads(BUDGET.read_text())
    case = "linear-4x1"
    count = instructions(program, case)
    assert instructions(program, case) == pytest.approx(count, rel=1e-3)  # counts repeat, unlike times
    assert too_many({case: count}, {case: count}, stored["tolerance"]) == []
    assert too_many({case: count}, {case: round(count / 1.1)}, stored["tolerance"])
    assert too_many({"new": count}, {case: count}, stored["tolerance"])
    # 512 x 512 weights in blocks of 4x1, a tenth of them kept, on 64 rows, 8 products at once.
    products = 512 * 512 / 10 * 64 / 8
    assert products < count < 4 * products
