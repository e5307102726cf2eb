"""Dynamo's settings are those of a marked backend while it traces, and as they were for every other."""

from __future__ import annotations

import gc
import logging
import traceback
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo import output_graph, symbolic_convert
from torch._dynamo.variables.tensor import TensorVariable
from torch._subclasses import fake_tensor

from sfcompile.errors import InternalError, OptionError
from sfcompile.torch_breaks import COLLECT_EVERY, FOLDED_NUMEL, trace_with_fewer_breaks

Seen = list[tuple[int, bool]]


def backend(seen: Seen, marked: bool) -> Any:
    """Notes what Dynamo's settings are while a graph is handed over, and how many graphs there are."""
    before = TensorVariable.method_item

    def compile(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((fake_tensor.CONSTANT_NUMEL_LIMIT, TensorVariable.method_item is before))
        return gm.forward

    if marked:
        trace_with_fewer_breaks(compile, lambda code, reason: None)
    return compile


def step(x: torch.Tensor) -> torch.Tensor:
    sizes = torch.tensor([[2, 3]])
    for rows, columns in sizes.tolist():
        x = x.reshape(rows, columns) * 2
    return x


@pytest.mark.parametrize("marked", [True, False])
def test_settings_are_put_back(marked: bool) -> None:
    torch._dynamo.reset()
    limit, item, seen = fake_tensor.CONSTANT_NUMEL_LIMIT, TensorVariable.method_item, Seen()
    with torch.no_grad():
        out = torch.compile(step, backend=backend(seen, marked))(torch.arange(6.0))
    assert torch.equal(out, torch.arange(6.0).reshape(2, 3) * 2)
    assert (fake_tensor.CONSTANT_NUMEL_LIMIT, TensorVariable.method_item) == (limit, item)
    if marked:
        assert seen == [(FOLDED_NUMEL, False)], "one graph"
    else:
        assert len(seen) > 1 and set(seen) == {(limit, True)}, "a break at tolist"


class Unhashable:
    """A backend that compares by what it is set to, as Inductor's does: it has no hash, and no weak references here."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable)

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return gm.forward


def test_other_backends_go_on_whatever_they_are() -> None:
    backend(Seen(), True)
    torch._dynamo.reset()
    out = torch.compile(lambda x: x * 2, backend=Unhashable())(torch.ones(3))
    assert out.tolist() == [2.0] * 3


@torch.no_grad()
def test_tensors_of_the_same_sizes_get_other_memory() -> None:
    """As hooks do that bring weights and take them away: each has the sizes of what it was given."""
    torch._dynamo.reset()
    weights, kept = [torch.empty(0), torch.empty(0)], [torch.rand(3, 4), torch.rand(3, 4)]

    def step(x: torch.Tensor) -> torch.Tensor:
        for weight, value in zip(weights, kept, strict=True):
            weight.data = value.clone()
        for weight in weights:
            x = x + weight @ weight.mT
        for weight in weights:
            weight.data = torch.empty(0)
        return x

    run = torch.compile(step, backend=backend([], True))
    for scale in (1.0, 2.0):
        for value in kept:
            value *= scale
        assert torch.equal(run(torch.ones(3, 3)), 1 + kept[0] @ kept[0].mT + kept[1] @ kept[1].mT)
        assert [weight.numel() for weight in weights] == [0, 0]


@pytest.mark.parametrize("through", [True, False])
def test_results_go_through_a_function_where_the_options_say_so(through: bool) -> None:
    """Also those that come from the first of several graphs, or that Python returns behind the last."""
    torch._dynamo.reset()
    seen: list[Any] = []

    def noted(result: Any) -> Any:
        seen.append(type(result))
        return [result]

    def compile(gm: fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        return gm.forward

    trace_with_fewer_breaks(
        compile, lambda code, reason: None, lambda options: noted if options.get("through") else None
    )

    def step(x: torch.Tensor, early: bool) -> Any:
        y = x.sin()
        torch._dynamo.graph_break()
        if early:
            return y
        z = y + 1
        torch._dynamo.graph_break()
        return {"y": y, "z": z}

    run, x = torch.compile(step, backend=compile, options={"through": through}), torch.ones(3)
    for early in (True, False, True):
        result = run(x, early)
        while isinstance(result, list):
            (result,) = result
        assert torch.equal(result if early else result["y"], x.sin())
    assert bool(seen) == through


@pytest.mark.parametrize("before", [(700, 10, 10), (0, 10, 10), (200_000, 10, 10)])
def test_cycles_are_looked_for_less_often(before: tuple[int, int, int]) -> None:
    torch._dynamo.reset()
    seen: list[tuple[int, ...]] = []

    def compile(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(gc.get_threshold())
        raise ValueError("no compiler")

    trace_with_fewer_breaks(compile, lambda code, reason: None)
    python = gc.get_threshold()
    gc.set_threshold(*before)
    try:
        with pytest.raises(Exception, match="no compiler"):
            torch.compile(lambda x: x + 1, backend=compile)(torch.ones(2))
        assert gc.get_threshold() == before, "as it was, also after an error"
    finally:
        gc.set_threshold(*python)
    first = before[0] and max(before[0], COLLECT_EVERY)
    assert seen == [(first, *before[1:])], "what is switched off, or asked for less often, stays so"


@pytest.mark.parametrize("written", [False, True])
def test_names_for_a_log_are_looked_up_where_it_is_written(written: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    log, seen, looked_up = output_graph.trace_call_log, list[bool](), symbolic_convert.get_funcname
    monkeypatch.setattr(log, "level", logging.DEBUG if written else log.level)
    monkeypatch.setattr(log, "propagate", False)
    log.manager._clear_cache()  # type: ignore[attr-defined]

    def compile(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(symbolic_convert.get_funcname is looked_up)
        return gm.forward

    trace_with_fewer_breaks(compile, lambda code, reason: None)
    torch.compile(lambda x: x + 1, backend=compile)(torch.ones(2))
    log.manager._clear_cache()  # type: ignore[attr-defined]
    assert seen == [written] and symbolic_convert.get_funcname is looked_up


@pytest.mark.parametrize("error", [OptionError("no such option"), InternalError("a slip"), ValueError("a slip")])
@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_for_the_user_comes_out_as_it_is(error: Exception, verbose: bool) -> None:
    """Alone and last in what Python prints. Mistakes of ours keep torch's frames, as everything does if asked for."""
    torch._dynamo.reset()

    def compile(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        raise error

    trace_with_fewer_breaks(compile, lambda code, reason: None)
    with torch._dynamo.config.patch(verbose=verbose), pytest.raises(Exception, match="no such|slip") as raised:
        torch.compile(lambda x: x + 1, backend=compile)(torch.ones(2))
    printed = "".join(traceback.format_exception(raised.value))
    as_it_is = isinstance(error, OptionError) and not verbose
    assert as_it_is == (raised.value is error) == printed.endswith("OptionError: no such option.\n")
    assert as_it_is == ("in compile\n" not in printed)
