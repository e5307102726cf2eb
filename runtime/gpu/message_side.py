"""GPU ranks whose sites run step by step (runtime/rank/executor.py) on the current stream, without NVSHMEM.

Where no rank reaches another's memory, chunks travel as NCCL's messages (runtime/wires/c10d.py). The heap is plain
memory of this GPU, for what arrived: all that reads or writes it is on that stream, so its two banks need neither
signals nor credit. symmetric_side.py has the ranks that reach each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sfcompile.errors import HeapError, InternalError, StreamFusionError, UnsupportedError
from sfcompile.runtime.gpu.status import DeviceStatus, Watchdog
from sfcompile.runtime.gpu.streams import is_capturing
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.sides import RunningSite, SiteEngine, bank_room, run_on_host
from sfcompile.runtime.rank.site_call import OwnHeap, SiteCall, SiteSchedule
from sfcompile.runtime.wires.symmetric_heap import HeapSize, view_at
from sfcompile.runtime.wires.transport import MessageTransport, Transport


class Banks:
    """The banks of a heap, in memory of this rank's own device."""

    def __init__(self, memory: torch.Tensor, size: HeapSize) -> None:
        self._memory, self._size = memory, size

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of a bank at ``offset`` bytes."""
        with torch.inference_mode(False):  # a view made in it could be written in it only
            return view_at(self._memory, self._size.bank_at(bank) + offset, shape, dtype)


class MessageSide:
    """A session's GPU, with messages between all ranks.

    Args:
        rank: this one.
        device: its GPU.
        status: where chunks of other calls are noted.
        messages: carries chunks between ranks that reach no memory of each other; None: there are no such ranks.
        trouble: what is known of other ranks' failures; asked by a thread.

    Attributes:
        domains: by rank of the job: each is alone.
        carried_by, no_kernels, on_gpu: see Side in runtime/rank/sides.py.
    """

    no_kernels = "no NVSHMEM carries what kernels put"
    on_gpu = True

    def __init__(
        self,
        rank: int,
        topology: Topology,
        device: torch.device,
        status: DeviceStatus,
        messages: MessageTransport | None,
        trouble: Callable[[], str | None],
    ) -> None:
        self._rank, self._topology, self._device = rank, topology, device
        self._status, self._messages, self._trouble = status, messages, trouble
        self._banks: OwnHeap | None = None
        self._wires: Transport | None = messages
        self._size: HeapSize | None = None
        self.domains: Sequence[int] = tuple(range(topology.num_ranks))
        self.carried_by = ""
        self._watchdog = Watchdog(status, self._look)

    @property
    def device(self) -> torch.device:
        """This rank's GPU."""
        return self._device

    @property
    def size(self) -> HeapSize | None:
        """Of the banks."""
        return self._size

    def room(self, schedules: Sequence[SiteSchedule], engines: Sequence[SiteEngine | None]) -> HeapSize:
        """Banks for what arrives."""
        return bank_room(schedules, engines)

    def make_heap(self, size: HeapSize, epoch: int) -> None:
        """New banks. The old ones are given back behind what the stream still reads of them.

        Raises:
            HeapError: no room for them; the old ones stay.
        """
        try:
            with torch.inference_mode(False):
                memory = torch.zeros(size.segment_bytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise HeapError(
                f"two banks of {size.bank_bytes / 2**20:.1f} MiB cannot be had on {self._device} ({error})",
                "every rank keeps what arrives for two sites at a time",
                "use fewer tokens per call, or leave more of the GPU's memory free",
                rank=self._rank,
            ) from error
        self._banks, self._size = Banks(memory, size), size

    def _look(self) -> str | None:
        """Where another rank has failed or gone, nothing may wait for it any more; runs on the watchdog's thread."""
        notice = self._trouble()
        if notice is not None:
            self._status.stop(notice)  # first: what is ended now must find the reason
            self.abort(notice)
        return notice

    def prepare(self, engines: Sequence[SiteEngine | None]) -> None:
        """The executor needs nothing beside the heap."""

    def epochs_opened(self, counted: int) -> int:
        """The host opens every site."""
        return counted

    def begin(self, tag: int) -> None:
        """Every site is told when it is opened."""

    def end(self) -> None:
        """See :class:`DeviceStatus`."""
        self._status.end_call()

    def settle(self) -> None:
        """The stream waits, at the end of each epoch, for what is sent from memory that lasts: what is written to that
        memory after the call comes behind it on the stream."""

    def open(self, call: SiteCall, engine: SiteEngine | None) -> RunningSite:
        """Begin a call, on the current stream.

        Raises:
            UnsupportedError: a CUDA graph is being captured.
        """
        if engine is not None or self._banks is None or self._wires is None:
            raise InternalError(
                f"site {call.site} was given kernels on rank {call.job_rank}, or has no heap",
                "generated kernels store into other ranks' memory, which messages do not reach",
                "report this graph; options={'attention': 'aten'} goes round it",
            )
        if is_capturing(self._device):
            raise UnsupportedError(
                "a CUDA graph is captured while the executor runs the sites of a GPU rank",
                "chunks carry the number of their call, and a replay would send that of the capture: ranks out of step "
                "would no longer be noticed",
                "use a mode of torch.compile without CUDA graphs, or transport='nvshmem' with attention='triton'",
                rank=self._rank,
            )
        return run_on_host(call, self._topology, self._banks, self._wires)

    def restart(self, epoch: int, life: int) -> None:
        """Refused: what waits on the stream cannot be called back.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"a call failed before ({self.notice() or 'on some rank'}), and GPU ranks cannot start afresh",
            "messages that still wait on the GPU's stream for each other cannot be called back one by one",
            "end the job and start it again",
            rank=self._rank,
        )

    def rewire(self, timeout_s: float) -> None:
        """The host's waits get the new limit; NCCL keeps that of its group, set when the session began."""
        self._status.limit_s = timeout_s
        if self._messages is not None:
            self._messages.timeout_s = timeout_s

    def notice(self) -> str | None:
        """What the host has learnt of chunks of another call, and of ranks that failed."""
        return self._status.notice()

    def explained(self, error: BaseException) -> StreamFusionError | None:
        """See :class:`DeviceStatus`."""
        return self._status.explained(error)

    def abort(self, notice: str) -> None:
        """End what is under way on this GPU; the job's store tells the other hosts."""
        self._status.stop(notice)
        if self._wires is not None:
            self._wires.abort(notice)

    def close(self, failed: bool) -> None:
        """Forget what is under way; nothing collective."""
        self._watchdog.close()
        if self._wires is not None:
            self._wires.close()
        self._banks = self._wires = self._size = None
