"""Ops that keep dims: the op on shards is the shard of the op."""

from __future__ import annotations

import pytest
import torch
from helpers import check_sharded
from hypothesis import given
from hypothesis import strategies as st
from random_ops import Fn, few, rand, ranks, sizes, tokens
from torch.nn import functional as F

POINTWISE: dict[str, Fn] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x) * 2 + 1,
    "to": lambda x: x.double().clone().to(torch.float32),
    "where": lambda x: torch.where(x > 0, x, -x),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.0),
    "clamp": lambda x: x.clamp(min=-1).tanh().sigmoid(),
    "like": lambda x: torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 2.0),
    "pow": lambda x: (x.abs() + 1).pow(0.5).rsqrt() - x.exp().neg().cos() / x.sin().abs().add(1),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "compare": lambda x: (x > 0) & (x < 1) | ~(x == 0),
    "floor_divide": lambda x: torch.floor_divide(x, 0.5) + x.floor_divide(x.abs() + 1),
    "untagged": lambda x: F.hardswish(x) * F.logsigmoid(x) * torch.isclose(x, x.round()),
    "complex": lambda x: torch.view_as_real(torch.polar(x.abs(), x)).flatten(-2),
}


@pytest.mark.parametrize("name", POINTWISE)
@few
@given(tokens, sizes, ranks)
def test_pointwise(name: str, n: int, width: int, p: int) -> None:
    check_sharded(POINTWISE[name], [rand(2, n, width)], (0, 1), ranks=p)


@few
@given(tokens, sizes, ranks)
def test_broadcasting(n: int, width: int, p: int) -> None:
    def modulate(x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return (x + table) * (1 + scale) - row

    check_sharded(modulate, [rand(2, n, width), rand(n, width), rand(2, 1, width), rand(width)], (0, 1), ranks=p)


@few
@given(tokens, sizes, ranks)
def test_expand(n: int, width: int, p: int) -> None:
    check_sharded(lambda x: x.unsqueeze(0).expand(3, -1, -1) * 2, [rand(n, width)], (0, 0), ranks=p)
    check_sharded(lambda x, s: s.expand(2, x.shape[1], 4).cos() * x, [rand(2, n, 4), rand(2, 1, 4)], (0, 1), ranks=p)


MOVES: dict[str, Fn] = {
    "permute": lambda x: x.permute(2, 1, 0).transpose(0, 1),
    "swap": lambda x: x.swapaxes(0, 1).movedim(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(-1).squeeze(1),
    "unbind": lambda x: x.unbind(-1)[1] + x.unbind(0)[0][..., 0],
    "select": lambda x: x[..., 0] + x.select(-1, 2),
    "stack": lambda x: torch.stack([x, -x], dim=-1).flatten(-2),
    "matrix_transpose": lambda x: x.mT,
    "real": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2),
}


@pytest.mark.parametrize("name", MOVES)
@few
@given(tokens, ranks)
def test_moving_dims(name: str, n: int, p: int) -> None:
    check_sharded(MOVES[name], [rand(2, n, 4)], (0, 1), ranks=p, exact=name != "unbind")


def test_squeeze_keeps_a_token_dim_whose_shard_is_one_long() -> None:
    check_sharded(lambda x: x.unsqueeze(0).squeeze() * 1, [rand(3, 4)], (0, 0), ranks=3)


def test_a_squeeze_of_no_dims_keeps_all() -> None:
    squeeze = torch.ops.aten.squeeze.dims
    check_sharded(lambda x: squeeze(x * 2, []) + 1, [rand(1, 5, 1, 3)], (0, 1), exact=True)
    check_sharded(lambda x: squeeze(x * 2, [0, -2]) + 1, [rand(1, 5, 1, 3)], (0, 1), exact=True)


@few
@given(tokens, ranks, st.sampled_from(["ij", "xy"]))
def test_coordinates_of_a_grid(n: int, p: int, indexing: str) -> None:
    def grid(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first, second = torch.meshgrid(x * 2, y, indexing=indexing)
        return first - second

    check_sharded(grid, [rand(n), rand(4)], (0, 0), ranks=p)
