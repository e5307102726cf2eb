"""What models write between a projection and attention, as functions of tensors; captured, and run in a put kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deadline import Deadline
from torch import fx
from torch.nn import functional as F
from watched import UNWATCHED

from sfcompile.capture.graph import capture
from sfcompile.codegen.kernels.moves import MoveSpec, put_source
from sfcompile.codegen.kernels.tables import PUT
from sfcompile.codegen.rows.rows import RowProgram
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.codegen.toolchain.loader import load_source
from sfcompile.runtime.wires.symmetric_heap import HeapSize, local_segment
from sfcompile.runtime.wires.transport import word_of

Tensors = tuple[torch.Tensor, ...]
HEADS = 2


def heads(x: torch.Tensor) -> torch.Tensor:
    """[B, L, H * W] -> [B, H, L, W]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def one_of_three(x: torch.Tensor) -> torch.Tensor:
    """K of a projection to q, k and v."""
    return x.unflatten(-1, (3, HEADS, -1))[:, :, 1].transpose(1, 2)


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE that turns the first half of a row against the second."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE that turns neighbours, in fp32, as diffusers writes it."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def written(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same, written into even and odd columns."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm written out."""
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def partly(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    """LayerNorm, then RoPE for all tokens but the first two, written over them."""
    x = F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-6)
    x[:, :, 2:] = pairs(x[:, :, 2:], cos[2:], sin[2:])
    return x


def joint(y: torch.Tensor, text: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, w: torch.Tensor) -> Any:
    """Two streams, each normed, one after the other, turned by tables of three axes side by side."""
    parts = [F.rms_norm(x.unflatten(-1, (HEADS, -1)), (len(w),), w, 1e-6) for x in (text, y)]
    return pairs(torch.cat(parts, 1).transpose(1, 2), cos, sin)


def partial(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Only the first columns of a row are turned."""
    size = cos.shape[-1]
    return torch.cat([halves(x[..., :size], cos, sin), x[..., size:]], -1)


def split_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Halves as a dim of their own, stacked again."""
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -2).flatten(-2)


def forms(dtype: torch.dtype = torch.float32, width: int = 16) -> dict[str, tuple[Callable[..., Any], Tensors]]:
    """By name: a function and its arguments; activations and weights of a dtype, tables fp32."""
    made = torch.Generator().manual_seed(width)

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=made).to(kind)

    y, text, qkv = draw(2, 5, HEADS * width), draw(2, 3, HEADS * width), draw(2, 5, 3 * HEADS * width)
    w, bias = draw(width), draw(width)
    cos, sin, long_cos, long_sin = (draw(n, width, kind=torch.float32) for n in (5, 5, 8, 8))
    half = (draw(5, width // 2, kind=torch.float32), draw(5, width // 2, kind=torch.float32))
    quarter = (draw(5, width // 4), draw(5, width // 4))
    cut = width // 4

    def tables(c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.cat([c[:, :cut], s[:, cut:]], -1)

    found: dict[str, tuple[Callable[..., Any], Tensors]] = {
        "halves": (lambda y, c, s: halves(heads(y) * 0.5, c.to(y.dtype), s.to(y.dtype)), (y, cos, sin)),
        "pairs": (lambda y, c, s: pairs(heads(y), c, s), (y, cos, sin)),
        "written": (
            lambda y, c, s: written(
                y.unflatten(2, (HEADS, -1)), c[None, :, None].to(y.dtype), s[None, :, None].to(y.dtype)
            ).transpose(1, 2),
            (y, cos, sin),
        ),
        "layer norm, some tokens": (lambda y, c, s, w, b: partly(heads(y), c, s, w, b), (y, cos, sin, w, bias)),
        "joint": (joint, (y, text, long_cos, long_sin, w)),
        "norm by hand": (lambda y, w: normed(heads(y), w), (y, w)),
        "half tables": (
            lambda y, c, s: pairs(heads(y), c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)),
            (y, *half),
        ),
        "tables of two axes": (lambda y, c, s: halves(heads(y).float(), tables(c, s), tables(s, c)), (y, cos, sin)),
        "one projection": (lambda x, w: F.rms_norm(one_of_three(x), (len(w),), w), (qkv, w)),
        "split": (lambda x, w: normed(heads(x.chunk(3, -1)[2]), w), (qkv, w)),
        "halves as a dim": (lambda y, c, s: split_halves(heads(y), c.to(y.dtype), s.to(y.dtype)), (y, *half)),
        "some columns": (lambda y, c, s: partial(heads(y), torch.cat([c, s], 1), torch.cat([s, c], 1)), (y, *quarter)),
        "norm without weight": (lambda y: F.rms_norm(heads(y), (y.shape[-1] // HEADS,)), (y,)),
    }  # fmt: skip
    return found


def traced(fn: Callable[..., Any], arguments: Tensors) -> tuple[fx.GraphModule, fx.Node]:
    """The captured graph of a function and the node that it returns."""
    graph = fx.Graph()
    graph.output((graph.call_function(fn, tuple(graph.placeholder(f"x{i}") for i in range(len(arguments)))),))
    gm = capture(fx.GraphModule(torch.nn.Module(), graph), arguments).gm
    return gm, gm.graph.output_node().args[0][0]  # type: ignore[index,return-value]


def sent(program: RowProgram, sources: Tensors, lines: int = 4) -> torch.Tensor:
    """What a put kernel leaves in its own bank, in the interpreter."""
    shape, dtype = program.shapes[-1], {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    kind = dtype[program.dtype]
    nbytes = shape[0] * shape[1] * shape[2] * shape[3] * kind.itemsize
    size = HeapSize(1, -(-nbytes // 64) * 64, 1)
    segment = local_segment(size)
    row = dict(zip(PUT, (-1, -1, 0, 0, shape[1], 0, shape[2], 0, 0, nbytes), strict=True))
    heaps = torch.tensor([(segment.address, 0, segment.address)])
    given = {
        "heaps_ptr": heaps, "place_ptr": torch.tensor(size.place(1, word_of(1, 0), UNWATCHED.watched)),
        "puts_ptr": torch.tensor([[row[name] for name in PUT]]), "receivers_ptr": torch.zeros(0, dtype=torch.int64),
        "counters_ptr": torch.zeros(1, dtype=torch.int32), "rank": 0, "num_puts": 1, "num_receivers": 0,
        "batch": shape[0], **program.bind(sources),
    }  # fmt: skip
    kernel = load_source(put_source(MoveSpec(program.dtype, program.width, lines=lines), program), True).put
    with interpreting(Deadline(5.0)):
        kernel[(2,)](**given)
    return segment.chunk(1, 0, shape, kind).clone()
