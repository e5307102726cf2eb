"""GPU ranks end to end without GPUs: symmetric memory, credits and epochs on the device, heaps that grow."""

from __future__ import annotations

import device_workers
import pytest
from processes import run_processes

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "host calls"])
@pytest.mark.parametrize("machine_of", [(0, 0), (0, 1), (0, 0, 1, 1)], ids=["one machine", "two", "two of two"])
def test_attention_and_gather_on_a_symmetric_heap(machine_of: tuple[int, ...], kernels: bool) -> None:
    """Uneven chunks, masks or causal, one rank late; the heap grows in between, and an older program runs again."""
    results = run_processes(len(machine_of), device_workers.run, (5, kernels, 3, 1), machine_of)
    for result in results:
        assert result["error"] < 1e-5 and result["same"]
        assert result["names"] == []
    assert results[0]["domains"] == tuple(machine_of.index(machine) for machine in machine_of)


@pytest.mark.parametrize("machine_of", [(0, 0), (0, 0, 1)], ids=["one machine", "two"])
def test_puts_that_compute_what_they_send(machine_of: tuple[int, ...]) -> None:
    """Norms and RoPE in the put kernels of q and k; v is a cat of two inputs. By peer stores, and by both ways."""
    results = run_processes(len(machine_of), device_workers.fused, (), machine_of)
    for result in results:
        assert max(result["errors"]) < 1e-5, result["errors"]
        assert result["fused"] == (3, 3) and result["order"] == results[0]["order"]
