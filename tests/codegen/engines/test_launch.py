"""Arguments of launches; what waits that gave up say."""

from __future__ import annotations

import pytest
import torch
from deadline import Deadline
from kernel_ranks import Job, make_site
from watched import UNWATCHED, Watch

from sfcompile.codegen.engines import launch
from sfcompile.codegen.engines.launch import (
    AttendKernel,
    HeapView,
    arrived_slots,
    gave_up,
    mask_arguments,
    mask_kind,
)
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.runtime.wires.symmetric_heap import HeapSize, local_segment
from sfcompile.runtime.wires.transport import word_of

JOB = Job("torus", 2, 1, 2, 1, make_site(8, 2))


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((1, 1, 1, 9), torch.bool, ("key", True)),
        ((2, 1, 1, 9), torch.float32, ("key", False)),
        ((9,), torch.bool, ("key", True)),
        ((7, 9), torch.float16, ("full", False)),
        ((1, 4, 1, 9), torch.bool, ("full", True)),
    ],
)
def test_masks_by_kind(shape: tuple[int, ...], dtype: torch.dtype, kind: tuple[str, bool]) -> None:
    mask = torch.zeros(shape, dtype=dtype)
    assert mask_kind(mask) == kind
    given = mask_arguments(mask)
    assert given["mask_sc"] == 1 and (given["mask_sr"] == 0) == (len(shape) < 2 or shape[-2] == 1)
    assert given["mask_ptr"].dtype == (torch.uint8 if dtype == torch.bool else dtype)
    assert mask_kind(None) == ("none", True) and mask_arguments(None) == {}


def test_one_rank_with_its_log_sum_exp() -> None:
    site = make_site(70, 1, 2, torch.float32)
    schedule = Job("torus", 1, 1, 1, 1, site).schedule()
    kernel = AttendKernel(schedule, 0, KernelTarget(torch.device("cpu")), lse=True)
    size = HeapSize(1, kernel.tables.bank_bytes, 1)
    segment = local_segment(size)
    row = [segment.address, 0, segment.address]
    place = torch.tensor(size.place(1, word_of(1, 0), UNWATCHED.watched))
    heap = HeapView(torch.tensor([row]), place, torch.zeros(0, dtype=torch.int64))
    q, k, v = (torch.randn(1, 2, 70, 32) for _ in range(3))
    out, lse = torch.empty(1, 2, 70, 32), torch.empty(1, 2, 70)
    with interpreting(Deadline(5.0)):
        for name, x in (("q", q), ("k", k), ("v", v)):
            kernel.put(name, x, heap)
        kernel.run(out, heap, lse=lse)
    scores = q @ k.transpose(-1, -2) * site.scale
    assert torch.allclose(out, torch.softmax(scores, -1) @ v, atol=1e-5)
    assert torch.allclose(lse, torch.logsumexp(scores, -1), atol=1e-5)
    assert kernel.copiers == 0 and kernel.options == {}


@pytest.mark.parametrize(("tokens", "causal"), [([0, 8], False), ([9, 8], True)], ids=["no queries", "causal"])
def test_a_site_ends_when_all_has_come_that_comes_to_it(tokens: list[int], causal: bool) -> None:
    """Rank 0 needs nothing of rank 1's keys, and gets them: a late one would lie in what its credit gives away."""
    schedule = Job("ring", 1, 2, 1, 2, make_site(tokens, 2, causal=causal)).schedule()
    kernel, watch = AttendKernel(schedule, 0, KernelTarget(torch.device("cpu"))), Watch(0.1)
    size = HeapSize(len(schedule.slots), kernel.tables.bank_bytes, 2)
    segments = [local_segment(size) for _ in range(2)]
    heaps = torch.tensor([(segment.address, i, segments[0].address) for i, segment in enumerate(segments)])
    place = torch.tensor(size.place(1, word_of(1, 0), watch.watched))
    view, x = HeapView(heaps, place, torch.zeros(0, dtype=torch.int64)), torch.randn(1, 4, tokens[0], 32)
    out = torch.zeros_like(x)
    with interpreting(lambda: None):
        for name in ("q", "k", "v"):
            kernel.put(name, x, view)
        kernel.run(out, view)
        assert not watch.status["gave_up"]
        kernel.collect(out, view)
    assert watch.status["gave_up"] and watch.status["slot"] in kernel.fixed["slots"].tolist()


def test_chunks_without_elements_are_not_waited_for() -> None:
    """No kernel sends them: a rank that waited for one would wait until its limit."""
    schedule = Job("ring", 1, 2, 1, 2, make_site([0, 8], 2)).schedule()
    assert schedule.program(1).arrivals
    assert not arrived_slots(schedule, 1, torch.device("cpu")).numel()
    assert arrived_slots(schedule, 0, torch.device("cpu")).numel()


def test_own_rows_are_those_of_this_rank() -> None:
    """The pitch of the log-sum-exp; the table of queries holds those of the other rank too."""
    kernel = AttendKernel(JOB.schedule(), 0, KernelTarget(torch.device("cpu")))
    assert len(kernel.tables.queries) == 2 and kernel.scalars["own_rows"] == 8


def test_programs_that_copy_are_of_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs of a launch must be on the GPU together, with those that pass chunks on."""
    ring = Job("ring", 3, 1, 1, 3, make_site(8, 3), True, "ring")
    kernel = AttendKernel(ring.schedule(), 0, KernelTarget(torch.device("cpu"), calls={}), ring.machine_of)
    monkeypatch.setattr(launch, "resident_programs", lambda *launched: 100)
    kernel._programs = 0
    assert kernel.copiers > 0 and kernel.programs([]) + kernel.copiers == 100


def test_a_wait_that_gave_up_in_words() -> None:
    schedule: Schedule = JOB.schedule()
    arrival = schedule.program(0).arrivals[0]
    error = gave_up(schedule, 0, arrival.slot, word_of(7, 3), word_of(5, 3), 1.5)
    assert "did not come: a kernel of site waited 1.5 s" in str(error)
    assert (error.rank, error.peer, error.slot, error.epoch, error.seen_epoch) == (0, 1, arrival.slot, 7, 5)
    error = gave_up(schedule, 1, -1 - 3, 4, 2, 60.0)
    assert "rank 3 has not read epoch 4" in str(error) and error.peer == 3
