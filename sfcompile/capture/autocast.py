"""Autocast regions become casts: what autocast would do at each call stands in the graph, and the regions go.

The trace records ops above the autocast kernels, so a captured ``linear`` still reads fp32 operands though its value is
bf16; a graph that lost the region would compute another thing without a word. What autocast does to a call is not
looked up in a list: the call is made once on fake values with autocast on, and the casts of its operands are watched.

Autocast may know nothing of an op and yet change what is computed inside it: an ``einsum`` calls ``bmm``, an op of the
user's own may call anything. Where casts of the operands make the same calls inside, those are written; else the call
becomes an opaque one, which runs under the state of its region. So does one whose autocast kernel is not torch's and
does more than to cast: registered for one of torch's operators, or for an op of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from sfcompile.capture.opaque import hide_call
from sfcompile.errors import UnsupportedError, source_line
from sfcompile.torch_private import (
    AutocastState,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    TorchDispatchMode,
    autocast_as,
    autocast_off,
    calls_no_other,
    enter_autocast,
    exit_autocast,
    has_autocast_kernel,
    is_composite,
    outside_autocast,
    tree_leaves,
    tree_map,
)

Casts = dict[tuple[fx.Node, torch.dtype], fx.Node]
"""The casts written so far, by operand and dtype."""


@dataclass
class Regions:
    """Autocast regions that a replay of a Dynamo graph has entered; they are really on while it runs."""

    _open: list[torch.autocast] = field(default_factory=list)

    def enter(self, *arguments: Any) -> torch.autocast:
        """Enter a region with the arguments of torch's own call."""
        region = torch.autocast(*arguments)
        region.__enter__()
        self._open.append(region)
        return region

    def exit(self, region: torch.autocast) -> None:
        """Leave a region."""
        self._open.remove(region)
        region.__exit__(None, None, None)

    def close(self) -> None:
        """Leave what is still open: the replay failed, or the graph ends inside a region."""
        while self._open:
            self.exit(self._open[-1])


def bake_autocast(graph: fx.Graph, mode: FakeTensorMode, before: AutocastState) -> None:
    """Write the casts of autocast into a captured graph and drop the marks of its regions.

    Args:
        mode: the fake mode of the graph's values, which were computed with autocast on where it was.
        before: the state outside the graph.

    Raises:
        UnsupportedError: autocast does more to some call than to cast its operands or choose its dtype.
    """
    states = [before]
    casts: Casts = {}
    for node in list(graph.nodes):
        if node.target is enter_autocast:
            device, dtype, enabled = node.args[0], node.args[1], node.args[2]
            current = states[-1].get(device, (False, torch.bfloat16))
            states.append({**states[-1], device: (enabled, dtype if dtype is not None else current[1])})
        elif node.target is exit_autocast:
            states.pop()
        elif isinstance(node.target, OpOverload | HigherOrderOperator) and _regions_of(node, states[-1]):
            _bake_call(graph, node, mode, _regions_of(node, states[-1]), casts)
    for node in reversed(list(graph.nodes)):
        if node.target in (enter_autocast, exit_autocast):
            graph.erase_node(node)


def _regions_of(node: fx.Node, state: AutocastState) -> AutocastState:
    """What of a state concerns a call: the devices of its operands on which autocast is on."""
    devices = {n.meta["val"].device.type for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    return {device: state[device] for device in devices if state.get(device, (False, None))[0]}


def _bake_call(graph: fx.Graph, node: fx.Node, mode: FakeTensorMode, state: AutocastState, casts: Casts) -> None:
    """One call under a ``state`` in which autocast is on."""
    if not isinstance(node.target, OpOverload):
        hide_call(graph, node, state)  # an op of the user's that writes to its operands, made functional
        return
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    if any(outside_autocast(device, node.target) for device in state):
        dtypes = _casts_of(node.target, args, kwargs, mode, state)
        if _only_casts(node.target, args, kwargs, mode, state, dtypes):
            _write_casts(graph, node, mode, dtypes, casts)
        else:
            hide_call(graph, node, state)
    elif any(has_autocast_kernel(node.target, device) for device in state):
        _write_casts(graph, node, mode, _casts_of(node.target, args, kwargs, mode, state), casts)
    elif node.target.namespace not in _OWN and not _is_transparent(node.target, args, kwargs, mode, state):
        lower = _casts_to_lower(node.target, args, kwargs, mode, state)
        if lower is None:
            hide_call(graph, node, state)
        else:
            _write_casts(graph, node, mode, lower, casts)


_CASTS_INSIDE = (torch.ops.aten._trilinear.default, torch.ops.aten.linalg_pinv.atol_rtol_tensor)
"""Ops that autocast does not know and no trace sees into, though their kernels call ops that it casts: ``bmm`` and
``matmul``. The test that compares all that torch can call under autocast with eager finds them."""

_OWN = ("streamfusion", "prim")
"""Our own ops: opaque calls keep the state of their region by themselves."""


def _write_casts(
    graph: fx.Graph, node: fx.Node, mode: FakeTensorMode, dtypes: dict[int, torch.dtype], casts: Casts
) -> None:
    """Cast a call's operands; ``dtypes`` by ``id`` of their values."""
    assert isinstance(node.target, OpOverload)

    def cast(operand: fx.Node) -> fx.Node:
        dtype = dtypes.get(id(operand.meta["val"]))
        if dtype is None:
            return operand
        if (operand, dtype) not in casts:
            # At its first use: cast once, and no copy of a weight lives longer than it must.
            with graph.inserting_before(node):
                copy = graph.call_function(torch.ops.aten._to_copy.default, (operand,), {"dtype": dtype})
            with mode:
                copy.meta = {**node.meta, "val": operand.meta["val"].to(dtype)}
            casts[operand, dtype] = copy
        return casts[operand, dtype]

    new_args, new_kwargs = fx.map_arg((node.args, dict(node.kwargs)), cast)
    want = node.meta["val"]
    got = _plain(node.target, new_args, new_kwargs, mode)
    if _facts(got) != _facts(want) and _takes_dtype(node) and isinstance(want, torch.Tensor):
        new_kwargs = {**new_kwargs, "dtype": want.dtype}
        got = _plain(node.target, new_args, new_kwargs, mode)
    if _facts(got) != _facts(want):
        raise UnsupportedError(
            f"autocast makes {_facts(want)} of {node.target}, and casts of its operands make {_facts(got)}",
            "what autocast does to a call is written into the graph as casts",
            "cast the operands in the model, or leave this call out of the autocast region",
            node=node.name,
            source=source_line(node.stack_trace),
        )
    node.args, node.kwargs = new_args, new_kwargs


def _plain(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with mode, autocast_off(), torch.no_grad():
        return target(*values[0], **values[1])


def _facts(value: Any) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(leaf.dtype, tuple(leaf.shape)) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _takes_dtype(node: fx.Node) -> bool:
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    if "dtype" not in names or node.kwargs.get("dtype") is not None:
        return False
    place = names.index("dtype")
    return place >= len(node.args) or node.args[place] is None


class _Watch(TorchDispatchMode):
    """Notes the casts of the operands that stand before anything else."""

    def __init__(self, operands: list[torch.Tensor]) -> None:
        super().__init__()
        self._operands = {id(operand) for operand in operands}
        self._casting = True
        self.dtypes: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._casting and func is torch.ops.aten._to_copy.default and id(args[0]) in self._operands:
            self.dtypes[id(args[0])] = (kwargs or {})["dtype"]
        elif func.namespace != "prim":  # questions such as a tensor's device
            self._casting = False
        return func(*args, **(kwargs or {}))


def _casts_of(
    target: OpOverload, args: Any, kwargs: Any, mode: FakeTensorMode, state: AutocastState
) -> dict[int, torch.dtype]:
    """By ``id`` of an operand, the dtype to which autocast casts it."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    watch = _Watch(operands)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocast_as(state))
        stack.enter_context(mode)
        stack.enter_context(watch)
        target(*args, **kwargs)
    return watch.dtypes


class _Calls(TorchDispatchMode):
    """Notes the calls that an op makes, what each returns, and which values each is given.

    Args:
        operands: of the op, in an order.
        dtypes: by ``id`` of an operand, a dtype: cast to it, it counts as the operand, and the cast as no call.
    """

    def __init__(
        self, operands: Sequence[torch.Tensor], dtypes: Mapping[int, torch.dtype] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self._dtypes = dtypes
        self._names = {id(x): f"{'before ' if id(x) in dtypes else ''}{i}" for i, x in enumerate(operands)}
        self._held = list(operands)  # so that no other tensor gets an id
        self.calls: list[tuple[OpOverload, Any]] = []
        self.words: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return out
        if func is torch.ops.aten._to_copy.default and self._dtypes.get(id(args[0])) == (kwargs or {}).get("dtype", ""):
            self._name([out], self._names[id(args[0])].removeprefix("before "))
            return out
        self.calls.append((func, _facts(out)))
        self.words.append(f"{func} {self.named((args, kwargs or {}))}")
        self._name(tree_leaves(out), f"result {len(self.words)}")
        return out

    def _name(self, values: Sequence[Any], name: str) -> None:
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor) and id(value) not in self._names:
                self._names[id(value)] = f"{name}.{i}" if len(values) > 1 else name
                self._held.append(value)

    def named(self, values: Any) -> str:
        """Some values, of which tensors are called by what they are."""
        return repr(tree_map(lambda x: self._names.get(id(x), "new") if isinstance(x, torch.Tensor) else x, values))

    @property
    def casts_unseen(self) -> bool:
        """Whether autocast may do more inside than these calls show."""
        return any(func in _CASTS_INSIDE for func, _ in self.calls)

    @property
    def numeric(self) -> list[tuple[OpOverload, list[torch.dtype]]]:
        """Without views, copies and casts: what decides the result once the operands are what they are."""
        moves = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default, torch.ops.aten._unsafe_view.default)
        return [(f, [t for t, _ in facts]) for f, facts in self.calls if not f.is_view and f not in moves]


def _calls_inside(
    target: Any,
    args: Any,
    kwargs: Any,
    mode: FakeTensorMode,
    state: AutocastState,
    dtypes: Mapping[int, torch.dtype] = MappingProxyType({}),
) -> _Calls:
    calls = _Calls([leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)], dtypes)
    with torch.no_grad(), autocast_as(state), mode, calls:
        out = target(*args, **kwargs)
    calls.words.append(calls.named(out))
    return calls


def _only_casts(
    target: OpOverload,
    args: Any,
    kwargs: Any,
    mode: FakeTensorMode,
    state: AutocastState,
    dtypes: Mapping[int, torch.dtype],
) -> bool:
    """Whether a kernel does no more than to cast operands and to make the call: with the casts written, and autocast
    off, the same calls are made of the same values."""
    want = _calls_inside(target, args, kwargs, mode, state, dtypes)
    with mode:
        low = tree_map(lambda leaf: leaf.to(dtypes[id(leaf)]) if id(leaf) in dtypes else leaf, (args, kwargs))
    args, kwargs = low
    return _calls_inside(target, args, kwargs, mode, {}).words == want.words


def _is_transparent(target: OpOverload, args: Any, kwargs: Any, mode: FakeTensorMode, state: AutocastState) -> bool:
    """Whether autocast changes nothing inside an op that it does not know. Of an op from outside nobody can tell."""
    if target.namespace not in ("aten", "prims") or target in _CASTS_INSIDE:
        return False
    if not is_composite(target):
        return calls_no_other(target) or not any(map(outside_autocast, state))
    inside = _calls_inside(target, args, kwargs, mode, state)
    return inside.words == _calls_inside(target, args, kwargs, mode, {}).words and not inside.casts_unseen


def _casts_to_lower(
    target: OpOverload, args: Any, kwargs: Any, mode: FakeTensorMode, state: AutocastState
) -> dict[int, torch.dtype] | None:
    """As :func:`_casts_of`, for an op that autocast does not know: casts after which the op makes the same calls with
    autocast off; None: casts of its operands cannot say it."""
    if target.namespace not in ("aten", "prims") or target in _CASTS_INSIDE or any(map(outside_autocast, state)):
        return None
    dtypes = {
        id(leaf): state[leaf.device.type][1]
        for leaf in tree_leaves((args, kwargs))
        if isinstance(leaf, torch.Tensor) and leaf.device.type in state and _is_cast(leaf)
    }

    def lowered(leaf: Any) -> Any:
        return leaf.to(dtypes[id(leaf)]) if id(leaf) in dtypes else leaf

    with mode:
        low_args, low_kwargs = tree_map(lowered, args), tree_map(lowered, kwargs)
    want = _calls_inside(target, args, kwargs, mode, state)
    try:
        got = _calls_inside(target, low_args, low_kwargs, mode, {})
    except (RuntimeError, TypeError, ValueError):  # it takes no such dtype
        return None
    return dtypes if got.numeric == want.numeric and not want.casts_unseen else None


def _is_cast(tensor: torch.Tensor) -> bool:
    """Whether autocast casts a tensor to a lower precision."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64
