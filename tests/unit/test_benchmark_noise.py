"""Noise is seen and said: a busy neighbour, two processes of one file that differ, blocks that differ, a slow clock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy import stats

from sparsepipe.benchmark import harness, results
from sparsepipe.benchmark.conditions import Watch, merged
from sparsepipe.benchmark.harness import Contestant, Setting
from sparsepipe.benchmark.statistics import minimum_samples, percentile, tail
from sparsepipe.reporting import verdicts
from sparsepipe.stages.bench import judged


@pytest.fixture(autouse=True)
def _one_cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "COLD_STARTS", 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Takes about a tenth of a millisecond."""
    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [64, 256])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [64, 256])],
        [numpy_helper.from_array(weight, "weight")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    return tmp_path / "model.onnx"


@pytest.fixture
def busy() -> Iterator[int]:
    """A processor that another process keeps busy."""
    cpu = max(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{cpu}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as neighbour:
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        yield cpu
        neighbour.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who had the processor")
def test_a_busy_neighbour_on_the_same_processor_is_flagged(model: Path, busy: int) -> None:
    setting = Setting(threads=1, batch=64, seconds=0.6, cpus=(busy,))
    (measurement,), verdict = judged([Contestant(model)], 0, setting, lambda note: None)
    assert measurement.failure is None
    assert sum(block.disturbed for block in measurement.blocks) > len(measurement.blocks) / 2
    (row,) = results.rows(["model"], [measurement], setting, baseline=0)
    assert row["noisy"] is True
    assert "other processes disturbed" in row["note"]
    # The processor was shared by two, so the CPU time of a call is well below its mean wall time.
    wall = sum(block.wall_ns for block in measurement.blocks) / sum(len(b.latency_ns) for b in measurement.blocks)
    assert row["cpu_ms"] < 0.8 * wall / 1e6
    assert verdict["noisy"] is True
    assert verdict["blocks_disturbed"] > verdict["blocks"] / 2


# A worker whose clock is made up: the second process of a file takes `change` times as long as the first one.
FAKE = """
import json, os, sys
change, counter = float(sys.argv[1]), sys.argv[2]
with open(counter, "a") as stream:
    stream.write(".")
latency = 1e5 * (1.0 if os.path.getsize(counter) == 1 else change)
for line in sys.stdin:
    request = json.loads(line)
    answer = {"rss_bytes": 1, "peak_rss_bytes": 1}
    if request["command"] == "quit":
        break
    if request["command"] == "load":
        answer = {"load_ms": 1.0, "first_call_ms": 1.0, "idle_rss_bytes": 1, "cpus": [0], "settings": {}}
    if request["command"] == "run":
        wall = request["count"] * latency
        answer = {"latency_ns": [latency] * request["count"], "wall_ns": wall, "cpu_ns": wall, "switches": 0,
                  "waited_ns": 0, "stolen_ns": 0, "foreign_ns": 0}
    print(json.dumps(answer), flush=True)
"""


@pytest.mark.parametrize(("change", "noisy"), [(1.0, False), (1.02, False), (1.05, True), (0.95, True)])
def test_two_processes_of_one_file_that_differ_by_more_than_3_percent_make_a_noisy_machine(
    tmp_path: Path, change: float, noisy: bool
) -> None:
    script, file = tmp_path / "fake.py", tmp_path / "model.onnx"
    script.write_text(FAKE)
    file.write_bytes(b"")
    command = (sys.executable, "-S", "-E", str(script), str(change), str(tmp_path / "started"))
    setting = Setting(threads=1, batch=1, seconds=0.05, cpus=None)
    measured, verdict = judged([Contestant(file, command=command)], 0, setting, lambda note: None)
    assert len(measured) == 1
    assert verdict["difference"] == pytest.approx(max(change, 1 / change) - 1)
    assert verdict["noisy"] is noisy
    assert ("noisy machine" in verdicts.sentence(verdict, [])) is noisy


def test_a_file_that_failed_says_nothing_of_the_machine_and_that_counts_as_noisy(tmp_path: Path) -> None:
    setting = Setting(threads=1, batch=1, seconds=0.05, cpus=None)
    contestant = Contestant(tmp_path / "model.onnx", command=(str(tmp_path / "absent"),))
    _, verdict = judged([contestant], 0, setting, lambda note: None)
    assert verdict["difference"] is None
    assert verdict["noisy"] is True


def machine(root: Path, frequency: int, temperature: int, throttled: int) -> None:
    files = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": frequency,
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": 500_000,
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": throttled,
        "sys/devices/system/cpu/intel_pstate/no_turbo": 1,
        "sys/class/thermal/thermal_zone0/temp": temperature,
    }
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")


def test_the_clock_and_the_heat_of_the_processors_that_were_used_are_noted(tmp_path: Path) -> None:
    machine(tmp_path, 3_000_000, 45_000, 7)
    watch = Watch([0], tmp_path)
    watch.look()
    machine(tmp_path, 2_400_000, 81_000, 9)
    watch.look()
    assert watch.summary() == {
        "frequency_mhz": {"low": 2400.0, "high": 3000.0},
        "temperature_c": {"low": 45.0, "high": 81.0},
        "throttled": 2,
        "governor": "ondemand",
        "boost": False,
        "note": "the clock varied from 2400 to 3000 MHz, temperatures up to 81 °C, the processor slowed itself down "
        "for heat 2 times",
    }


def test_clock_and_heat_of_several_settings_are_those_of_all(tmp_path: Path) -> None:
    seen = []
    for frequency, temperature in ((3_000_000, 45_000), (2_990_000, 61_000)):
        machine(tmp_path, frequency, temperature, 7)
        watch = Watch([0], tmp_path)
        watch.look()
        machine(tmp_path, frequency, temperature, 8)
        seen.append(watch.summary())
    found = merged([*seen, Watch(None, tmp_path / "nothing").summary()])
    assert found["frequency_mhz"] == {"low": 2990.0, "high": 3000.0}
    assert found["temperature_c"] == {"low": 45.0, "high": 61.0}
    assert found["throttled"] == 2
    assert found["note"].startswith("the system told a clock of 3000 MHz throughout, temperatures up to 61 °C")
    unknown = merged([Watch(None, tmp_path / "nothing").summary()])
    assert {key for key, value in unknown.items() if value is not None} == {"note"}


def test_what_the_system_does_not_tell_is_said(tmp_path: Path) -> None:
    watch = Watch(None, tmp_path)
    watch.look()
    summary = watch.summary()
    assert {key for key, value in summary.items() if value is not None} == {"note"}
    assert summary["note"] == "the system does not tell the clock frequency, nor the temperature"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("cpu MHz\t\t: 2600.0\nflags\t: fma\ncpu MHz\t\t: 2590.0\n")
    watch.look()
    assert watch.summary()["frequency_mhz"] == {"low": 2590.0, "high": 2600.0}


def blocks_with_moods(seed: int) -> list[Any]:
    """Calls whose block has a mood of its own: a sum of two normal variables of variance 1."""
    random = np.random.default_rng(seed)
    return [random.standard_normal() + random.standard_normal(40) for _ in range(30)]


def test_the_interval_of_a_tail_holds_for_calls_that_share_a_mood() -> None:
    truth = float(stats.norm.ppf(0.9, scale=2**0.5))
    hits = {"percentile": 0, "tail": 0}
    for seed in range(60):
        blocks = blocks_with_moods(seed)
        for name, found in (
            ("percentile", percentile(np.concatenate(blocks), 0.9)),
            ("tail", tail(blocks, 0.9, seed)),
        ):
            assert found is not None
            hits[name] += found.low <= truth <= found.high
    assert hits["tail"] >= 51  # 57 are expected of 60; fewer than 51 happen once in 100 such tests
    assert hits["percentile"] < 45  # what takes all calls for independent promises too much


def test_the_tail_of_many_calls_agrees_with_the_quantile_and_of_few_is_refused() -> None:
    random = np.random.default_rng(0)
    blocks = [random.exponential(size=5000) for _ in range(12)]
    found = tail(blocks, 0.99, 0)
    assert found is not None
    assert found.low < -np.log(0.01) < found.high
    assert found.value == float(np.quantile(np.concatenate(blocks), 0.99))
    assert found.high - found.low < 0.4
    assert tail([np.arange(minimum_samples(0.99) - 1.0)], 0.99, 0) is None
    assert tail([], 0.9, 0) is None
