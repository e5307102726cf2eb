"""Measure what the ranks of a job can compute and move, and write it as a topology file.

    torchrun ... -m sfcompile.commands.measure --out cluster.toml       on the cluster itself
    sfcompile doctor --measure --ranks 4                       on this machine

Everything goes through the runtime that models will use, so the constants contain its own cost. All ranks work at the
same time: what they share (cores, memory, a network card) is measured shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.exchange import ExchangeSchedule, build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import lay_out
from sfcompile.runtime.program.instructions import Arrival, Chunk, Put, RankProgram, Wait
from sfcompile.runtime.program.phases import EXCHANGE_FINISH, EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite, nbytes
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.attention_aten import attend
from sfcompile.runtime.rank.process_group import ProcessWorld
from sfcompile.runtime.rank.session import Session, close_session, get_session

SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
"""Floats of a message; up to 4 MiB."""
_POINTWISE = 6
"""Rounds of pointwise ops that are timed as one: about 16 ms on one core."""
PATIENCE_S = 0.4
WAIT_S = 1e-5


def shift(topology: Topology, across: bool, floats: int) -> ExchangeSchedule:
    """Every rank sends a chunk to the next rank of its machine, or to its peer on the next machine."""
    machines, ranks = topology.num_machines, topology.num_ranks
    mesh = Mesh.of(topology, machines, ranks // machines)
    step = mesh.offset(1, 0) if across else mesh.offset(0, 1)
    owned = tuple(((rank, 1),) for rank in range(ranks))
    wanted = tuple(tuple((row, 1) for row in sorted({rank, mesh.rank_after(rank, step)})) for rank in range(ranks))
    site = ExchangeSite("shift", (ranks, floats), torch.float32, 0, 1, 1, owned, 0, wanted)
    origin = RankProgram(
        0,
        {EXCHANGE_START: (Put("x", 0, mesh.back(step), 0),), EXCHANGE_FINISH: (Wait(0, step),)},
        (Arrival(0, step, "x", Chunk(step)),),
    )
    return ExchangeSchedule("shift", site, mesh, lay_out([("x", nbytes((floats,), torch.float32))]), origin)


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

    def timed(self, run: Callable[[], object], seconds: float = PATIENCE_S) -> float:
        """Seconds of one call while every rank does the same: the lower quartile, since noise only adds."""
        for _ in range(3):
            run()
        self.session.meet()
        times: list[float] = []
        end = time.perf_counter() + seconds
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
        start, slope = _line(puts)
        copy = 2.0 / max(slope, 1e-12)
        arrive = max(_line(totals)[0] - start - WAIT_S, 1e-6)
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
        sharing = self.topology.num_ranks / self.topology.num_machines
        wire = max(slope - 4.0 / known["copy_bytes_per_s"], 0.1 * slope)
        constants = {"network_bytes_per_s": sharing / wire, "network_latency_s": max(start - _line(puts)[0], 1e-6)}
        constants.setdefault("message_s", known.get("message_s", _line(puts)[0]))
        touch = self.lost(totals[-1])
        return constants | ({"touch_bytes_per_s": touch} if touch else {})

    def lost(self, transfer_s: float) -> float:
        """Bytes per second of lost compute while messages come and go for so long; 0 if nothing is lost."""
        floats = SIZES[-1]
        name = f"shift True {floats}"
        q, k = torch.randn(1, 8, 512, 64), torch.randn(1, 8, 1024, 64)
        chunk, out = torch.randn(1, floats), torch.empty(self.topology.num_ranks, floats)
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


def _line(times: Sequence[float]) -> tuple[float, float]:
    """``(start, seconds a byte)`` of the straight line through times by size, near in relative terms."""
    sizes = 4.0 * np.array(SIZES)
    weights = 1.0 / np.array(times)
    slope, start = np.polyfit(sizes, np.array(times), 1, w=weights)
    if start <= 0.0:
        start = 0.5 * float(min(times))
    return float(start), float(max(slope, 0.0))


def table(topology: Topology) -> str:
    """The constants for people."""
    rows = [
        ("matmul", f"{topology.flops_per_s / 1e9:.1f} GFLOP/s a rank"),
        ("attention", f"{(topology.attention_flops_per_s or topology.flops_per_s) / 1e9:.1f} GFLOP/s a rank"),
        (
            "pointwise",
            f"{topology.memory_bytes_per_s / 1e9:.2f} GB/s; a call starts in {topology.launch_s * 1e6:.0f} us",
        ),
        ("put", f"{topology.message_s * 1e6:.0f} us and {(topology.copy_bytes_per_s or 0) / 1e9:.2f} GB/s of copying"),
        ("inside", f"{topology.local_latency_s * 1e6:.0f} us until a chunk is seen"),
    ]
    if topology.num_machines > 1:
        link = f"{topology.network_bytes_per_s * 8 / 1e6:.0f} Mbit/s a machine"
        touch = topology.touch_bytes_per_s
        lost = f"its bytes cost compute a second per {touch / 1e6:.0f} MB" if touch else "its bytes cost no compute"
        rows.append(("between", f"{link}, {topology.network_latency_s * 1e6:.0f} us; {lost}"))
    head = f"{topology.num_ranks} ranks on {topology.num_machines} machine{'s' * (topology.num_machines > 1)}"
    return "\n".join([head, *(f"  {name:<10} {text}" for name, text in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """One rank's part; rank 0 writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cluster.toml"))
    args = parser.parse_args(argv)
    session = get_session(lambda: ProcessWorld("auto", 60.0))
    with session.guard(), torch.no_grad():
        first = session.rank == 0
        topology = measure(session, lambda text: print(f"  measuring {text}", flush=True) if first else None)
        if first:
            print(table(topology))
            args.out.write_text("# measured by sfcompile doctor --measure\n" + topology.to_toml(), encoding="utf-8")
            print(f'wrote {args.out}: use it as options={{"topology": "{args.out}"}} or --topology {args.out}')
    close_session()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
