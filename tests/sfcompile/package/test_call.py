"""How a model is called and what it returns, as JSON."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from sfcompile.errors import InputError, UnsupportedError
from sfcompile.package.call import Record, Signature, bind, describe, restore
from sfcompile.package.graph import tensor_facts


class Model(nn.Module):
    def forward(self, x: torch.Tensor, pair: Any = None, *, scale: float = 1.0, **extra: Any) -> torch.Tensor:
        return x


@dataclass
class Out:
    sample: torch.Tensor
    step: int


Point = namedtuple("Point", "x y")
X, Y = torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)


def signature(*args: Any, **kwargs: Any) -> Signature:
    positional, given = bind(Model(), args, kwargs)
    found: list[torch.Tensor] = []

    def leaf(x: torch.Tensor) -> int:
        found.append(x)
        return len(found) - 1

    arguments = {name: describe(value, leaf, name) for name, value in given.items()}
    data = {"positional": positional, "arguments": arguments, "tensors": [tensor_facts(x) for x in found]}
    return Signature(json.loads(json.dumps(data)))


def test_by_position_and_by_name() -> None:
    made = signature(X, [Y, {"k": X}], scale=float("nan"), word="a")
    for args, kwargs in (
        ((X, [Y, {"k": X}]), {"scale": float("nan"), "word": "a"}),
        ((), {"x": X, "pair": (Y, {"k": X}), "word": "a"}),
    ):
        assert [t.shape for t in made.tensors(args, kwargs)] == [X.shape, Y.shape, X.shape]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((X[:1], [Y]), {}, r"x must be float32\[2, 3\], got float32\[1, 3\]"),
        ((X.double(), [Y]), {}, r"x must be float32\[2, 3\], got float64\[2, 3\]"),
        ((X.to("meta"), [Y]), {}, "x must be on cpu, got meta"),
        ((3, [Y]), {}, "x must be a tensor"),
        ((X, [Y, Y]), {}, "pair must be a list of 1, got a list of 2"),
        ((X, [X]), {}, r"pair\[0\] must be int64\[4\]"),
        ((X, [Y]), {"scale": 2.0}, "scale was 1.0 when the model was exported, got 2.0"),
        ((X, [Y]), {"scale": 1}, "scale was 1.0 when the model was exported, got 1"),
        ((X, [Y]), {"other": 1}, "argument 'other' is unknown"),
        ((X, [Y]), {"x": X}, "argument 'x' is given twice"),
        ((X,), {}, "argument 'pair' is missing"),
        ((X, [Y], 1.0), {}, "3 arguments by position, forward.. takes 2"),
    ],
)
def test_another_call_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        signature(X, [Y]).tensors(args, kwargs)


def test_results_keep_their_form_without_their_classes() -> None:
    value = {"a": [Out(X, 3), Point(Y, torch.float16)], "b": (None, float("inf"))}
    kept: list[torch.Tensor] = []
    tree = describe(value, lambda x: kept.append(x) or len(kept) - 1, "result")  # type: ignore[func-returns-value]
    again = restore(json.loads(json.dumps(tree)), kept)
    out, point = again["a"]
    assert out.sample is X and out["step"] == 3 and out[0] is X and point.x is Y and point[1] is torch.float16
    assert isinstance(out, Record) and again["b"] == (None, float("inf"))
    with pytest.raises(AttributeError, match="no field 'smaple'; fields are sample, step"):
        _ = out.smaple


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"x\[1\]\['k'\] holds a set"):
        describe([1, {"k": {2}}], lambda x: 0, "x")
    with pytest.raises(InputError, match="do not fit"):
        bind(Model(), (), {})

    class Star(nn.Module):
        def forward(self, *xs: torch.Tensor) -> torch.Tensor:
            return xs[0]

    with pytest.raises(UnsupportedError, match=r"takes \*xs, and 1 were given"):
        bind(Star(), (X,), {})
