from __future__ import annotations

import math

import pytest
import torch
from helpers import captured
from models import build

from sfcompile.options import AS_IT_IS, Wire
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology


def report(name: str, ranks: int, shard: bool = True, wire: Wire = AS_IT_IS) -> GraphReport:
    model, inputs = build(name)
    got = captured(model, *inputs)
    asked = Asked({"ulysses": ranks, "ring": 1} if shard else None, shard_everything=shard, wire=wire)
    return run_pipeline(State(got.gm, got.mode, Topology.grid(1, ranks), 0, asked)).report


def test_attention_is_counted_by_kind_and_the_output_gather_named() -> None:
    plan = report("cross", 2)
    assert (plan.sharded_sites, plan.local_sites) == (1, 1)
    assert any(row.reason == "model output" for row in plan.gathered)
    assert any("read whole by scaled_dot_product_attention" in row.reason for row in plan.gathered)


def test_the_wire_is_named_with_its_error_bound() -> None:
    plain, coded = report("self", 2), report("self", 2, wire=Wire(k="fp8", v="fp8"))
    assert plain.wire == "" and "  wire " not in str(plain)
    assert coded.wire == (
        "K, V as fp8, off by at most 2^-4 of an element or 2^-17 of its row's largest (fp8) (2 attentions), all else "
        "as it is"
    )
    assert f"  wire         {coded.wire}\n" in str(coded) and coded.heap_bytes < plain.heap_bytes
    assert coded.programs.keys() != plain.programs.keys()


def test_flops_are_shared_out() -> None:
    plan = report("joint", 3)
    assert 1.0 <= plan.share < 1.3 and sum(plan.rank_flops) >= plan.total_flops
    assert plan.heap_bytes > 0 and plan.schedules >= 2


def test_a_small_model_on_slow_links_is_left_alone_with_a_warning() -> None:
    plan = report("joint", 2, shard=False)
    assert plan.sharded_ops == 0 and "nothing was sharded" in plan.warnings[0]


def test_every_site_of_a_program_is_named_after_its_own_attention() -> None:
    (names,) = report("self", 2).programs.values()
    assert len(names) == len(set(names)) and sum("scaled_dot_product" in name for name in names) == 2


def test_source_lines_are_short() -> None:
    got = captured(
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x).sort(2)[0], torch.zeros(1, 1, 8, 4)
    )
    plan = run_pipeline(State(got.gm, got.mode, Topology.grid(1, 2), 0, Asked(shard_everything=True))).report
    assert plan.replicated[0].source.startswith("test_report_graph.py:")


def test_halos_are_listed_with_their_bytes() -> None:
    def mix(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, 0]
        return torch.nn.functional.conv2d(x.transpose(1, 2).unflatten(2, (8, 6)), w, padding=1)

    got = captured(mix, torch.zeros(1, 1, 48, 4), torch.zeros(4, 4, 3, 3))
    plan = run_pipeline(State(got.gm, got.mode, Topology.grid(1, 4), 0, Asked(shard_everything=True))).report
    (halo,) = plan.moved
    assert "halo" in halo.reason and halo.nbytes == 6 * 6 * 4 * 4, "six rows of six positions of four floats"
    assert "exchanged in part" in str(plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_halo_that_goes_with_statistics_is_listed_in_the_dtype_in_which_it_travels(dtype: torch.dtype) -> None:
    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, 0]
        x = torch.nn.functional.group_norm(x.transpose(1, 2).unflatten(2, (8, 6)), 2)
        return torch.nn.functional.conv2d(x, w, padding=1)

    got = captured(block, torch.zeros(1, 1, 48, 4, dtype=dtype), torch.zeros(4, 4, 3, 3, dtype=dtype))
    state = State(got.gm, got.mode, Topology.grid(1, 4), 0, Asked(shard_everything=True))
    (halo,) = run_pipeline(state).report.moved
    assert halo.nbytes == 6 * 6 * 4 * 4, "six rows of six positions of four floats, whatever the model computes in"
    sites = [site for site in state.local.sites if isinstance(site, ExchangeSite) and site.dtype == torch.float32]
    statistics = 4 * 2 * 2 * 4  # of four ranks: mean and variance of two groups
    assert math.prod(sites[0].shape) * 4 == statistics + halo.nbytes


def test_an_op_that_looks_like_attention_and_is_left_whole_is_named_with_the_cure() -> None:
    @torch.library.custom_op("report_graph::fused", mutates_args=())
    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    fused.register_fake(lambda q, k, v: torch.empty_like(q))
    got = captured(lambda x: fused(fused(x, x + 1, x), x * 2, x).sin(), torch.zeros(1, 2, 8, 4))
    plan = run_pipeline(State(got.gm, got.mode, Topology.grid(1, 2), 0, Asked(shard_everything=True))).report
    assert "2 x report_graph::fused look like attention and are computed whole" in plan.warnings[0]
    assert "register_attention" in plan.warnings[0]
    assert not any("look" in warning for warning in report("self", 2).warnings)
