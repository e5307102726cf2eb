"""Links of known speed for ranks that are threads, in a time of their own: no rank waits, no busy machine is slower.

Every rank has a clock. What it does costs nothing; a message costs its sender ``message_s`` and the copying of its
bytes, then takes its turn on the uplink of the sender's machine, a token bucket; who waits for it sets its clock to the
message's arrival. ``install`` puts the links under the ranks of run_threads, and the clocks under modules.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from threads import ThreadWorld

from sfcompile.runtime.rank.sides import Wires
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import Segment
from sfcompile.runtime.wires.transport import Source


@dataclass
class VirtualLinks:
    """What messages take, in seconds and bytes; the links' and the ranks' state.

    Attributes:
        rate, burst: of every machine's uplink; so many bytes go out at once after it was idle for long.
        latency_s: between machines.
    """

    rate: float
    burst: float = 0.0
    latency_s: float = 2e-4
    message_s: float = 3e-5
    copy_bytes_per_s: float = 5e9
    local_latency_s: float = 2e-5
    lock: threading.Lock = field(default_factory=threading.Lock)
    clocks: dict[int, float] = field(default_factory=dict)
    free: dict[int, float] = field(default_factory=dict)  # by machine: when its uplink has sent all it was given
    arrivals: dict[tuple[int, int, int], float] = field(default_factory=dict)
    mine: Any = field(default_factory=threading.local)

    def install(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        """For this test: under all rank threads, and as the clock of ``modules``."""

        def make_wires(world: ThreadWorld, segments: Sequence[Segment | None]) -> Wires:
            self.mine.rank = world.rank
            transport = _VirtualTransport(world, segments, self)
            return Wires(transport, transport)

        monkeypatch.setattr(ThreadWorld, "make_wires", make_wires)
        clock = SimpleNamespace(
            perf_counter=lambda: self.clocks.get(self.mine.rank, 0.0), process_time=lambda: 0.0, thread_time=lambda: 0.0
        )
        for module in modules:
            monkeypatch.setattr(module, "time", clock)

    def send(self, machine: int, now: float, nbytes: int) -> float:
        """When the last byte of a message has left the uplink (lock held)."""
        idle_since = self.free.get(machine, -1e9)
        tokens = min(self.burst, max(0.0, now - idle_since) * self.rate)
        self.free[machine] = max(idle_since, now) + max(0.0, nbytes - tokens) / self.rate
        return self.free[machine]


class _VirtualTransport(DirectTransport):
    def __init__(self, world: ThreadWorld, segments: Sequence[Segment | None], links: VirtualLinks) -> None:
        super().__init__(world.rank, segments, 30.0)
        self._world, self._links = world, links

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Note when it arrives, then store it."""
        links, rank, topology = self._links, self._world.rank, self._world.topology
        with links.lock:
            now = links.clocks.get(rank, 0.0) + links.message_s + chunk.nbytes / links.copy_bytes_per_s
            links.clocks[rank] = now
            if not topology.same_machine(rank, dst):
                now = links.send(topology.machine_of[rank], now, chunk.nbytes) + links.latency_s
            else:
                now += links.local_latency_s
            links.arrivals[dst, epoch, slot] = now
        super().put(dst, slot, offset, chunk, epoch, source)

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """Until it is there; then it is as late as it was under way."""
        super().wait(src, slot, epoch)
        links, rank = self._links, self._world.rank
        with links.lock:
            links.clocks[rank] = max(links.clocks.get(rank, 0.0), links.arrivals.pop((rank, epoch, slot)))
