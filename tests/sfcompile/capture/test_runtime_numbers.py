"""Numbers that stay inputs: one graph gives what PyTorch gives for every value; where it cannot, the value is baked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sfcompile.capture.graph import Captured, capture

Step = Callable[[torch.Tensor, Any], torch.Tensor]


def half(x: torch.Tensor, s: Any) -> torch.Tensor:
    y = x.bfloat16()
    return (s / y + y * s + s) / s - (s - y.half())


def in_place(x: torch.Tensor, s: Any) -> torch.Tensor:
    y = x.clone()
    y *= s
    y.add_(s)
    y -= s / 7
    return y.div_(s)


STEPS: dict[str, Step] = {
    "product": lambda x, s: x * s,
    "from the right": lambda x, s: 1.5 - s * x,
    "quotient": lambda x, s: s / (x.abs() + 1) + x / s,
    "arithmetic of numbers": lambda x, s: x * (1 - s / 1000.0) + (2 * s - 3),
    "half precision": half,
    "whole numbers": lambda x, s: (x * 8).to(torch.int32) * s + (x > 0) * s,
    "divided whole numbers": lambda x, s: (x * 8).to(torch.int64) / s,
    "float64": lambda x, s: x.double() * s,
    "full": lambda x, s: x + torch.full((x.shape[0], 1), s / 1000.0),
    "full of a type": lambda x, s: x + torch.full((3,), s, dtype=torch.float16),
    "full like": lambda x, s: x * torch.full_like(x, s),
    "new full": lambda x, s: x * x.new_full((3,), s),
    "tensor": lambda x, s: x * torch.tensor([s, 1.0, s * 2]),
    "tensor of one": lambda x, s: x * torch.tensor(s),
    "filled": lambda x, s: x.masked_fill(x > 0, s),
    "in place": in_place,
    "compared": lambda x, s: (x * 100 > s) + (s <= x.bfloat16()) * 2 + ((x * 100).to(torch.int64) == s) * 4,
    "chosen": lambda x, s: torch.where(x > 0, x, s) + torch.where(x.half() > 0, s, 0.5),
    "without dims": lambda x, s: x * (x.bfloat16().sum() * s - s),
    "unused": lambda x, s: x + 1,
}
# The value decides what is computed.
BAKED: dict[str, Step] = {
    "power": lambda x, s: x.abs() ** s,
    "alpha": lambda x, s: torch.add(x, x, alpha=s),
    "clamp": lambda x, s: x.clamp(max=s),
}


def graphs_of(step: Step, values: Sequence[Any]) -> tuple[list[Captured], list[torch.Tensor], torch.Tensor]:
    """What Dynamo hands over for several values: the captured graphs; the results of what was captured; the input."""
    seen: list[Captured] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(got := capture(gm, inputs, keep_numbers=True))
        return lambda *args: got.gm(*(got.as_tensors(args)[i] for i in got.tensor_inputs))

    torch._dynamo.reset()
    run = torch.compile(step, backend=backend)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return seen, [run(x, value) for value in values], x


@pytest.mark.parametrize("kind", [float, int])
@pytest.mark.parametrize("name", STEPS)
def test_two_graphs_serve_every_value(name: str, kind: type) -> None:
    values = [kind(value) for value in (7, 11, 500, 999, 3)]
    if kind is float:
        values = [value + 0.1 for value in values]
    seen, results, x = graphs_of(STEPS[name], values)
    for value, got in zip(values, results, strict=True):
        want = STEPS[name](x, value)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len(seen) <= 2 and all(graph.numbers for graph in seen[1:])


@pytest.mark.parametrize("name", BAKED)
def test_a_number_whose_value_is_needed_is_part_of_the_graph(name: str) -> None:
    seen, results, x = graphs_of(BAKED[name], [2.5, 3.5])
    assert all(graph.numbers == () for graph in seen)
    torch.testing.assert_close(results[1], BAKED[name](x, 3.5))


def test_one_number_is_needed_and_another_stays_an_input() -> None:
    def step(x: torch.Tensor, s: Any) -> torch.Tensor:
        scale, power = s
        return (x.abs() * scale) ** power

    seen, results, x = graphs_of(step, [(2.5, 1.5), (3.5, 2.5)])
    assert [len(graph.numbers) for graph in seen] == [0, 1]
    torch.testing.assert_close(results[1], step(x, (3.5, 2.5)))


def test_sizes_are_no_numbers() -> None:
    seen, _, _ = graphs_of(lambda x, n: x[:, :n] * n, [2, 3])
    assert all(graph.numbers == () for graph in seen)


def test_lengths_are_no_numbers_though_they_are_inputs_too() -> None:
    seen: list[Captured] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(capture(gm, inputs, keep_numbers=True))
        return gm.forward

    torch._dynamo.reset()
    run = torch.compile(lambda x, y, n: (x + 1, y.flatten(), x.shape[0] * x, n * x), backend=backend, dynamic=True)
    run(torch.randn(5, 3), torch.randn(7, 9).t(), 11)
    (graph,) = seen
    assert len(graph.numbers) == 1


TABLE = torch.arange(24.0).view(8, 3) / 7
PICKS: dict[str, Step] = {
    "an entry": lambda x, i: x * TABLE[i],
    "its neighbour's distance": lambda x, i: x * (TABLE[i] - TABLE[i - 1]),
    "from the end": lambda x, i: x * TABLE[-i],
    "along another dim": lambda x, i: x * TABLE.t().select(1, i) + TABLE.t().select(dim=-1, index=i),
    "of an input": lambda x, i: x + x[i % 4],
    "select": lambda x, i: x * TABLE.select(0, i) + torch.select(TABLE, 0, i),
    "of half precision": lambda x, i: x * TABLE.bfloat16()[i],
}
# A view is made, which the graph hands out or writes through: the place is part of the program.
VIEWS: dict[str, Step] = {
    "handed out": lambda x, i: x[i],
    "a view of it handed out": lambda x, i: x[i][None, :2],
    "written to": lambda x, i: (y := x * 1, y[i].mul_(2), y)[-1],
    "its tensor is written to": lambda x, i: (y := x * 1, row := y[i], y.add_(1), y * row)[-1],
    "set": lambda x, i: (y := x * 1, y.__setitem__(i, 0.5), y)[-1],
    "a slice": lambda x, i: x + TABLE[i : i + 1],
}


@pytest.mark.parametrize("name", PICKS)
def test_a_place_in_a_table_stays_an_input(name: str) -> None:
    places = [2, 3, 7, 5, 4]
    seen, results, x = graphs_of(PICKS[name], places)
    for place, got in zip(places, results, strict=True):
        torch.testing.assert_close(got, PICKS[name](x, place), rtol=0, atol=0)
    assert len(seen) == 2 and all(graph.numbers for graph in seen[1:])


@pytest.mark.parametrize("name", VIEWS)
def test_a_place_of_which_a_view_is_wanted_is_part_of_the_graph(name: str) -> None:
    seen, results, x = graphs_of(VIEWS[name], [2, 3])
    assert all(graph.numbers == () for graph in seen)
    for place, got in zip([2, 3], results, strict=True):
        torch.testing.assert_close(got, VIEWS[name](x, place), rtol=0, atol=0)
