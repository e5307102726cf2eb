"""Rule for attention of which it is known only that heads do not look at each other: quantised, sparse and packed
kernels, called as an op of their own.

Such an op needs all tokens, but only some of the heads. So ranks trade tokens for heads before it and heads for tokens
after it (the all-to-all of DeepSpeed-Ulysses, arXiv 2309.14509), and the op itself stays as it is: every rank runs it
on all tokens of its own heads, exactly as one device does for those heads. What is known only as a number (lengths of
packed sequences, a block mask without heads) is whole on every rank; a block mask for each head, and what makes it of
queries and keys, is computed by heads too.

An op is named with a :class:`Reader` (:func:`register_per_head`, open to users in sfcompile/extend.py), which says
which dims of its tensors are tokens and heads. FlashAttention's and xFormers' packed forms are known here, and those
calls of their other forms that are more than softmax(q k^T) v (a window, a soft cap): nobody else has to name them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.passes.graph.cost import FORMULAS, value_bytes
from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import Operand, OpView
from sfcompile.passes.rules.rule import RULES, Rule, Side, Spread, register_rule
from sfcompile.runtime.program.intervals import Runs, slice_of
from sfcompile.runtime.rank.library_calls import CALLS
from sfcompile.runtime.rank.ops import OPAQUE, narrowed

aten = torch.ops.aten
_AS_THEY_ARE = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten._to_copy.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_MOST_STRETCHES = 64


@dataclass(frozen=True)
class Dims:
    """Which dims of an op's tensors are what, a letter for each dim: "BLHD", "LHD", "BHLD".

    L are tokens, H heads, B samples; other letters mean nothing. Tensors that are not named are whole on every rank.

    Attributes:
        tensors: by the names of the op's arguments; a tensor that is not named and has a dim as long as the heads are
            many leaves the call whole. The first is q, whose tokens are those of the output; all others
            that have L share its tokens with each other. One with H but without L (slopes, a scale of each head) is
            cut by heads. Heads of k and v may be fewer, each for as many of q.
            A tensor with a dim of samples must be named if q has one.
        out: of the op's first result, the only one that may be used.
    """

    tensors: Mapping[str, str]
    out: str


Reader = Callable[[Mapping[str, Any]], Dims | None]
"""From an op's arguments by the names of its schema, tensors among them as things with ``shape``; None: this call
looks across heads, or is something else."""


class PerHead:
    """An op whose heads are independent.

    Args:
        names: letters of the dims, by operand (see :class:`Dims`); ``query``: which is q; ``out``: of the result.
    """

    def __init__(self, names: Mapping[int, str], query: int, out: str) -> None:
        self.names, self.query, self.out = dict(names), query, out

    def heads(self, op: OpView) -> int:
        """The heads that ranks share out: the fewest of any tensor, which are those of k and v."""
        return min(op.operands[i].shape[names.index("H")] for i, names in self.names.items() if "H" in names)

    def seeds(self, op: OpView) -> list[tuple[fx.Node, int]]:
        """Where tokens are: of q, and of the first other tensor that has some; and where heads are in the first of
        those tensors that have heads and blocks of tokens: what makes these can be computed by heads as well."""
        others = [i for i, names in self.names.items() if "L" in names and i != self.query]
        lengths = [op.operands[i].shape for i, names in self.names.items() if names == "-"]
        samples = {shape[0] - 1 for shape in lengths if len(shape) == 1}
        places = [(op.operands[i].node, self.names[i].index("L")) for i in (self.query, *others[:1])]
        heads = [(op.operands[i].node, self.names[i].index("H")) for i in self._by_heads()[:1]]
        return [_one_sample(node, dim, samples) for node, dim in places] + heads

    def _by_heads(self) -> list[int]:
        """The tensors that have heads and blocks of tokens: lists of the blocks that a head looks at, say."""
        return [i for i, names in self.names.items() if "H" in names and "L" not in names and len(names) > 2]

    def _side(self, side: Side) -> str:
        return self.out if side[0] == "out" else self.names.get(side[1], "")

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Tokens of q are those of the output; those of k and v belong together; samples belong together, and heads of
        lists of blocks."""
        names = self._side(side)
        letter = names[layout.dim : layout.dim + 1]
        if letter == "H" and side[0] == "in" and side[1] in self._by_heads():
            alike = [(i, self.names[i].index("H")) for i in self._by_heads() if i != side[1]]
            return [(("in", i), layout.at(dim)) for i, dim in alike if op.operands[i].shape[dim] == layout.size]
        if letter not in ("L", "B") or (side[0] == "out" and side[1] != 0):
            return []
        ins = [i for i in self.names if letter in self.names[i]]
        if letter == "L":
            queries = side == ("in", self.query) or side[0] == "out"
            ins = [i for i in ins if (i == self.query) == queries]
        sides: list[tuple[Side, tuple[int, ...]]] = [(("in", i), op.operands[i].shape) for i in ins]
        if letter in self.out and (letter == "B" or side == ("in", self.query)):
            sides.append((("out", 0), op.out_shapes[0]))
        places = [(other, shape, self._side(other).index(letter)) for other, shape in sides if other != side]
        return [(other, layout.at(dim)) for other, shape, dim in places if shape[dim] == layout.size]

    def _letter(self, chosen: OpLayouts) -> str:
        out = chosen.outs[0]
        return "" if out is None or out.dim >= len(self.out) else self.out[out.dim]

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Shards of tokens as they come, or of samples; what is read whole only gives this rank's heads."""
        out, letter = chosen.outs[0], self._letter(chosen)
        if out is None or letter not in ("L", "B") or any(op.outputs[1:]) or not _is_few(chosen, out):
            return None
        needs: list[Need] = [None] * len(op.operands)
        for i, names in self.names.items():
            if letter == "B":
                needs[i] = out.at(names.index("B")) if "B" in names else None
                if "B" in names and op.operands[i].shape[names.index("B")] != out.size:
                    return None
            elif i == self.query:
                needs[i] = out.at(names.index("L"))
            elif "L" in names:
                own = chosen.ins[i]
                needs[i] = own if own is not None and own.dim == names.index("L") and _is_few(chosen, own) else None
            elif i in self._by_heads():
                needs[i] = self._held(op, chosen, i)
        return needs

    def _held(self, op: OpView, chosen: OpLayouts, i: int) -> Layout | None:
        """The layout of a tensor of which every rank holds just its heads; None: it is needed whole, and cut."""
        own, at, ranks = chosen.ins[i], self.names[i].index("H"), chosen.owners.num_ranks
        if own is None or own.dim != at:
            return None
        heads = self.heads(op)
        owned = _owned(heads, op.operands[i].shape[at] // heads, ranks)
        return own if all(chosen.owners.dim_runs(own, rank) == owned[rank] for rank in range(ranks)) else None

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens."""
        return None

    def statistics(self, op: OpView, chosen: OpLayouts) -> int:
        """Bytes that every rank gives every other: its part of q, k, v and the output in an even all-to-all."""
        if self._letter(chosen) != "L":
            return 0
        travel = sum(
            value_bytes(op.operands[i].node) for i, names in self.names.items() if "L" in names and "H" in names
        )
        output = op.outputs[0]
        return -(-(travel + (value_bytes(output) if output is not None else 0)) // chosen.owners.num_ranks**2)

    def parts(self, op: OpView, chosen: OpLayouts) -> list[float] | None:
        """By rank its part of the heads; None where samples are shared out, which are layouts' own."""
        if self._letter(chosen) != "L":
            return None
        heads, ranks = self.heads(op), chosen.owners.num_ranks
        cuts = [slice_of(heads, ranks, rank) for rank in range(ranks)]
        return [(stop - start) / heads for start, stop in cuts]

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Tokens for heads, the op on all tokens of this rank's heads, heads for tokens."""
        out = chosen.outs[0]
        assert out is not None
        if self._letter(chosen) == "B":
            if 0 in local.out_shapes(op, chosen)[0]:
                return local.call(
                    aten.new_zeros.default, [operands[self.query], list(local.out_shapes(op, chosen)[0])], {}
                )
            return self._called(op, operands, local)
        heads, ranks = self.heads(op), range(local.owners.num_ranks)
        mine = []
        for operand, node in zip(op.operands, operands, strict=True):
            names = self.names.get(operand.index, "")
            if "H" not in names:
                mine.append(node)
                continue
            at = names.index("H")
            owned = _owned(heads, operand.shape[at] // heads, len(ranks))
            layout = chosen.ins[operand.index]
            if "L" not in names and layout is not None:  # its heads are what this rank has of it
                mine.append(node)
            elif layout is None:
                start, length = owned[local.rank][0] if owned[local.rank] else (0, 0)
                mine.append(local.narrow(node, at, start, length))
            else:
                held = tuple(local.owners.dim_runs(layout, rank) for rank in ranks)
                mine.append(local.trade(node, operand.shape, layout.dim, held, at, owned))
        at, shape = self.out.index("H"), op.out_shapes[0]
        owned = _owned(heads, shape[at] // heads, len(ranks))
        if owned[local.rank]:
            result = self._called(op, mine, local)
        else:  # more ranks than heads: kernels refuse none
            nothing = [0 if dim == at else size for dim, size in enumerate(shape)]
            dtype = {"dtype": _first(op.node.meta["val"]).dtype}
            # From all that came, so that this rank waits for it where the others do: ranks talk in one order.
            parts = [local.call(aten.new_zeros.default, [mine[i], nothing], dtype) for i in self.names]
            result = local.call(aten.cat.default, [parts, at], {})
        wanted = tuple(local.owners.dim_runs(out, rank) for rank in ranks)
        return local.trade(result, shape, at, owned, out.dim, wanted)

    def _called(self, op: OpView, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        if op.name == "opaque":  # what it returns is part of what it is
            sizes = [int(n) for n in operands[self.query].meta["val"].shape[:-1]]
            node = local.call(op.node.target, [operands, narrowed(str(op.args["key"]), sizes)], {})
        else:
            args, kwargs = op.rebuild(operands)
            node = local.call(op.node.target, args, kwargs)
        return node if isinstance(node.meta["val"], torch.Tensor) else local.getitem(node, 0)


def _one_sample(node: fx.Node, dim: int, samples: set[int]) -> tuple[fx.Node, int]:
    """The tokens of a value, or where ``samples`` of one length were laid end to end just before, the dim that holds
    those of one.

    Each rank has some tokens of every sample then, here as in the rest of the model; labels of all samples' tokens
    would have each sample on ranks of its own.
    """
    value, at = node, dim
    while value.target in (*_AS_THEY_ARE, aten.unsqueeze.default):
        inner: fx.Node = value.args[0]  # type: ignore[assignment]
        if value.target is aten.unsqueeze.default:
            at -= int(value.args[1]) % value.meta["val"].dim() < at  # type: ignore[arg-type]
        value = inner
    if value.target not in _VIEWS:
        return node, dim
    source: fx.Node = value.args[0]  # type: ignore[assignment]
    shape, before = value.meta["val"].shape, source.meta["val"].shape
    wide = [d for d, size in enumerate(before) if size > 1]
    for first, second in zip(wide, wide[1:], strict=False):
        merged = before[first] * before[second] == shape[at] and math.prod(before[:first]) == math.prod(shape[:at])
        if merged and int(before[first]) in samples:
            return source, second
    return node, dim


def _is_few(chosen: OpLayouts, layout: Layout) -> bool:
    """Whether ranks have a dim in few enough stretches to send each by itself; of samples end to end, some of each."""
    if layout.outer == layout.inner == 1:
        return True
    ranks = range(chosen.owners.num_ranks)
    return max(len(chosen.owners.dim_runs(layout, rank)) for rank in ranks) <= _MOST_STRETCHES


def _owned(heads: int, each: int, ranks: int) -> tuple[Runs, ...]:
    """Every rank's heads of a tensor that has ``each`` for one that is shared out."""
    cuts = [slice_of(heads, ranks, rank) for rank in range(ranks)]
    return tuple(((start * each, (stop - start) * each),) if stop > start else () for start, stop in cuts)


def _first(value: Any) -> torch.Tensor:
    first: torch.Tensor = value if isinstance(value, torch.Tensor) else value[0]
    return first


PER_HEAD: dict[str, Reader] = {}
"""By the op's name with its namespace."""


def register_per_head(name: str, reader: Reader) -> None:
    """Have calls of an op computed by heads; ``name`` is ``library::op``."""
    PER_HEAD[name] = reader
    RULES[name] = rule_of
    FORMULAS[name] = flops_of


def rule_of(op: OpView) -> Rule | None:
    """The rule of a call that its reader accepts, with heads that can be shared out."""
    dims = PER_HEAD[f"{op.namespace}::{op.name}"](op.args)
    if dims is None or not fits(op, dims):
        return None
    names = {op.args[name].index: text for name, text in dims.tensors.items() if isinstance(op.args.get(name), Operand)}
    return PerHead(names, op.args[next(iter(dims.tensors))].index, dims.out)


@register_rule("streamfusion::opaque")
def _flex(op: OpView) -> Rule | None:
    """Flex attention whose mask and score function ask for no head (sfcompile/capture/opaque.py); its lists of blocks
    may have heads. Samples are cut if neither function asks for the sample."""
    names = OPAQUE[str(op.args["key"])].per_head
    if names is None or any(op.operands[i].ndim != len(text) for i, text in names.items()):
        return None
    tokens = [i for i, text in names.items() if "L" in text]
    query, counts = tokens[0], [op.operands[i].shape[1] for i in tokens]
    if not counts[-1] or counts[0] % counts[-1] or len(set(counts[1:])) > 1:
        return None
    return PerHead(names, query, names[query])


@register_rule("streamfusion::library_call")
def _function(op: OpView) -> Rule | None:
    """A Python function of a library (sfcompile/capture/library_functions.py)."""
    call = CALLS[str(op.args["key"])]
    counts = [op.operands[i].shape[text.index("H")] for i, text in call.letters.items() if "H" in text]
    rest = [operand for operand in op.operands if operand.index not in call.letters]
    if any(size in counts and size > 1 for operand in rest for size in operand.shape):
        return None
    alike = min(counts) > 0 and all(count % min(counts) == 0 for count in counts)
    return PerHead(call.letters, call.query, call.out) if alike else None


def _function_flops(op: OpView) -> float:
    """As of :func:`flops_of`."""
    call = CALLS[str(op.args["key"])]
    tokens = [op.operands[i].shape[text.index("L")] for i, text in call.letters.items() if "L" in text]
    return 4.0 * math.prod(op.operands[call.query].shape) * tokens[min(1, len(tokens) - 1)]


FORMULAS["streamfusion::library_call"] = _function_flops


def fits(op: OpView, dims: Dims) -> bool:
    """Whether the named tensors are there and have the dims they are said to have, k and v's heads dividing q's."""
    letters = {name: letters for name, letters in dims.tensors.items() if isinstance(op.args.get(name), Operand)}
    if next(iter(dims.tensors)) not in letters or len(op.out_shapes[0]) != len(dims.out):
        return False
    if any(op.args[name].ndim != len(text) for name, text in letters.items()):
        return False
    first = letters[next(iter(letters))]
    if not all("L" in text and "H" in text for text in (first, dims.out)):
        return False
    counts = [op.args[name].shape[text.index("H")] for name, text in letters.items() if "H" in text]
    counts.append(op.out_shapes[0][dims.out.index("H")])
    # A tensor that nobody named may have heads too: a kernel that does not look would read those of others.
    unnamed = [value for name, value in op.args.items() if isinstance(value, Operand) and name not in letters]
    if any(size in counts and size > 1 for operand in unnamed for size in operand.shape):
        return False
    return min(counts) > 0 and all(count % min(counts) == 0 for count in counts)


def flops_of(op: OpView) -> float | None:
    """What attention of every query to every key takes, the most that the op can: 4 x Lq x Lk x D for each head."""
    dims = PER_HEAD[f"{op.namespace}::{op.name}"](op.args)
    if dims is None or not fits(op, dims):
        return None
    names = list(dims.tensors)
    tokens = [op.args[n].shape[dims.tensors[n].index("L")] for n in names if "L" in dims.tensors[n] and op.args.get(n)]
    pairs: int = math.prod(op.args[names[0]].shape) * tokens[min(1, len(tokens) - 1)]
    return 4.0 * pairs


def _flash(args: Mapping[str, Any]) -> Dims | None:
    """FlashAttention: [B, L, H, D], or packed [tokens, H, D] with lengths; slopes [H] or [B, H]; no cache, no pages,
    and no tensor whose dims are not known here. As xFormers calls it too, which has other names."""
    if args.get("dropout_p") or args.get("p") or args.get("return_softmax"):
        return None
    packed = args.get("cu_seqlens_q") is not None
    if packed != (args.get("cu_seqlens_k") is not None):
        return None
    text = "LHD" if packed else "BLHD"
    slopes = args.get("alibi_slopes")
    rest = {"alibi_slopes": "BH"[-slopes.ndim :]} if isinstance(slopes, Operand) else {}
    rest |= {name: "BH" for name in ("q_descale", "k_descale", "v_descale") if args.get(name) is not None}
    rest |= {name: "B" for name in ("seqused_q", "seqused_k") if args.get(name) is not None}
    rest |= {name: "-" for name in ("cu_seqlens_q", "cu_seqlens_k") if packed}
    known = dict.fromkeys(("query", "key", "value") if "query" in args else ("q", "k", "v"), text) | rest
    return (
        Dims(known, text) if all(name in known for name, value in args.items() if isinstance(value, Operand)) else None
    )


for _op in (
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn::_flash_attn_varlen_forward_v3",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    "_diffusers_flash_attn_3::_flash_attn_forward",
    "xformers_flash::flash_fwd",
    "xformers_flash3::flash_fwd",
):
    register_per_head(_op, _flash)


def _torch_varlen(args: Mapping[str, Any]) -> Dims | None:
    """``torch.nn.attention.varlen``: packed [tokens, H, D] with lengths that all heads share; no pages."""
    known = dict.fromkeys(("query", "key", "value"), "LHD") | dict.fromkeys(("cu_seq_q", "cu_seq_k", "seqused_k"), "-")
    present = [name for name, value in args.items() if isinstance(value, Operand)]
    return Dims({name: known[name] for name in present}, "LHD") if all(name in known for name in present) else None


register_per_head("torch_attn::_varlen_attn", _torch_varlen)


def _cutlass(args: Mapping[str, Any]) -> Dims | None:
    """xFormers' memory-efficient op: [B, L, H, D]; packed sequences have B = 1 and lengths, which all heads share."""
    if args.get("dropout_p"):
        return None
    packed = args.get("seqstart_q") is not None
    if packed != (args.get("seqstart_k") is not None):
        return None
    known = dict.fromkeys(("query", "key", "value"), "BLHD") | {"attn_bias": "BH--", "seqlen_k": "-"}
    known |= {name: "-" for name in ("seqstart_q", "seqstart_k")}
    if args.get("seqlen_k") is not None and not packed:
        return None
    present = [name for name, value in args.items() if isinstance(value, Operand)]
    return Dims({name: known[name] for name in present}, "BLHD") if all(name in known for name in present) else None


register_per_head("xformers::efficient_attention_forward_cutlass", _cutlass)
