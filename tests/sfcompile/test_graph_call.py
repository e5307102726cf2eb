"""What a call of a compiled graph looks at before it runs. Between ranks: tests/e2e/test_hidden_inputs.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from sfcompile.capture.graph import Captured
from sfcompile.errors import UnsupportedError
from sfcompile.graph_call import GPU_LOOKS, _can_look, compared_inputs, compared_weights, not_shared
from sfcompile.options import Options
from sfcompile.torch_private import FakeTensorMode

INPUTS = [torch.ones(2), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), 3, torch.ones(2).to_sparse()]


def graph(written: tuple[int, ...] = (), numbers: tuple[int, ...] = ()) -> Captured:
    return Captured(symbolic_trace(nn.Identity()), FakeTensorMode(), (0, 1, 2, 4), written, numbers)


@pytest.mark.parametrize("inputs", ["checked", "rank0"])
def test_written_buffers_go_with_the_inputs(inputs: str) -> None:
    asked = Options(inputs=inputs)
    assert compared_inputs(INPUTS, asked, graph()) == (0,)
    assert compared_inputs(INPUTS, asked, graph(written=(2,))) == (0, 2)
    assert compared_inputs(INPUTS, asked, graph(numbers=(3,))) == (0, 3)
    assert compared_weights(INPUTS, asked) == (1, 2)


def test_ranks_that_trust_each_other_compare_nothing() -> None:
    asked = Options(inputs="trusted")
    assert compared_inputs(INPUTS, asked, graph(written=(2,))) == compared_weights(INPUTS, asked) == ()


def test_gpus_look_at_first_calls_only() -> None:
    assert all(_can_look(torch.device("cpu"), call) for call in (1, GPU_LOOKS + 1))
    assert not _can_look(torch.device("cuda"), GPU_LOOKS + 1)


def test_a_refusal_is_every_ranks() -> None:
    error = not_shared(UnsupportedError("a graph with a loop"))
    assert error.on_every_rank and "a graph with a loop" in str(error) and "'checked'" in str(error)
