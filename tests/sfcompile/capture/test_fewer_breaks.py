"""Models that break for nothing are one graph for a marked backend, and give and say what they give and say eagerly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx
from torch._dynamo import config
from torch._dynamo.variables.tensor import TensorVariable
from torch._subclasses import fake_tensor

from sfcompile.capture.fewer_breaks import fewer_breaks

log = logging.getLogger(__name__)


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.count += 1
        return gm.forward


def graphs(function: Callable[..., Any], *args: Any, marked: bool = True, **kwargs: Any) -> tuple[int, Any]:
    """How many graphs a function is for Dynamo, and what it returns."""
    torch._dynamo.reset()
    backend = Graphs()

    def plain(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return backend(gm, inputs)

    with torch.no_grad():
        result = torch.compile(function, backend=fewer_breaks(plain) if marked else plain)(*args, **kwargs)
    return backend.count, result


def tolist(x: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.stack([torch.tensor(x.shape)])[0].tolist()
    return x.sin().view(columns, rows)


def item(x: torch.Tensor) -> torch.Tensor:
    sizes = torch.tensor(x.shape)
    return x.sin() * sizes.prod().item() + int(sizes[0]) / float(sizes[1])


def slices(x: torch.Tensor) -> torch.Tensor:
    lengths = torch.tensor([len(row) - 1 for row in x], dtype=torch.int32)
    return torch.stack([row[:length] for row, length in zip(x.sin(), lengths, strict=True)])


def running_sum(x: torch.Tensor) -> torch.Tensor:
    offsets = torch.tensor([0, 1, x.shape[0] - 1]).cumsum(0, dtype=torch.int32)
    return torch.cat([x.sin()[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)])


def written_in_place(x: torch.Tensor) -> torch.Tensor:
    offsets = torch.tensor([0, 0, 0])
    offsets[1] += 2
    return x.sin()[: offsets[1].item()]


def numpy_product(x: torch.Tensor) -> torch.Tensor:
    return x.sin().reshape(int(np.prod(x.shape)))


FOLDED = (tolist, item, slices, running_sum, written_in_place, numpy_product)


@pytest.mark.parametrize("function", FOLDED)
def test_numbers_that_are_constants_of_the_trace_are_folded(function: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(4, 6)
    count, result = graphs(function, x)
    assert count == 1
    assert torch.equal(result, function(x))
    again = torch.randn(4, 6)
    assert torch.equal(torch.compile(function, backend=fewer_breaks(Graphs()))(again), function(again))


def test_numbers_of_data_are_not_folded() -> None:
    def count_of(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * torch.count_nonzero(x).item()

    def last(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        sizes = torch.tensor([1, 2])
        sizes[0] = where
        return x.sin() * sizes[0].item()

    for zeros in (0, 3):
        x = torch.ones(5)
        x[:zeros] = 0
        assert torch.equal(graphs(count_of, x)[1], count_of(x))
    run = torch.compile(last, backend=fewer_breaks(Graphs()))
    for where in (3, 7):
        assert torch.equal(run(torch.ones(5), torch.tensor(where)), last(torch.ones(5), torch.tensor(where)))


def test_other_sizes_later_are_other_constants() -> None:
    torch._dynamo.reset()
    run = torch.compile(slices, backend=fewer_breaks(Graphs()))
    for shape in ((4, 6), (4, 9), (3, 12), (4, 6)):
        x = torch.randn(shape)
        assert torch.equal(run(x), slices(x))


def speaks(x: torch.Tensor) -> torch.Tensor:
    def inner(y: torch.Tensor) -> torch.Tensor:
        warnings.warn(f"from within, {y.shape[0]} rows", category=FutureWarning, stacklevel=2)
        print("printed", y.shape)
        return y.cos()

    y = inner(x.sin())
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    log.warning("logged %s of %d", "rows", x.shape[0])
    log.debug("not wanted")
    return y + 1


def test_what_a_model_says_is_said_at_every_call(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(4, 6)
    torch._dynamo.reset()
    backend = Graphs()
    run = torch.compile(speaks, backend=fewer_breaks(backend))
    for _ in range(2):
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
            warnings.simplefilter("always")
            assert torch.equal(run(x), x.sin().cos() + 1)
        said = [(w.category, str(w.message)) for w in caught]
        assert said == [(FutureWarning, "from within, 4 rows"), (DeprecationWarning, "old")]
        assert capsys.readouterr().out == "printed torch.Size([4, 6])\n"
        assert [record.getMessage() for record in caplog.records] == ["logged rows of 4"]
    assert backend.count == 1


def test_other_backends_are_traced_as_ever() -> None:
    x = torch.randn(4, 6)
    assert graphs(tolist, x)[0] == 1
    before = fake_tensor.CONSTANT_NUMEL_LIMIT, TensorVariable.method_item, set(config.reorderable_logging_functions)
    assert graphs(tolist, x, marked=False)[0] == 2
    assert graphs(speaks, x, marked=False)[0] > 1
    after = fake_tensor.CONSTANT_NUMEL_LIMIT, TensorVariable.method_item, set(config.reorderable_logging_functions)
    assert before == after == (1, TensorVariable.method_item, set())


def test_settings_are_put_back_when_a_trace_fails() -> None:
    def fails(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise ValueError("no")

    torch._dynamo.reset()
    with pytest.raises(Exception, match="no"):
        torch.compile(tolist, backend=fewer_breaks(fails))(torch.randn(4, 6))
    assert fake_tensor.CONSTANT_NUMEL_LIMIT == 1
    assert not config.reorderable_logging_functions
