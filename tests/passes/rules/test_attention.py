"""Attention on shards: torus, whole keys, masks, causal, grouped heads, tokens in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import check_sharded
from hypothesis import given
from hypothesis import strategies as st
from random_ops import examples
from torch.nn.functional import scaled_dot_product_attention as sdpa

few = examples(10)
ranks = st.integers(2, 5)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@few
@given(st.integers(2, 9), ranks, st.booleans())
def test_self_attention_of_one_axis(n: int, p: int, causal: bool) -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return sdpa(x * 2, x + 1, x, is_causal=causal, scale=0.3) * 1

    check_sharded(attend, [rand(2, 5, n, 4)], (0, 2), ranks=p)


@few
@given(st.integers(2, 9), st.integers(1, 6), ranks)
def test_cross_attention_with_whole_keys(n: int, t: int, p: int) -> None:
    def attend(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return sdpa(x * 2, text + 1, text * 3)

    check_sharded(attend, [rand(2, 3, n, 4), rand(2, 3, t, 4)], (0, 2), ranks=p)
    check_sharded(attend, [rand(2, 3, n, 4), rand(2, 3, t, 4)], (0, 2), (1, 2), ranks=p)


MASKS = {
    "key": (2, 1, 1, 8), "full": (2, 1, 8, 8), "heads": (1, 4, 8, 8), "two_dims": (8, 8), "one_row": (1, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(name: str, kind: str) -> None:
    mask = rand(*MASKS[name])
    mask = mask > -0.5 if kind == "bool" else mask

    def attend(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return sdpa(x, x + 1, x, attn_mask=m)

    for p in (2, 3):
        check_sharded(attend, [rand(2, 4, 8, 4), mask], (0, 2), ranks=p)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_and_causal_with_whole_keys(causal: bool) -> None:
    def attend(x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        extra: dict[str, Any] = {"is_causal": True} if causal else {"attn_mask": mask}
        return sdpa(x * 2, text, text, **extra)

    check_sharded(attend, [rand(2, 4, 8, 4), rand(2, 4, 6, 4), rand(8, 6) > -1], (0, 2))


def test_grouped_heads() -> None:
    def attend(x: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return sdpa(x, kv, kv * 2, enable_gqa=True)

    check_sharded(attend, [rand(2, 6, 7, 4), rand(2, 2, 7, 4)], (0, 2), (1, 2), ranks=3)


def test_tokens_in_the_batch_need_no_other_rank() -> None:
    def frames(x: torch.Tensor) -> torch.Tensor:
        y = x.transpose(1, 2).flatten(0, 1).unsqueeze(1)
        return sdpa(y, y * 2, y).squeeze(1).unflatten(0, (2, 6)).transpose(1, 2)

    check_sharded(frames, [rand(2, 3, 6, 4)], (0, 2), ranks=4)


def test_three_dims() -> None:
    check_sharded(lambda x: sdpa(x * 2, x, x), [rand(2, 7, 4)], (0, 1))


@pytest.mark.parametrize("lone", ["k", "v"])
def test_one_head_of_keys_or_of_values_is_broadcast(lone: str) -> None:
    """A site knows one number of K/V heads, so such an attention is no site."""

    def attend(x: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        return sdpa(x * 2, one, x) if lone == "k" else sdpa(x * 2, x, one)

    check_sharded(attend, [rand(2, 4, 8, 4), rand(2, 1, 8, 4)], (0, 2), (1, 2), ranks=2)


@pytest.mark.parametrize(("heads", "whole"), [(8, ()), (4, ["scaled_dot_product_attention"]), (1, ())])
def test_tokens_that_are_heads_stay_beside_the_keys_that_serve_them(heads: int, whole: Sequence[str]) -> None:
    """A rank's two of eight heads of queries would share four of keys in another way than all eight do."""

    def attend(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return sdpa(x * 2, k, k + 1, enable_gqa=True) * 2

    check_sharded(attend, [rand(2, 8, 5, 4), rand(2, heads, 5, 4)], (0, 1), ranks=4, whole=whole)
