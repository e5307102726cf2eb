"""The public way in for passes, rules, schedules and topologies; the examples use it from outside the packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import captured, placeholder_values, run_compiled
from models import build as build_model

from sfcompile import extend
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.builders import REGISTERED, build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import MeshError, OptionError, TopologyError
from sfcompile.options import Options
from sfcompile.passes import pipeline
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules import rule as op_rules
from sfcompile.passes.rules.rule import find_rule
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology


def compiled(name: str, **options: object) -> tuple[list[Compiled], Callable[[], bool]]:
    """Every rank's program on 2 ranks, and whether it is right."""
    model, inputs = build_model(name)
    got = captured(model, *inputs)
    topology = Topology.grid(1, 2)
    asked = Asked(shard_everything=True, split_batch=False, **options)  # type: ignore[arg-type]
    ranks = [run_pipeline(extend.State(got.gm, got.mode, topology, rank, asked)) for rank in range(2)]

    def right() -> bool:
        values = placeholder_values(got)
        with torch.no_grad():
            want = got.gm(*values)[0]
        return all(torch.allclose(out, want, rtol=1e-5, atol=1e-5) for (out,) in run_compiled(ranks, topology, values))

    return ranks, right


def test_passes_are_added_dropped_and_moved() -> None:
    seen: list[str] = []

    def count(state: extend.State) -> None:
        seen.append(f"{len(state.local.graph.nodes)} nodes")

    with extend.scope():
        name = extend.register_pass(count, why="counts")
        order = [entry for entry in extend.passes() if entry not in ("choose_axes", "order_puts")] + [name]
        ranks, right = compiled("joint", order=tuple(order))
        assert len(seen) == 2 and right()
        assert list(ranks[0].report.pass_seconds) == order
        assert Options.from_dict({"passes": order}).passes == tuple(order)
        with pytest.raises(OptionError, match="cannot be named 'rewrite_local'"):
            extend.register_pass(count, "rewrite_local")
    assert not pipeline.REGISTERED
    with pytest.raises(OptionError, match="list of names of passes"):
        Options.from_dict({"passes": "rewrite_local"})


def test_a_pass_before_the_batch_split_runs_for_the_part_too() -> None:
    parts: list[int] = []
    with extend.scope():
        extend.register_pass(lambda state: parts.append(state.topology.num_ranks), "look")
        order = ["look", *extend.passes()]
        model, inputs = build_model("self")
        got = captured(model, *inputs)
        asked = Asked({"batch": 2, "ulysses": 2, "ring": 1}, order=tuple(order))
        run_pipeline(extend.State(got.gm, got.mode, Topology.grid(1, 4), 0, asked))
    assert parts == [4, 2]


def lazy(site: AttentionSite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1) -> AttentionSchedule:
    """All-gathered keys under another name; on one axis only."""
    if mesh.ring > 1:
        raise MeshError(f"lazy has one axis, the mesh has a ring of {mesh.ring}")
    return replace(build("allgather", site, mesh, q_parts, kv_parts), kind="lazy")


def deaf(site: AttentionSite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1) -> AttentionSchedule:
    """Attends to what it did not wait for."""
    made = lazy(site, mesh, q_parts, kv_parts)
    phases = {
        name: tuple(step for step in steps if type(step).__name__ != "Wait")
        for name, steps in made.origin.phases.items()
    }
    return replace(made, kind="deaf", origin=replace(made.origin, phases=phases))


def test_a_schedule_is_planned_asked_for_and_run() -> None:
    with extend.scope():
        extend.register_schedule("lazy", lazy)
        assert Options.from_dict({"schedule": "lazy"}).schedule == "lazy"
        ranks, right = compiled("joint", schedule="lazy")
        assert ranks[0].report.schedule.startswith("lazy 2x1") and right()
        ranks, _ = compiled("joint")
        assert any("lazy 2x1" in table for table in ranks[0].report.plans)
        assert any("lazy has one axis" in table for table in ranks[0].report.plans)
    assert not REGISTERED
    with pytest.raises(OptionError, match="got 'lazy'"):
        Options.from_dict({"schedule": "lazy"})
    with pytest.raises(OptionError, match="cannot be named 'torus'"):
        extend.register_schedule("torus", lazy)


def test_a_wrong_schedule_never_runs() -> None:
    with extend.scope():
        extend.register_schedule("deaf", deaf)
        with pytest.raises(MeshError, match="schedule='deaf' is not possible"):
            compiled("joint", schedule="deaf")


def test_a_rule_is_for_one_library() -> None:
    library = torch.library.Library("test_extend", "DEF")
    library.define("permute(Tensor x) -> Tensor")
    library.impl("permute", lambda x: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake("test_extend::permute", lambda x: torch.empty_like(x), lib=library)
    got = captured(lambda x: torch.ops.test_extend.permute(x), torch.zeros(2, 3))
    (op,) = (op for op in map(OpView.of, got.gm.graph.nodes) if op is not None)
    assert find_rule(op) is None, "ATen's rule of that name was taken"
    with extend.scope():
        extend.register_op_rule("test_extend::permute")(op_rules.RULES["__pointwise__"])
        assert find_rule(op) is not None
    assert find_rule(op) is None


def test_a_topology_has_a_name() -> None:
    with extend.scope():
        extend.register_topology("lab", flops_per_s=1e12, nics_per_machine=2)
        assert Topology.parse("2x4:lab").flops_per_s == 1e12
        with pytest.raises(OptionError, match="preset of that name"):
            extend.register_topology("a100-efa")
        with pytest.raises(TopologyError, match="flops"):
            extend.register_topology("bad", flops=1.0)
    with pytest.raises(TopologyError, match="preset 'lab' is unknown"):
        Topology.parse("2x4:lab")


def test_what_was_registered_from_outside_is_named() -> None:
    assert extend.registered() == ""
    with extend.scope():
        extend.register_row_wise("somebody::op")
        assert "somebody::op" in extend.registered()
    assert extend.registered() == ""
