"""GPU ranks of machines whose GPUs map each other's memory: stores inside a machine, NCCL's messages between."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sfcompile.errors import HeapError
from sfcompile.runtime.gpu.message_side import Banks, MessageSide
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.stores import StoresAndMessages, StoreTransport, num_channels
from sfcompile.runtime.gpu.streams import SideStream
from sfcompile.runtime.gpu.symmetric import SharedMemory
from sfcompile.runtime.gpu.together import Share, together
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.wires.c10d import PairedTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize

MakeMemory = Callable[[int], SharedMemory]
"""Of so many bytes on every rank of this machine; collective there."""


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
        stream: SideStream,
        share: Share,
        trouble: Callable[[], str | None],
    ) -> None:
        super().__init__(rank, topology, device, status, messages, trouble)
        self._pairs, self._make_memory, self._stream, self._share = messages, make_memory, stream, share
        self._memory: SharedMemory | None = None
        try:
            together(share, "map each other's memory", lambda: make_memory(HeapSize(1, 64).segment_bytes))
        except BaseException:
            self._watchdog.close()  # of a side that does not start no thread is left
            raise

    def make_heap(self, size: HeapSize, epoch: int) -> None:
        """Collective: a new heap in place of the old one, whose calls have ended on every rank's stream.

        Raises:
            HeapError: no room, or more slots than torch has signals.
        """
        if self._memory is not None:
            self._status.settle()
            self._share(None, "leave the old heap")

        def make() -> SharedMemory:
            memory = self._make_memory(size.segment_bytes)
            if memory.channels < num_channels(size):
                raise HeapError(
                    f"the schedules have {num_channels(size)} signals and torch's pad has room for {memory.channels}",
                    "each chunk that a rank gets at a site has a signal of its own",
                    "use transport='nccl', or fewer parts and ranks",
                    rank=self._rank,
                )
            return memory

        memory = self._memory = together(self._share, "make the heap", make)
        own = memory.segments[self._rank]
        assert own is not None
        self._banks, self._size = Banks(own, size), size
        stores = StoreTransport(self._rank, memory.segments, size, memory, self._stream, self._status.words)
        near = [segment is not None for segment in memory.segments]
        self._wires = stores if self._pairs is None else StoresAndMessages(stores, self._pairs, near)

    def close(self, failed: bool) -> None:
        """Forget what is under way; nothing collective."""
        super().close(failed)
        self._memory = None
