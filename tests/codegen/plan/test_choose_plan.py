"""The planner: legal, never above what peers run, explained, quick, and what the user asked for."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace

import pytest
import torch
from random_sites import attention_site, even

from sfcompile.codegen.plan import choose_plan
from sfcompile.codegen.plan.choose_plan import Candidate, plan_site
from sfcompile.codegen.plan.simulator import simulate
from sfcompile.codegen.plan.step import layer
from sfcompile.codegen.proof.checker import check
from sfcompile.errors import MeshError
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology


def site(
    ranks: int, heads: int = 8, tokens: int = 512, head_dim: int = 64, kv_heads: int | None = None
) -> AttentionSite:
    base = attention_site(ranks, heads, tokens, head_dim)
    return replace(base, kv_heads=kv_heads or heads, dtype=torch.bfloat16)


def price(candidate: Candidate, site: AttentionSite, topology: Topology) -> float:
    return simulate(layer(candidate.schedule(site, topology), 1), topology).seconds


@pytest.mark.parametrize("seed", range(12))
def test_never_priced_above_what_peers_run(seed: int) -> None:
    """Ulysses, ring and USP as their users run them, on random hardware and shapes."""
    rng = random.Random(seed)
    machines, inside = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 4])
    topology = Topology.grid(
        machines, inside, network_bytes_per_s=10 ** rng.uniform(6, 10), local_bytes_per_s=10 ** rng.uniform(8, 11),
        flops_per_s=10 ** rng.uniform(10, 14), launch_s=10 ** rng.uniform(-6, -4),
    )  # fmt: skip
    ranks = topology.num_ranks
    kv_heads = rng.choice([1, 2, 8])
    here = site(ranks, heads=8, tokens=rng.choice([64, 999, 8192]), kv_heads=kv_heads)
    plan = plan_site(here, topology)
    assert plan.price.seconds is not None and plan.price.limit_s <= plan.price.seconds
    usp = [Candidate("usp", u, ranks // u, "ring") for u in (2, 4, 8) if u <= min(inside, 8) and ranks % u == 0]
    peers = [Candidate("ring", 1, ranks), *usp, *([Candidate("ulysses", ranks, 1)] if ranks <= 8 else [])]
    for peer in peers:
        assert plan.price.seconds <= price(peer, here, topology) * (1 + 1e-9), f"{plan.best} above {peer}"
    check(plan.best.schedule(here, topology))


@pytest.mark.parametrize(("shape", "parts"), [("2x2", 1), ("4x1", 2), ("3x2:a10-ethernet", 1), ("4x8:a100-efa", 1)])
@pytest.mark.parametrize("tokens", [997, 8192])
def test_many_ranks_take_the_plan_that_all_prices_would(
    shape: str, parts: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On many ranks bounds turn down what cannot be among the best: here, on few, both ways are at hand."""
    topology = Topology.parse(shape)
    for heads in (24, 3):
        here = replace(site(topology.num_ranks, heads, tokens, 128), parts=parts)
        choose_plan.forget_plans()
        full = plan_site(here, topology, 1e-3, layers=5)
        with monkeypatch.context() as patched:
            patched.setattr(choose_plan, "PRICED_ALL", 0)
            choose_plan.forget_plans()
            quick = plan_site(here, topology, 1e-3, layers=5)
        choose_plan.forget_plans()
        assert quick.best == full.best and quick.price == full.price
        prices = {row.candidate: row for row in full.rows}
        assert set(prices) == {row.candidate for row in quick.rows}
        for row in quick.rows:
            least_ms = re.search(r"waits alone take ([\d.]+) ms", row.reason)
            known = prices[row.candidate].seconds
            assert row.seconds in (None, known)
            assert least_ms is None or known is None or float(least_ms[1]) <= known * 1e3 + 1e-3


def test_of_a_thousand_ranks_few_plans_are_simulated() -> None:
    """Seconds of CPU time are printed, not asserted."""
    topology = Topology.parse("128x8:a100-efa")
    here = site(1024, heads=24, tokens=37376, head_dim=128)
    start = time.process_time()
    plan = plan_site(here, topology, 1e-4)
    middle = time.process_time()
    check(plan.best.schedule(here, topology))
    print(f"planned in {middle - start:.1f} s, proved in {time.process_time() - middle:.2f} s")
    assert sum(row.seconds is not None for row in plan.rows) < 8, "bounds turn down most"


def test_slow_links_between_machines_bring_the_torus() -> None:
    """Four machines: Ulysses across them moves half of what a ring across them does, and staging hides it."""
    topology = Topology.parse("4x8:a100-efa")
    plan = plan_site(site(32, heads=24, tokens=66048, head_dim=128), topology, 4.7e-3)
    assert plan.best.kind == "torus" and plan.best.across == "ulysses" and plan.best.ulysses % 4 == 0
    text = str(plan)
    assert "24 heads for 32 Ulysses ranks" in text and "<- taken" in text and "alone take" in text
    assert len(plan.rows) == len({row.candidate for row in plan.rows})


def test_one_shared_key_head_brings_the_gather() -> None:
    """Multi-query attention on many machines: keys are a fraction of queries and outputs."""
    topology = Topology.grid(4, 1, network_bytes_per_s=2e7, flops_per_s=1e13)
    plan = plan_site(site(4, heads=16, tokens=2048, kv_heads=1), topology)
    assert plan.best.kind in ("allgather", "ring")


def test_a_full_size_plan_is_quick_and_kept() -> None:
    """Seconds are printed, not asserted."""
    topology = Topology.parse("4x8:a100-efa")
    here = replace(site(32, heads=24, tokens=37376, head_dim=128), name="first")
    start = time.perf_counter()
    first = plan_site(here, topology, 3.3e-3)
    middle = time.perf_counter()
    assert plan_site(replace(here, name="another layer"), topology, 3.3e-3) is first
    print(f"planned in {middle - start:.2f} s, again in {(time.perf_counter() - middle) * 1e6:.0f} us")


@pytest.mark.parametrize(
    ("schedule", "mesh", "kind"),
    [("torus", None, "torus"), ("ulysses", None, "ulysses"), ("ring", None, "ring"), ("usp", None, "usp"),
     ("auto", {"ulysses": 2, "ring": 2}, None), ("torus", {"ulysses": 4, "ring": 1}, "torus")],
)  # fmt: skip
def test_what_was_asked_for_is_taken(schedule: str, mesh: dict[str, int] | None, kind: str | None) -> None:
    plan = plan_site(site(4), Topology.grid(2, 2), mesh=mesh, schedule=schedule)
    assert kind is None or plan.best.kind == kind
    assert mesh is None or plan.best.degrees == (mesh["ulysses"], mesh["ring"])
    if schedule == "usp":
        assert plan.best.across == "ring"


def test_what_is_not_possible_is_refused_with_the_numbers() -> None:
    with pytest.raises(MeshError, match="schedule='ulysses' is not possible for attention with 3 heads on 4 ranks"):
        plan_site(site(4, heads=3), Topology.grid(1, 4), schedule="ulysses")
    with pytest.raises(MeshError, match="mesh ulysses 4 x ring 1.*3 heads for 4 Ulysses ranks"):
        plan_site(site(4, heads=3), Topology.grid(1, 4), mesh={"ulysses": 4, "ring": 1})


def test_a_torus_of_one_group_is_a_ring() -> None:
    assert plan_site(site(3, heads=2), Topology.grid(1, 3), schedule="torus").best.kind == "ring"
    asked = {"ulysses": 1, "ring": 4}
    assert plan_site(site(4), Topology.grid(1, 4), mesh=asked, schedule="torus").best.kind == "ring"


def test_one_rank_has_one_plan() -> None:
    plan = plan_site(replace(site(1), q_positions=even(512, 1)), Topology.grid(1, 1))
    assert plan.price.exposed_s == 0.0


def test_ranks_spread_unevenly_over_machines_are_planned() -> None:
    topology = Topology((0, 0, 0, 1, 2, 2))
    plan = plan_site(site(6), topology)
    check(plan.best.schedule(site(6), topology))


def test_few_layers_in_parts_pay_for_filling() -> None:
    topology = Topology.grid(2, 1, network_bytes_per_s=1e7)
    here = replace(site(2), parts=2)
    one, two, many = (plan_site(here, topology, 1e-3, layers=layers).price.seconds for layers in (1, 2, 60))
    assert one is not None and two is not None and many is not None
    assert many < two < one
    whole = plan_site(site(2), topology, 1e-3)
    assert plan_site(site(2), topology, 1e-3, layers=60) is whole, "whole tokens: every layer costs the same"
