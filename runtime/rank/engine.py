"""What runs a site's attend phase as one kernel, and what such a kernel gets to see of the heaps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import NO_LIMIT_NS, STATUS, Segment, Watched


class Engine(Protocol):
    """One rank's attend phase of one site, waits and puts included."""

    @property
    def bank_bytes(self) -> int:
        """Bytes of a bank: the schedule's slots and what the kernel keeps beside them."""

    @property
    def own_at(self) -> Mapping[str, int]:
        """Where in the bank this rank's own q, k and v lie."""

    @property
    def sends(self) -> Sequence[tuple[int, int]]:
        """``(rank of the schedule, slot)`` of every chunk that the kernel sends."""

    def run(self, out: torch.Tensor, access: KernelAccess, epoch: int, mask: torch.Tensor | None) -> None:
        """Attend; outputs of own queries for this rank's heads go to ``out`` [B, H, Lq, E], others home."""


class KernelAccess:
    """The heaps of a schedule's ranks as a kernel of this process sees them.

    Args:
        members: rank of the job of each rank of the schedule.

    Raises:
        UnsupportedError: some rank's heap cannot be reached by loads and stores.
    """

    def __init__(self, members: Sequence[int], segments: Sequence[Segment | None], transport: DirectTransport) -> None:
        reached = [segments[member] for member in members]
        apart = [member for member, segment in zip(members, reached, strict=True) if segment is None]
        if apart:
            raise UnsupportedError(
                f"ranks {', '.join(map(str, apart))} are on other machines, and attention='triton' runs on CPU ranks",
                "generated kernels store straight into the heaps of other ranks; on CPUs nothing reaches another "
                "machine's memory",
                "use attention='aten', or ranks of one machine",
            )
        self._members, self._transport = members, transport
        # Of no use here: the executor looks at every tag, and what watches the polls (watch) ends them.
        self._status = torch.zeros(len(STATUS) + 1, dtype=torch.int64)
        address = self._status.data_ptr()
        self._watched = Watched(address, address + 8 * len(STATUS), NO_LIMIT_NS)
        segment = next(entry for entry in reached if entry is not None)
        self.size = segment.size
        addresses = [entry.address for entry in reached if entry is not None]
        self.heaps = torch.tensor([(address, pe, address) for pe, address in enumerate(addresses)], dtype=torch.int64)

    def place(self, epoch: int) -> torch.Tensor:
        """The epoch, its signal, and where things lie in a segment (PLACE in runtime/wires/symmetric_heap.py)."""
        return torch.tensor(self.size.place(epoch, self._transport.word(epoch), self._watched))

    def await_banks(self, sends: Sequence[tuple[int, int]], epoch: int) -> None:
        """Wait until every bank that a kernel will write to has been read."""
        for dst, slot in sends:
            self._transport.await_bank(self._members[dst], slot, epoch)

    def wake(self, sends: Sequence[tuple[int, int]], epoch: int) -> None:
        """Wake ranks that sleep on a signal that a kernel raised."""
        for dst, slot in sends:
            self._transport.wake(self._members[dst], slot, epoch)

    def watch(self) -> Callable[[], None]:
        """What a kernel's waits call: gives the core away; raises when a rank failed, or nothing came for too long."""
        return self._transport.watch()
