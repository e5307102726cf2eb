"""All ranks of a site in one world: put, attend, collect and release by their real launches, several epochs long.

Every rank has the two streams of runtime/gpu/device_run.py: puts on one, the rest on the other, joined before the
attention. Every epoch's values differ, so that nothing of an old one passes for a new one's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from kernel_ranks import Job, expected, inputs_of, rows_of
from watched import Watch

from ptx.driver import MachineDriver, MachineTarget
from ptx.network import Network
from ptx.world import Stream, World
from sfcompile.codegen.engines.device_engine import receivers_of
from sfcompile.codegen.engines.launch import AttendKernel, HeapView
from sfcompile.codegen.engines.transfers import ReleaseKernel, TellKernel, TransferKernels, WaitKernel
from sfcompile.codegen.schedule.exchange import ExchangeSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.wires.symmetric_heap import HeapSize, bank_of
from sfcompile.runtime.wires.transport import TAG_BITS, word_of

CPU = torch.device("cpu")


class Heaps:
    """Every rank's segment in a world.

    Args:
        machine_of: machine of each rank: others are reached by NVSHMEM only.
    """

    def __init__(self, world: World, size: HeapSize, machine_of: tuple[int, ...]) -> None:
        self.size, self._machine_of, ranks = size, machine_of, range(len(machine_of))
        pitch = -(-size.segment_bytes // 1024) * 1024
        self._memory = torch.zeros(pitch * (len(machine_of) + 1), dtype=torch.uint8)
        first = -(-self._memory.data_ptr() // 1024) * 1024
        self.at = [first + pitch * rank for rank in ranks]
        for address in self.at:
            world.memory.add(address, pitch, "a heap", self._memory)
        self.tables = [
            torch.tensor([(self.at[o] if machine_of[o] == machine_of[r] else 0, o, self.at[r]) for o in ranks])
            for r in ranks
        ]
        self.watches = [Watch() for _ in ranks]
        for watch in self.watches:
            for words in (watch.words, watch.abort):
                world.memory.add(words.data_ptr(), words.nbytes, "what waits look at", words)
        network = Network(world)
        for rank in ranks:
            network.segments(rank, self.at, size.segment_bytes)

    def bank(self, rank: int, epoch: int, dtype: torch.dtype) -> torch.Tensor:
        """What lies in a rank's bank of an epoch."""
        start = self.at[rank] - self._memory.data_ptr() + self.size.bank_at(bank_of(epoch))
        return self._memory[start : start + self.size.bank_bytes].view(dtype)

    def word(self, rank: int, offset: int) -> int:
        """A word of a rank's segment."""
        start = self.at[rank] - self._memory.data_ptr() + offset
        return int(self._memory[start : start + 8].view(torch.int64))

    def view(self, rank: int, epoch: int, schedule: Schedule) -> HeapView:
        """A rank's view of a site in an epoch."""
        receivers = torch.tensor(receivers_of(schedule, rank, self._machine_of), dtype=torch.int64)
        place = self.size.place(epoch, word_of(epoch, 0), self.watches[rank].watched)
        return HeapView(self.tables[rank], torch.tensor(place), receivers)


class AttentionRanks:
    """An attention site on several ranks.

    Args:
        job: its epochs, mesh, masks and kinds of links.
        arch: 80 or 90.
        change, edit: of PTX and of generated source (driver.py); ``order``: of the names of a rank's launches: mutants.
        programs: that attend, and that move.
    """

    def __init__(
        self, job: Job, arch: int = 80, seed: int = 0, together: float = 0.9,
        change: Callable[[str, str], str] | None = None, edit: Callable[[str, str], str] | None = None,
        order: Callable[[list[str]], list[str]] | None = None, programs: int = 2,
    ) -> None:  # fmt: skip
        self.job, self.world, self._order = job, World(seed, together), order or (lambda names: names)
        self.driver = MachineDriver(self.world, arch, change)
        target = MachineTarget(CPU, programs=programs, driver=self.driver, move_programs=programs, edit=edit)
        schedule, ranks = job.schedule(), range(job.ranks)
        machines = job.machine_of or (0,) * job.ranks
        mask = (job.mask, job.mask_is_bool)
        self.kernels = [
            AttendKernel(schedule, r, target, job.machine_of, mask, merge=job.merge, **job.options) for r in ranks
        ]
        self.releases = [ReleaseKernel(r, job.ranks, target, job.machine_of) for r in ranks]
        size = HeapSize(max(len(schedule.slots), 1), self.kernels[0].tables.bank_bytes, job.ranks)
        self.heaps = Heaps(self.world, size, machines)
        self.streams = [(self.world.stream(rank), self.world.stream(rank)) for rank in ranks]
        self._keep: list[Any] = []

    def run(self) -> float:
        """The worst error of any rank and epoch against fp64, in parts of the output's norm."""
        outs = [[self._epoch(rank, epoch) for epoch in range(1, self.job.epochs + 1)] for rank in range(self.job.ranks)]
        self.world.run()
        whole = expected(self.job)
        worst = 0.0
        for rank, of_rank in enumerate(outs):
            want = whole[:, :, rows_of(self.job.site.q_positions[rank])]
            for epoch, out in enumerate(of_rank, start=1):
                if want.numel():
                    error = float((out.double() / factor_of(epoch) - want).norm() / want.norm())
                    worst = max(worst, error if error == error else float("inf"))
        return worst

    def _epoch(self, rank: int, epoch: int) -> torch.Tensor:
        """Launch a rank's kernels of an epoch; its output, to be."""
        job, kernel, site = self.job, self.kernels[rank], self.job.site
        main, side = self.streams[rank]
        q, k, v, mask = inputs_of(job)
        mine = rows_of(site.q_positions[rank]), rows_of(site.kv_positions[rank])
        factor = factor_of(epoch)  # products of queries and keys stay what they are
        local = {"q": q[:, :, mine[0]] / factor, "k": k[:, :, mine[1]] * factor, "v": v[:, :, mine[1]] * factor}
        out = torch.zeros(site.batch, site.heads, len(mine[0]), site.v_head_dim, dtype=site.dtype)
        heap = self.heaps.view(rank, epoch, kernel.schedule)
        self._keep += [out, heap, local, mask]

        def put() -> None:
            self.world.wait(side, self.world.record(main))
            with self.driver.on(side):
                for name in ("q", "k", "v"):
                    kernel.put(name, local[name], heap)
            self.world.wait(main, self.world.record(side))

        steps: dict[str, Callable[[], Any]] = {
            "put": put,
            "attend": lambda: kernel.run(out, heap, mask=mask),
            "collect": lambda: kernel.collect(out, heap),
            "release": lambda: self.releases[rank].run(heap.heaps, heap.place),
        }
        with ExitStack() as held:
            held.enter_context(self.driver.on(main))
            for name in self._order(list(steps)):
                steps[name]()
        return out


class ExchangeRanks:
    """An exchange between several ranks.

    Args:
        machine_of: machine of each rank.
        change, edit: see :class:`AttentionRanks`.
        stream_waits: the stream waits for every chunk before the kernel that receives.
        stream_tells: the stream tells every signal behind the kernel that sends.
    """

    def __init__(
        self, schedule: ExchangeSchedule, machine_of: tuple[int, ...], arch: int = 80, seed: int = 0,
        change: Callable[[str, str], str] | None = None, edit: Callable[[str, str], str] | None = None,
        stream_waits: bool = False, stream_tells: bool = False,
    ) -> None:  # fmt: skip
        self.world, ranks = World(seed), range(len(machine_of))
        self.driver = MachineDriver(self.world, arch, change)
        target = MachineTarget(CPU, driver=self.driver, edit=edit)
        self._waits = [WaitKernel(rank, target) for rank in ranks] if stream_waits else []
        self._tells = [TellKernel(rank, target) for rank in ranks] if stream_tells else []
        self.kernels = [TransferKernels(schedule, rank, target, machine_of) for rank in ranks]
        self.releases = [ReleaseKernel(rank, len(machine_of), target, machine_of) for rank in ranks]
        size = HeapSize(len(schedule.slots), self.kernels[0].bank_bytes, len(machine_of))
        self.heaps = Heaps(self.world, size, machine_of)
        self.streams = [self.world.stream(rank) for rank in ranks]

    def run(self, shards: list[torch.Tensor], outs: list[torch.Tensor], epochs: int) -> list[list[torch.Tensor]]:
        """Every epoch's outputs, divided by its factor; ``outs`` are like them."""
        results = []
        for epoch in range(1, epochs + 1):
            schedule = self.kernels[0].schedule
            views, own = [self.heaps.view(rank, epoch, schedule) for rank in range(len(shards))], []
            for rank, shard in enumerate(shards):
                with self.driver.on(self.streams[rank]):
                    own.append(self.kernels[rank].put(shard * factor_of(epoch), views[rank]))
                    for dst in range(len(shards)) if self._tells else ():
                        for slot in [each.slot for each in schedule.program(dst).arrivals if each.src == rank]:
                            at = self.heaps.size.signal_at(bank_of(epoch), slot)
                            self._tells[rank].run(views[rank].heaps, views[rank].place, dst, at, epoch, TAG_BITS, 0)
            for rank, like in enumerate(outs):
                with self.driver.on(self.streams[rank]):
                    self.driver.after = self._finish
                    out = torch.full_like(like, torch.nan)
                    for arrival in self.kernels[rank].schedule.program(rank).arrivals if self._waits else ():
                        at = self.heaps.size.signal_at(bank_of(epoch), arrival.slot)
                        self._waits[rank].run(views[rank].heaps, views[rank].place, at, epoch, TAG_BITS, arrival.slot)
                    self.kernels[rank].receive(out, own[rank], views[rank])
                    self.driver.after = lambda stream: None
                    self.releases[rank].run(views[rank].heaps, views[rank].place)
                results.append(out)
        self.world.run()
        every = [results[at : at + len(outs)] for at in range(0, len(results), len(outs))]
        return [[out / factor_of(epoch) for out in of_epoch] for epoch, of_epoch in enumerate(every, start=1)]

    def _finish(self, stream: Stream) -> None:
        """What the host does next comes after the launch: torch's own kernels are on this stream too."""
        self.world.run(lambda: stream.idle)


def factor_of(epoch: int) -> float:
    """Of an epoch's values: a power of two, another one than in the epoch before, and in the one before that, whose
    bank it has."""
    return (-1) ** epoch * 2.0 ** -(epoch % 4 // 2)
