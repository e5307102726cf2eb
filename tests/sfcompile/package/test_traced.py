"""The trace of an export: nothing is computed, tensors are told apart by where they come from and go to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_attention import Small

from sfcompile.errors import InputError, OptionError
from sfcompile.package.traced import trace

X = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))


def test_nothing_is_computed_and_tensors_are_told_apart() -> None:
    traced = trace(Small(), (X,), {})
    assert [kind for kind, _ in traced.placeholders].count("input") == 1
    assert {name for kind, name in traced.placeholders if kind == "weight"} == set(traced.weights)
    assert {"qkv.weight", "qkv.bias", "table"} < set(traced.weights)
    loose = set(traced.weights) - {"qkv.weight", "qkv.bias", "table"}
    assert len(loose) == 1 and loose.pop().startswith("constant.")


def test_one_tensor_in_two_places_has_two_inputs() -> None:
    class Two(Small):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return {"sum": self.attend(x) + y, "x": x, "n": 3}

    traced = trace(Two(), (X, X), {})
    assert sorted(number for kind, number in traced.placeholders if kind == "input") == [0, 1]
    assert traced.result == {"dict": {"sum": {"tensor": 0}, "x": {"tensor": 1}, "n": {"value": 3}}}


def test_arguments_that_are_none_of_forwards_are_refused() -> None:
    with pytest.raises(InputError, match="do not fit Small.forward"):
        trace(Small(), (X, X), {})
    with pytest.raises(OptionError, match="args is a tensor"):
        trace(Small(), X, {})
