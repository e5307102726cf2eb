"""Attention ops of libraries, by stand-ins of the same names and schemas with CPU code: read, or left as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import captured
from torch.nn import functional as F

from sfcompile import extend
from sfcompile.capture.attention_calls import AttentionCall

SDPA = torch.ops.aten.scaled_dot_product_attention.default
FLASH_2 = (
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
    "bool return_softmax=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
FLASH_3 = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? cu_seqlens_q=None, float? softmax_scale=None, "
    "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0.0, Tensor? q_v=None, "
    "Tensor? leftpad_k=None, Tensor? s_aux=None) -> (Tensor, Tensor)"
)
CUTLASS = (
    "efficient_attention_forward_cutlass(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, "
    "Tensor? seqstart_q, Tensor? seqstart_k, float dropout_p, bool compute_logsumexp, int custom_mask_type, "
    "float? scale, Tensor? seqlen_k, int? window_size) -> (Tensor, Tensor, int, int)"
)
XFORMERS_FLASH = (
    "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, SymInt window_left, "
    "SymInt window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)"
)
OWN = "attend(Tensor x, Tensor y, float factor) -> Tensor"


def heads_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, causal: bool, scale: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def flash_2(q: Any, k: Any, v: Any, p: float, scale: float, causal: bool, left: int = -1, *rest: Any) -> Any:
    out = heads_last(q, k, v, None, causal, scale) + (left != -1)
    return out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), q.new_zeros(0), q.new_zeros(2)


def flash_3(q: Any, k: Any, v: Any, k_new: Any = None, lengths: Any = None, scale: Any = None, *rest: Any) -> Any:
    changed = sum(1.0 for value in rest if isinstance(value, torch.Tensor))  # as what they mean does
    out = heads_last(q, k, v, None, bool(rest and rest[0]), scale) + changed
    return out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


def cutlass(
    q: Any, k: Any, v: Any, bias: Any, a: Any, b: Any, p: float, lse: bool, kind: int, scale: Any, *_: Any
) -> Any:
    return heads_last(q, k, v, bias, kind == 1, scale), q.new_zeros(0), 0, 0


def xformers_flash(q: Any, k: Any, v: Any, a: Any, b: Any, c: Any, mq: int, mk: int, p: float, *rest: Any) -> Any:
    scale, causal, left = rest[:3]
    return heads_last(q, k, v, None, causal, scale) + (left != -1), q.new_zeros(0), q.new_zeros(0)


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    """The stand-ins, as long as a test runs."""
    made = []
    for name, schema, run in (
        ("flash_attn", FLASH_2, flash_2),
        ("flash_attn_3", FLASH_3, flash_3),
        ("xformers", CUTLASS, cutlass),
        ("xformers_flash", XFORMERS_FLASH, xformers_flash),
        ("sfcompile_test", OWN, lambda x, y, factor: F.scaled_dot_product_attention(x * factor, y, y)),
    ):
        library = torch.library.Library(name, "FRAGMENT")
        library.define(schema)
        library.impl(schema.split("(")[0], run, "CompositeExplicitAutograd")
        made.append(library)
    yield
    for library in made:
        library._destroy()


def qkv(kv_heads: int = 4) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(1, 6, heads, 8, generator=gen) for heads in (4, kv_heads, kv_heads)]


def flash_of_xformers(q: Any, k: Any, v: Any, causal: bool = False, left: int = -1) -> torch.Tensor:
    run = torch.ops.xformers_flash.flash_fwd
    return run(q, k, v, None, None, None, 6, 6, 0.0, 0.3, causal, left, -1, False, None)[0]


CALLS: dict[str, Any] = {
    "xformers' flash": flash_of_xformers,
    "xformers' flash, causal": lambda q, k, v: flash_of_xformers(q, k, v, True),
    "flash 2": lambda q, k, v: torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, False)[0],
    "flash 2, causal": lambda q, k, v: torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, True, -1, 0)[0],
    "flash 3": lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v)[0],
    "xformers": lambda q, k, v: torch.ops.xformers.efficient_attention_forward_cutlass(
        q, k, v, None, None, None, 0.0, False, 0, None, None, None
    )[0],
}
LEFT: dict[str, Any] = {
    "xformers' flash, a window": lambda q, k, v: flash_of_xformers(q, k, v, False, 3),
    "a window": lambda q, k, v: torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, False, 3, 3)[0],
    "keys that are padding": lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v, leftpad_k=q.new_ones(1).int())[0],
    "values of queries": lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v, q_v=q)[0],
    "sinks": lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v, s_aux=q.new_ones(4))[0],
    "log-sum-exp used": lambda q, k, v: torch.ops.flash_attn_3.fwd(q, k, v)[1],
    "causal, other lengths": lambda q, k, v: torch.ops.flash_attn._flash_attn_forward(q[:, :4], k, v, 0.0, 0.3, True)[
        0
    ],
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_read_as_attention(name: str, kv_heads: int) -> None:
    inputs = qkv(kv_heads)
    got = captured(CALLS[name], *inputs)
    assert [node.target for node in got.gm.graph.nodes].count(SDPA) == 1
    torch.testing.assert_close(got.gm(*inputs)[0], CALLS[name](*inputs))


@pytest.mark.parametrize("name", LEFT)
def test_what_a_reader_does_not_accept_is_left_as_it_is(name: str) -> None:
    inputs = qkv()
    got = captured(LEFT[name], *inputs)
    assert SDPA not in [node.target for node in got.gm.graph.nodes]
    torch.testing.assert_close(got.gm(*inputs)[0], LEFT[name](*inputs))


def test_a_reader_of_ones_own() -> None:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.ops.sfcompile_test.attend(x, y, 2.0)

    inputs = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 5, 8)
    with extend.scope():
        extend.register_attention(
            "sfcompile_test::attend", lambda args: AttentionCall(args["x"] * args["factor"], args["y"], args["y"])
        )
        got = captured(step, *inputs)
        assert SDPA in [node.target for node in got.gm.graph.nodes]
        torch.testing.assert_close(got.gm(*inputs)[0], step(*inputs))
    assert SDPA not in [node.target for node in captured(step, *inputs).gm.graph.nodes]


def test_names_have_a_namespace() -> None:
    with pytest.raises(extend.OptionError, match="Write 'library::op'"):
        extend.register_attention("attend", lambda args: None)
