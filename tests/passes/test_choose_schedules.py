"""Plans of a graph: one per distinct attention, the same for every rank."""

from __future__ import annotations

from typing import Any

import torch
from helpers import captured
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.codegen.plan.choose_plan import SitePlan
from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.analyse_tokens import analyse_tokens, seeds_of
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.choose_schedules import Choices, choose_schedules
from sfcompile.runtime.program.sites import GatherSite
from sfcompile.runtime.program.topology import Topology


def choices(*shapes: tuple[int, ...], ranks: int = 4, **asked: Any) -> Choices:
    graph = captured(lambda *xs: [sdpa(x, x, x) for x in xs], *(torch.zeros(s) for s in shapes)).gm.graph
    sites = analyse_attention(graph)
    tokens = analyse_tokens(graph, seeds_of(sites))
    topology = Topology.grid(2, ranks // 2)
    return choose_schedules(tokens, choose_layouts(tokens, sites, ranks), sites, topology, **asked)


def test_equal_attentions_share_a_plan() -> None:
    found = choices((1, 4, 64, 8), (1, 4, 64, 8), (1, 8, 4096, 8))
    assert sorted(found.counts.values()) == [1, 2] and len(found.exchange_s) == 3
    assert found.main is not None and "2 x " in str(found)
    assert all(seconds >= 0.0 for seconds in found.exchange_s.values())
    key = max(found.plans, key=lambda key: found.plans[key].price.seconds or 0.0)
    assert found.main is found.plans[key]


def test_one_rank_plans_for_all() -> None:
    calls = []

    def agree(plan: Any) -> list[SitePlan]:
        calls.append(plan())
        return calls[-1]

    found = choices((1, 4, 64, 8), agree=agree, schedule="ring")
    assert len(calls) == 1 and [plan.best.kind for plan in found.plans.values()] == ["ring"]


def test_gathers_need_no_plan() -> None:
    found = choices((1, 4, 64, 8))
    site = GatherSite("g", (4, 8), torch.float32, 0, 1, 1, tuple(((r, 1),) for r in range(4)))
    assert found.schedule(site).kind == "gather"


def test_no_attention_no_plan() -> None:
    assert Choices(Topology.grid(1, 2)).main is None
