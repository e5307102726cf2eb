"""Reshapes: tokens merged with the batch, with heads, and back; grids that no single dim holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import check_sharded
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=12, deadline=None)


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


def test_tokens_spread_over_a_grid_are_gathered_before_the_view() -> None:
    def unpatchify(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).reshape(2, 3, 4, 6).permute(0, 3, 1, 2)

    check_sharded(unpatchify, [rand(2, 12, 6)], (0, 1), whole=["view"], exact=True)


def test_reading_bytes_as_another_type_has_no_rule() -> None:
    check_sharded(lambda x: (x * 2).view(torch.int32), [rand(2, 5, 6)], (0, 1), whole=["view"], exact=True)
