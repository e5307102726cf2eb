from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import captured

Fn = Callable[..., torch.Tensor]


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (4, -1)).transpose(1, 2)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(heads(q) @ heads(k).transpose(-1, -2) * 0.5, dim=-1) @ heads(v)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (heads(q) * 0.3) @ heads(k).transpose(-2, -1) / 2.0
    scores = scores + torch.arange(k.shape[1]).float()[None, None, None] * 0.1
    return scores.float().softmax(dim=-1).to(v.dtype) @ heads(v)


def folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (heads(t).flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(q.new_empty(q.shape[0], q.shape[1], k.shape[1]), q, k.mT, beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(dim=-1), v)


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (4, -1)) for t in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).transpose(1, 2)


def filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    later = torch.ones(q.shape[1], k.shape[1]).triu(4).bool()
    scores = (heads(q) @ heads(k).mT * 0.5).masked_fill(later, float("-inf"))
    scores = torch.where(torch.arange(k.shape[1]) != 2, scores, -1e9)
    return torch.softmax(scores - scores.amax(-1, keepdim=True), -1) @ heads(v)


def one_head_of_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = heads(q), k[:, None, :, :4], v[:, None, :, :4]
    return (q @ k.mT / 2).softmax(-1) @ v


def a_number_for_each_key(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = heads(q) @ heads(k).mT * 0.5 + torch.arange(k.shape[1]).to(q.dtype) * 0.1 + torch.tensor(0.5)
    return scores.softmax(-1) @ heads(v)


def rows_filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of queries that are padding: all of their keys count the same."""
    padding, scores = torch.arange(q.shape[1])[:, None] >= 4, heads(q) @ heads(k).mT * 50
    return scores.masked_fill(padding, -1e9).masked_fill(padding, -1e9).softmax(-1) @ heads(v)


def rows_of_nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of queries whose scores are all -inf nothing comes, which a model may notice; those of -1e9 are scores still."""
    padding, later = torch.arange(q.shape[1])[:, None] >= 4, torch.ones(q.shape[1], k.shape[1]).triu(1).bool()
    scores = (heads(q) @ heads(k).mT).masked_fill(later, -1e9).masked_fill(padding | later & later.flip(0), -torch.inf)
    return (scores.softmax(-1) @ heads(v)).nan_to_num(0.25)


def rows_filled_twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of padding on the left the first queries see no key: those hidden twice count as much as those hidden once."""
    scores = heads(q) @ heads(k).mT
    padding, later = torch.arange(k.shape[1]) < 2, torch.ones(q.shape[1], k.shape[1]).triu(1).bool()
    scores = scores.masked_fill(later & (torch.arange(k.shape[1]) > 6), -torch.inf)
    return scores.masked_fill(padding, -1e9).masked_fill(later, -1e9).softmax(-1) @ heads(v)


def rows_added_to_nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A mask to add may leave a query nothing, as one that is filled in."""
    bias = torch.zeros(q.shape[1], k.shape[1]).masked_fill(torch.arange(q.shape[1])[:, None] >= 4, -torch.inf)
    return ((heads(q) @ heads(k).mT + bias).softmax(-1) @ heads(v)).nan_to_num(0.25)


def in_bfloat16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The least number of fp32 is no number of bf16; queries that it hides as a whole see all keys alike."""
    least, padding = torch.finfo(torch.float32).min, torch.arange(q.shape[1])[:, None] >= 4
    bias = torch.zeros(q.shape[1], k.shape[1]).masked_fill(padding, least)
    weights = (heads(q) @ heads(k).mT + bias).softmax(-1)
    return (weights.to(torch.bfloat16) @ heads(v).to(torch.bfloat16)).float()


@pytest.mark.parametrize(
    "fn",
    [
        plain, masked, folded, by_einsum, filled, one_head_of_keys, a_number_for_each_key, rows_filled, rows_of_nothing,
        rows_filled_twice, rows_added_to_nothing, in_bfloat16,
    ],
)  # fmt: skip
def test_hand_written_attention_becomes_one_node(fn: Fn) -> None:
    args = torch.randn(2, 6, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    got = captured(fn, *args)
    names = [str(node.target) for node in got.gm.graph.nodes]
    assert names.count("aten.scaled_dot_product_attention.default") == 1
    assert not any("softmax" in name for name in names)
    tolerance = 0.03 if fn is in_bfloat16 else 1e-5
    torch.testing.assert_close(got.gm(*args)[0], fn(*args), rtol=tolerance, atol=tolerance)


def scores_read_twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(heads(q) @ heads(k).transpose(-1, -2), dim=-1)
    return weights @ heads(v) + weights.sum()


def softmax_over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(heads(q) @ heads(k).transpose(-1, -2), dim=-2) @ heads(v)


def softmax_over_queries_less_the_largest_of_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = heads(q) @ heads(k).transpose(-1, -2)
    return torch.softmax(scores - scores.amax(-1, keepdim=True), dim=-2) @ heads(v)


def squashed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax((heads(q) @ heads(k).transpose(-1, -2)).tanh(), dim=-1) @ heads(v)


def faintly_filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = heads(q) @ heads(k).mT
    return torch.softmax(scores.masked_fill(torch.arange(k.shape[1]) < 3, -5.0), -1) @ heads(v)


def filled_with_two_numbers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A query that sees nothing weighs the keys of the larger number alone."""
    scores = (heads(q) @ heads(k).mT).masked_fill(torch.arange(k.shape[1]) < 3, -1e12)
    return scores.masked_fill(torch.arange(k.shape[1]) >= 3, -1e9).softmax(-1) @ heads(v)


def filled_and_added_to(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores, hidden = heads(q) @ heads(k).mT, torch.arange(k.shape[1]) < 3
    scores = scores.masked_fill(hidden, -1e9)
    return (scores + torch.where(hidden, 0.0, -1e9)).softmax(-1) @ heads(v)


def filled_in_half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Beside the least number of fp16 scores would still count."""
    padding = torch.arange(q.shape[1])[:, None] >= 4
    weights = (heads(q) @ heads(k).mT).masked_fill(padding, -1e9).softmax(-1)
    return (weights.half() @ heads(v).half()).float()


@pytest.mark.parametrize(
    "fn",
    [
        filled_with_two_numbers,
        filled_and_added_to,
        filled_in_half,
        scores_read_twice,
        softmax_over_queries,
        softmax_over_queries_less_the_largest_of_keys,
        squashed,
        faintly_filled,
    ],
)
def test_what_only_looks_like_attention_is_left_alone(fn: Fn) -> None:
    args = torch.randn(2, 6, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    got = captured(fn, *args)
    names = [str(node.target) for node in got.gm.graph.nodes]
    assert not any("scaled_dot_product_attention" in name for name in names)
    torch.testing.assert_close(got.gm(*args)[0], fn(*args))
