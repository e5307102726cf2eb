"""Plans of a graph: one per distinct attention, the same for every rank."""

from __future__ import annotations

from typing import Any

import torch
from helpers import captured
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.options import Wire
from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.analyse_tokens import analyse_tokens, seeds_of
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.choose_schedules import choose_schedules
from sfcompile.passes.state import Asked, Choices
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology


def choices(*shapes: tuple[int, ...], ranks: int = 4, topology: Topology | None = None, **asked: Any) -> Choices:
    graph = captured(lambda *xs: [sdpa(x, x, x) for x in xs], *(torch.zeros(s) for s in shapes)).gm.graph
    sites = analyse_attention(graph)
    tokens = analyse_tokens(graph, seeds_of(sites))
    topology = topology or Topology.grid(2, ranks // 2)
    return choose_schedules(tokens, choose_layouts(tokens, sites, ranks), sites, topology, Asked(**asked))


def test_equal_attentions_share_a_plan() -> None:
    planned = choices((1, 4, 64, 8), (1, 4, 64, 8), (1, 8, 4096, 8))
    assert sorted(planned.counts.values()) == [1, 2] and len(planned.exchange_s) == 3
    assert planned.main is not None and "2 x " in str(planned)
    assert all(seconds >= 0.0 for seconds in planned.exchange_s.values())
    key = max(planned.plans, key=lambda key: planned.plans[key].price.seconds or 0.0)
    assert planned.main is planned.plans[key]


def test_one_rank_plans_for_all() -> None:
    calls = []

    def agree(plan: Any) -> Any:
        calls.append(plan())
        return calls[-1]

    planned = choices((1, 4, 64, 8), agree=agree, schedule="ring")
    assert len(calls) == 1 and [plan.best.kind for plan in planned.plans.values()] == ["ring"]


def test_a_wire_is_part_of_a_site_and_of_its_price() -> None:
    """On links so slow that bytes are all that counts: half, and little more than a quarter, of the seconds."""
    slow = {"network_bytes_per_s": 1e6, "local_bytes_per_s": 1e6}
    seconds = {}
    for wire in ("same", "bf16", "fp8"):
        planned = choices((1, 4, 256, 64), topology=Topology.grid(2, 2, **slow), wire=Wire(*[wire] * 4), parts=())
        (site,), (plan,) = planned.sites.values(), planned.plans.values()
        assert site.wire == Wire(*[wire] * 4)
        seconds[wire] = plan.price.seconds or 0.0
        assert planned.schedule(site).site.written("k") == wire
    assert 0.49 < seconds["bf16"] / seconds["same"] < 0.55
    assert 0.25 < seconds["fp8"] / seconds["same"] < 0.32


def test_what_is_nearly_even_is_decided_as_if_ranks_computed_faster() -> None:
    """Parts hide more than ranks so slow have to hide; ahead by 1 and 2.5 % at two speeds, behind at a third."""
    parts = {}
    for gflops in (20, 27, 28):
        rates = {
            "flops_per_s": gflops * 1e9,
            "attention_flops_per_s": gflops * 1e9,
            "memory_bytes_per_s": gflops * 1e9 / 8,
        }
        link = {"network_bytes_per_s": 25e6, "network_latency_s": 1e-4, "launch_s": 3e-5}
        planned = choices((1, 8, 2048, 64), ranks=2, topology=Topology.grid(2, 1, **rates, **link))
        parts[gflops] = planned.parts, [note for note in planned.notes if "3 parts" in note]
    assert {gflops: count for gflops, (count, _) in parts.items()} == {20: 1, 27: 3, 28: 3}, parts


def test_groups_that_lie_otherwise_on_the_machines_are_no_way_to_split_a_batch() -> None:
    """Four ranks and two: the first half of the ranks shares a machine, the second would use the link unseen."""
    slow = {"network_bytes_per_s": 1e5, "network_latency_s": 0.1}
    for machine_of, batch in (((0, 0, 0, 0, 1, 1), 1), ((0, 1, 0, 0, 1, 0), 1), ((0, 0, 0, 1, 1, 1), 2)):
        planned = choices((2, 4, 512, 64), ranks=6, topology=Topology(machine_of, **slow), parts=(), split_batch=True)
        uneven = "batch split 2 ways: groups would share machines unevenly" in planned.notes
        assert (planned.batch, uneven) == (batch, batch == 1), (machine_of, planned.notes)


def test_exchanges_need_no_plan() -> None:
    planned = choices((1, 4, 64, 8))
    site = ExchangeSite.gather("g", (4, 8), torch.float32, 0, tuple(((r, 1),) for r in range(4)))
    assert planned.schedule(site).kind == "exchange"


def test_no_attention_no_plan() -> None:
    assert Choices(Topology.grid(1, 2)).main is None
