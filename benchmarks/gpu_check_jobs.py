"""Sections of benchmarks/gpu_check.py: calls that are open side by side, a peer that is lost, the library beside the
generated kernel."""

from __future__ import annotations

import torch
from gpu_check_kernels import schedule_of
from gpu_check_report import Bench, compare, exact, inputs_of, sdpa, site_of
from gpu_check_runtime import TwoRanks

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import RuntimeTimeoutError
from sfcompile.measuring.attention import BUDGET_S, DeviceClock, Work, flops, ways_on
from sfcompile.measuring.attention import compare as compare_ways
from sfcompile.runtime.program.phases import EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology

HEADS = 24


def order(bench: Bench) -> None:
    """Two calls open at a time, of which the younger ends first: attentions, and gathers of one geometry."""
    with bench.case("two attentions, the younger ends first"):
        ranks = TwoRanks(bench)
        q, k, v = inputs_of(ranks.site, bench.device)
        pairs = ((q, k, v), (k, q, v))
        wants = [exact(ranks.site, *given, None)[0] for given in pairs]
        for turn in range(1, 2 if bench.dry else 4):
            opened = [ranks.open(), ranks.open()]
            for each, given in zip(opened, pairs, strict=True):
                ranks.put(each, *given)
            outs = [ranks.attend(each) for each in reversed(opened)]
            ranks.finish()
            for name, out, want, given in zip(("younger", "older"), outs, wants[::-1], pairs[::-1], strict=True):
                compare(bench, f"{name} call, turn {turn}", ranks.site, out, want, sdpa(ranks.site, *given, None))
    with bench.case("two gathers of one geometry"):
        rows = (6, 4) if bench.dry else (600, 400)
        owned = (((0, rows[0]),), ((rows[0], rows[1]),))
        site = ExchangeSite.gather("gather", (1, sum(rows), 32), torch.float32, 1, owned)
        ranks = TwoRanks(bench, build_exchange(site, Mesh.of(Topology.grid(1, 2), 2, 1)))
        wholes = [torch.randn(1, sum(rows), 32, device=bench.device) for _ in range(2)]
        for turn in range(1, 2 if bench.dry else 4):
            opened = [ranks.open(), ranks.open()]
            for each, whole in zip(opened, wholes, strict=True):
                for run, part in zip(each, whole.split(rows, 1), strict=True):
                    run.put(EXCHANGE_START, part)
            for runs in ranks.runs:
                runs.join()
            same = True
            for each, whole in zip(opened[::-1], wholes[::-1], strict=True):
                for run in each:
                    out = torch.full_like(whole, torch.nan)
                    run.receive(out)
                    same &= torch.equal(out, whole)
            ranks.finish()
            bench.check(same, f"both gathers bitwise on both ranks, turn {turn}")


def lost(bench: Bench) -> None:
    """One of two ranks never comes: the other one's kernels end, no signal leaves it, and its host says why."""
    with bench.case("a peer that never comes"):
        limit_s = 0.1 if bench.dry else 2.0
        ranks = TwoRanks(bench, limit_s=limit_s)
        inputs = inputs_of(ranks.site, bench.device)
        ranks.attention(*inputs)  # compiled here
        bench.sync()
        run = ranks.open()[0]
        split = ranks.site.q_positions[0][0][1]
        for name, tensor in zip("qkv", inputs, strict=True):
            run.put(f"put_{name}", tensor[:, :, :split])
        bench.sync()
        words = ranks.heaps[1].memory[: ranks.heaps[1].size.banks_at]  # signals and credits; data without them is none
        before = words.clone()
        run.attend(None)
        assert run.output is not None
        run.collect(run.output)
        bench.sync()
        bench.check(torch.equal(before, words), "no signal and no credit left the rank after its wait gave up")
        status, said = ranks.statuses[0], ""
        try:
            status.end_call()
            bench.sync()  # here the device's assertion has stopped the stream
        except RuntimeTimeoutError:
            said = "at once"
        except RuntimeError as error:
            said = str(error).splitlines()[0]
        bench.check(bool(said), f"the call is no result: {said or 'nobody said so'}")
        known = status.error()
        bench.check(isinstance(known, RuntimeTimeoutError), " ".join(str(known).split()))


def library(bench: Bench) -> None:
    """What ``attention="auto"`` times at a compile, on schedules of 2 and 4 ranks: the first rank's part, both ways."""
    sizes, tokens = ((32,), (12, 8)) if bench.dry else ((64, 128), (9216, 9216))
    ways, clock = ways_on(bench.device), DeviceClock(bench.device)
    for size in sizes:
        rates: dict[str, list[float]] = {}
        for kind, count in (("torus", 2), ("usp", 2), ("torus", 4))[: 1 if bench.dry else 3]:
            with bench.case(f"{kind} on {count} ranks, D={size}"):
                site = site_of((tokens * 2)[:count], 2 if bench.dry else HEADS, size, torch.bfloat16)
                schedule = schedule_of(site, kind)
                found = compare_ways([Work(schedule, ("none", True), 1)], ways, clock, BUDGET_S)
                bench.check(len(found.seconds) == len(ways), f"{kind} on {count} ranks, D={size}: {found.line}")
                for name, seconds in found.seconds.items():
                    rates.setdefault(name, []).append(flops(schedule) / count / seconds)
        if len(rates) == len(ways):
            least = {"fused": min(rates["triton"]), "library": min(rates["aten"])}
            bench.figure("rates", size, least)
