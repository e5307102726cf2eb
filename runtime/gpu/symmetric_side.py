"""GPU ranks of machines whose GPUs map each other's memory: stores inside a machine, NCCL's messages between."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sfcompile.runtime.gpu.message_side import Banks, MessageSide
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.stores import StoresAndMessages, StoreTransport
from sfcompile.runtime.gpu.streams import SideStream
from sfcompile.runtime.gpu.symmetric import SharedMemory
from sfcompile.runtime.gpu.together import Share, together
from sfcompile.runtime.gpu.words import WordTell, WordWait
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.sides import SiteEngine
from sfcompile.runtime.rank.site_call import SiteSchedule
from sfcompile.runtime.wires.c10d import PairedTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize

MakeMemory = Callable[[int], SharedMemory]
"""Of so many bytes on every rank of this machine; collective there."""
MakeWords = Callable[[], tuple[WordTell, WordWait]]
"""The kernels that tell and await words of segments (codegen makes them)."""


class SymmetricSide(MessageSide):
    """A session's GPU, in a machine whose ranks store into each other's memory.

    Args:
        make_memory: tried once at the start with little, so that a machine that cannot is found then.
        messages: to ranks of other machines; None: there are none.
    """

    def __init__(
        self,
        rank: int,
        topology: Topology,
        device: torch.device,
        status: DeviceStatus,
        messages: PairedTransport | None,
        make_memory: MakeMemory,
        make_words: MakeWords,
        stream: SideStream,
        share: Share,
        trouble: Callable[[], str | None],
    ) -> None:
        super().__init__(rank, topology, device, status, messages, trouble)
        self._pairs, self._make_memory, self._stream, self._share = messages, make_memory, stream, share
        self._memory: SharedMemory | None = None
        self._stores: StoreTransport | None = None
        try:
            self._tells, self._waits = together(share, "make kernels of signals", make_words)
            together(share, "map each other's memory", lambda: make_memory(HeapSize(1, 64).segment_bytes))
        except BaseException:
            self._watchdog.close()  # of a side that does not start no thread is left
            raise

    def room(self, schedules: Sequence[SiteSchedule], engines: Sequence[SiteEngine | None]) -> HeapSize:
        """Banks for what arrives, and a credit of every rank."""
        return super().room(schedules, engines).grown(HeapSize(0, 0, self._topology.num_ranks))

    def make_heap(self, size: HeapSize, epoch: int) -> None:
        """Collective: a new heap in place of the old one, whose calls have ended on every rank's stream.

        Raises:
            HeapError, UnsupportedError: no room on this rank or on another; the old heap stays.
        """
        if self._memory is not None:
            self._status.settle()
            self._share(None, "leave the old heap")
        memory = together(self._share, "make the heap", lambda: self._make_memory(size.segment_bytes))
        self._memory, own = memory, memory.segments[self._rank]
        assert own is not None
        self._banks, self._size = Banks(own, size), size
        stores = self._stores = StoreTransport(
            self._rank, memory.segments, size, self._tells, self._waits, self._stream, self._status
        )
        near = [segment is not None for segment in memory.segments]
        self._wires = stores if self._pairs is None else StoresAndMessages(stores, self._pairs, near)

    def rewire(self, timeout_s: float) -> None:
        """Waits last as long as the options now say."""
        super().rewire(timeout_s)
        if self._stores is not None:
            self._stores.limit_waits()

    def close(self, failed: bool) -> None:
        """Forget what is under way; nothing collective."""
        super().close(failed)
        self._memory = self._stores = None
