"""What is found out of the machine, from files as systems have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsepipe import environment


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        # A container with a namespace of its own, with and without `docker run --cpus 1.5`.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        # A slice of systemd: the tightest of those above counts.
        (
            {
                "proc/self/cgroup": "0::/user.slice/job.scope\n",
                "sys/fs/cgroup/user.slice/cpu.max": "200000 50000\n",
                "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
            },
            4.0,
        ),
        # Version 1; the container sees its own group at the top, under the name that it has outside.
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123\n2:memory:/docker/0123\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_the_quota_of_a_container(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert environment.cpu_quota(tree(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.5, 1), (2.9, 2), (64.0, 4)])
def test_no_more_cores_are_usable_than_the_quota_keeps_running(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert environment.usable_cores() == cores


X86 = "processor\t: 0\nmodel name\t: Example 9000\nflags\t\t: fpu avx2 fma\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: {}\nCPU revision\t: 1\n"


@pytest.mark.parametrize(
    ("text", "model", "flag"),
    [
        (X86, "Example 9000", "avx2"),
        # Two machines with the same extensions are not the same; a telephone has two kinds of cores.
        (ARM.format("0xd0c"), "aarch64 0x41:0xd0c", "asimddp"),
        (2 * ARM.format("0xd40"), "aarch64 0x41:0xd40", "asimddp"),
        (ARM.format("0xd05") + ARM.format("0xd41"), "aarch64 0x41:0xd05 0x41:0xd41", "asimd"),
        (ARM.format("0xd08") + "Model\t\t: Raspberry Pi 4 Model B Rev 1.4\n", "Raspberry Pi 4 Model B Rev 1.4", "fp"),
    ],
)
def test_the_processor_by_its_name_or_the_numbers_of_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, model: str, flag: str
) -> None:
    monkeypatch.setattr(environment.platform, "processor", lambda: "aarch64")
    found, flags = environment._cpu_info(tree(tmp_path, {"proc/cpuinfo": text}))
    assert found == model
    assert flag in flags


def test_a_system_without_files_names_its_processor_all_the_same(tmp_path: Path) -> None:
    assert environment._cpu_info(tmp_path)[0]
