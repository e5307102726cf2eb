"""Attention that is called through a library's own op: read as what it is, so that it is sharded like any other.

A registry from an op's name to a reader, which says where q, k, v, scale and mask stand among its arguments
(:func:`sfcompile.extend.register_attention`). A call that a reader accepts becomes
``scaled_dot_product_attention``, to the rounding of the library's kernel. A call that it does not accept (a window, a
soft cap, results beside the output that are used) stays as it is, computed whole on every rank.

Readers here know ops by their names and schemas; no library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from sfcompile.errors import RuleError, StreamFusionError
from sfcompile.torch_private import OpOverload, OpOverloadPacket


@dataclass(frozen=True)
class AttentionCall:
    """What a call of a library's attention computes: softmax(scale q k^T + mask) v.

    Attributes:
        q, k, v: [B, H, L, D], or [B, L, H, D] with ``heads_last``; k and v may have fewer heads, each for as many of q.
        mask: for scaled_dot_product_attention.
        scale: None: one over the root of D.
        causal: a query sees keys up to its own place; queries and keys are equally many.
        heads_last: of q, k, v, and of the output that the op returns.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None
    causal: bool = False
    heads_last: bool = False

    def compute(self) -> torch.Tensor:
        """The output, its heads where those of q are."""
        q, k, v = (x.transpose(1, 2) if self.heads_last else x for x in (self.q, self.k, self.v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, self.mask, is_causal=self.causal, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2) if self.heads_last else out


Reader = Callable[[Mapping[str, Any]], AttentionCall | None]
"""From an op's arguments by the names of its schema, defaults filled in; None: this call is something else."""

READERS: dict[str, Reader] = {}
"""By the op's name with its namespace: ``library::op``."""


class ReadCall:
    """In place of a library's op in a Dynamo graph: attention if the reader accepts the call, else the op itself.

    Args:
        gives: what Dynamo knows of the op's first result; None: nothing.
    """

    __name__ = "attention_call"

    def __init__(self, op: OpOverload, reader: Reader, gives: torch.Tensor | None = None) -> None:
        self._op, self._reader, self._gives = op, reader, gives

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._read(args, kwargs)
        if call is None:
            return self._op(*args, **kwargs)
        try:
            result = call.compute()
        except (RuntimeError, TypeError, AttributeError) as error:
            raise self._wrong(f"cannot be computed: {type(error).__name__}: {error}") from error
        own, returns = self._gives, len(self._op._schema.returns)
        if own is not None and not _alike(result, own):
            raise self._wrong(f"gives {result.dtype}{list(result.shape)}, where it gives {own.dtype}{list(own.shape)}")
        return result if returns == 1 else (result, *[None] * (returns - 1))

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall | None:
        try:
            call = self._reader(_named(self._op, args, kwargs))
        except StreamFusionError:
            raise
        except Exception as error:  # the reader is its author's
            raise self._wrong(f"cannot be read: {type(error).__name__}: {error}") from error
        if call is not None and not isinstance(call, AttentionCall):
            raise self._wrong(f"is a {type(call).__name__}, and neither an AttentionCall nor None")
        return call

    def _wrong(self, what: str) -> RuleError:
        name = self._op._schema.name
        return RuleError(
            f"a call of {name}, as its reader says, {what}",
            "the attention that the reader describes is computed in the place of the op",
            f"mend what was given to sfcompile.extend.register_attention({name!r}, ...); it may return None for a call",
        )


def read_call(node: fx.Node) -> ReadCall | None:
    """What stands for a node that calls a registered op, if no more than its first result is used."""
    target: Any = node.target
    if isinstance(target, OpOverloadPacket) and target.overloads() == ["default"]:
        target = target.default
    if not isinstance(target, OpOverload) or target._schema.name not in READERS:
        return None
    if len(target._schema.returns) > 1:
        if any(getattr(user.target, "__name__", "") != "getitem" or user.args[1] != 0 for user in node.users):
            return None
    shown = node.meta.get("example_value")
    gives = shown[0] if isinstance(shown, (tuple, list)) and shown else shown
    return ReadCall(target, READERS[target._schema.name], gives if isinstance(gives, torch.Tensor) else None)


def _alike(result: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a result has the dtype and, where they are no symbols, the sizes of another."""
    sizes = zip(result.shape, own.shape, strict=False)
    same = all(a == b for a, b in sizes if type(a) is int and type(b) is int)
    return result.dtype == own.dtype and result.dim() == own.dim() and same


def _named(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name."""
    names = [argument.name for argument in op._schema.arguments]
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def _plain(args: Mapping[str, Any], **wanted: Any) -> bool:
    """Whether arguments, where the op has them, are one of the values that mean nothing special."""
    return all(args[name] in values for name, values in wanted.items() if name in args)


def _tensors(args: Mapping[str, Any]) -> set[str]:
    """The names of the tensors that a call was given: lengths, slopes, a cache and whatever a later version has."""
    return {name for name, value in args.items() if isinstance(value, torch.Tensor)}


def flash(args: Mapping[str, Any]) -> AttentionCall | None:
    """FlashAttention's forward ops, versions 2 and 3: [B, L, H, D], no window, no packed lengths, no cache."""
    q, k, v = args["q"], args["k"], args["v"]
    if _tensors(args) != {"q", "k", "v"} or not _plain(
        args, dropout_p=[0.0], window_size_left=[-1], window_size_right=[-1, 0] if args.get("causal") else [-1],
        softcap=[0.0], attention_chunk=[0], return_softmax=[False],
    ):  # fmt: skip
        return None
    causal = bool(args.get("causal", args.get("is_causal", False)))
    if q.dim() != 4 or (causal and q.shape[1] != k.shape[1]):  # the library's corner is another one then
        return None
    return AttentionCall(q, k, v, None, args.get("softmax_scale"), causal, heads_last=True)


def cutlass(args: Mapping[str, Any]) -> AttentionCall | None:
    """xFormers' memory-efficient forward op: [B, L, H, D], a dense bias [B, H, Lq, Lk] or none."""
    q, k, v = args["query"], args["key"], args["value"]
    if q.dim() != 4 or not _tensors(args) <= {"query", "key", "value", "attn_bias"} or not _plain(
        args, window_size=[None], dropout_p=[0.0], custom_mask_type=[0, 1]
    ):  # fmt: skip
        return None
    causal, bias = args.get("custom_mask_type") == 1, args.get("attn_bias")
    if causal and (bias is not None or q.shape[1] != k.shape[1]):
        return None
    return AttentionCall(q, k, v, bias, args.get("scale"), causal, heads_last=True)


def xformers_flash(args: Mapping[str, Any]) -> AttentionCall | None:
    """The ops by which xFormers calls FlashAttention, versions 2 and 3: as :func:`flash`, under names of their own."""
    names = {"query": "q", "key": "k", "value": "v", "p": "dropout_p", "is_causal": "causal",
             "window_left": "window_size_left", "window_right": "window_size_right"}  # fmt: skip
    return flash({names.get(name, name): value for name, value in args.items()})


READERS |= {
    "flash_attn::_flash_attn_forward": flash,
    "flash_attn_3::fwd": flash,
    "flash_attn_3::_flash_attn_forward": flash,
    "_diffusers_flash_attn_3::_flash_attn_forward": flash,
    "xformers::efficient_attention_forward_cutlass": cutlass,
    "xformers_flash::flash_fwd": xformers_flash,
    "xformers_flash3::flash_fwd": xformers_flash,
}
