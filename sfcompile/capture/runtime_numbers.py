"""Python numbers that change from call to call and stay inputs: a guidance scale, a timestep, the weight of an adapter.

Dynamo hands a float that changed as a 0-dim tensor that the graph reads with ``item()``, an int as a symbolic number.
While a graph is replayed for capture, such a number stands for a 0-dim tensor (float64 or int64, as Python computes),
and what Python or PyTorch would do with the number is done with the tensor, to the same bits and of the type that a
Python scalar would give. So one program serves every value. What a number cannot do so (a size, the bounds of a slice,
the threshold of a clamp) raises :class:`NumberNeeded`, and the number is then part of the program, as all of them were.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.torch_private import FunctionalTensor, has_data_mutation, is_refs_tensor, same_storage, tree_leaves


class NumberNeeded(Exception):
    """An op needs the value of a number while the graph is traced.

    Attributes:
        sources: positions of the inputs that the number comes from.
    """

    def __init__(self, sources: frozenset[int]) -> None:
        super().__init__(f"the values of inputs {sorted(sources)} are needed")
        self.sources = sources


@dataclass(frozen=True)
class Number:
    """A Python number whose value is known when the program runs.

    Attributes:
        tensor: 0-dim, float64 or int64.
        sources: positions of the graph inputs that it comes from.
    """

    tensor: torch.Tensor
    sources: frozenset[int]

    @property
    def is_int(self) -> bool:
        return not self.tensor.dtype.is_floating_point

    @property
    def as_scalar(self) -> int | float:
        """A Python scalar of its kind, for rules of type promotion."""
        return 1 if self.is_int else 1.0


def numbers_in(*values: Any) -> list[Number]:
    """The numbers in some arguments, in slices and nested ones too."""
    numbers: list[Number] = []

    def look(value: Any) -> Any:
        if isinstance(value, Number):
            numbers.append(value)
        return value

    fx.node.map_aggregate(values, look)
    return numbers


def needed(*values: Any) -> NumberNeeded:
    """The error for arguments whose numbers must be known."""
    return NumberNeeded(_sources(*values))


PICKS = ("getitem", "select")
"""What picks out of a tensor (:class:`Copied`)."""


def name_of(op: str, target: Any) -> Any:
    """What an op of a Dynamo graph is called here; "": nothing."""
    return target if op == "call_method" else "tensor" if is_refs_tensor(target) else _NAMES.get(target, "")


def call(op: str, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an op of a Dynamo graph gives, where numbers are among its arguments.

    Args:
        op: the node's: "call_function" or "call_method".

    Raises:
        NumberNeeded: it can only be computed with the value of a number.
    """
    rule = _RULES.get(name_of(op, target)) if op in ("call_method", "call_function") else None
    if rule is None:
        raise needed(args, kwargs)
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:  # alpha, rounding_mode: another op
        raise needed(args, kwargs) from None
    result = rule(*args, **kwargs)
    if result is NotImplemented:
        raise needed(args, kwargs)
    return result


def _sources(*values: Any) -> frozenset[int]:
    return frozenset().union(*(number.sources for number in numbers_in(*values)))


# ------------------------------------------------------------------ arithmetic


def _binary(compute: Callable[[Any, Any], Any], division: bool = False) -> Callable[..., Any]:
    def rule(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return _with_tensor(compute, a, b, division)
        if any(isinstance(value, bool) or not isinstance(value, (int, float, Number)) for value in (a, b)):
            return NotImplemented
        ints = all(value.is_int if isinstance(value, Number) else isinstance(value, int) for value in (a, b))
        dtype = torch.int64 if ints and not division else torch.float64
        x, y = (value.tensor.to(dtype) if isinstance(value, Number) else value for value in (a, b))
        return Number(compute(x, y), _sources(a, b))

    return rule


def _with_tensor(compute: Callable[[Any, Any], Any], a: Any, b: Any, division: bool) -> Any:
    """A tensor and a number. PyTorch itself wraps a scalar in a 0-dim tensor, which only differs in type promotion
    among tensors without dims: such a tensor gets one meanwhile."""
    tensor = a if isinstance(a, torch.Tensor) else b
    number = b if tensor is a else a
    if not isinstance(number, Number) or tensor.is_complex():
        return NotImplemented
    if not tensor.dim():
        row = tensor[None]
        return _with_tensor(compute, row if tensor is a else a, row if tensor is b else b, division)[0]
    result, scalar = torch.result_type(tensor, number.as_scalar), number.tensor
    if result.is_floating_point and not tensor.is_floating_point():
        tensor = tensor.to(result)
    if division and number is a:  # as Tensor.__rtruediv__ has it
        return tensor.reciprocal() * scalar
    return compute(scalar, tensor) if number is a else compute(tensor, scalar)


def _reversed(rule: Callable[..., Any]) -> Callable[..., Any]:
    def swapped(a: Any, b: Any) -> Any:
        return rule(b, a)

    return swapped


def _into(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The in-place form: the tensor on the left is written to."""

    def written(a: Any, b: Any) -> Any:
        result = rule(a, b)
        return a.copy_(result) if isinstance(a, torch.Tensor) and result is not NotImplemented else result

    return written


def _comparison(compute: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Of a tensor with a number; of two numbers the program itself would depend on it."""

    def rule(a: Any, b: Any) -> Any:
        tensors = [value for value in (a, b) if isinstance(value, torch.Tensor)]
        # Of other whole numbers PyTorch refuses what does not fit.
        if not all(value.is_floating_point() or value.dtype == torch.int64 for value in tensors) or not tensors:
            return NotImplemented
        return _with_tensor(compute, a, b, False)

    return rule


def _whole(compute: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A whole number by a known one that is not zero."""

    def rule(a: Any, b: Any) -> Any:
        if not isinstance(a, Number) or not a.is_int or type(b) is not int or not b:
            return NotImplemented
        return Number(compute(a.tensor, b), a.sources)

    return rule


def _negative(a: Any) -> Any:
    return Number(-a.tensor, a.sources)


def _as_float(a: Any) -> Any:
    return Number(a.tensor.to(torch.float64), a.sources)


# ------------------------------------------------------------------ tensors made of numbers


def _dtype_of(values: Sequence[Any], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    floats = any(isinstance(v, float) or (isinstance(v, Number) and not v.is_int) for v in values)
    return torch.get_default_dtype() if floats else torch.int64


def _is_plain(**rest: Any) -> bool:
    """Whether what else is asked of a new tensor is what it is anyway."""
    return all(value in (None, False, torch.strided) for value in rest.values())


def _full(size: Any, fill_value: Any, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Any:
    if not isinstance(fill_value, Number) or numbers_in(size) or not _is_plain(**rest):
        return NotImplemented
    value = fill_value.tensor.to(device=device or torch.get_default_device(), dtype=_dtype_of([fill_value], dtype))
    return value.expand(size).clone(memory_format=torch.contiguous_format)


def _full_like(a: Any, fill_value: Any, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Any:
    if not _is_plain(**rest):
        return NotImplemented
    return torch.empty_like(a, dtype=dtype, device=device).copy_(fill_value.tensor)


def _new_full(
    a: Any, size: Any, fill_value: Any, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any
) -> Any:
    return _full(size, fill_value, dtype=dtype or a.dtype, device=device or a.device, **rest)


def _fill(a: Any, value: Any) -> Any:
    return a.copy_(value.tensor)


def _tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Any:
    leaves = tree_leaves(data)
    if any(isinstance(leaf, bool) or not isinstance(leaf, (int, float, Number)) for leaf in leaves):
        return NotImplemented
    if not _is_plain(**rest):
        return NotImplemented
    kind, where = _dtype_of(leaves, dtype), device or torch.get_default_device()

    def stacked(value: Any) -> torch.Tensor:
        if isinstance(value, (list, tuple)):
            return torch.stack([stacked(entry) for entry in value])
        if isinstance(value, Number):
            return value.tensor.to(device=where, dtype=kind, copy=True)
        return torch.full((), value, device=where, dtype=kind)

    return stacked(data)


def _masked_fill(a: Any, mask: Any, value: Any) -> Any:
    return a.masked_fill(mask, value.tensor.to(a.dtype)) if isinstance(value, Number) else NotImplemented


def _where(condition: Any, a: Any, b: Any) -> Any:
    if numbers_in(condition):
        return NotImplemented
    result = torch.result_type(*(value.as_scalar if isinstance(value, Number) else value for value in (a, b)))
    return torch.where(
        condition, *(value.tensor.to(result) if isinstance(value, Number) else value for value in (a, b))
    )


# ------------------------------------------------------------------ places in tensors


def _where_at(a: torch.Tensor, dim: int, place: Number) -> torch.Tensor:
    """A place along a dim as a row of one, counted from the front."""
    index = place.tensor.to(a.device)
    return torch.where(index < 0, index + a.shape[dim], index)[None]


def _is_known(a: Any) -> bool:
    """Whether it shows if a tensor is written to during the replay, or cannot be: a constant."""
    return isinstance(a, FunctionalTensor) or type(a) is torch.Tensor


def _select(a: Any, dim: Any, index: Any) -> Any:
    if not _is_known(a) or not isinstance(index, Number) or not index.is_int or type(dim) is not int:
        return NotImplemented
    return a.index_select(dim, _where_at(a, dim, index)).squeeze(dim)


def _entry(a: Any, index: Any) -> Any:
    """``a[index]``; a number among several makes Dynamo a graph for each of its values."""
    return _select(a, 0, index)


class Copied:
    """Values that numbers pick out of tensors: they are copies, where PyTorch has views.

    So none of them may be written to, nor what they were picked from, nor may one leave the graph.
    """

    def __init__(self) -> None:
        self._picked: list[tuple[torch.Tensor, torch.Tensor, frozenset[int]]] = []

    def note(self, base: Any, result: Any, numbers: Sequence[Number]) -> None:
        """Some numbers picked a result out of a tensor."""
        if isinstance(base, torch.Tensor) and isinstance(result, torch.Tensor):
            self._picked.append((base, result, _sources(numbers)))

    def check(self, outputs: Sequence[Any]) -> None:
        """Look at all of them when the graph has been replayed.

        Raises:
            NumberNeeded: with its value known, a view can be made.
        """
        leaving = [value for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)]
        for base, picked, sources in self._picked:
            written = any(has_data_mutation(x) for x in (base, picked) if isinstance(x, FunctionalTensor))
            if written or any(same_storage(picked, x) for x in leaving):
                raise NumberNeeded(sources)


_ADD, _SUB, _MUL = _binary(operator.add), _binary(operator.sub), _binary(operator.mul)
_DIV = _binary(operator.truediv, division=True)
_RULES: dict[str, Callable[..., Any]] = {
    "add": _ADD,
    "sub": _SUB,
    "mul": _MUL,
    "div": _DIV,
    "rsub": _reversed(_SUB),
    "add_": _into(_ADD),
    "sub_": _into(_SUB),
    "mul_": _into(_MUL),
    "div_": _into(_DIV),
    "neg": _negative,
    "float": _as_float,
    "full": _full,
    "full_like": _full_like,
    "new_full": _new_full,
    "fill_": _fill,
    "tensor": _tensor,
    "masked_fill": _masked_fill,
    "torch.where": _where,  # the method has its operands in another order
    "floordiv": _whole(functools.partial(torch.div, rounding_mode="floor")),
    "mod": _whole(torch.remainder),
    "getitem": _entry,
    "select": _select,
    **{name: _comparison(getattr(operator, name)) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
}
_RULES |= {
    alias: _RULES[name]
    for name, aliases in {
        "add": ("__add__", "__radd__"),
        "sub": ("__sub__", "subtract"),
        "rsub": ("__rsub__",),
        "mul": ("__mul__", "__rmul__", "multiply"),
        "div": ("__truediv__", "true_divide", "divide"),
    }.items()
    for alias in aliases
}
_NAMES: dict[Any, str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.iadd: "add_",
    operator.isub: "sub_",
    operator.imul: "mul_",
    operator.itruediv: "div_",
    operator.neg: "neg",
    operator.floordiv: "floordiv",
    operator.mod: "mod",
    operator.getitem: "getitem",
    torch.select: "select",
    **{getattr(place, name): name for place in (operator, torch) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    torch.where: "torch.where",
    torch.add: "add",
    torch.sub: "sub",
    torch.subtract: "sub",
    torch.rsub: "rsub",
    torch.mul: "mul",
    torch.multiply: "mul",
    torch.div: "div",
    torch.true_divide: "div",
    torch.divide: "div",
    torch.full: "full",
    torch.full_like: "full_like",
    torch.tensor: "tensor",
    torch.scalar_tensor: "tensor",
    torch.masked_fill: "masked_fill",
    torch.sym_float: "float",
}
