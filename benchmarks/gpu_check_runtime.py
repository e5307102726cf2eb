"""Sections of benchmarks/gpu_check.py: NVSHMEM with one PE; a CUDA graph of puts, attention, collects and credits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_check_kernels import TOKENS, run_apart, run_virtual, schedule_of
from gpu_check_report import Bench, Skip, compare, distance, exact, inputs_of, sdpa, site_of

from sfcompile.codegen.engines.device_engine import KernelEngine
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel, WaitKernel
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.device_state import fill_device_state, leave_device_state
from sfcompile.codegen.toolchain.nvshmem_bitcode import slim_library
from sfcompile.errors import UnsupportedError
from sfcompile.runtime.gpu.device_run import DeviceRun, DeviceRuns
from sfcompile.runtime.gpu.nvshmem import Nvshmem, NvshmemHeap
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.transport import NvshmemTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize


def share(value: Any, doing: str) -> list[Any]:
    """One rank's all-gather."""
    return [value]


def nvshmem(bench: Bench) -> None:
    """One PE: unique id, symmetric memory, the module hook, puts and waits inside kernels and on a stream."""
    library, calls = _emulated() if bench.dry else (None, None)
    with bench.case("NVSHMEM with one PE"):
        try:
            joined = Nvshmem(0, 1, bench.device, share, library and (library, library))
        except UnsupportedError as error:
            raise Skip(f"{error.what}; give a folder with its wheel: make gpu-check WHEELS=folder") from error
        bench.check(True, f"started with a unique id, host library {joined.version()}")
        filled: list[int] = []

        def fill(module: int) -> int:
            filled.append(module)
            return int(joined.bindings.cumodule_init(module))

        fill_device_state(fill, joined.bindings.cumodule_finalize)
        bitcode = None if bench.dry else slim_library(KernelTarget(bench.device).architecture)
        for reach, machines in (("nvshmem", (0, 1, 2, 3)), ("mixed", (0, 0, 1, 1))):
            for kind in ("torus",) if bench.dry else ("torus", "ring"):
                name = f"{reach}, {kind} on 4 virtual ranks of one PE"
                with bench.case(name):
                    target = KernelTarget(bench.device, bitcode, calls)
                    where = {"machine_of": machines, "allocate": joined.allocate}
                    made = run_virtual(bench, name, kind, 4, torch.bfloat16, 64, target, **where)
                    joined.free(made.memory)
            kind = "ulysses" if bench.dry else "torus"  # which passes chunks on: launches side by side
            name = f"{reach}, {kind} on 4 ranks of one PE"
            with bench.case(f"{name}, a launch each"):
                target = KernelTarget(bench.device, bitcode, calls, programs=2 if bench.dry else 8)
                where = {"machine_of": machines, "allocate": joined.allocate}
                made = run_apart(bench, name, kind, TOKENS[4], torch.bfloat16, 64, "", target=target, **where)
                joined.free(made.memory)
        if not bench.dry:
            bench.check(bool(filled), f"the load hook filled NVSHMEM's state into {len(filled)} modules")
        with bench.case("puts and waits on the stream"):
            _transport(bench, joined)
        leave_device_state(False)
        joined.close()


def _transport(bench: Bench, joined: Nvshmem) -> None:
    """What attention='aten' does on GPUs, sent to itself: five epochs, so that credits are awaited too."""
    size = HeapSize(4, 1 << 16, 1)
    heap = NvshmemHeap(joined, size, (0,), share)
    status = DeviceStatus(0, bench.device, 60.0)
    wait = WaitKernel(0, KernelTarget(bench.device))
    transport = NvshmemTransport(joined, heap, size.bank_bytes // 2, status, wait)
    wrong = []
    for epoch in range(1, 6):
        chunk = torch.randn(4, 100, device=bench.device)
        transport.open(epoch, [])
        transport.put(0, 1, 256, chunk, epoch)
        transport.wait(0, 1, epoch)
        if not torch.equal(heap.chunk(epoch % 2, 256, chunk.shape, chunk.dtype), chunk):
            wrong.append(epoch)
        transport.finish(epoch)
    bench.sync()
    bench.check(not wrong, f"put, wait and credit on the stream, 5 epochs: {f'wrong in {wrong}' if wrong else 'right'}")
    credit = int(heap.words(size.credits_at, 1)[0])
    bench.check(credit == 5, f"credit after 5 epochs: {credit}")
    bench.check(not status.words.any(), "no chunk of another call came")
    heap.close()


def _emulated() -> tuple[Any, Any]:
    """What a dry run takes for nvshmem4py, and for NVSHMEM's functions on the device (tests/support/)."""
    from emulated_nvshmem import DeviceCalls, Library

    library = Library(0, lambda: None, lambda pe: True)
    return library, DeviceCalls(library.address_of).names()


@dataclass
class LocalHeap:
    """One rank's heap among several in one piece of memory."""

    size: HeapSize
    table: torch.Tensor
    domains: Sequence[int]
    memory: torch.Tensor

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of a bank at ``offset`` bytes."""
        start = self.size.bank_at(bank) + offset
        count = torch.Size(shape).numel()
        return self.memory[start : start + count * dtype.itemsize].view(dtype).view(tuple(shape))

    def credit(self, rank: int) -> int:
        """The last epoch that a rank has read, as it told this one."""
        at = self.size.credits_at + 64 * rank
        return int(self.memory[at : at + 8].view(torch.int64)[0])

    def close(self) -> None:
        """Nothing to give back."""


class TwoRanks:
    """Two ranks of one process on one device, through runtime/gpu/device_run.py as in a job."""

    def __init__(self, bench: Bench, schedule: Schedule | None = None, limit_s: float = 60.0) -> None:
        self.site = site_of([40, 24] if bench.dry else [1024, 640], 4, 32 if bench.dry else 64, torch.float16)
        schedule, device = schedule or schedule_of(self.site), bench.device
        self.engines = [KernelEngine(schedule, rank, KernelTarget(device), (0, 0)) for rank in range(2)]
        size = HeapSize(len(schedule.slots), max(engine.bank_bytes for engine in self.engines), 2)
        memory = torch.zeros(2, -(-size.segment_bytes // 256) * 256, dtype=torch.uint8, device=device)
        rows = [(part.data_ptr(), 0, part.data_ptr()) for part in memory]
        table = torch.tensor(rows, dtype=torch.int64, device=device)
        self.heaps = [LocalHeap(size, table, (0, 0), part) for part in memory]
        releases = [ReleaseKernel(rank, 2, KernelTarget(device)) for rank in range(2)]
        self.statuses = [DeviceStatus(rank, device, limit_s) for rank in range(2)]
        self.runs = [
            DeviceRuns(heap, release, device, status)
            for heap, release, status in zip(self.heaps, releases, self.statuses, strict=True)
        ]
        for runs, engine in zip(self.runs, self.engines, strict=True):
            runs.prepare(engine)
        self.calls = 0

    def open(self) -> list[DeviceRun]:
        """Begin a call on both ranks."""
        self.calls += 1
        return [run.open(engine, self.calls) for run, engine in zip(self.runs, self.engines, strict=True)]

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One call of the site on both ranks: whole tensors in, the whole output back."""
        opened = self.open()
        self.put(opened, q, k, v)
        out = self.attend(opened)
        self.finish()
        return out

    def put(self, opened: Sequence[DeviceRun], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Both ranks send their parts of whole tensors."""
        split = [owned[0][1] for owned in self.site.q_positions]
        parts = list(zip(*(x.split(split, 2) for x in (q, k, v)), strict=True))
        for run, tensors in zip(opened, parts, strict=True):
            for name, tensor in zip("qkv", tensors, strict=True):
                run.put(f"put_{name}", tensor)

    def attend(self, opened: Sequence[DeviceRun]) -> torch.Tensor:
        """Both ranks attend and collect; the whole output."""
        for runs in self.runs:  # both ranks' puts come before either's attention: here one device does it all
            runs.join()
        for run in opened:
            run.attend(None)
        outs = []
        for run in opened:
            assert run.output is not None
            run.collect(run.output)
            outs.append(run.output)
        return torch.cat(outs, 2)

    def finish(self) -> None:
        """All calls have ended."""
        for runs in self.runs:
            runs.finish(self.calls)


def graph(bench: Bench) -> None:
    """Two calls in a CUDA graph, replayed: right each time, with the inputs of the time, and epochs that go on."""
    with bench.case("CUDA graph of two ranks"):
        ranks = TwoRanks(bench)
        q, k, v = inputs_of(ranks.site, bench.device)

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            return ranks.attention(q, k, v), ranks.attention(k, q, v)

        replay, before = _captured(bench, step, ranks)
        wrong, changed, first = [], 0.0, [x.clone() for x in replay()]
        wants = [exact(ranks.site, *x, None)[0] for x in ((q, k, v), (k, q, v))]
        for i, (name, given) in enumerate((("first", (q, k, v)), ("second", (k, q, v)))):
            compare(bench, f"{name} call in the graph", ranks.site, first[i], wants[i], sdpa(ranks.site, *given, None))
        replays = 2 if bench.dry else 5
        for i in range(1, replays):
            if not all(torch.equal(one, other) for one, other in zip(first, replay(), strict=True)):
                wrong.append(i + 1)
        v.neg_()
        changed = max(distance(out, -want) for out, want in zip(replay(), wants, strict=True))
        bench.sync()
        bench.check(not wrong, f"{replays} replays: {f'others in {wrong}' if wrong else 'the same each time'}")
        bench.check(changed < 5e-3, f"a replay with other values: error {changed:.1e}")
        epochs, wanted = ranks.heaps[0].credit(1), before + 2 * (replays + 1)
        bench.check(epochs == wanted, f"epochs after {replays + 1} replays of 2 calls: {epochs}, expected {wanted}")


def _captured(
    bench: Bench, step: Callable[[], tuple[torch.Tensor, torch.Tensor]], ranks: TwoRanks
) -> tuple[Callable[[], tuple[torch.Tensor, torch.Tensor]], int]:
    """``(replay, epochs before the first)``; on CPUs a replay is a call."""
    if bench.dry:
        return step, 0
    stream = torch.cuda.Stream(bench.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled before a capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    bench.sync()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outs = step()

    def replay() -> tuple[torch.Tensor, torch.Tensor]:
        captured.replay()
        return outs

    return replay, 2
