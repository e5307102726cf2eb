"""What no run of a schedule can beat, read off it without a simulation: hundreds of times quicker than its price.

    traffic    the busiest rank computes its pairs, the busiest link carries its bytes: no software, no order
    work       every rank runs the same program, so each starts as many calls and messages and meets as many waits; the
               rank that computes most does all of that besides, one after the other

The second is the larger one wherever messages are small, on many ranks above all: a ring of a thousand ranks waits two
thousand times a layer. It leaves out what differs from rank to rank beyond the pairs (it takes the smallest rank's) and
all time in which a rank is blocked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfcompile.codegen.plan.links import Vector
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.runtime.program.formats import SAME, travel_bytes
from sfcompile.runtime.program.instructions import Attend, Chunk, Forward, Push, Put, Wait
from sfcompile.runtime.program.topology import Topology


@dataclass(frozen=True)
class Bounds:
    """Seconds of one run of a schedule that cannot be less."""

    traffic_s: float
    work_s: float

    @property
    def least_s(self) -> float:
        """The larger one."""
        return max(self.traffic_s, self.work_s)


def bounds(schedule: AttentionSchedule, topology: Topology) -> Bounds:
    """Both bounds of a schedule."""
    compute_s = _compute_s(schedule, topology)
    work_s = compute_s + _software_s(schedule, topology)
    traffic_s = max(float(compute_s.max(initial=0.0)), _links_s(schedule, topology))
    return Bounds(traffic_s, float(work_s.max(initial=0.0)))


def more_waits(schedule: AttentionSchedule, q_parts: int, kv_parts: int) -> int:
    """How many waits a schedule of whole chunks gains by cutting them: every part is a chunk with a wait of its own."""
    queries = sum(arrival.tensor in ("q", "o") for arrival in schedule.origin.arrivals)
    keys = len(schedule.origin.arrivals) - queries
    return queries * (q_parts - 1) + keys * (kv_parts - 1)


def _compute_s(schedule: AttentionSchedule, topology: Topology) -> Vector:
    """The pairs of every rank at the full rate."""
    site = schedule.site
    parts = range(schedule.q_parts)
    queries = np.zeros(topology.num_ranks)
    groups = range(schedule.mesh.ulysses) if schedule.split_heads else range(1)
    for a in groups:
        origin = schedule.mesh.ranks_after(schedule.mesh.offset(a, 0))
        queries += np.sum([schedule.row_counts("q", part) for part in parts], axis=0)[origin]
    keys = sum(int(schedule.row_counts("k", part).sum()) for part in range(schedule.kv_parts))
    flops = 2.0 * site.batch * schedule.head_counts("q") * queries * keys * (site.head_dim + site.v_head_dim)
    seconds: Vector = flops / (topology.attention_flops_per_s or topology.flops_per_s)
    return seconds / 2 if site.causal else seconds


def _links_s(schedule: AttentionSchedule, topology: Topology) -> float:
    """The bytes of the mean link, which the busiest one does not undercut, at the full bandwidth."""
    inside, across = schedule.bytes_by_link(topology)
    cards = len(set(topology.nic_of()))
    return max(inside / topology.num_ranks / topology.local_bytes_per_s, across / cards / topology.network_bytes_per_s)


def _software_s(schedule: AttentionSchedule, topology: Topology) -> Vector:
    """What messages, waits, calls, merges and the thread's own copies cost each rank at least."""
    rows = {
        tensor: _least(schedule, tensor, schedule.q_parts if tensor == "q" else schedule.kv_parts) for tensor in "qk"
    }
    starts = waits = calls = keys = merged = 0
    touched: set[Chunk] = set()
    for steps in schedule.origin.phases.values():
        peer: int | None = None  # messages to one peer in a row start together
        for step in steps:
            match step:
                case Put(_, _, dst, _) | Forward(_, dst, _) | Push(Chunk(dst), _):
                    starts += dst != peer
                    peer = dst
                case Wait():
                    waits += 1
                case Attend(q, kv):
                    peer = None
                    calls += 1
                    keys += sum(int(rows["k"][chunk.part]) for chunk in kv)
                    merged += sum(int(rows["q"][chunk.part]) for chunk in q if chunk in touched)
                    touched.update(q)
    site = schedule.site
    heads = site.batch * schedule.head_counts("q")
    each_s = starts * topology.message_s + waits * topology.wait_s + calls * topology.launch_s
    seconds = np.full(topology.num_ranks, each_s)
    if rows["q"].min(initial=0):  # with no rows a call has none that run below the full rate
        rate = (topology.attention_flops_per_s or topology.flops_per_s) * (2.0 if site.causal else 1.0)
        seconds += 2.0 * keys * (site.head_dim + site.v_head_dim) * topology.attention_rows / rate
    seconds += 3.0 * 4 * heads * merged * (site.v_head_dim + 1) / topology.memory_bytes_per_s
    if topology.copy_bytes_per_s is not None:
        seconds += _copied(schedule) / topology.copy_bytes_per_s
    return seconds


def _least(schedule: AttentionSchedule, tensor: str, parts: int) -> NDArray[np.int64]:
    """Tokens of each part on the rank that has fewest of it."""
    return np.array([schedule.row_counts(tensor, part).min(initial=0) for part in range(parts)], dtype=np.int64)


def _copied(schedule: AttentionSchedule) -> float:
    """Bytes that any rank's thread copies at least: what it keeps, what it sends, the outputs that it collects.

    What encoding takes beyond that is left out.
    """
    site, total = schedule.site, 0.0
    for tensor, parts in (("q", schedule.q_parts), ("k", schedule.kv_parts), ("v", schedule.kv_parts)):
        rows = int(_least(schedule, tensor, parts).sum())
        rows *= site.batch * int(schedule.head_counts(tensor).min(initial=0))
        total += travel_bytes(SAME, rows, schedule.width(tensor), site.dtype)
    for arrival in schedule.origin.arrivals:  # as many leave a rank as come to it
        rows = int(schedule.row_counts(arrival.tensor, arrival.chunk.part).min(initial=0))
        rows *= site.batch * int(schedule.head_counts(arrival.tensor).min(initial=0))
        times = 2 if arrival.tensor == "o" else 1
        written = site.written(arrival.tensor)
        total += times * travel_bytes(written, rows, schedule.width(arrival.tensor), site.dtype)
    return total
