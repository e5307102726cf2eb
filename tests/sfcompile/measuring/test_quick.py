"""Half a second of measuring: links of known speed are found, in time, whatever they let through at first."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

import device_workers
import pytest
import torch
from processes import run_processes
from threads import run_threads
from virtual_links import VirtualLinks

from sfcompile.measuring import quick
from sfcompile.measuring.compute import OwnCompute
from sfcompile.measuring.quick import BUDGET_S, Quick, measure_quickly
from sfcompile.runtime.rank import recorder
from sfcompile.runtime.rank.session import current_session

HALF = (0, 0, 1, 1)


def measured(links: VirtualLinks, machine_of: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> list[Quick]:
    """What every rank gets on such links."""
    links.install(monkeypatch, quick)
    monkeypatch.setattr(quick, "_copies", lambda: 5e9)
    monkeypatch.setattr(quick, "compute_rates", lambda *args: OwnCompute({"flops_per_s": [2e10, 18e9]}, 0.5, 1e-4))

    def work(rank: int) -> Quick:
        links.mine.rank = rank
        session = current_session()
        return measure_quickly(session, session.topology, torch.float32)

    return run_threads(len(machine_of), work, machine_of)


LAYOUTS = {"2x1": (0, 1), "2x2": HALF, "4x1": (0, 1, 2, 3)}
QUICK = [("2x1", 100, 128), ("2x2", 200, 128), ("4x1", 1000, 0), ("2x2", 20, 0)]
CELLS = [
    pytest.param(
        LAYOUTS[layout], mbit, kib << 10, id=f"{layout}, {mbit} Mbit/s, burst of {kib} KiB",
        marks=[] if (layout, mbit, kib) in QUICK else pytest.mark.thorough,
    )
    for layout, mbit, kib in itertools.product(LAYOUTS, (20, 100, 200, 500, 1000, 10000), (0, 128))
]  # fmt: skip


@pytest.mark.parametrize(("machine_of", "mbit", "burst"), CELLS)
def test_links_of_known_speed(
    machine_of: tuple[int, ...], mbit: int, burst: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, latency_s = mbit * 1e6 / 8, 3e-4
    everyone = measured(VirtualLinks(rate, burst, latency_s), machine_of, monkeypatch)
    assert all(found == everyone[0] for found in everyone)
    constants = everyone[0].constants
    assert constants["network_bytes_per_s"] == pytest.approx(rate, rel=0.15)
    # The smallest message has bytes too, which the ranks of a machine send one after the other; a rank whose clock is
    # some messages ahead when its thread comes first has the other's wait behind them.
    assert constants["network_latency_s"] == pytest.approx(latency_s, rel=0.15, abs=4.5 * 256 / rate)
    assert everyone[0].spread is not None and everyone[0].spread < 0.2
    assert everyone[0].seconds < BUDGET_S + 0.1


@pytest.mark.parametrize("mbit", [2, 5])
def test_very_slow_links_take_little_longer(mbit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(VirtualLinks(mbit * 1e6 / 8), (0, 1), monkeypatch)[0]
    assert found.constants["network_bytes_per_s"] == pytest.approx(mbit * 1e6 / 8, rel=0.15)
    assert found.seconds < 2 * BUDGET_S


def test_inside_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    links = VirtualLinks(1e6, message_s=2e-5, copy_bytes_per_s=3e9, local_latency_s=4e-5)
    for machine_of in ((0, 0), HALF):
        found = measured(links, machine_of, monkeypatch)[0]
        constants = found.constants
        assert constants["copy_bytes_per_s"] == constants["local_bytes_per_s"] == pytest.approx(3e9, rel=0.15)
        assert constants["message_s"] == pytest.approx(2e-5, rel=0.15)
        assert constants["local_latency_s"] == pytest.approx(4e-5, rel=0.15)
        assert ("network_bytes_per_s" in constants) == (machine_of == HALF) == (found.spread is not None)


@pytest.mark.parametrize(
    "machine_of", [(0, 0, 1), (0, 1, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1), (0, 1, 0, 2), (0, 1, 1, 2, 2)]
)
def test_machines_of_unequal_size(machine_of: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some ranks have nobody to send to, or nobody who sends to them, what others see counts."""
    links = VirtualLinks(1e7, latency_s=5e-4, message_s=2e-5, copy_bytes_per_s=3e9, local_latency_s=4e-5)
    constants = measured(links, machine_of, monkeypatch)[0].constants
    assert constants["network_bytes_per_s"] == pytest.approx(1e7, rel=0.15)
    assert constants["network_latency_s"] == pytest.approx(5e-4, rel=0.15, abs=len(machine_of) * 256 / 1e7)
    assert constants["message_s"] == pytest.approx(2e-5, rel=0.15)
    assert constants["copy_bytes_per_s"] == pytest.approx(3e9, rel=0.15)
    assert ("local_latency_s" in constants) == (len(machine_of) % 2 == 0)  # of an odd number no two answer each other
    assert constants.get("local_latency_s", 4e-5) == pytest.approx(4e-5, rel=0.15)


def test_what_was_set_before_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = recorder.Recorder()
    monkeypatch.setattr(recorder, "active", mine)
    threads = torch.get_num_threads()

    def work(rank: int) -> int:
        session = current_session()
        measure_quickly(session, session.topology, torch.float32)
        assert not session.programs
        return session.heap_bytes

    run_threads(2, work, (0, 1))
    assert recorder.active is mine and not mine.events and torch.get_num_threads() == threads


def test_threads_that_find_no_core_are_noticed() -> None:
    """Two processes on one core: each is ready for half of the time."""
    before = quick._without_core_s()
    core = min(os.sched_getaffinity(0))
    loop = "end = time.monotonic() + 1.0\nwhile time.monotonic() < end: pass"
    spin = f"import os, time; os.sched_setaffinity(0, [{core}]); {loop}"
    others = [subprocess.Popen([sys.executable, "-S", "-c", spin]) for _ in range(2)]
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [core])
    try:
        end = time.process_time() + 0.3
        while time.process_time() < end or any(other.poll() is None for other in others):
            pass
    finally:
        os.sched_setaffinity(0, allowed)
    assert quick._without_core_s() - before > 0.05


def test_an_idle_core_does_the_wires_work_for_nothing() -> None:
    def work(rank: int) -> tuple[bool, bool]:
        session = current_session()
        bench = quick._QuickBench.__new__(quick._QuickBench)
        bench._session, bench._base = session, session.topology
        found = []
        for threads in (1, len(os.sched_getaffinity(0))):
            bench._threads = threads
            found.append(bench.has_idle_cores)
        return found[0], found[1]

    cores = len(os.sched_getaffinity(0))
    assert run_threads(2, work, (0, 1)) == [(cores > 1, False)] * 2


@pytest.mark.ranks
def test_gpu_ranks_through_their_symmetric_heap() -> None:
    """NVSHMEM emulated: rates of messages; what a launch or a put costs stays the preset's."""
    first, second = run_processes(2, device_workers.measured, (), (0, 1))
    assert first == second
    assert first["network_bytes_per_s"] > 1e4 and first["network_latency_s"] > 0.0
    assert not {"message_s", "copy_bytes_per_s", "touch_bytes_per_s", "local_bytes_per_s"} & set(first)
