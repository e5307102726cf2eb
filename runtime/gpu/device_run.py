"""Calls of sites on GPUs: kernels on two streams, epochs in device memory.

Puts run on a stream of their own, beside the products that make the next tensor; the attention waits for the put
*kernels* (not for what they sent). If it did not, its persistent grid could fill the GPU while a put of this rank,
which a peer's grid waits for, finds no room: a deadlock across ranks.

Epochs are counted on the device, by kernels on the main stream, and read there by every kernel of the call. So a
captured CUDA graph can be replayed: each replay raises the epochs that it uses. The tag of a call is set there too, by
kernels outside of any graph that the compiler captures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from sfcompile.errors import InternalError, StreamFusionError
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.streams import CudaSideStream, is_capturing
from sfcompile.runtime.program.phases import EXCHANGE_START
from sfcompile.runtime.rank.site_call import OwnHeap
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, PLACE, HeapSize, bank_of
from sfcompile.runtime.wires.transport import TAG_BITS, word_of

T = TypeVar("T")


class DeviceHeap(Protocol):
    """The symmetric heap as kernels see it (runtime/gpu/nvshmem.py)."""

    @property
    def size(self) -> HeapSize:
        """What the segments have room for; it grows with the programs that are loaded."""

    @property
    def table(self) -> torch.Tensor:
        """int64 [ranks of the job, 3]: address, NVSHMEM's number, symmetric address."""

    @property
    def domains(self) -> Sequence[int]:
        """By rank of the job: ranks of equal number reach each other's memory."""

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of a bank at ``offset`` bytes."""

    def close(self) -> None:
        """Collective: give the memory back."""


class DeviceEngine(Protocol):
    """One rank's side of one site, as kernels."""

    @property
    def bank_bytes(self) -> int:
        """Bytes of a bank: the schedule's slots and what the kernels keep beside them."""

    @property
    def members(self) -> Sequence[int]:
        """Ranks of the job that the site is of, in the order of its mesh."""

    def view(self, table: torch.Tensor, place: torch.Tensor) -> Any:
        """What the methods below are given for one call; ``table`` has the heaps of ``members``."""

    def put(self, name: str, tensor: torch.Tensor, view: Any) -> None:
        """Send "q", "k" or "v"."""

    def start(self, tensor: torch.Tensor, view: Any) -> torch.Tensor:
        """The start of an exchange; what its end needs of this rank's own shard."""

    def put_fused(self, name: str, rows: Any, sources: Sequence[torch.Tensor], view: Any) -> None:
        """Send "q", "k" or "v" as a row program (codegen/rows/rows.py) makes it from its sources."""

    def attend(self, mask: torch.Tensor | None, view: Any) -> torch.Tensor:
        """Attend and push; this rank's queries' outputs [B, H, Lq, E], its own heads filled in."""

    def collect(self, out: torch.Tensor, view: Any) -> None:
        """Fill in the other heads as they come home."""

    def receive(self, out: torch.Tensor, own: torch.Tensor, view: Any) -> None:
        """The end of an exchange, with what its start returned."""

    def gave_up(self, slot: int, wanted: int, seen: int, limit_s: float) -> StreamFusionError:
        """The error for a wait of its kernels that gave up."""


class Release(Protocol):
    """Gives credits (codegen/engines/transfers.py ReleaseKernel)."""

    def run(self, heaps: torch.Tensor, place: torch.Tensor) -> None:
        """Every rank may overwrite the bank of the epoch in ``place`` and of those before."""


class _SitePlaces(NamedTuple):
    """What an engine's calls read on the device: the heaps of its ranks, and by bank a place (PLACE)."""

    table: torch.Tensor
    places: list[torch.Tensor]


class DeviceRuns:
    """The open calls of one rank on one heap, the device's epoch counter, and the stream of the puts.

    Whatever a call needs on the device is made by :meth:`prepare`. A call allocates nothing that outlives it: a graph
    of CUDA calls that the compiler captures may not.

    Args:
        opened: epochs that were opened before (on an older heap).

    Attributes:
        captured: whether some call was captured in a CUDA graph, whose replays go on reading this heap.
    """

    def __init__(
        self, heap: DeviceHeap, release: Release, device: torch.device, status: DeviceStatus, opened: int = 0
    ) -> None:
        self._heap, self._release, self._device, self._status = heap, release, device, status
        self._tag = 0
        self.captured = False
        # The epoch, and what its signals hold; an epoch on, both grow.
        self._counter = torch.tensor([opened, word_of(opened, 0)], dtype=torch.int64, device=device)
        self._step = torch.tensor([1, 1 << TAG_BITS], dtype=torch.int64, device=device)
        self._prepared: dict[DeviceEngine, _SitePlaces] = {}
        # By bank, the place of the call that used it last: two calls may be open.
        self._places: list[torch.Tensor | None] = [None] * NUM_BANKS
        self._side = CudaSideStream(device)

    def prepare(self, engine: DeviceEngine) -> None:
        """Make what calls of an engine's sites need on the device."""
        if engine in self._prepared:
            return
        row = self._heap.size.place(0, 0, self._status.watched, self._status.number_of(engine))
        places = [torch.tensor(row, dtype=torch.int64, device=self._device) for _ in range(NUM_BANKS)]
        table, members = self._heap.table, list(engine.members)
        if members != list(range(len(table))):
            table = table[members].contiguous()
        self._prepared[engine] = _SitePlaces(table, places)

    def limit_waits(self) -> None:
        """Give every place the limit that the status has now; graphs that were captured read it there too."""
        at = PLACE.index("limit_ns")
        for prepared in self._prepared.values():
            for place in prepared.places:
                place[at : at + 1].fill_(self._status.watched.limit_ns)

    def open(self, engine: DeviceEngine, epoch: int) -> DeviceRun:
        """Begin a call; ``epoch`` is the host's count, which tells the two open calls apart."""
        self.captured |= is_capturing(self._device)
        self._counter.add_(self._step)
        table, places = self._prepared[engine]
        place = self._places[bank_of(epoch)] = places[bank_of(epoch)]
        place[:2].copy_(self._counter)
        return DeviceRun(self, engine, epoch, engine.view(table, place))

    def opened(self) -> int:
        """Epochs that were opened, those of replays among them; waits for the stream."""
        return int(self._counter[0])

    def host_bank(self, epoch: int) -> OwnHeap:
        """Begin a call whose epoch the host bakes in (transport.py): both counts go on together."""
        self._counter[:1].fill_(epoch)
        self._counter[1:].fill_(word_of(epoch, self._tag))
        return self._heap

    def begin(self, tag: int) -> None:
        """A call of a program begins: signals of its sites hold this tag."""
        self._tag = tag
        self._counter[1:].bitwise_and_(-(1 << TAG_BITS)).bitwise_or_(tag)

    def finish(self, epoch: int) -> None:
        """Everything up to the host's ``epoch`` has been read, as far as the main stream goes."""
        place = self._places[bank_of(epoch)]
        assert place is not None, "the epoch was opened here"
        self._release.run(self._heap.table, place)

    def on_the_side(self) -> AbstractContextManager[None]:
        """Inside, kernels run on the stream of the puts, after all that was launched before.

        What they read stays where it is until :meth:`join`: the graph holds it (passes/graph/lifetimes.py). So nobody
        need tell the allocator, which would keep every source of a captured graph for ever.
        """
        return self._side.after_current()

    def join(self) -> None:
        """The main stream goes on after the put kernels."""
        self._side.hold_current(self._side.event())


class DeviceRun:
    """One call of one site; see RunningSite in runtime/rank/sides.py.

    Attributes:
        blocked_s: 0, and ``waited_s`` empty: the host never waits.
        late_reads: what puts read, until the main stream waits for them.
    """

    def __init__(self, runs: DeviceRuns, engine: DeviceEngine, epoch: int, view: Any) -> None:
        self.epoch = epoch
        self.blocked_s = 0.0
        self.waited_s: dict[int, float] = {}
        self.output: torch.Tensor | None = None
        self.late_reads: Collection[int] = frozenset()
        self._own: torch.Tensor | None = None  # of an exchange: engines are shared by all sites of a geometry
        self._runs, self._engine, self._view = runs, engine, view

    def put(self, phase: str, tensor: torch.Tensor, part: int = -1) -> None:
        """A phase that sends a local tensor; kernels take all of its tokens at a time."""
        assert part == -1
        self._reads(tensor)
        with self._runs.on_the_side():
            if phase == EXCHANGE_START:
                self._own = self._engine.start(tensor, self._view)
            else:
                self._engine.put(phase.removeprefix("put_"), tensor, self._view)

    def put_fused(self, phase: str, sources: Sequence[torch.Tensor], rows: Any) -> None:
        """:meth:`put` of what a row program makes of its sources."""
        self._reads(*sources)
        with self._runs.on_the_side():
            self._engine.put_fused(phase.removeprefix("put_"), rows, sources, self._view)

    def _reads(self, *tensors: torch.Tensor) -> None:
        self.late_reads = frozenset(self.late_reads) | {tensor.data_ptr() for tensor in tensors if tensor.numel()}

    def attend(self, mask: torch.Tensor | None) -> None:
        """Attend; what it makes of this rank's queries becomes the call's output."""
        self._runs.join()
        self.late_reads = frozenset()
        self.output = self._engine.attend(mask, self._view)

    def collect(self, out: torch.Tensor, part: int = -1) -> bool:
        """Complete ``out``, which is the call's output; True: everything has been collected."""
        assert out is self.output and part == -1
        self._engine.collect(out, self._view)
        return True

    def receive(self, out: torch.Tensor) -> None:
        """Fill ``out``."""
        assert self._own is not None
        self._runs.join()
        self.late_reads = frozenset()
        self._engine.receive(out, self._own, self._view)

    def read(self, part: int, reader: Callable[[torch.Tensor], T]) -> tuple[T, bool]:
        """No weight comes together in a GPU's bank (codegen/schedule/weight_gather.py)."""
        raise InternalError(
            "a weight is read in the bank of a GPU rank", "that is planned for CPU ranks only", "report this graph"
        )

    def finish(self, epoch: int) -> None:
        """Everything up to ``epoch`` has been read, as far as the main stream goes."""
        self._runs.finish(epoch)
