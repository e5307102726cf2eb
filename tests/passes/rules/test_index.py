"""Ops that pick, join and reorder positions along the token dim itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ANY, check_sharded
from hypothesis import assume, given
from hypothesis import strategies as st
from random_ops import examples

tokens = st.integers(4, 13)
ranks = st.integers(2, 5)
few = examples(15)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@few
@given(st.integers(1, 6), tokens, ranks)
def test_joint_axis_and_cuts_from_either_end(text: int, image: int, p: int) -> None:
    def joint(t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.cat([t, x], dim=1) * 2
        return y[:, :text] + t, y[:, text:] * x, y[:, -image:], y[:, :-image]

    check_sharded(joint, [rand(2, text, 3), rand(2, image, 3)], (1, 1), ranks=p, exact=True)


@few
@given(tokens, st.integers(-15, 15), st.integers(-15, 15), st.integers(1, 3), ranks)
def test_slices(n: int, start: int, stop: int, step: int, p: int) -> None:
    assume(len(range(n)[start:stop:step]) > 0)
    check_sharded(lambda x: (x + 0)[:, start:stop:step] * 1, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)


@few
@given(tokens, st.data(), ranks)
def test_splits(n: int, data: st.DataObject, p: int) -> None:
    cut = data.draw(st.integers(0, n - 1))
    parts = data.draw(st.integers(1, 5))

    def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x.split([cut, n - cut], dim=1)
        return a * 2, x.chunk(parts, dim=1)[0] + 1, x.split(3, dim=1)[0] * 1, b * 3

    check_sharded(split, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(lambda x: x.split([cut, n - cut], dim=1)[1] * 1, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(lambda x: x.chunk(3, dim=-1)[1] * 1, [rand(2, n, 6)], (0, 1), ranks=p, exact=True)


@few
@given(tokens, ranks)
def test_parts_without_elements_have_the_shape_of_the_whole(n: int, p: int) -> None:
    """Beside the tokens: a rotation of all channels leaves none of them."""

    def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        turned, rest = (x * 2).split([4, 0], dim=-1)
        return turned + 1, rest, rest.sum(-1), torch.cat([turned, rest], -1), (x + 1)[..., 4:]

    check_sharded(split, [rand(2, n, 4)], (0, 1), ranks=p, exact=True)


def test_splits_at_places_that_do_not_ascend_are_whole() -> None:
    check_sharded(lambda x: (x * 2).tensor_split([3, 1], dim=1)[2] + 1, [rand(2, 6, 3)], (0, 1), ranks=2, whole=ANY)


@few
@given(tokens, st.data(), ranks)
def test_slice_scatter(n: int, data: st.DataObject, p: int) -> None:
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    step = data.draw(st.integers(1, 2))

    def write(x: torch.Tensor) -> torch.Tensor:
        return torch.slice_scatter(x * 2, x[:, start:stop:step] * 3, 1, start, stop, step)

    check_sharded(write, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(
        lambda x: torch.slice_scatter(x, x[..., ::2] * 3, 2, 0, 4, 2), [rand(2, n, 4)], (0, 1), ranks=p, exact=True
    )


@few
@given(tokens, st.integers(-20, 20), ranks)
def test_flip_and_roll(n: int, shift: int, p: int) -> None:
    check_sharded(lambda x: x.flip(1) * 2, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(lambda x: x.flip(-1) * 2, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(lambda x: x.roll(shift, 1) * 2, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)


REPEATS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tile": lambda x: x.repeat(2, 3, 1) + 1,
    "tile_new_dim": lambda x: x.repeat(2, 1, 2, 1) + 1,
    "interleave": lambda x: x.repeat_interleave(3, dim=1) + 1,
    "interleave_flat": lambda x: x[..., 0].repeat_interleave(3) + 1,
    "interleave_batch": lambda x: x.repeat_interleave(2, dim=0) + 1,
    "there_and_back": lambda x: x.repeat_interleave(3, dim=1).unflatten(1, (-1, 3)).mean(2) * x,
}


@pytest.mark.parametrize("name", REPEATS)
@few
@given(tokens, ranks)
def test_repeats(name: str, n: int, p: int) -> None:
    check_sharded(REPEATS[name], [rand(2, n, 3)], (0, 1), ranks=p)


def test_a_shifted_copy_of_the_same_tokens_is_gathered_and_right() -> None:
    check_sharded(lambda x: (x * 2)[:, 1:] - x[:, :-1] * 3, [rand(2, 9, 3)], (0, 1), exact=True)


@few
@given(ranks)
def test_fewer_tokens_than_ranks(p: int) -> None:
    check_sharded(lambda x: torch.cat([x * 2, x[:, 1:]], dim=1).flip(1), [rand(2, 2, 3)], (0, 1), ranks=p, exact=True)


@few
@given(st.integers(3, 9), st.integers(-9, 9), ranks)
def test_several_dims_move_at_once(n: int, shift: int, p: int) -> None:
    """Windows are shifted along rows and columns: tokens may be either."""
    for dim in (1, 2):
        shape = [2, 4, 3]
        shape[dim] = n
        check_sharded(lambda x: (x + 0).roll((shift, 1), (1, 2)) * 2, [rand(*shape)], (0, dim), ranks=p, exact=True)
        check_sharded(lambda x: (x + 0).roll((shift, 1, 2), (1, 2, 1)) * 2, [rand(*shape)], (0, dim), ranks=p)
        check_sharded(lambda x: (x + 0).flip(2, 1) * 2, [rand(*shape)], (0, dim), ranks=p, exact=True)
