"""Links and compute of a job in several seconds: the constants of a topology file (sfcompile doctor --measure).

Everything goes through the runtime that models will use, so the constants contain its own cost. All ranks work at the
same time: what they share (cores, memory, a network card) is measured shared.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.exchange import ExchangeSchedule, build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.measuring.estimate import line
from sfcompile.measuring.shifts import shift
from sfcompile.runtime.program.phases import EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.attention_aten import attend
from sfcompile.runtime.rank.session import Session

SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
"""Floats of a message; up to 4 MiB."""
_BYTES = tuple(4.0 * floats for floats in SIZES)
_POINTWISE = 6
"""Rounds of pointwise ops that are timed as one: about 16 ms on one core."""
PATIENCE_S = 0.4
WAIT_S = 1e-5


def measure(session: Session, say: Callable[[str], None] = lambda text: None) -> Topology:
    """Collective: the constants of this job, the same on every rank (of unequal ranks, the slowest counts)."""
    bench = _Bench(session)
    say("compute: matmul, attention, pointwise ops")
    constants = bench.compute()
    say("messages inside machines")
    constants |= bench.inside()
    if session.topology.num_machines > 1:
        say("messages between machines")
        constants |= bench.between(constants)
    return session.topology.with_constants(constants)


class _Bench:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.topology = session.topology

    def slowest(self, value: float) -> float:
        """Collective: the largest of all ranks' values."""
        return max(float(other) for other in self.session.exchange(value, "measure"))

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds of one call while every rank does the same: the lower quartile, since noise only adds."""
        for _ in range(3):
            run()
        self.session.meet()
        times: list[float] = []
        end = time.perf_counter() + PATIENCE_S
        while len(times) < 8 or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return self.slowest(float(np.quantile(times, 0.25)))

    # ------------------------------------------------------------------ compute

    def compute(self) -> dict[str, float]:
        """Rates of matmul and attention, the start of a call, and of what pointwise ops move (merges move more)."""
        a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
        matmul = self.timed(lambda: a @ b)
        q, k = torch.randn(1, 8, 512, 64), torch.randn(1, 8, 1024, 64)
        large = self.timed(lambda: attend(q, k, k, None, 0.1))
        few, keys = q[:, :, :8].contiguous(), k[:, :, :64].contiguous()
        small = self.timed(lambda: attend(few, keys, keys, None, 0.1))
        flops = 4.0 * 8 * 512 * 1024 * 64
        c = torch.randn_like(b)

        def pointwise() -> None:  # long enough that ranks which share a core have their turns within
            for _ in range(_POINTWISE):
                torch.nn.functional.layer_norm(torch.nn.functional.gelu(b * c, approximate="tanh"), (1024,))

        moved = _POINTWISE * (3.0 + 2.0 + 2.0) * b.nbytes
        return {
            "flops_per_s": 2.0 * 512 * 1024 * 1024 / matmul,
            "attention_flops_per_s": flops / max(large - small, 0.1 * large),
            "launch_s": small,
            "memory_bytes_per_s": moved / self.timed(pointwise),
        }

    # ------------------------------------------------------------------ messages

    def shifts(self, across: bool) -> tuple[list[float], list[float]]:
        """Seconds of the put, and of put and arrival together, by size.

        The median of some rounds; of the largest messages between machines, which other work delays by far more than
        they take, the least, where a round takes as long as its slowest rank: all share the links.
        """
        puts, totals = [], []
        for floats in SIZES:
            schedule = shift(self.topology, across, floats)
            check(schedule)
            name = f"shift {across} {floats}"
            self.session.load(name, [schedule])
            chunk = torch.randn(1, floats)
            site = schedule.site
            out = torch.empty(site.wanted_shape(self.session.rank))
            put_s: list[float] = []
            total_s: list[float] = []
            self.session.meet()
            # The number of rounds is agreed on: a rank that stops early would leave its peer waiting.
            rounds = 5 if floats == SIZES[-1] and across else 10
            large = across and floats == SIZES[-1]
            for _ in range(rounds):
                if large:
                    self.start_together()
                start = time.perf_counter()
                self.session.put(name, 0, EXCHANGE_START, chunk)
                middle = time.perf_counter()
                self.session.receive(name, 0, out)
                put_s.append(middle - start)
                total_s.append(time.perf_counter() - start)
            puts.append(self.slowest(statistics.median(put_s)))
            if large:
                everyone = self.session.exchange(total_s, "measure")
                totals.append(min(max(of_round) for of_round in zip(*everyone, strict=True)))
            else:
                totals.append(self.slowest(statistics.median(total_s)))
        return puts, totals

    def start_together(self) -> None:
        """Collective: returns on all ranks within a message's time (a meeting at the store may take far longer)."""
        ranks = self.topology.num_ranks
        if "start" not in self.session.programs:
            site = ExchangeSite.gather(
                "start", (ranks, 1), torch.float32, 0, tuple(((rank, 1),) for rank in range(ranks))
            )
            self.session.load("start", [build_exchange(site, Mesh.of(self.topology, 1, ranks))])
        self.session.put("start", 0, EXCHANGE_START, torch.zeros(1, 1))
        self.session.receive("start", 0, torch.empty(ranks, 1))

    def inside(self) -> dict[str, float]:
        """What a put costs its sender, and how soon it is seen."""
        if self.topology.num_ranks == self.topology.num_machines:  # one rank a machine: its own copies only
            chunk = torch.randn(SIZES[-1])
            copy = 4.0 * SIZES[-1] / self.timed(chunk.clone)
            return {"copy_bytes_per_s": copy, "local_bytes_per_s": copy}
        puts, totals = self.shifts(across=False)
        # The put phase moves the bytes twice: into the peer's heap, and the part that stays into a place of its own.
        start, slope = line(_BYTES, puts)
        copy = 2.0 / max(slope, 1e-12)
        arrive = max(line(_BYTES, totals)[0] - start - WAIT_S, 1e-6)
        return {
            "message_s": start, "copy_bytes_per_s": copy, "local_bytes_per_s": copy, "local_latency_s": arrive,
            "wait_s": WAIT_S,
        }  # fmt: skip

    def between(self, known: dict[str, float]) -> dict[str, float]:
        """Bandwidth of a machine's uplink, latency, and the compute lost to moving its bytes."""
        puts, totals = self.shifts(across=True)
        # Its rate is what the largest messages see; the burst that a shaped link lets through at first is a hundredth.
        slope = max((totals[-1] - totals[0]) / (4.0 * (SIZES[-1] - SIZES[0])), 1e-12)
        start = totals[0]
        sharing = messages_of_a_machine(shift(self.topology, True, SIZES[-1]), self.topology)
        wire = max(slope - 4.0 / known["copy_bytes_per_s"], 0.1 * slope)
        constants = {
            "network_bytes_per_s": sharing / wire,
            "network_latency_s": max(start - line(_BYTES, puts)[0], 1e-6),
        }
        constants.setdefault("message_s", known.get("message_s", line(_BYTES, puts)[0]))
        touch = self.lost(totals[-1])
        return constants | ({"touch_bytes_per_s": touch} if touch else {})

    def lost(self, transfer_s: float) -> float:
        """Bytes per second of lost compute while messages come and go for so long; 0 if nothing is lost."""
        floats = SIZES[-1]
        name = f"shift True {floats}"
        q, k = torch.randn(1, 8, 512, 64), torch.randn(1, 8, 1024, 64)
        chunk, out = (
            torch.randn(1, floats),
            torch.empty(shift(self.topology, True, floats).site.wanted_shape(self.session.rank)),
        )
        calls = max(4, int(transfer_s / self.timed(lambda: attend(q, k, k, None, 0.1))))

        def attends() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                attend(q, k, k, None, 0.1)
            return time.perf_counter() - start

        alone, both = [], []
        for _ in range(5):  # in turn, so that noise hits both
            self.session.meet()
            alone.append(attends())
            self.session.meet()
            self.session.put(name, 0, EXCHANGE_START, chunk)
            both.append(attends())
            self.session.receive(name, 0, out)
        lost = self.slowest(statistics.median(both) - statistics.median(alone))
        return 2.0 * 4 * floats / lost if lost > 0.03 * statistics.median(alone) else 0.0


def messages_of_a_machine(schedule: ExchangeSchedule, topology: Topology) -> int:
    """So many messages of a shift between machines leave one machine, or come to one: the most of any.

    They share its link. Where machines have unequal numbers of ranks, some ranks have no peer and send nothing.
    """
    leave: Counter[int] = Counter()
    come: Counter[int] = Counter()
    for dst, runs in enumerate(schedule.site.wanted):
        for src in (row for first, length in runs for row in range(first, first + length)):
            if not topology.same_machine(src, dst):
                leave[topology.machine_of[src]] += 1
                come[topology.machine_of[dst]] += 1
    return max((*leave.values(), *come.values()), default=1)
