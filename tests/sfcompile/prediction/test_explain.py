"""Explanations: what they say agrees with the passes, for whole models, broken graphs and single ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import build
from torch.nn.functional import scaled_dot_product_attention as sdpa

import sfcompile
from sfcompile.errors import MeshError, OptionError, TopologyError
from sfcompile.prediction.explain import Explanation, explain
from sfcompile.prediction.predict import simulate


def explained(
    name: str = "joint", topology: str = "1x4", placement: str = "shard", rank: int = 0, batch: int = 1
) -> Explanation:
    model, inputs = build(name)
    inputs = tuple(x[:batch] for x in inputs)
    return explain(model, *inputs, topology=topology, placement=placement, rank=rank)


def test_axes_and_their_carriers() -> None:
    (graph,) = explained().graphs
    (axis,) = graph.axes
    assert axis.tokens == 27 and axis.segments == (5, 22) and axis.flops > 0
    assert {("image", 1, 22), ("text", 1, 5), ("keep", 1, 5)} == set(axis.inputs)


def test_the_plan_is_the_simulators() -> None:
    model, inputs = build("joint")
    found, predicted = explained(), simulate(model, *(x[:1] for x in inputs), topology="1x4")
    (kind,) = found.graphs[0].attentions
    (plan,) = predicted.choices.plans.values()
    assert kind.plan == plan and "27 tokens, 4 heads x 4, batch 1, with a mask" in kind.what
    for _, value, sent in (kind.inside, kind.across):
        assert value == pytest.approx(sent, rel=0.5)  # 27 tokens do not divide by 4


def test_a_step_is_the_sum_of_its_lines() -> None:
    found = explained()
    (graph,) = found.graphs
    lines = [(block.alike, line) for block in graph.blocks for line in block.lines]
    assert found.step_s == pytest.approx(sum(n * line.seconds for n, line in lines))
    assert 0.0 < found.limit_s <= found.step_s and 0.0 <= found.exposed_s < found.step_s
    # What a layer costs around its attention is what the planner priced, less the compute before it.
    (kind,) = graph.attentions
    assert graph.choices is not None and kind.plan.price.seconds is not None
    priced = kind.count * (kind.plan.price.seconds - graph.choices.other_s)
    slowest = max(explained(rank=rank).graphs[0].seconds("put", "attend", "collect") for rank in range(4))
    assert slowest == pytest.approx(priced, rel=0.02)


def test_bytes_of_all_ranks_are_what_the_schedules_send() -> None:
    graphs = [explained(topology="2x2", rank=rank, batch=2).graphs[0] for rank in range(4)]
    (kind,) = graphs[0].attentions
    groups = graphs[0].groups
    assert groups == 2 and "2 groups of ranks" in str(explained(topology="2x2", batch=2))
    sent = [
        sum(line.nbytes for block in graph.blocks for line in block.lines if line.kind in ("put", "attend"))
        for graph in graphs
    ]
    copies = [block.alike for block in graphs[0].blocks for line in block.lines if line.kind == "attend"]
    assert copies == [1] * kind.count  # else the sum above would count blocks once
    assert sum(sent) == kind.count * groups * (kind.inside[2] + kind.across[2])


def test_layers_alike_are_shown_once() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(64, 192)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.unflatten(2, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            return x + sdpa(q, k, v).transpose(1, 2).flatten(2)

    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    with torch.device("meta"):
        model, x = Deep(), torch.empty(1, 4096, 64)
    found = explain(model, x, topology="2x2", placement="shard")
    (graph,) = found.graphs
    layers = [block for block in graph.blocks if block.name.startswith("blocks.")]
    assert sum(block.alike for block in layers) == 6 and len(layers) <= 3
    assert found.weight_bytes == 6 * (64 * 192 + 192) * 4 and found.heap_bytes > 0
    assert "whole on every rank: tokens are split" in str(found)
    (linear,) = [line for line in layers[-1].lines if line.text.startswith("linear")]
    assert linear.placement == "sharded" and linear.value == "f32[1, 1024, 192]"
    assert "qkv.weight" in linear.text and "test_explain.py" in linear.source and "self.qkv(x)" in linear.source


def test_who_holds_the_weights() -> None:
    with torch.device("meta"):
        model, x = torch.nn.Linear(256, 768), torch.empty(1, 4096, 256)
    texts = {
        topology: str(explain(model, x, topology=topology, placement="shard", options={"weights": weights}))
        for topology, weights in (
            ("2x1", "sharded"), ("1x2", "sharded"), ("2x2", "sharded-by-machine"),
            ("1x2:a100-efa", "sharded"), ("2x2:a100-efa", "sharded-by-machine"), ("2x1:a100-efa", "sharded-by-machine"),
        )
    }  # fmt: skip
    assert "1 in shares: a rank holds 0.4 of 0.8 MiB; 1 gatherings a step, 0.4 MiB come to a rank" in texts["2x1"]
    assert "the large ones once for the ranks of a machine" in texts["1x2"]
    assert "the large ones once for the ranks of a machine" in texts["2x2"]
    # GPU ranks keep shares on one machine too, and of each machine if that is asked for.
    for gpus in ("1x2:a100-efa", "2x2:a100-efa"):
        assert "1 in shares: a rank holds 0.4 of 0.8 MiB; 1 gatherings a step, 0.4 MiB come to a rank" in texts[gpus]
        assert "CPU" not in texts[gpus]
    assert "no other GPU is there to hold a share" in texts["2x1:a100-efa"]
    with torch.device("meta"):
        small = torch.nn.Linear(8, 8)
        assert "none is large enough" in str(
            explain(small, torch.empty(1, 64, 8), topology="2x1", options={"weights": "sharded"})
        )


def test_what_stays_whole_has_a_reason_and_a_line() -> None:
    class Sorts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + sdpa(x, x, x)
            return torch.cummax(x, 2).values * 2

    found = explain(Sorts(), torch.randn(1, 2, 64, 8), topology="1x2", placement="shard")
    (graph,) = found.graphs
    lines = [line for block in graph.blocks for line in block.lines if line.text.startswith("cummax")]
    assert [line.placement for line in lines] == ["whole"] and "mixes the tokens" in lines[0].reason
    assert "torch.cummax(x, 2)" in lines[0].source and "torch.cummax(x, 2)" in str(found)


class Broken(torch.nn.Module):
    """Two attentions with a graph break between them; ``looks`` at a value there."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks = looks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + sdpa(x, x, x)
        torch._dynamo.graph_break()
        if self.looks and x.sum().item() > 0:
            x = x + 1
        return x + sdpa(x, x, x)


def test_one_section_per_graph() -> None:
    found = explain(Broken(looks=False), torch.empty(1, 2, 64, 8, device="meta"), topology="1x2", placement="shard")
    assert len(found.graphs) == 2 and not found.stopped
    assert "graph_break" in found.graphs[0].break_reason and "test_explain.py" in found.graphs[0].break_reason
    assert [graph.attentions[0].count for graph in found.graphs] == [1, 1]
    assert found.step_s == pytest.approx(sum(graph.seconds() for graph in found.graphs))
    text = str(found)
    assert "graph 1 of 2" in text and "graph 2 of 2" in text and "ends at a graph break" in text


def test_a_look_at_values_stops_meta_tensors_only() -> None:
    meta, real = torch.empty(1, 2, 64, 8, device="meta"), torch.randn(1, 2, 64, 8)
    stopped = explain(Broken(looks=True), meta, topology="1x2", placement="shard")
    assert stopped.graphs and stopped.graphs[0].attentions and "meta tensors" in stopped.stopped
    assert "Give real tensors" in str(stopped)
    whole = explain(Broken(looks=True), real, topology="1x2", placement="shard")
    assert not whole.stopped and sum(bool(graph.attentions) for graph in whole.graphs) == 2


def test_a_model_without_attention() -> None:
    found = explain(torch.nn.Linear(4, 4), torch.zeros(2, 4), topology="1x2")
    assert found.timeline() is None and "no attention was found" in str(found) and found.heap_bytes == 0
    assert "No attention is sharded" in found.to_html()


def test_json_and_files(tmp_path: Path) -> None:
    found = explained("self", topology="2x2")
    text = found.to_json(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == text
    plain = json.loads(text)
    assert plain["model"] == "SelfDiT" and plain["step"]["seconds"] == pytest.approx(found.step_s)
    (graph,) = plain["graphs"]
    candidates = graph["attentions"][0]["candidates"]
    assert candidates[0]["reason"] == "" and all(row["reason"] for row in candidates[1:])
    assert graph["attentions"][0]["bytes"]["inside"]["closed_form"]
    assert found.to_html(tmp_path / "plan.html") == (tmp_path / "plan.html").read_text()
    with pytest.raises(OptionError, match="no folder"):
        found.to_json(tmp_path / "gone" / "plan.json")


def test_what_cannot_be_explained_is_said() -> None:
    model, inputs = build("self")
    with pytest.raises(TopologyError, match="cannot be read"):
        explain(model, *inputs, topology="four")
    with pytest.raises(OptionError, match="no rank 9"):
        explain(model, *inputs, topology="1x4", rank=9)
    with pytest.raises(MeshError, match="is not possible"):
        explain(model, *inputs, topology="5x1", schedule="ulysses")


def test_it_is_found_on_the_package() -> None:
    for _ in range(2):  # a module of that name would take its place once it is loaded
        assert sfcompile.explain is explain
