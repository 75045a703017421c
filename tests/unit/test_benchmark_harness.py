"""The race between worker processes, with workers whose clocks are made up, so that nothing depends on real time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparsepipe.benchmark import harness, results
from sparsepipe.benchmark.client import WORKER_COMMAND, WorkerError, WorkerProcess
from sparsepipe.benchmark.harness import Contestant, Setting, choose_cpus, disturbed, measure

# Speaks the worker's protocol; every call takes `latency_ms` of a clock of its own. A behaviour may end it early.
FAKE = """
import json, os, sys, time
latency, behaviour = float(sys.argv[1]) * 1e6, sys.argv[2:]
runs = 0
for line in sys.stdin:
    request = json.loads(line)
    command = request["command"]
    if command == "quit":
        break
    if command == "load":
        answer = {"load_ms": 5.0, "first_call_ms": 2.0, "idle_rss_bytes": 10, "cpus": [0], "settings": {"name": "fake"}}
        answer["inputs"] = {"x": ["float32", request["shapes"].get("", [1, 3])]}
        if "larger" in behaviour:
            answer["inputs"] = {"x": ["float32", [1, 4]]}
        if "renamed" in behaviour:
            answer["inputs"] = {"y": ["float32", [1, 3]]}
        if "talks" in behaviour:
            answer["warnings"] = ["An old habit."]
        if "asleep" in behaviour:
            time.sleep(60)
        if "refuse" in behaviour:
            answer = {"error": "the model is not for me"}
    elif command == "stats":
        answer = {"rss_bytes": 100, "peak_rss_bytes": 120}
    else:
        runs += 1
        if "die" in behaviour and runs == 9:
            print("out of luck", file=sys.stderr, flush=True)
            os.abort()
        if "hang" in behaviour and runs == 9:
            time.sleep(60)
        count = request["count"]
        busy = "busy" in behaviour or ("sometimes" in behaviour and runs % 3 == 0)
        slow = 1.2 if "uneven" in behaviour and runs % 2 else 1.0
        wall = count * latency * slow
        answer = {"latency_ns": [latency * slow] * count, "wall_ns": wall, "cpu_ns": wall, "switches": 0,
                  "waited_ns": wall * 0.5 if busy else 0, "stolen_ns": 0, "foreign_ns": 0}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(autouse=True)
def _one_cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "COLD_STARTS", 1)


@pytest.fixture
def fake(tmp_path: Path) -> Any:
    script, model = tmp_path / "fake.py", tmp_path / "model.onnx"
    script.write_text(FAKE)
    model.write_bytes(b"")

    def make(latency_ms: float, *behaviour: str) -> Contestant:
        command = (sys.executable, "-S", "-E", str(script), str(latency_ms), *behaviour)
        return Contestant(model, runtime="fake", command=command)

    return make


def setting(seconds: float = 0.2, **more: Any) -> Setting:
    return Setting(threads=1, batch=1, seconds=seconds, cpus=None, **more)


def row(measurements: list[harness.Measurement], index: int, seconds: float = 0.2) -> dict[str, Any]:
    labels = [f"file {number}" for number in range(len(measurements))]
    return results.rows(labels, measurements, setting(seconds), baseline=0)[index]


def test_blocks_are_paired_and_the_ratio_of_the_clocks_is_the_speedup(fake: Any) -> None:
    measurements = measure([fake(0.1), fake(0.025)], setting())
    first, second = measurements
    assert len(first.blocks) == len(second.blocks) >= harness.ROUNDS
    assert first.spent_ns >= 0.2e9
    assert second.spent_ns >= 0.2e9
    fast = row(measurements, 1)
    assert fast["speedup"] == {"value": pytest.approx(4.0), "low": pytest.approx(4.0), "high": pytest.approx(4.0)}
    assert fast["latency_ms"]["p99"] == {key: pytest.approx(0.025) for key in ("value", "low", "high")}
    assert fast["samples"] == sum(len(block.latency_ns) for block in second.blocks)
    assert fast["cpu_ms"] == pytest.approx(0.025)
    assert (fast["rss_bytes"], fast["peak_rss_bytes"], fast["load_ms"], fast["first_call_ms"]) == (100, 120, 5.0, 2.0)
    assert fast["note"] is None
    assert fast["noisy"] is False


def test_measuring_goes_on_for_a_percentile_within_reach(fake: Any) -> None:
    (measurement,) = measurements = measure([fake(1.0)], setting())
    result = row(measurements, 0)
    assert result["samples"] >= 368  # 200 calls fit into the time, 600 into three times as much
    assert measurement.spent_ns <= 3 * 0.2e9
    assert result["latency_ms"]["p99"] is not None


def test_a_percentile_out_of_reach_is_null_and_said_so(fake: Any) -> None:
    result = row(measure([fake(10.0)], setting()), 0)
    assert 36 <= result["samples"] <= 60  # a p90 is within three times the budget, a p99 is not
    assert result["latency_ms"]["p90"] is not None
    assert result["latency_ms"]["p99"] is None
    assert "p99 not shown" in result["note"]
    assert "needs 368" in result["note"]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("die", "signal 6"),
        ("hang", "no answer to 'run' within 3 s"),
        ("asleep", "no answer to 'load' within 3 s"),
        ("refuse", "the model is not for me"),
    ],
)
def test_a_worker_that_fails_becomes_a_row_with_the_reason(fake: Any, behaviour: str, reason: str) -> None:
    measurements = measure([fake(0.1), fake(0.1, behaviour)], setting(timeout=3.0))
    failed, good = row(measurements, 1), row(measurements, 0)
    assert reason in failed["note"]
    assert failed["latency_ms"] == {"p50": None, "p90": None, "p99": None}
    assert failed["speedup"] is None
    assert good["note"] is None
    assert len(measurements[0].blocks) >= harness.ROUNDS


def test_the_time_to_answer_goes_by_the_measurement_and_the_size_of_the_file(fake: Any) -> None:
    contestant = fake(0.1)
    assert harness.patience(contestant, setting(6.0)) == 120.0
    contestant.model.write_bytes(bytes(20_000_000))
    assert harness.patience(contestant, setting(0.5)) == 67.0
    assert harness.patience(contestant, setting(0.5, timeout=3.0)) == 3.0


def test_files_that_take_other_inputs_are_told_apart(fake: Any) -> None:
    measurements = measure([fake(0.1), fake(0.1), fake(0.1, "renamed"), fake(0.1, "larger")], setting())
    same, renamed, larger = (row(measurements, index) for index in (1, 2, 3))
    assert same["note"] is None
    assert renamed["note"] == "its inputs are called y, not x as those of 'file 0'"
    assert renamed["speedup"]["value"] == pytest.approx(1.0)
    assert larger["note"] == "no speed-up is given: it takes x float32 1x4, not x float32 1x3 as 'file 0'"
    assert larger["speedup"] is None
    assert larger["latency_ms"]["p50"] is not None


def test_shapes_reach_the_worker_and_what_it_says_the_row(fake: Any) -> None:
    result = row(measure([fake(0.1, "talks")], setting(shapes={"": (2, 7)})), 0)
    assert result["inputs"] == {"x": ["float32", [2, 7]]}
    assert result["note"] == "An old habit"


def test_the_death_of_the_baseline_leaves_the_others_without_a_speedup(fake: Any) -> None:
    measurements = measure([fake(0.1, "die"), fake(0.1)], setting())
    assert "out of luck" in row(measurements, 0)["note"]
    other = row(measurements, 1)
    assert other["speedup"] is None
    assert other["latency_ms"]["p50"] is not None


def test_a_program_that_does_not_exist_is_a_reason(fake: Any, tmp_path: Path) -> None:
    missing = Contestant(tmp_path / "model.onnx", command=(str(tmp_path / "no-such-python"),))
    measurements = measure([fake(0.1), missing], setting())
    assert "cannot be started" in row(measurements, 1)["note"]


def test_disturbed_blocks_are_dropped_while_enough_are_left(fake: Any) -> None:
    measurements = measure([fake(0.1), fake(0.1, "sometimes")], setting())
    result = row(measurements, 1)
    assert 0 < result["blocks_dropped"] < result["blocks"] / 2
    assert result["samples"] < sum(len(block.latency_ns) for block in measurements[1].blocks)
    assert result["noisy"] is False


def test_where_all_blocks_are_disturbed_they_are_kept_and_flagged(fake: Any) -> None:
    (measurement,) = measurements = measure([fake(0.1, "busy")], setting())
    result = row(measurements, 0)
    assert measurement.clean == []
    assert result["blocks_dropped"] == 0
    assert result["noisy"] is True
    assert "other processes disturbed" in result["note"]


def test_halves_that_differ_make_a_noisy_row(fake: Any) -> None:
    result = row(measure([fake(0.1, "uneven")], setting()), 0)
    assert result["self_difference"] == pytest.approx(0.2)
    assert result["noisy"] is True


def test_progress_is_reported_once_for_each_planned_round(fake: Any) -> None:
    notes: list[str] = []
    measure([fake(0.1), fake(0.1, "die")], setting(), notes.append)
    assert len(notes) == harness.ROUNDS


ANSWER = {"wall_ns": 1e8, "cpu_ns": 1e8, "switches": 0, "waited_ns": 0, "stolen_ns": 0, "foreign_ns": 0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"waited_ns": 1e6}, False),
        ({"waited_ns": 3e6}, True),
        ({"stolen_ns": 1e7}, True),
        ({"foreign_ns": 2e7}, False),
        ({"foreign_ns": 5e7}, True),
        ({"waited_ns": None, "switches": 3}, False),
        ({"waited_ns": None, "switches": 30}, True),
    ],
)
def test_what_counts_as_a_disturbance(change: dict[str, Any], expected: bool) -> None:
    pinned = Setting(threads=1, batch=1, seconds=1, cpus=(0,))
    assert disturbed({**ANSWER, **change}, pinned, usable_cpus=1) is expected


def test_threads_that_share_a_processor_do_not_count_as_disturbed() -> None:
    crowded = Setting(threads=4, batch=1, seconds=1, cpus=(0,))
    assert not disturbed({**ANSWER, "waited_ns": 9e7, "switches": 500}, crowded, usable_cpus=1)


def test_processors_are_chosen_from_those_that_may_be_used() -> None:
    usable = os.sched_getaffinity(0)
    for threads in (1, 2, 1000):
        chosen = choose_cpus(threads)
        assert chosen is not None
        assert len(chosen) == min(threads, len(usable))
        assert set(chosen) <= usable


def state(pid: int) -> str:
    return psutil.Process(pid).status()


def test_a_stopped_worker_rests_and_goes_on_when_it_is_asked_to(fake: Any) -> None:
    with WorkerProcess(fake(1.0).command) as worker:
        worker.stop()
        wait_for(lambda: state(worker.pid) == psutil.STATUS_STOPPED)
        worker.resume()
        assert worker.ask("stats", 10.0) == {"rss_bytes": 100, "peak_rss_bytes": 120}
    assert not psutil.pid_exists(worker.pid)


def test_a_start_that_is_interrupted_leaves_no_process(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(worker: WorkerProcess, *_: Any, **__: Any) -> None:
        started.append(worker.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerProcess, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:  # which keeps the process from being collected
        measure([fake(0.1)], setting())
    assert caught.value
    assert [pid for pid in started if psutil.pid_exists(pid)] == []


def test_the_worker_itself_answers_with_an_error_and_lives_on() -> None:
    with WorkerProcess(WORKER_COMMAND) as worker:
        with pytest.raises(WorkerError, match="no model is loaded") as raised:
            worker.ask("run", 30.0, count=1, warmup=0)
        assert raised.value.alive
        answer = worker.ask("stats", 30.0)
        assert 0 < answer["rss_bytes"] <= answer["peak_rss_bytes"]
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="signal 9") as raised:
            worker.ask("stats", 30.0)
        assert not raised.value.alive


def test_files_of_the_current_folder_take_the_place_of_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("numpy", "logging", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the package')")
    with WorkerProcess() as process:
        assert "rss_bytes" in process.ask("stats", 60.0)
        with pytest.raises(WorkerError, match="no such ONNX file") as caught:
            process.ask("load", 60.0, runtime="onnxruntime", model="absent.onnx", threads=1)
        assert caught.value.alive


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_stopped_worker_does_not_outlive_the_harness() -> None:
    code = (
        "import os; from sparsepipe.benchmark.client import WorkerProcess; worker = WorkerProcess();"
        "worker.ask('stats', 30.0); worker.stop(); print(worker.pid, flush=True); os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    wait_for(lambda: not psutil.pid_exists(pid) or state(pid) == psutil.STATUS_ZOMBIE)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
