"""First calls held against one process: silence where they are right, one error on every rank where they are not."""

from __future__ import annotations

import math

import pytest
import torch
import verify_cases
from processes import preload, run_processes

from sfcompile.errors import OptionError
from sfcompile.options import Options, Wire
from sfcompile.verify import difference, limit_of

preload("verify_cases", "sfcompile.backend")


@pytest.mark.ranks
@pytest.mark.parametrize(("case", "homes"), [("right", [0, 0]), ("shares", [0, 1]), ("wrong", [0, 0])])
def test_first_calls_are_compared(case: str, homes: list[int]) -> None:
    run_processes(2, verify_cases.run, (case,), homes, timeout_s=120.0)


@pytest.mark.parametrize(
    ("mine", "want", "apart"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, math.inf], [1.0, math.inf], 0.0),
        ([1.0, math.nan], [1.0, math.nan], 0.0),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([0.0, 1e-9], [0.0, 0.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_differences_are_of_the_scale_and_never_hidden(mine: list[float], want: list[float], apart: float) -> None:
    assert difference(torch.tensor(mine), torch.tensor(want)) == apart


def test_what_is_no_number_is_equal_or_infinitely_far() -> None:
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert difference(torch.zeros(2), torch.zeros(3)) == difference(torch.zeros(2).half(), torch.zeros(2)) == math.inf
    assert difference(None, None) == difference(3, 3) == 0.0
    assert difference(3, 4) == math.inf


def test_the_limit_is_that_of_the_coarsest_dtype_and_of_the_wire() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(3)
    graph.output(x)
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert limit_of(gm, Wire()) == 1e-4 and limit_of(gm, Wire(k="fp8")) == 2e-1
    x.meta["val"] = torch.zeros(3, dtype=torch.bfloat16)
    assert limit_of(gm, Wire()) == 5e-2


def test_a_number_of_calls_is_asked_for() -> None:
    assert Options.from_dict({"verify": 2}).verify == 2
    with pytest.raises(OptionError, match="a number of calls"):
        Options.from_dict({"verify": -1})
