"""diffusers' context parallelism on CPU ranks, as its users run it.

What CPU ranks need beyond ``enable_parallelism``: a device count of one, and for ring attention a forward that returns
the log-sum-exp, which the CPU's flash kernel has. Models without a plan of their own in diffusers (CogVideoX, PixArt)
get one, and processors that call diffusers' attention dispatcher, in the manner of its other models.

yunchang's USP (``LongContextAttention``, its ring overlaps sends with compute), if it is installed, takes the place of
diffusers' attention under the same plan; it too needs the CPU's flash kernel in place of the GPU's.

Meshes are diffusers' own: ranks in order, ``ring`` outside ``ulysses``. So unified (USP) is Ulysses inside a machine
and ring across machines; with one rank a machine that is ring alone.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def prepare() -> None:
    """Make diffusers' context parallelism run on CPU ranks."""
    from diffusers.models import attention_dispatch

    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]
    attention_dispatch._native_attention_forward_op = _forward_op
    templated = attention_dispatch._templated_context_parallel_attention

    def attention(query: Any, key: Any, value: Any, *args: Any, _parallel_config: Any, **kwargs: Any) -> Any:
        other = getattr(_parallel_config.context_parallel_config, "attention", None)
        if other is not None:
            return other(query, key, value)
        return templated(query, key, value, *args, _parallel_config=_parallel_config, **kwargs)

    attention_dispatch._templated_context_parallel_attention = attention


def yunchang(machines: int, ranks: int) -> Callable[..., torch.Tensor] | None:
    """Collective: yunchang's USP, Ulysses inside machines and ring across; None if it is not installed."""
    if importlib.util.find_spec("yunchang") is None:
        return None
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import attention as kernels

    def flash(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)

    kernels._scaled_dot_product_flash_attention = flash
    set_seq_parallel_pg(ranks, machines, dist.get_rank(), machines * ranks)
    attention: Callable[..., torch.Tensor] = LongContextAttention(ring_impl_type="basic_pytorch")
    return attention


def _forward_op(ctx: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """diffusers' forward op ``(ctx, q, k, v [B, S, H, D], mask, dropout, causal, scale, gqa, return_lse)``."""
    mask, _, _, scale, _, return_lse = args
    query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    if not return_lse:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return out.permute(0, 2, 1, 3)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scale
    )
    return out.permute(0, 2, 1, 3), lse.permute(0, 2, 1)


class _Processor:
    """Self-attention through diffusers' dispatcher; ``joint`` adds CogVideoX's text stream."""

    _attention_backend = None
    _parallel_config = None

    def _attend(self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class _SelfProcessor(_Processor):
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads = [f(hidden_states).unflatten(2, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v)]
        return self._attend(attn, *heads) / attn.rescale_output_factor


class _JointProcessor(_Processor):
    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (f(both).unflatten(2, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        for heads in (query, key):
            heads[:, text:] = apply_rotary_emb(heads[:, text:], image_rotary_emb, sequence_dim=1)
        out = self._attend(attn, query, key, value)
        return out[:, text:], out[:, :text]


def _plan(name: str, model: nn.Module) -> Any:
    """A context parallel plan for models that have none; swaps in processors that it can steer. None: its own."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    tokens = ContextParallelInput(split_dim=1, expected_dims=3)
    angles = ContextParallelInput(split_dim=0, expected_dims=2)
    gather = ContextParallelOutput(gather_dim=1, expected_dims=3)
    if name == "cogvideox":
        for block in model.transformer_blocks:
            block.attn1.set_processor(_JointProcessor())
        return {
            "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
            "transformer_blocks.*": {"image_rotary_emb": [angles, angles]},
            "proj_out": gather,
        }
    if name == "pixart":
        for block in model.transformer_blocks:
            block.attn1.set_processor(_SelfProcessor())
        output = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
        return {"pos_embed": {0: output}, "proj_out": gather}
    return None


def peers(machines: int, ranks: int) -> dict[str, dict[str, int]]:
    """diffusers' configurations for ``machines`` of ``ranks`` each: degrees by name. USP always has an entry."""
    total = machines * ranks
    found = {"diffusers ulysses": {"ulysses_degree": total}}
    if ranks > 1:
        found["diffusers ring"] = {"ring_degree": total}
        found["diffusers usp"] = {"ulysses_degree": ranks, "ring_degree": machines}
    else:
        found["diffusers usp"] = {"ring_degree": total}
    return found


def parallel(
    name: str,
    model: nn.Module,
    degrees: dict[str, int],
    divides: bool,
    attention: Callable[..., torch.Tensor] | None = None,
) -> nn.Module:
    """A copy of the model, on the same weights, with diffusers' context parallelism switched on.

    Args:
        divides: every stream's tokens divide by the ranks; else diffusers' "anything" modes are asked for.
        attention: in place of diffusers' own, on q, k, v [B, S, H, D].
    """
    from diffusers import ContextParallelConfig

    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo)
    more: dict[str, Any] = {}
    if not divides:
        more = {"ulysses_anything": True} if "ulysses_degree" in degrees else {"ring_anything": True}
    enable: Callable[..., None] = twin.enable_parallelism
    config: Any = ContextParallelConfig(**degrees, **more)
    config.attention = attention
    enable(config=config, cp_plan=_plan(name, twin))
    return twin
