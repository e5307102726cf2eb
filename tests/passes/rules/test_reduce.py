"""Products, norms, reductions, orderings: their other dims shard; what mixes tokens is whole or a partial sum."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, check_sharded, rewritten, run_lockstep
from hypothesis import given
from hypothesis import strategies as st
from random_ops import Fn, few, rand, ranks, tokens
from torch import fx
from torch.nn import functional as F

CONTRACTIONS: dict[str, tuple[Fn, list[tuple[int, ...]]]] = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(2, 0, 5), (4, 5), (4,)]),
    "matmul": (lambda x, w: x @ w, [(2, 0, 5), (5, 3)]),
    "matmul_vector": (lambda x, w: (x @ w) * 2, [(2, 0, 5), (5,)]),
    "matmul_batch": (lambda x, w: x @ w, [(2, 3, 0, 5), (3, 5, 4)]),
    "bmm": (lambda x, w: torch.bmm(x, w), [(2, 0, 5), (2, 5, 3)]),
    "baddbmm": (lambda x, b, w: torch.baddbmm(b, x, w), [(2, 0, 5), (1, 1, 3), (2, 5, 3)]),
    "einsum": (lambda x, w: torch.einsum("bsd,de->bse", x, w), [(2, 0, 5), (5, 3)]),
    "einsum_dots": (lambda x, w: torch.einsum("...sd,...de->...es", x, w), [(2, 0, 5), (2, 5, 3)]),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
@few
@given(tokens, ranks)
def test_contractions(name: str, n: int, p: int) -> None:
    fn, shapes = CONTRACTIONS[name]
    inputs = [rand(*(size or n for size in shape)) for shape in shapes]
    check_sharded(fn, inputs, (0, len(shapes[0]) - 2), ranks=p)


@few
@given(tokens, ranks, st.booleans())
def test_quantised_products(n: int, p: int, by_rows: bool) -> None:
    x, w = (rand(n, 16) * 20).to(torch.int8), (rand(16, 8) * 20).to(torch.int8)
    check_sharded(lambda x, w: torch._int_mm(x, w) + 1, [x, w], (0, 0), ranks=p, exact=True)
    a, b = rand(n, 16).to(torch.float8_e4m3fn), rand(32, 16).to(torch.float8_e4m3fn)
    scales = (rand(n, 1).abs(), rand(1, 32).abs()) if by_rows else (torch.tensor(2.0), torch.tensor(0.5))

    def product(a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), left, right, out_dtype=torch.float32) * 2

    check_sharded(product, [a, b, *scales], (0, 0), *([(2, 0)] if by_rows else []), ranks=p)


def test_a_sum_over_tokens_by_a_vector() -> None:
    check_sharded(lambda x, v: (x * 2).transpose(1, 2) @ v, [rand(2, 7, 5), rand(7)], (0, 1), (1, 0))


@few
@given(st.integers(2, 6), ranks)
def test_tokens_made_of_output_features_cut_the_weight(n: int, p: int) -> None:
    def project(w: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w, b).unflatten(-1, (-1, 3)) * 2

    weight = rand(n * 3, 5).view(n, 3, 5)
    check_sharded(lambda w, x: project(w.flatten(0, 1), x, w[:, :, 0].flatten()), [weight, rand(2, 5)], (0, 0), ranks=p)


@few
@given(tokens, ranks)
def test_two_dimensional_products_after_merging_batch_and_tokens(n: int, p: int) -> None:
    def merged(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 5)
        return (torch.mm(rows, w) + torch.addmm(b, rows, w)).view(2, -1, 3)

    check_sharded(merged, [rand(2, n, 5), rand(5, 3), rand(3)], (0, 1), ranks=p)
    check_sharded(lambda t, f: torch.outer(t, f).cos(), [rand(n), rand(4)], (0, 0), ranks=p)


@few
@given(tokens, ranks)
def test_sums_over_tokens_become_partial_sums(n: int, p: int) -> None:
    def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        context = k.transpose(-1, -2) @ v
        return q @ context / (q * k.sum(dim=1, keepdim=True)).mean(dim=1, keepdim=True).abs().add(1)

    inputs = [rand(2, n, 4), rand(2, n, 4) + 1, rand(2, n, 4) + 2]
    check_sharded(linear_attention, inputs, (0, 1), (1, 1), ranks=p)


SUMS: dict[str, Fn] = {
    "mean": lambda x: (x * 1.0).abs().mean(1),
    "sum": lambda x: (x * 1.0).sum(1),
    "cast": lambda x: (x * 1.0).float().sum(1, dtype=x.dtype),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_partial_sums_of_narrow_types_are_fp32(dtype: torch.dtype, name: str) -> None:
    """What is too large for fp16 is only added up; and nothing is rounded before all ranks' parts are together."""
    x = (rand(1, 9, 4).abs() * 8000 + 20000).to(dtype)
    x[:, ::2] *= -1
    got = captured(SUMS[name], x)
    _, _, locals_ = rewritten(got, [(0, 1)], 3)
    graphs = [(fx.GraphModule(local.root, local.graph), local.sites) for local in locals_]
    (want,) = got.gm(x)
    for (out,) in run_lockstep(lambda rank: graphs[rank], 3, [x]):
        assert out.dtype == want.dtype == dtype
        torch.testing.assert_close(out, want, rtol=torch.finfo(dtype).eps, atol=0)


@few
@given(st.integers(2, 5), ranks, st.sampled_from([(-1, 0), (1, 0), (1, 1), (-1, 1)]))
def test_a_product_summed_over_one_dim(n: int, p: int, dims: tuple[int, int]) -> None:
    """All dims of one size: which is which shows in names alone."""
    over, tokens = dims
    inputs = [rand(n, n, n), rand(n, n, n)]
    check_sharded(lambda x, y: torch.linalg.vecdot(x * 2, y, dim=over) + 1, inputs, (0, tokens), ranks=p)


NORMS: dict[str, Fn] = {
    "layer_norm": lambda x: F.layer_norm(x, (6,), torch.ones(6) * 2, torch.ones(6)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), torch.ones(6) * 2),
    "softmax": lambda x: x.softmax(dim=-1) + x.log_softmax(-1),
    "reductions": lambda x: x.mean(-1) + x.sum(-1) + x.amax(-1) + x.var(-1) + x.std(-1) + x.max(dim=-1).values,
    "keepdim": lambda x: x / x.norm(dim=-1, keepdim=True) + x.mean(-1, keepdim=True) + x.any(-1, keepdim=True),
    "sort": lambda x: x.sort(dim=-1).values + x.cumsum(-1) + x.topk(2, dim=-1).values.sum(-1, keepdim=True),
    "argmax": lambda x: x.argmax(-1) + x.argsort(-1)[..., 0],
    "glu": lambda x: F.glu(x, -1),
}


@pytest.mark.parametrize("name", NORMS)
@few
@given(tokens, ranks)
def test_norms_and_reductions(name: str, n: int, p: int) -> None:
    check_sharded(NORMS[name], [rand(2, n, 6)], (0, 1), ranks=p)


@few
@given(tokens, ranks)
def test_layer_norm_over_two_dims(n: int, p: int) -> None:
    check_sharded(lambda x: F.layer_norm(x, (3, 4)), [rand(2, n, 3, 4)], (0, 1), ranks=p)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda x: x.softmax(dim=1), "softmax"),
        (lambda x: x.cumprod(dim=1), "cumprod"),
        (lambda x: x.sort(dim=1).values, "sort"),
        (lambda x: x.median(dim=1).values, "median"),
    ],
)
def test_ops_that_mix_tokens_are_computed_whole(fn: Fn, name: str) -> None:
    # The product in front of them runs on shards, so a gather is needed and must be right.
    check_sharded(lambda x: fn(x * 2), [rand(2, 7, 6)], (0, 1), whole=[name])


@pytest.mark.parametrize("name", ["fft", "rfft", "fft2", "rfftn"])
def test_transforms_of_other_dims_keep_tokens(name: str) -> None:
    dims = {"fft": -1, "rfft": 3, "fft2": (2, 3), "rfftn": None}[name]
    sizes = {"s": (4, 6)} if name == "rfftn" else {}

    def mix(x: torch.Tensor) -> torch.Tensor:
        return getattr(torch.fft, name)(x * 2, dim=dims, **sizes).abs()

    check_sharded(mix, [rand(2, 7, 4, 6)], (0, 1))
    check_sharded(lambda x: torch.fft.fft2(x * 2, dim=(1, 2)).real, [rand(2, 7, 4, 6)], (0, 1), whole=["fft_fft2"])
