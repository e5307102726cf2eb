"""Open up, before the capture, calls that stand for a stretch of plain ops: nothing in them is left to guess.

* Higher-order ops that only run their body: activation checkpoints (there is nothing to save for a backward) and
  subgraphs compiled once for many calls.
* PyTorch's fused encoder layer and attention, which ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call
  at inference.
* Sequences of several lengths that are padded and stacked.
* Padding by the other end of a grid, patches that touch, averages of all of a grid: plain ops under other names.
* Attention ops of libraries (attention_calls.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from sfcompile.capture.attention_calls import read_call
from sfcompile.torch_private import HigherOrderOperator, fused_attention, fused_encoder_layer, pad, pad_sequence

_BODIES = {"tag_activation_checkpoint": 1, "wrap": 1, "invoke_subgraph": 2}
"""Higher-order ops that run their first argument on what follows, and where that begins."""


def expand_calls(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph without such calls; the graph itself where there are none."""
    if not any(_replacement(gm, node) for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        values[node] = copied = graph.node_copy(node, lambda n: values[n])
        replacement = _replacement(gm, node)
        if replacement is not None:
            copied.target, first = replacement
            copied.args = copied.args[first:]
            copied.kwargs = {} if first else copied.kwargs
    for node in graph.find_nodes(op="get_attr"):  # the bodies; a call whose result nobody reads may write in place
        if not node.users:
            graph.erase_node(node)
    return fx.GraphModule(gm, graph)


def _replacement(gm: fx.GraphModule, node: fx.Node) -> tuple[Callable[..., Any], int] | None:
    """What to call instead, and from which argument on."""
    if node.op != "call_function":
        return None
    if node.target in _FUSED:
        return _FUSED[node.target], 0
    if node.target in _PLAIN and _PLAIN[node.target][0](*node.args, **node.kwargs):
        return _PLAIN[node.target][1], 0
    read = read_call(node)
    if read is not None:
        return read, 0
    name = getattr(node.target, "__name__", "")
    if isinstance(node.target, HigherOrderOperator) and name in _BODIES:
        body = gm.get_submodule(str(node.args[0].target))  # type: ignore[union-attr]
        assert isinstance(body, fx.GraphModule)
        return _Body(expand_calls(body)), _BODIES[name]
    return None


class _Body:
    """Runs a body node by node, so that every op keeps the place in the user's code."""

    __name__ = "body"

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm

    def __call__(self, *args: Any) -> Any:
        return fx.Interpreter(self._gm).run(*args)


def _attention_mask(mask: torch.Tensor | None, mask_type: int | None) -> torch.Tensor | None:
    """True where attention is allowed, for heads [B, H, L, L]; the fused ops mean the opposite by any nonzero."""
    if mask is None:
        return None
    allowed: torch.Tensor = torch.logical_not(mask.to(torch.bool))
    return allowed[:, None, None, :] if mask_type == 1 else allowed


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count).transpose(1, 2)


def multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's fused attention on [B, L, C]: its output and, if asked for, the weights (else empty)."""
    weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
    parts = zip((query, key, value), weights, biases, strict=True)
    q, k, v = (_heads(F.linear(x, weight, bias), num_head) for x, weight, bias in parts)
    allowed = _attention_mask(mask, mask_type)
    out = F.scaled_dot_product_attention(q, k, v, allowed)
    seen = query.new_empty(0)
    if need_weights:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        seen = scores.softmax(-1)
        seen = seen.mean(1) if average_attn_weights else seen
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), seen


def encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """PyTorch's fused encoder layer on [B, L, C]."""

    def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: torch.Tensor) -> torch.Tensor:
        weights = qkv_weight, qkv_bias, proj_weight, proj_bias
        return multi_head_attention(x, x, x, embed_dim, num_heads, *weights, mask, False, True, mask_type)[0]

    def feed(x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    def beside(branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x + branch).to(branch.dtype)  # added in place: under autocast the branch's dtype is the lower one

    if norm_first:
        src = beside(attend(norm(src, norm_weight_1, norm_bias_1)), src)
        return beside(feed(norm(src, norm_weight_2, norm_bias_2)), src)
    src = norm(beside(attend(src), src), norm_weight_1, norm_bias_1)
    return norm(beside(feed(src), src), norm_weight_2, norm_bias_2)


def padded_sequence(
    sequences: Sequence[torch.Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> torch.Tensor:
    """Sequences [L_i, ...] as one tensor [B, max L, ...], or [max L, B, ...]."""
    longest = max(x.shape[0] for x in sequences)
    rows = []
    for x in sequences:
        missing = longest - x.shape[0]
        ends = (0, missing) if padding_side == "right" else (missing, 0)
        rows.append(F.pad(x, [0, 0] * (x.dim() - 1) + list(ends), value=padding_value))
    return torch.stack(rows, 0 if batch_first else 1)


def _is_circular(input: Any, pad: Any, mode: str = "constant", value: Any = None) -> bool:
    amounts = list(pad) if isinstance(pad, (list, tuple)) else []
    return mode == "circular" and bool(amounts) and all(isinstance(n, int) and n >= 0 for n in amounts)


def circular_pad(input: torch.Tensor, pad: Sequence[int], mode: str = "circular", value: Any = None) -> torch.Tensor:
    """The last rows before the first, and the first behind the last, dim by dim: rows keep who owns them."""
    sizes = [input.shape[input.dim() - 1 - i] for i in range(len(pad) // 2)]
    if len(pad) % 2 or any(max(pad[2 * i : 2 * i + 2]) > size for i, size in enumerate(sizes)):
        return F.pad(input, list(pad), mode, value)  # it says what is wrong
    for i, size in enumerate(sizes):
        dim, (before, after) = input.dim() - 1 - i, pad[2 * i : 2 * i + 2]
        parts = [input.narrow(dim, size - before, before)] if before else []
        parts += [input, *([input.narrow(dim, 0, after)] if after else [])]
        input = torch.cat(parts, dim) if len(parts) > 1 else input
    return input


def _are_patches(input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> bool:
    sizes = [_pair(value) for value in (kernel_size, dilation, padding, stride)]
    known = all(isinstance(n, int) for pair in sizes for n in pair)
    return known and sizes == [sizes[3], (1, 1), (0, 0), sizes[0]]


def _are_folded_patches(input: Any, output_size: Any, kernel_size: Any, *rest: Any, **named: Any) -> bool:
    known = all(isinstance(n, int) for n in _pair(output_size))
    return known and _are_patches(input, kernel_size, *rest, **named)


def _pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[-1]) if isinstance(value, (list, tuple)) else (value, value)


def patches(input: torch.Tensor, kernel_size: Any, *rest: Any, **named: Any) -> torch.Tensor:
    """``unfold`` of patches that touch: [B, C h w, patches], of which rows stay rows."""
    (h, w), (height, width) = _pair(kernel_size), input.shape[-2:]
    rows, columns = height // h, width // w
    if input.dim() != 4 or not rows or not columns:
        return F.unfold(input, kernel_size, *rest, **named)
    batch, channels = input.shape[:2]
    input = input[:, :, : rows * h, : columns * w].reshape(batch, channels, rows, h, columns, w)
    return input.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * h * w, rows * columns)


def _overlap(input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> bool:
    sizes = [_pair(value) for value in (kernel_size, dilation, padding, stride)]
    return all(isinstance(n, int) for pair in sizes for n in pair)


def overlapping_patches(
    input: torch.Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> torch.Tensor:
    """``unfold``: [B, C h w, patches], as windows along one dim and then along the other."""
    sizes, apart, around, steps = (_pair(value) for value in (kernel_size, dilation, padding, stride))
    if input.dim() != 4 or min(*sizes, *apart, *steps) < 1 or min(around) < 0:
        return F.unfold(input, kernel_size, dilation, padding, stride)
    x = F.pad(input, [around[1], around[1], around[0], around[0]]) if any(around) else input
    reach = [(size - 1) * each + 1 for size, each in zip(sizes, apart, strict=True)]
    if any(n < most for n, most in zip(x.shape[2:], reach, strict=True)):
        return F.unfold(input, kernel_size, dilation, padding, stride)  # it says what is wrong
    for dim in (0, 1):
        x = x.unfold(2 + dim, reach[dim], steps[dim])[..., :: apart[dim]]
    return x.permute(0, 1, 4, 5, 2, 3).reshape(x.shape[0], x.shape[1] * sizes[0] * sizes[1], -1)


def from_patches(input: torch.Tensor, output_size: Any, kernel_size: Any, *rest: Any, **named: Any) -> torch.Tensor:
    """``fold`` of patches that touch: an image of them."""
    (h, w), (height, width) = _pair(kernel_size), _pair(output_size)
    rows, columns = height // h, width // w
    fits = input.dim() == 3 and input.shape[2] == rows * columns > 0 and input.shape[1] % (h * w) == 0
    if not fits:
        return F.fold(input, output_size, kernel_size, *rest, **named)
    batch, channels = input.shape[0], input.shape[1] // (h * w)
    input = input.reshape(batch, channels, h, w, rows, columns).permute(0, 1, 4, 2, 5, 3)
    image = input.reshape(batch, channels, rows * h, columns * w)
    behind = [0, width - columns * w, 0, height - rows * h]
    return F.pad(image, behind) if any(behind) else image


def unfolded(input: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
    """``unfold`` of patches that touch, or overlap."""
    if _are_patches(input, *args, **named):
        return patches(input, *args, **named)
    return overlapping_patches(input, *args, **named)


def _is_of_all(input: Any, output_size: Any) -> bool:
    sizes = output_size if isinstance(output_size, (list, tuple)) else [output_size]
    return all(isinstance(n, int) and n == 1 for n in sizes)


def average_of(space: int) -> Callable[..., torch.Tensor]:
    """``adaptive_avg_pool`` to one position: a mean, of which each rank adds up its own."""

    def average(input: torch.Tensor, output_size: Any) -> torch.Tensor:
        return input.mean(list(range(input.dim() - space, input.dim())), keepdim=True)

    return average


_PLAIN: dict[Any, tuple[Callable[..., bool], Callable[..., Any]]] = {
    pad: (_is_circular, circular_pad),
    F.unfold: (_overlap, unfolded),
    F.fold: (_are_folded_patches, from_patches),
    F.adaptive_avg_pool1d: (_is_of_all, average_of(1)),
    F.adaptive_avg_pool2d: (_is_of_all, average_of(2)),
    F.adaptive_avg_pool3d: (_is_of_all, average_of(3)),
}
"""Calls that are plain ops for some arguments: which, and what instead."""
_FUSED: dict[Any, Callable[..., Any]] = {
    fused_attention: multi_head_attention,
    fused_encoder_layer: encoder_layer,
    pad_sequence: padded_sequence,
}
