"""Which stretches of a graph are equal, and what one of them is as a graph of its own."""

from __future__ import annotations

import pytest
import torch
from graph_text import Parsed, parse
from torch import fx

from sfcompile.capture.graph import compile_with_inductor
from sfcompile.lowering.regions import Region, letter, region_of
from sfcompile.torch_private import same_storage, static_mode

PUTS = """
    x: f32[1,2,8,4] = input
    t: i64[1] = input
    tq: i64[1] = streamfusion.put_q(x, t, '{0}', {1})
    tk: i64[1] = streamfusion.put_k(x, tq, '{0}', {1})
    tv: i64[1] = streamfusion.put_v(x, tk, '{0}', {2})
    return tv
"""


def whole(graph: Parsed) -> Region:
    return region_of([node for node in graph.gm.graph.nodes if node.op == "call_function"])


def of(*lines: str, returns: str = "y") -> Region:
    head = "a: f32[4,4] = input", "b: f32[4,4] = input", "h: f16[4,4] = input", "w: f32[8,4] = input"
    return whole(parse("\n".join([*head, *lines, f"return {returns}"])))


SUM = "y: f32[4,4] = aten.add.Tensor(a, b)"


@pytest.mark.parametrize(
    "other",
    [
        of("y: f32[4,4] = aten.sub.Tensor(a, b)"),
        of("y: f32[4,4] = aten.add.Tensor(a, a)"),
        of("y: f32[4,4] = aten.add.Tensor(a, b, alpha=2)"),
        of("y: f32[4,4] = aten.add.Tensor(a, h)"),
        of("c: f32[4,4] = aten.t(b)", "y: f32[4,4] = aten.add.Tensor(a, c)"),
        of("y: f32[4,4] = aten.add.Tensor(a, b)", "z: f32[4,4] = aten.relu(y)", returns="z"),
    ],
    ids=["op", "one operand twice", "constant", "dtype", "stride", "longer"],
)
def test_regions_that_differ(other: Region) -> None:
    assert of(SUM).key == of(SUM).key != other.key


def test_operands_may_come_in_another_order_or_from_elsewhere() -> None:
    assert of(SUM).key == of("y: f32[4,4] = aten.add.Tensor(b, a)").key
    graph = parse(f"a: f32[4,4] = input\nb: f32[4,4] = aten.relu(a)\n{SUM}\nreturn y")
    assert region_of([graph["y"]]).key == of(SUM).key


@pytest.mark.parametrize(
    ("one", "other"), [("2", "2.0"), ("1", "True"), ("2.0", "2.0000000000000004"), ("0.0", "-0.0")]
)
def test_constants_that_differ_a_little(one: str, other: str) -> None:
    a, b = (of(f"y: f32[4,4] = aten.mul.Tensor(a, {value})") for value in (one, other))
    assert a.key != b.key
    assert letter(a.nodes[0]) != letter(b.nodes[0])


def test_what_is_read_behind_a_region_belongs_to_it() -> None:
    two = "y: f32[4,4] = aten.relu(a)", "z: f32[4,4] = aten.relu(y)"
    graph = parse("\n".join(["a: f32[4,4] = input", *two, "u: f32[4,4] = aten.add.Tensor(y, z)", "return u"]))
    region = region_of([graph["y"], graph["z"]])
    assert [node.name for node in region.outputs] == ["y", "z"]
    assert region.key != of(*two, returns="z").key


def test_sites_count_from_the_lowest_of_a_region() -> None:
    puts = [whole(parse(PUTS.format("p", first, last))) for first, last in ((0, 1), (5, 6), (5, 7), (6, 5))]
    assert puts[0].key == puts[1].key != puts[2].key != puts[3].key
    assert [region.first_site for region in puts] == [{"p": 0}, {"p": 5}, {"p": 5}, {"p": 5}]
    gm, _ = puts[1].as_module(fx.GraphModule({}, fx.Graph()), static_mode())
    assert [node.args[3] for node in gm.graph.nodes if node.op == "call_function"] == [0, 0, 1]
    assert puts[0].key != whole(parse(PUTS.format("another", 0, 1))).key
    assert len({letter(region.nodes[0]) for region in puts}) == 1


def test_inputs_lie_apart_at_addresses_of_their_alignment() -> None:
    graph = parse(
        """
        a: f32[4,8] = input
        b: f32[4,4] = aten.slice.Tensor(a, 1, 0, 4)
        c: f32[4,4] = aten.slice.Tensor(a, 1, 3, 7)
        y: f32[4,4] = aten.add.Tensor(b, c)
        z: f32[4,4] = aten.add.Tensor(c, b)
        u: f32[4,4] = aten.add.Tensor(y, z)
        return u
        """
    )
    region = region_of([graph["y"]])
    _, (b, c) = region.as_module(graph.gm, graph.mode)
    assert not same_storage(b, c)
    assert (b.stride(), b.storage_offset(), c.stride(), c.storage_offset()) == ((8, 1), 0, (8, 1), 3)
    assert region.key != region_of([graph["z"]]).key, "a kernel may count on the alignment"


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "halves of one tensor"])
def test_outputs_that_are_views_are_those_of_their_own_inputs(shared: bool) -> None:
    """Traced with two inputs in one memory, either output could become a view of the other's input."""
    mode = static_mode()
    graph = parse(
        """
        x: f32[4,8] = input
        a: f32[4,4] = aten.slice.Tensor(x, 1, 0, 4)
        b: f32[4,4] = aten.slice.Tensor(x, 1, 4, 8)
        y: f32[4,4] = aten.t(a)
        z: f32[4,4] = aten.t(b)
        u: f32[4,4] = aten.relu(y)
        v: f32[4,4] = aten.relu(z)
        s: f32[4,4] = aten.add.Tensor(u, v)
        return s
        """
    )
    gm, inputs = region_of([graph["y"], graph["z"]]).as_module(graph.gm, mode)
    run = compile_with_inductor(gm, inputs, mode, {})
    x = torch.arange(64.0).view(8, 8)[4:]
    a, b = x[:, :4], x[:, 4:]
    if not shared:
        a, b = torch.randn(6, 8)[2:, :4], torch.randn(5, 8)[1:, 4:]
    y, z = run(a, b)
    assert torch.equal(y, a.t()) and torch.equal(z, b.t())
