"""Where a plan would be another one if assumed costs were otherwise; known costs leave no doubt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_sites import attention_site

from sfcompile.codegen.plan.choose_plan import plan_site
from sfcompile.codegen.plan.doubts import COMPARED, WORTH, doubts
from sfcompile.codegen.plan.step import price
from sfcompile.runtime.program.presets import SOFTWARE, Assumed
from sfcompile.runtime.program.topology import Topology


def small_site() -> object:
    """So few tokens that the start of a message weighs as much as its bytes."""
    return replace(attention_site(8, 8, 4096, 64), dtype=torch.bfloat16)


def test_known_costs_leave_no_doubt() -> None:
    topology, site = Topology.grid(1, 8), attention_site(8, 8, 512, 64)
    assert doubts(plan_site(site, topology, 1e-4), site, topology, 1e-4) == []


def test_what_is_said_is_what_a_search_would_find() -> None:
    site = small_site()
    topology = Topology.parse("1x8:a100-efa")
    plan = plan_site(site, topology, 1e-4)  # type: ignore[arg-type]
    sentences = doubts(plan, site, topology, 1e-4)  # type: ignore[arg-type]
    assumed = SOFTWARE[topology.software]
    candidates = [row.candidate for row in plan.rows if row.seconds is not None][:COMPARED]

    def best_with(costs: dict[str, float]) -> tuple[object, float]:
        changed = replace(topology, **costs)
        seconds = [price(each.schedule(site, topology), changed, 1e-4).seconds for each in candidates]  # type: ignore[arg-type]
        return candidates[seconds.index(min(seconds))], seconds[0] / min(seconds)

    expected = set()
    for end in ("low", "high"):
        costs = {name: getattr(cost, end) for name, cost in assumed.items()}
        if WORTH * best_with(costs)[1] <= 1.0:
            continue
        alone = {name for name, cost in costs.items() if WORTH * best_with({name: cost})[1] > 1.0}
        expected |= {(name, f"{costs[name]:g}") for name in alone} or {("all", end)}
    assert len(sentences) == len(expected), sentences
    for text in sentences:
        assert "x as fast as" in text and text.endswith(str(plan.best))
        assert text.startswith("were all costs") or any(
            text.startswith(f"{name} is assumed") and f"were it {value}, " in text for name, value in expected
        )


def test_a_range_that_decides_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where messages are assumed to cost nothing, cutting chunks pays; were they dear, the whole ones would win."""
    monkeypatch.setitem(SOFTWARE, "guess", {"message_s": Assumed(0.0, 0.0, 1e-2), "wait_s": Assumed(0.0, 0.0, 0.0)})
    known = Topology.grid(2, 2, network_bytes_per_s=1e8, copy_bytes_per_s=None, message_s=0.0, wait_s=0.0, launch_s=0.0)
    site = attention_site(4, 8, 4096, 64)
    plan = plan_site(site, known, 1e-3)
    (sentence,) = doubts(plan, site, replace(known, software="guess"), 1e-3)
    assert sentence.startswith("message_s is assumed to be 0; were it 0.01, ")
    assert "wait_s" not in sentence and sentence.endswith(f"x as fast as {plan.best}")
