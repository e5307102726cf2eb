"""GPU ranks end to end without GPUs: symmetric memory, credits and epochs on the device, heaps that grow."""

from __future__ import annotations

import device_workers
import pytest
from processes import run_processes

pytestmark = pytest.mark.ranks


# Peer stores and calls beside each other, from kernels and from the host: each alone follows from these.
QUICK = [((0, 0, 1, 1), True), ((0, 0, 1, 1), False)]
CELLS = [
    pytest.param(
        machine_of, kernels, id=f"{name}-{'kernels' if kernels else 'host calls'}",
        marks=[] if (machine_of, kernels) in QUICK else pytest.mark.thorough,
    )
    for name, machine_of in {"one machine": (0, 0), "two": (0, 1), "two of two": (0, 0, 1, 1)}.items()
    for kernels in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(("machine_of", "kernels"), CELLS)
def test_attention_and_gather_on_a_symmetric_heap(machine_of: tuple[int, ...], kernels: bool) -> None:
    """Uneven chunks, masks or causal, one rank late; the heap grows in between, and an older program runs again."""
    results = run_processes(len(machine_of), device_workers.run, (5, kernels, 3, 1), machine_of)
    for result in results:
        assert result["error"] < 1e-5 and result["same"]
        assert result["names"] == []
    assert results[0]["domains"] == tuple(machine_of.index(machine) for machine in machine_of)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "host calls"])
def test_ranks_in_other_calls_are_told(kernels: bool) -> None:
    """Signals carry tags: no picture of two calls without a word, and no call after that either."""
    for _, told, afterwards in run_processes(2, device_workers.in_other_calls, (kernels,), (0, 0)):
        assert told.startswith("RankMismatchError") and "of another call" in told
        assert "GPU ranks cannot start afresh" in afterwards


@pytest.mark.parametrize("machine_of", [(0, 0), (0, 0, 1)], ids=["one machine", "two"])
def test_puts_that_compute_what_they_send(machine_of: tuple[int, ...]) -> None:
    """Norms and RoPE in the put kernels of q and k; v is a cat of two inputs. By peer stores, and by both ways."""
    results = run_processes(len(machine_of), device_workers.fused, (), machine_of)
    for result in results:
        assert max(result["errors"]) < 1e-5, result["errors"]
        assert result["fused"] == (3, 3) and result["order"] == results[0]["order"]
