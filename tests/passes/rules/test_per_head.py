"""Attention ops of which only the dims are known: by heads, by stand-ins of libraries' ops with CPU code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import captured, placeholder_values, run_compiled
from torch import nn
from torch.nn import functional as F

from sfcompile import extend
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology

VARLEN = (
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
    "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
    "bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
XFORMERS = (
    "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, SymInt window_left, "
    "SymInt window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)"
)
CUTLASS = (
    "efficient_attention_forward_cutlass(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, "
    "Tensor? seqstart_q, Tensor? seqstart_k, int? max_seqlen_q, float dropout_p, bool compute_logsumexp, "
    "int custom_mask_type, float? scale, Tensor? seqlen_k, int? window_size) -> (Tensor, Tensor, int, int)"
)
LISTED = "listed(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor lists) -> Tensor"
SPARSE = "sparse(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor? factor=None) -> Tensor"


def attend(q: Any, k: Any, v: Any, allowed: torch.Tensor | None, scale: float) -> torch.Tensor:
    """[L, H, D], fewer heads of k and v; a head's result depends on no other head, and q is coarsened as kernels do."""
    each = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(each, 1) for x in (k, v))
    q = torch.round(q * 64) / 64
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1e9)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).contiguous()


def varlen(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, mq: int, mk: int, p: float, scale: float, *rest: Any) -> Any:
    ids = [torch.bucketize(torch.arange(len(x)), cu[1:], right=True) for x, cu in ((q, cu_q), (k, cu_k))]
    out = attend(q, k, v, ids[0][:, None] == ids[1][None], scale)
    return out, out.new_zeros(q.shape[1], len(q)), out.new_zeros(0), torch.zeros(2, dtype=torch.int64)


def varlen_meta(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    assert q.shape[1] >= k.shape[1] > 0, "kernels refuse no heads"
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0]), q.new_empty(0), q.new_empty(2, dtype=torch.int64)


def xformers(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, used: Any, mq: int, mk: int, p: float, *rest: Any) -> Any:
    return varlen(q, k, v, cu_q, cu_k, mq, mk, p, *rest)[:3]


def cutlass(q: Any, k: Any, v: Any, bias: Any, cu_q: Any, cu_k: Any, *rest: Any) -> Any:
    out = varlen(q[0], k[0], v[0], cu_q, cu_k, 20, 20, 0.0, 0.3)[0]
    return out[None].contiguous(), out.new_zeros(0), 0, 0


def sparse(q: Any, k: Any, v: Any, blocks: Any, factor: Any = None) -> torch.Tensor:
    """[B, H, L, D] under a mask of blocks that all heads share, with a factor for each head."""
    factor = torch.ones(q.shape[1]) if factor is None else factor
    allowed = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)[: q.shape[2], : k.shape[2]]
    outs = [
        attend(a.transpose(0, 1) * factor[:, None], b.transpose(0, 1), c.transpose(0, 1), allowed, 0.3)
        for a, b, c in zip(q, k, v, strict=True)
    ]
    return torch.stack(outs).transpose(1, 2).contiguous()


def listed(q: Any, k: Any, v: Any, counts: Any, lists: Any) -> torch.Tensor:
    """[B, H, L, D] where each block of 4 queries of a head looks at the first so many blocks of its list."""
    first = torch.arange(lists.shape[-1]) < counts[..., None]
    seen = torch.zeros_like(lists, dtype=torch.bool).scatter(-1, lists.long(), first)
    seen = seen.repeat_interleave(4, 2).repeat_interleave(4, 3)
    each = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(each, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~seen, -1e9)
    return (scores.softmax(-1) @ v).contiguous()


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    """The stand-ins, as long as a test runs."""
    made = []
    for name, schema, run, meta in (
        ("flash_attn", VARLEN, varlen, varlen_meta),
        ("xformers_flash", XFORMERS, xformers, lambda *args: varlen_meta(*args)[:3]),
        ("xformers", CUTLASS, cutlass, lambda q, *rest: (q.new_empty(q.shape), q.new_empty(0), 0, 0)),
        ("sf_listed", LISTED, listed, lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format)),
        ("sf_sparse", SPARSE, sparse, lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format)),
    ):
        library = torch.library.Library(name, "FRAGMENT")
        library.define(schema)
        op = schema.split("(")[0]
        library.impl(op, run, "CPU")
        torch.library.register_fake(f"{name}::{op}", meta, lib=library)
        made.append(library)
    with extend.scope():
        yield
    for library in made:
        library._destroy()


class Packed(nn.Module):
    """Blocks over packed sequences [L, C] with their lengths, or (``sparse``) over [B, L, C] with a mask of blocks."""

    def __init__(self, kind: str, kv_heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.kv_heads = kind, kv_heads
        self.qkv = nn.ModuleList([nn.Linear(32, 32 + 16 * kv_heads) for _ in range(depth)])
        self.out = nn.ModuleList([nn.Linear(32, 32) for _ in range(depth)])
        self.factor = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]))

    def forward(self, x: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).split([32, 8 * self.kv_heads, 8 * self.kv_heads], -1)
            q, k, v = (t.unflatten(-1, (-1, 8)) for t in (q, k, v))
            if self.kind == "varlen":
                run = torch.ops.flash_attn._flash_attn_varlen_forward
                h = run(q, k, v, facts, facts, 20, 20, 0.0, 0.3, False)[0]
            elif self.kind == "xformers":
                flash = torch.ops.xformers_flash.flash_fwd
                h = flash(q, k, v, facts, facts, None, 20, 20, 0.0, 0.3, False, -1, -1, False, None)[0]
            elif self.kind == "cutlass":
                run = torch.ops.xformers.efficient_attention_forward_cutlass
                q, k, v = (t[None] for t in (q, k, v))
                h = run(q, k, v, None, facts, facts, 20, 0.0, False, 0, None, None, None)[0][0]
            else:
                h = torch.ops.sf_sparse.sparse(*(t.transpose(1, 2) for t in (q, k, v)), facts, self.factor).transpose(
                    1, 2
                )
            x = x + out(h.flatten(-2))
        return x


LENGTHS = torch.tensor([0, 11, 31, 38], dtype=torch.int32)


def sparse_dims(args: Any) -> extend.Dims:
    return extend.Dims({name: "BHLD" for name in "qkv"} | {"factor": "H"}, "BHLD")


def case(kind: str, kv_heads: int = 4) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    if kind in ("varlen", "xformers", "cutlass"):
        return Packed(kind, kv_heads), (torch.randn(38, 32), LENGTHS)
    return Packed(kind, kv_heads), (torch.randn(2, 22, 32), torch.rand(6, 6) > 0.3)


def compiled(model: nn.Module, inputs: Any, topology: Topology, **asked: Any) -> tuple[list[Compiled], Any, Any]:
    got = captured(model, *inputs)
    values = placeholder_values(got)
    states = [State(got.gm, got.mode, topology, r, Asked(**asked)) for r in range(topology.num_ranks)]
    with torch.no_grad():
        return [run_pipeline(state) for state in states], values, got.gm(*values)[0]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("kind", ["varlen", "sparse", "xformers", "cutlass"])
def test_a_librarys_kernel_runs_on_its_heads(kind: str, ranks: int, kv_heads: int) -> None:
    """Heads that do not divide, more ranks than heads of k and v; the op sees all tokens, and no gather is left."""
    extend.register_per_head_attention("sf_sparse::sparse", sparse_dims)
    model, inputs = case(kind, kv_heads)
    ones, values, want = compiled(model, inputs, Topology.grid(1, ranks), shard_everything=True)
    report = ones[0].report
    assert report.by_heads == 2 and len(report.gathered) == 1, str(report)
    assert "2 by heads in their library's kernel" in report.headline
    assert report.left_behind == [] and report.unpriced == []
    attention = 4.0 * 32 * 38 * 38 if kind != "sparse" else 4.0 * 2 * 32 * 22 * 22
    busiest = -(-kv_heads // ranks) / kv_heads  # heads that do not divide, or are fewer than the ranks
    linears = (report.total_flops - 2 * attention) / ranks
    assert max(report.rank_flops) >= 0.9 * linears + 2 * attention * busiest, "what the headline calls its share"
    for (out,) in run_compiled(ones, Topology.grid(1, ranks), values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert all(one.order == ones[0].order for one in ones), "ranks without heads wait where the others do"


class Flattened(Packed):
    """The model has [B, L, C]; samples are laid end to end for the kernel alone."""

    def forward(self, x: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        batch, length = x.shape[:2]
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(F.layer_norm(x, (32,))).split([32, 8 * self.kv_heads, 8 * self.kv_heads], -1)
            q, k, v = (t.unflatten(-1, (-1, 8)) for t in (q, k, v))
            if self.kind == "varlen":
                q, k, v = (t.flatten(0, 1) for t in (q, k, v))
                run = torch.ops.flash_attn._flash_attn_varlen_forward
                h = run(q, k, v, facts, facts, length, length, 0.0, 0.3, False)[0]
            else:
                q, k, v = (t.reshape(-1, *t.shape[2:])[None] for t in (q, k, v))
                run = torch.ops.xformers.efficient_attention_forward_cutlass
                h = run(q, k, v, None, facts, facts, length, 0.0, False, 0, None, None, None)[0][0]
            x = x + out(h.view(batch, length, -1))
        return x


@pytest.mark.parametrize(("batch", "ranks"), [(2, 4), (3, 2)])
@pytest.mark.parametrize("kind", ["varlen", "cutlass"])
def test_samples_laid_end_to_end_for_the_kernel_are_cut_as_in_the_model(kind: str, batch: int, ranks: int) -> None:
    torch.manual_seed(1)
    lengths = torch.arange(0, 13 * batch + 1, 13, dtype=torch.int32)
    model, topology = Flattened(kind), Topology.grid(1, ranks)
    ones, values, want = compiled(
        model, (torch.randn(batch, 13, 32), lengths), topology, shard_everything=True, split_batch=False
    )
    assert ones[0].report.by_heads == 2 and len(ones[0].report.gathered) == 1, str(ones[0].report)
    for (out,) in run_compiled(ones, topology, values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def torch_varlen(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, mq: int, mk: int, *rest: Any) -> Any:
    out, lse, _, state = varlen(q, k, v, cu_q, cu_k, mq, mk, 0.0, 0.3)
    return out, lse, state.to(torch.uint64)


def test_torchs_own_packed_attention_runs_on_its_heads() -> None:
    """On CPUs it has no kernel: one stands in."""
    from torch.nn.attention.varlen import _varlen_attn, varlen_attn

    _varlen_attn.register_kernel("cpu")(torch_varlen)

    def step(x: torch.Tensor, cu: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ w).unflatten(-1, (4, 8)) * n for n in (1, 2, 3))
        return varlen_attn(q, k, v, cu, cu, 20, 20).flatten(1) @ w

    inputs, topology = (torch.randn(38, 32), LENGTHS, torch.randn(32, 32)), Topology.grid(1, 3)
    ones, values, want = compiled(step, inputs, topology, shard_everything=True)  # type: ignore[arg-type]
    assert ones[0].report.by_heads == 1 and len(ones[0].report.gathered) == 1, str(ones[0].report)
    for (out,) in run_compiled(ones, topology, values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_groups_take_samples_and_share_out_heads_inside() -> None:
    extend.register_per_head_attention("sf_sparse::sparse", sparse_dims)
    model, inputs = case("sparse")
    topology = Topology.grid(2, 2)
    ones, values, want = compiled(model, inputs, topology, shard_everything=True)
    for (out,) in run_compiled(ones, topology, values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_keys_that_are_whole_are_cut_by_heads_without_traffic() -> None:
    """Cross-attention: the text lies on every rank."""
    extend.register_per_head_attention("sf_sparse::sparse", sparse_dims)

    def cross(x: torch.Tensor, text: torch.Tensor, blocks: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q = (x @ w).unflatten(-1, (4, 8)).transpose(1, 2)
        kv = text.unflatten(-1, (4, 8)).transpose(1, 2)
        return torch.ops.sf_sparse.sparse(q, kv, kv, blocks).transpose(1, 2).flatten(2) @ w

    torch.manual_seed(0)
    inputs = torch.randn(1, 24, 32), torch.randn(1, 7, 32), torch.ones(6, 2, dtype=torch.bool), torch.randn(32, 32)
    topology = Topology.grid(1, 2)
    ones, values, want = compiled(cross, inputs, topology, shard_everything=True)  # type: ignore[arg-type]
    assert ones[0].report.by_heads == 1
    for (out,) in run_compiled(ones, topology, values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "reader",
    [
        lambda args: None,
        lambda args: extend.Dims({"q": "BHL", "k": "BHLD", "v": "BHLD"}, "BHLD"),
        lambda args: extend.Dims({"q": "BDLH", "k": "BHLD", "v": "BHLD"}, "BHLD"),
        lambda args: extend.Dims({"query": "BHLD"}, "BHLD"),
        lambda args: extend.Dims({"q": "BHLD", "k": "BHLD", "v": "BHLD"}, "BLD"),
        lambda args: extend.Dims({"q": "BHLD", "k": "BHLD", "v": "BHLD"}, "BHLD"),  # a factor of each head is not named
    ],
)
def test_what_a_reader_declines_or_describes_wrongly_is_computed_whole(reader: Any) -> None:
    extend.register_per_head_attention("sf_sparse::sparse", reader)
    model, inputs = case("sparse", 2)
    ones, values, want = compiled(model, inputs, Topology.grid(1, 2))
    assert ones[0].report.by_heads == 0
    for (out,) in run_compiled(ones, Topology.grid(1, 2), values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_a_call_whose_other_results_are_used_is_computed_whole() -> None:
    def step(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        out, lse, *_ = torch.ops.flash_attn._flash_attn_varlen_forward(x, x, x, cu, cu, 20, 20, 0.0, 0.3, False)
        return out * lse.sum()

    inputs = torch.randn(38, 4, 8), LENGTHS
    ones, values, want = compiled(step, inputs, Topology.grid(1, 2), shard_everything=True)  # type: ignore[arg-type]
    assert ones[0].report.by_heads == 0
    for (out,) in run_compiled(ones, Topology.grid(1, 2), values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def listed_dims(args: Any) -> extend.Dims:
    return extend.Dims({name: "BHLD" for name in "qkv"} | {"counts": "BH-", "lists": "BH--"}, "BHLD")


class Listed(nn.Module):
    """A block whose heads each choose, by the means of blocks of 4 queries and keys, which blocks they look at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).split([32, 32, 32], -1))
        means = [t.unflatten(2, (-1, 4)).mean(3) for t in (q, k)]
        values, order = torch.softmax(means[0] @ means[1].mT, -1).sort(-1)
        seen = (values.cumsum(-1) >= 0.7).int().gather(-1, order.argsort(-1))
        counts, lists = seen.sum(-1).int(), seen.argsort(dim=-1, descending=True, stable=True).int()
        h = torch.ops.sf_listed.listed(q, k, v, counts, lists)
        return x + self.out(h.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_lists_of_blocks_that_each_head_makes_are_made_by_heads(ranks: int) -> None:
    """Nobody gathers queries and keys for them: ranks trade tokens for heads, or make means of their own blocks."""
    extend.register_per_head_attention("sf_listed::listed", listed_dims)
    ones, values, want = compiled(Listed(), (torch.randn(2, 40, 32),), Topology.grid(1, ranks), shard_everything=True)
    report = ones[0].report
    *inside, _ = report.gathered  # but for the output
    assert report.by_heads == 1 and report.left_behind == [], str(report)
    assert len(inside) <= (3 if ranks in (3, 5) else 0) and all(left.nbytes < 5120 for left in inside), str(report)
    for (out,) in run_compiled(ones, Topology.grid(1, ranks), values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_names_have_a_namespace() -> None:
    with pytest.raises(extend.OptionError, match="Write 'library::op'"):
        extend.register_per_head_attention("sparse", sparse_dims)


def flex(asks: str) -> nn.Module:
    """Two blocks of flex attention, its mask made in the graph; ``asks`` which of its functions ask for the head."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        if asks == "sample":
            return q >= k + b
        return q >= k + h if asks == "mask" else q >= k

    def score(s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return s + 0.1 * (h if asks == "score" else q)

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(32, 64), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            length = x.shape[1]
            heads = 4 if asks in ("mask", "blocks") else None
            samples = x.shape[0] if asks in ("sample", "blocks") else None
            blocks = create_block_mask(mask, samples, heads, length, length, device="cpu")
            q, k, v = self.qkv(x).split([32, 16, 16], -1)
            q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
            h = flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)
            return x + self.out(h.transpose(1, 2).flatten(2))

    return Flex()


@pytest.mark.parametrize("asks", ["nothing", "blocks", "sample"])
def test_groups_run_flex_attention_on_their_samples_unless_it_asks_which_they_are(asks: str) -> None:
    """Beside an attention for which the batch is split."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flex = flex(asks)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            for _ in range(3):
                q = nn.functional.scaled_dot_product_attention(q, q, q)
            return self.flex(q.transpose(1, 2).flatten(2))

    topology = Topology.grid(2, 2)
    mesh = {"batch": 2, "ulysses": 1, "ring": 2}
    ones, values, want = compiled(Both(), (torch.randn(2, 128, 32),), topology, shard_everything=True, mesh=mesh)
    assert ones[0].report.batch == 2
    assert (ones[0].report.share < 1.1) == (asks != "sample")
    for (out,) in run_compiled(ones, topology, values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("asks", "by_heads"), [("nothing", 1), ("mask", 0), ("score", 0), ("blocks", 1)])
def test_flex_attention_runs_on_its_heads_unless_it_asks_which_they_are(asks: str, by_heads: int) -> None:
    model, topology = flex(asks), Topology.grid(1, 2)
    ones, values, want = compiled(model, (torch.randn(1, 128, 32),), topology, shard_everything=True)
    assert ones[0].report.by_heads == by_heads
    assert (ones[0].report.share < 1.2) == (by_heads == 1)
    for (out,) in run_compiled(ones, topology, values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
