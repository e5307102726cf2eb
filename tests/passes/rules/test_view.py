"""Reshapes: tokens merged with the batch, with heads, and back; grids that no single dim holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import ANY, check_sharded
from hypothesis import given
from hypothesis import strategies as st
from random_ops import examples

few = examples(12)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "merge": lambda x: x.reshape(-1, 6) * 2,
    "merge_and_back": lambda x: (x.reshape(-1, 6) * 2).view(2, -1, 6),
    "heads": lambda x: x.unflatten(-1, (2, 3)).transpose(1, 2).flatten(0, 1) * 2,
    "last": lambda x: x.flatten(1, 2) * 2,
    "everything": lambda x: x.flatten() * 2,
    "ones": lambda x: x.reshape(2, 1, -1, 1, 6).reshape(-1, 6) * 2,
}


@pytest.mark.parametrize("name", VIEWS)
@few
@given(st.integers(2, 9), st.integers(2, 5))
def test_views(name: str, n: int, p: int) -> None:
    check_sharded(VIEWS[name], [rand(2, n, 6)], (0, 1), ranks=p, exact=True)


def unpatchify(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).reshape(2, 3, 4, 6).permute(0, 3, 1, 2)


def test_a_grid_is_sharded_by_rows_where_tokens_are_cut_between_rows() -> None:
    check_sharded(unpatchify, [rand(2, 12, 6)], (0, 1), ranks=3, exact=True)


def test_rows_that_ranks_share_are_gathered_before_the_view() -> None:
    check_sharded(unpatchify, [rand(2, 12, 6)], (0, 1), ranks=5, whole=["view"], exact=True)


@few
@given(st.integers(1, 5), st.integers(2, 4), st.integers(2, 4), st.integers(2, 4))
def test_patches_there_and_back(h: int, w: int, p: int, ranks: int) -> None:
    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        grid = (x * 2).reshape(2, h, w, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, h * p, w * p)
        back = grid.cos().reshape(2, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1)
        return back.reshape(2, h * w, p * p * 3) + x

    fits = (h * w) % (ranks * w) == 0
    check_sharded(
        there_and_back, [rand(2, h * w, 3 * p * p)], (0, 1), ranks=ranks, whole=ANY if not fits else (), exact=True
    )


def test_reading_bytes_as_another_type_has_no_rule() -> None:
    check_sharded(lambda x: (x * 2).view(torch.int32), [rand(2, 5, 6)], (0, 1), whole=["view"], exact=True)
