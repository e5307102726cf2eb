"""GPU ranks whose memory no other rank reaches: chunks travel as NCCL's messages (runtime/wires/c10d.py).

Sites run step by step (runtime/rank/executor.py) on the current stream. The heap is plain memory of this GPU, for what
arrived: all that reads or writes it is on that stream, so its two banks need neither signals nor credit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfcompile.errors import HeapError, InternalError, UnsupportedError
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.executor import SchedulePlan, SiteCall
from sfcompile.runtime.rank.sides import RunningSite, SiteEngine, bank_room, run_on_host
from sfcompile.runtime.wires.symmetric_heap import HeapSize, view_at
from sfcompile.runtime.wires.transport import MessageTransport, Transport, notice_of


class LocalBanks:
    """Two banks in memory of this rank's own device."""

    def __init__(self, size: HeapSize, device: torch.device) -> None:
        self._size = size
        with torch.inference_mode(False):  # memory made in it could be written in it only
            self._memory = torch.zeros(size.segment_bytes, dtype=torch.uint8, device=device)

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of a bank at ``offset`` bytes."""
        with torch.inference_mode(False):
            return view_at(self._memory, self._size.bank_at(bank) + offset, shape, dtype)


class MessageSide:
    """A session's GPU, with messages between all ranks.

    Args:
        rank: this one.
        device: its GPU.
        status: where the messages note chunks of other calls.
        messages: carries all chunks; closed with the side.

    Attributes:
        domains: by rank of the job: each is alone.
    """

    def __init__(
        self, rank: int, topology: Topology, device: torch.device, status: DeviceStatus, messages: MessageTransport
    ) -> None:
        self._rank, self._topology, self._device = rank, topology, device
        self._status, self._messages = status, messages
        self._banks: LocalBanks | None = None
        self._size: HeapSize | None = None
        self.domains: Sequence[int] = tuple(range(topology.num_ranks))

    @property
    def device(self) -> torch.device:
        """This rank's GPU."""
        return self._device

    @property
    def size(self) -> HeapSize | None:
        """Of the banks."""
        return self._size

    @property
    def _wires(self) -> Transport:
        return self._messages

    def room(self, schedules: Sequence[SchedulePlan], engines: Sequence[SiteEngine | None]) -> HeapSize:
        """Banks for what arrives; nobody signals or gives credit."""
        return bank_room(schedules, engines)

    def make_heap(self, size: HeapSize, epoch: int) -> None:
        """New banks. The old ones are given back behind what the stream still reads of them.

        Raises:
            HeapError: no room for them; the old ones stay.
        """
        try:
            self._banks = LocalBanks(size, self._device)
        except torch.OutOfMemoryError as error:
            raise HeapError(
                f"two banks of {size.bank_bytes / 2**20:.1f} MiB cannot be had on {self._device} ({error})",
                "every rank keeps what arrives for two sites at a time",
                "use fewer tokens per call, or leave more of the GPU's memory free",
                rank=self._rank,
            ) from error
        self._size = size

    def prepare(self, engines: Sequence[SiteEngine | None]) -> None:
        """No engine runs here."""

    def begin(self, tag: int) -> None:
        """Every site is told when it is opened."""

    def end(self) -> None:
        """See :class:`DeviceStatus`."""
        self._status.end_call()

    def open(self, call: SiteCall, engine: SiteEngine | None) -> RunningSite:
        """Begin a call, on the current stream.

        Raises:
            UnsupportedError: a CUDA graph is being captured.
        """
        if engine is not None or self._banks is None:
            raise InternalError(
                f"site {call.site} was given kernels on rank {call.job_rank}, or has no heap",
                "generated kernels store into other ranks' memory, which messages do not reach",
                "report this graph; options={'attention': 'aten'} goes round it",
            )
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "a CUDA graph is captured while chunks travel as NCCL messages",
                "a message carries the number of its call, and a replay would send the number of the capture: ranks "
                "out of step would no longer be noticed",
                "use a mode of torch.compile without CUDA graphs, or transport='nvshmem'",
                rank=self._rank,
            )
        return run_on_host(call, self._topology, self._banks, self._wires)

    def restart(self, epoch: int, life: int) -> None:
        """Refused: what waits on the stream cannot be called back.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "a call failed before on some rank, and GPU ranks cannot start afresh",
            "messages that still wait on the GPU's stream for each other cannot be called back one by one",
            "end the job and start it again",
            rank=self._rank,
        )

    def rewire(self, timeout_s: float) -> None:
        """The limit of NCCL's waits is its group's, set when the session began."""

    def notice(self) -> str | None:
        """That a chunk of another call came, as soon as the host knows."""
        error = self._status.error()
        return None if error is None else notice_of(self._rank, error)

    def abort(self, notice: str) -> None:
        """End what is under way on this GPU; the job's store tells the other hosts."""
        self._wires.abort(notice)

    def close(self, failed: bool) -> None:
        """Forget what is under way; nothing collective."""
        self._wires.close()
        self._messages.disconnect()
        self._banks = self._size = None
