"""The largest over tokens, and its place: ranks take those of their own tokens, and nothing is gathered."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, check_sharded, rewritten
from hypothesis import given
from hypothesis import strategies as st
from random_ops import Fn, few, rand, ranks, tokens

from sfcompile.passes.rules.extremes import least

EXTREMES: dict[str, Fn] = {
    "amax": lambda x: (x * 2).amax(1) + 1,
    "amin_kept": lambda x: (x * 2).amin(1, keepdim=True) + 1,
    "amax_of_two_dims": lambda x: (x * 2).amax((0, 1)) + 1,
    "amax_of_integers": lambda x: (x * 20).to(torch.int32).amax(1) + 1,
    "any": lambda x: (x > 1).any(1),
    "all_kept": lambda x: (x > -1).all(1, keepdim=True),
    "argmax": lambda x: (x * 2).argmax(1) + 1,
    "argmin_kept": lambda x: (x * 2).argmin(1, keepdim=True) + 1,
    "argmax_of_equals": lambda x: (x * 2).round().argmax(1),
}


@pytest.mark.parametrize("name", EXTREMES)
@few
@given(tokens, ranks, st.booleans())
def test_ranks_tell_that_of_their_own_tokens(name: str, n: int, p: int, odd: bool) -> None:
    """More ranks than tokens too, and numbers that are none."""
    x = rand(2, n, 3)
    if odd:
        x[0, n // 2], x[1, :, 0] = torch.nan, -torch.inf
    check_sharded(EXTREMES[name], [x], (0, 1), ranks=p, exact=not odd)


def test_nothing_is_gathered() -> None:
    got = captured(lambda x: ((x * 2).amax(1), (x * 2).argmin(1)), rand(2, 7, 3))
    placement, traffic, _ = rewritten(got, [(0, 1)], 3)
    assert not placement.reasons and not traffic[0].gathers


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, torch.bool])
def test_what_a_rank_without_tokens_tells_changes_nothing(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0, 1, 0], dtype=dtype)
    for largest in (True, False):
        nothing = torch.tensor([least(dtype, largest)], dtype=dtype)
        reduce = torch.amax if largest else torch.amin
        if dtype != torch.bool:
            assert reduce(torch.cat([numbers, nothing]), 0) == reduce(numbers, 0)
    assert (least(torch.bool, True), least(torch.bool, False)) == (False, True)
