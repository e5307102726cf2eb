"""What a node costs: floating-point operations, bytes moved, seconds, for the whole value on one rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils.flop_counter import flop_registry

from sfcompile.passes.graph.layout import Layout, Ownership, Window
from sfcompile.passes.graph.op_view import OpView
from sfcompile.runtime.program.intervals import count, overlap
from sfcompile.runtime.program.phases import EXCHANGE_LINEAR
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.ops import OPAQUE

_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "expand", "unsqueeze", "squeeze", "select",
    "slice", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "narrow", "lift_fresh_copy", "_conj",
    "view_as_real", "view_as_complex", "dropout", "_unsafe_view",
}  # fmt: skip


Shares = NDArray[np.float64]
"""By rank: a part of a value, or so many bytes."""

_READ_TWICE = {"group_norm", "native_group_norm", "instance_norm"}
"""Norms over more than fits a core: once for the statistics, once to apply them."""
_OF_TORCH = ("aten", "prims", "prim", "higher_order")
_PRODUCTS = {
    "addbmm", "bilinear", "_trilinear", "lstm", "gru", "rnn_tanh", "rnn_relu", "cdist", "_cdist_forward", "_grouped_mm",
    "_scaled_grouped_mm", "_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu", "tensordot",
    "scaled_dot_product_attention", "_scaled_mm", "mm", "bmm", "addmm", "baddbmm", "matmul", "einsum", "matrix_exp",
}  # fmt: skip
"""Ops of torch that are products, whether there is a formula for them or not."""


FORMULAS: dict[str, Callable[[OpView], float | None]] = {}
"""FLOPs of other libraries' ops, by their names with the namespace."""


def value_bytes(node: fx.Node) -> int:
    """Bytes of a tensor-valued node (all outputs of a node with several)."""
    value = node.meta["val"]
    values = value if isinstance(value, (tuple, list)) else [value]
    return sum(math.prod(v.shape) * v.element_size() for v in values if isinstance(v, torch.Tensor))


def flops(op: OpView) -> float:
    """Matmul, convolution and attention FLOPs (a multiply-add counts as two); 0 for everything else.

    What is 0 because nobody knows better is said by :func:`unpriced`.
    """
    return _formula(op) or 0.0


def unpriced(op: OpView) -> bool:
    """Whether the op may do much arithmetic of which nothing is known: another library's, or a product of torch's."""
    if _formula(op) is not None:
        return False
    return op.namespace not in _OF_TORCH or op.name in _PRODUCTS


def _formula(op: OpView) -> float | None:
    """FLOPs, or None where there is no formula, or one that does not take this call."""
    if op.name == "linear":
        x, weight = op.operands[:2]
        return 2.0 * math.prod(x.shape) * weight.shape[0]
    if op.name in ("matmul", "einsum"):
        return _contraction_flops(op)
    if "conv_transpose" in op.name or (op.name == "convolution" and op.args["transposed"]):
        return 2.0 * math.prod(op.operands[0].shape) * math.prod(op.operands[1].shape[1:])
    if op.name in ("conv1d", "conv2d", "conv3d", "convolution"):
        weight = op.operands[1]
        return 2.0 * math.prod(op.out_shapes[0]) * math.prod(weight.shape[1:])
    if op.name == "scaled_dot_product_attention":
        q, k, v = op.operands[:3]
        return 2.0 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if op.name == "opaque":
        return OPAQUE[str(op.args["key"])].flops or None
    if f"{op.namespace}::{op.name}" in FORMULAS:
        return FORMULAS[f"{op.namespace}::{op.name}"](op)
    if op.name in ("mv", "_int_mm"):
        return 2.0 * math.prod(op.operands[0].shape) * (op.operands[1].shape[-1] if op.name == "_int_mm" else 1)
    formula = flop_registry.get(getattr(op.node.target, "_overloadpacket", None))
    if formula is None:
        return None
    args, kwargs = op.rebuild([operand.node for operand in op.operands])
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    try:
        return float(formula(*values, **kwargs, out_val=op.node.meta["val"]))
    except (TypeError, AssertionError, ValueError, AttributeError):
        return None


def _contraction_flops(op: OpView) -> float:
    out = math.prod(op.out_shapes[0])
    if op.name == "matmul":
        return 2.0 * out * op.operands[0].shape[-1]
    spec = str(op.args["equation"]).replace(" ", "").replace(".", "").split("->")
    sizes: dict[str, int] = {}
    for letters, operand in zip(spec[0].split(","), op.operands, strict=True):
        sizes.update(zip(reversed(letters), reversed(operand.shape), strict=False))
    contracted = set(spec[0]) - set(spec[-1]) - {","}
    return 2.0 * out * math.prod(sizes[letter] for letter in contracted) if contracted else 0.0


def is_view(op: OpView) -> bool:
    """Whether the op moves no data."""
    return op.name in _VIEWS


def seconds(op: OpView, topology: Topology) -> float:
    """Time of the whole op on one rank: the larger of arithmetic and memory traffic; views are free."""
    return shard_seconds(op, topology, 1.0)


def shard_seconds(op: OpView, topology: Topology, part: float, whole: Collection[int] = ()) -> float:
    """Time of a part of the op on one rank, for which it reads some operands (by index) whole: weights, say."""
    if is_view(op):
        return 0.0
    moved = part * value_bytes(op.node)
    for operand in op.operands:
        passes = 2 if op.name in _READ_TWICE and operand.index == 0 else 1
        moved += passes * value_bytes(operand.node) * (1.0 if operand.index in whole else part)
    if op.name == EXCHANGE_LINEAR:  # its weight is no operand
        x = op.operands[0]
        moved += x.shape[-1] * int(op.args["features"]) * x.node.meta["val"].element_size()
    attention = op.name == "scaled_dot_product_attention" or f"{op.namespace}::{op.name}" in FORMULAS
    rate = topology.attention_flops_per_s if attention else None
    return max(part * flops(op) / (rate or topology.flops_per_s), moved / topology.memory_bytes_per_s)


def gather_seconds(node: fx.Node, topology: Topology, shares: Shares | None = None) -> float:
    """Time to all-gather a sharded value to every rank.

    Args:
        shares: the part of the value that each rank owns; None: even parts.
    """
    return spread_seconds(value_bytes(node), topology, shares)


def spread_seconds(total: float, topology: Topology, shares: Shares | None = None) -> float:
    """Time until every rank has so many bytes, of which it had its share; None: even shares."""
    ranks = topology.num_ranks
    own = np.full(ranks, total / ranks) if shares is None else total * shares
    return traffic_seconds(total - own, own * (ranks - 1), topology)


def exchange_seconds(
    node: fx.Node, owners: Ownership, held: Layout, need: Layout | Window, topology: Topology
) -> float:
    """Time until every rank has what it needs of a value of which ranks own other shards."""
    into, out = exchanged(owners, held, need)
    total = value_bytes(node)
    return traffic_seconds(total * into, total * out, topology)


def exchanged(owners: Ownership, held: Layout, need: Layout | Window) -> tuple[Shares, Shares]:
    """The parts of a value that come to each rank, and leave each rank, when all get what they need."""
    own = owners.shares(held)
    if isinstance(need, Layout) and need.dim != held.dim:  # of every row that others own, the columns of its own
        wanted = owners.shares(need)
        return wanted * (1.0 - own), own * (1.0 - wanted)
    ranks = range(owners.num_ranks)
    runs = need.wanted if isinstance(need, Window) else tuple(owners.dim_runs(need, rank) for rank in ranks)
    wanted = np.array([count(runs[rank]) for rank in ranks]) / max(1, held.size)
    kept = np.array([count(overlap(owners.dim_runs(held, rank), runs[rank])) for rank in ranks]) / max(1, held.size)
    if isinstance(need, Window):  # neighbours' halos: as much leaves as comes, give or take an edge
        return wanted - kept, wanted - kept
    return wanted - kept, own - kept


def traffic_seconds(into: Shares, out: Shares, topology: Topology) -> float:
    """Time of the busiest link, when so many bytes come to each rank and leave it, and one latency.

    Of what a rank sends and gets, as much crosses machines as if it went to all other ranks alike.
    """
    ranks = topology.num_ranks
    if ranks == 1:
        return 0.0
    busiest = max(float(into.max()), float(out.max()))
    local = busiest / topology.local_bytes_per_s + topology.local_latency_s
    if topology.num_machines == 1:
        return local
    card, away = _cards(topology.machine_of, topology.nics_per_machine)
    crossing = max(float(np.bincount(card, away * way).max()) for way in (into, out))
    return max(local, crossing / topology.network_bytes_per_s + topology.network_latency_s)


@lru_cache(maxsize=64)
def _cards(machine_of: tuple[int, ...], nics_per_machine: int) -> tuple[NDArray[np.int64], Shares]:
    """By rank its network card, and the part of the other ranks that is on other machines."""
    topology = Topology(machine_of, nics_per_machine=nics_per_machine)
    card = np.unique(np.array(topology.nic_of()), return_inverse=True)[1]
    machine = np.unique(np.array(machine_of), return_inverse=True)[1]
    away = (len(machine_of) - np.bincount(machine)[machine]) / (len(machine_of) - 1)
    return card, away
