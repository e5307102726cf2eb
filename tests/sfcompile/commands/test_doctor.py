"""The doctor: each finding on machines made up for it, cures for problems, quick without --measure."""

from __future__ import annotations

import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sfcompile.codegen.engines import choice
from sfcompile.commands import doctor
from sfcompile.commands.cli import main
from sfcompile.commands.doctor import Finding, examine, report


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_every_area_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine()
    assert not [finding for finding in findings if finding.name == "check failed"]
    areas = set(by_name(findings)[name].area for name in ("torch", "cores", "RAM", "transport", "device library"))
    assert areas == {"versions", "processor", "memory", "what ranks will use", "NVSHMEM"}
    # A wheel of torch with CUDA keeps the build ("+cu132") to itself: its metadata has only the release.
    assert by_name(findings)["torch"].value.split("+")[0] == torch.__version__.split("+")[0]
    problems = any(finding.is_problem for finding in findings)
    assert main(["doctor"]) == int(problems)
    out = capsys.readouterr().out
    assert "what ranks will use" in out and "say --measure" in out and ("no problems found" in out) != problems


def test_problems_come_with_their_cure() -> None:
    text = report([Finding("a", "fine", "1\n2"), Finding("a", "room", "none", "make some")])
    assert text.splitlines() == [
        "a", "   fine 1", "        2", " ! room none", "", "1 problem",
        " ! room: none", "     make some",
    ]  # fmt: skip
    assert report([Finding("a", "fine", "1")]).endswith("no problems found")


def test_a_check_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("driver gone")

    monkeypatch.setattr(doctor, "links", broken)
    found = by_name(examine())
    assert "driver gone" in found["check failed"].value and "transport" in found


def test_versions_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"torch": "2.9.1", "triton": "3.10.0"}
    monkeypatch.setattr(doctor, "_version", known.get)
    found = by_name(doctor.versions())
    assert found["torch"].value == "2.9.1, supported: 2.11 to below 2.16"
    assert "torch>=2.11" in found["torch"].cure
    assert "below 3.10" in found["triton"].value and found["triton"].is_problem
    assert found["diffusers"].value == "not installed" and not found["diffusers"].is_problem
    known["torch"] = "2.14.1"
    assert not by_name(doctor.versions())["torch"].is_problem
    known.clear()
    found = by_name(doctor.versions())
    assert found["torch"].is_problem and not found["triton"].is_problem


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "g++" in by_name(doctor.processors())["C++ compiler"].cure
    if not torch.cuda.is_available():
        assert by_name(doctor.choices())["inner"].value.startswith("eager")


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(64 << 20, 0, 64 << 20))
    (room,) = doctor.shared_memory(tmp_path)
    assert "--shm-size" in room.cure and "64 of 64 MiB free" in room.value
    monkeypatch.undo()
    assert "mount -t tmpfs" in doctor.shared_memory(tmp_path / "gone")[0].cure


def test_links_report_their_speed(tmp_path: Path) -> None:
    for name, speed, state in (("eth0", "25000", "up"), ("eth1", "-1", "up"), ("eth2", "10", "down"), ("lo", "", "")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "speed").write_text(speed)
        (tmp_path / "net" / name / "operstate").write_text(state)
    (tmp_path / "infiniband" / "mlx5_0" / "ports" / "1").mkdir(parents=True)
    (tmp_path / "infiniband" / "mlx5_0" / "ports" / "1" / "rate").write_text("400 Gb/sec (4X NDR)\n")
    found = {finding.name: finding.value for finding in doctor.links(tmp_path)}
    assert found == {"eth0": "25 Gbit/s", "eth1": "speed unknown", "mlx5_0": "400 Gb/sec (4X NDR)"}
    assert "one machine only" in doctor.links(tmp_path / "gone")[0].value


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0")]))
    monkeypatch.setattr(torch.version, "cuda", None)
    (cpu_build,) = doctor.gpus()
    assert "CPU build" in cpu_build.value and "pip install" in cpu_build.cure
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\n Please update it")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    (old,) = doctor.gpus()
    assert "nvidia-smi" in old.cure and "does not start: The NVIDIA driver on your system is too old" in old.value
    assert "\n" not in old.value


def test_gpus_and_their_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a < b)
    monkeypatch.setattr(doctor, "_output", lambda command: "GPU0 NV18")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    found = by_name(doctor.gpus())
    assert found["GPU 1"].value == "H100, 80 GiB, sm_90" and found["links"].value == "GPU0 NV18"
    assert found["peer access"].value.startswith("1 of 2 pairs")
    choices = by_name(doctor.choices())
    assert "not nvshmem: nvshmem4py does not load" in choices["transport"].value
    assert choices["attention"].value == "aten: no NVSHMEM carries what kernels put"


def test_gpus_of_several_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them may not run, none of the ranks does; Hopper's kernels are wrong with this Triton."""
    kinds = [
        SimpleNamespace(name=name, total_memory=1 << 36, major=x, minor=0) for name, x in (("A100", 8), ("H100", 9))
    ]

    def properties(device: Any) -> SimpleNamespace:
        return kinds[device if isinstance(device, int) else device.index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(choice, "version", lambda package: "3.7.0")
    for name in ("nvshmem", "nvshmem.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert by_name(doctor.gpus())["kinds"].value.startswith("1 x A100, 1 x H100: ")
    assert by_name(doctor.choices())["attention"].value.startswith("aten: Triton 3.7.0 compiles kernels for sm_90")


def test_a_library_of_nvshmem_that_is_missing_is_not_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvshmem4py is installed, and what it loads is not: the cure names that too."""
    monkeypatch.setattr(doctor, "_has_gpus", lambda: True)
    (tmp_path / "nvshmem").mkdir()
    for body, said in (
        ("raise ImportError('libnvshmem_host.so.3: cannot open shared object file')", "does not load: libnvshmem_host"),
        ("import cuda_core_is_missing", "does not load: No module named 'cuda_core_is_missing'"),
    ):
        (tmp_path / "nvshmem" / "__init__.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.partition(".")[0] == "nvshmem"]:
            monkeypatch.delitem(sys.modules, name)
        library = by_name(doctor.nvshmem())["host library"]
        assert said in library.value and "nvidia-nvshmem-cu13" in library.cure
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    assert by_name(doctor.nvshmem())["host library"].value == "nvshmem4py is not installed"


def test_versions_of_nvshmem_and_triton_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfcompile.codegen.toolchain import nvshmem_bitcode

    monkeypatch.setattr(nvshmem_bitcode, "wheel", lambda: ("nvidia-nvshmem-cu13", "3.1.0", Path("/")))
    library = by_name(doctor.nvshmem())["device library"]
    assert "older than 3.4" in library.value and "==3.4.5" in library.cure
    monkeypatch.setattr(nvshmem_bitcode, "wheel", lambda: None)
    monkeypatch.setattr(doctor, "_has_gpus", lambda: True)
    assert "pip install" in by_name(doctor.nvshmem())["device library"].cure


def test_a_host_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror("no such host")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SFCOMPILE_SECRET", "a secret of 26 bytes or so")
    found = by_name(doctor.environment())
    assert found["RANK"].value == "3" and "GLOO_SOCKET_IFNAME" in found["host name"].cure
    assert found["SFCOMPILE_SECRET"].value == "set, 26 bytes", "reports are pasted into issues"


def test_helpers_that_are_missing_say_nothing() -> None:
    assert doctor._output(["no-such-program"]) == "" and doctor._output(["false"]) == ""


def test_ranks_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int, int]] = []
    monkeypatch.setattr(doctor, "launch", lambda argv, ranks, machines: asked.append((argv, ranks, machines)) or 0)
    monkeypatch.setattr(doctor, "examine", lambda: [])
    assert main(["doctor", "--measure", "--ranks", "4", "--machines", "2"]) == 0
    ((argv, ranks, machines),) = asked
    assert argv[:2] == ["-m", "sfcompile.commands.measure"] and (ranks, machines) == (4, 2)
