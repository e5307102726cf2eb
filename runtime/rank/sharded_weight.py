"""A weight of which this rank holds some rows: a tensor that looks whole.

Where a compiled graph reads it, the graph gathers it (passes/rewrite_weights.py). Everything else that is done with it
goes through here. What reads it gathers it too, in a call of its own that all ranks have to make; what writes to it
writes this rank's rows; what would write to a view of it is refused, for that is a copy.

No row is held twice, so ranks cannot hold different values of one; but they could write different things to their
shares. So every weight keeps a *mark* of all that was written to it, taken from the written values as a whole, which is
the same on all ranks that did the same; calls compare it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from sfcompile.errors import UnsupportedError, WeightsError
from sfcompile.runtime.program.weight_rows import WeightRows
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.rank.no_memory import OF_MEMORY, without_memory
from sfcompile.runtime.rank.shared_weights import obstacle_of
from sfcompile.torch_private import FakeTensor, no_torch_function, not_traced, tree_leaves, tree_map, wrapper_tensor

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default}
_ROW_BY_ROW = {_aten.clone.default, _aten._to_copy.default}
"""Of a weight they make a weight, rows for rows; on another device too, where its session moves the pieces."""
_WRITES = {
    _aten.copy_.default, _aten.fill_.Scalar, _aten.zero_.default, _aten.add_.Tensor, _aten.add_.Scalar,
    _aten.sub_.Tensor, _aten.sub_.Scalar, _aten.mul_.Tensor, _aten.mul_.Scalar, _aten.div_.Tensor, _aten.div_.Scalar,
}  # fmt: skip
"""Writes of which a row's new values depend on nothing but that row of the operands: no rank needs another's rows."""

Gather = Callable[["ShardedWeight"], torch.Tensor]
"""Collective: all of a weight, as a plain tensor."""


class History:
    """What was done to a weight, and how it is gathered beside a compiled graph.

    Attributes:
        mark: of its values when it was cut, and of all that was written to it since: equal on ranks that did the same.
    """

    def __init__(self, gather: Gather, mark: int) -> None:
        self.gather, self.mark = gather, mark


class ShardedWeight(torch.Tensor):
    """A weight in shares.

    Attributes:
        shard: this rank's rows, contiguous.
        cut: which rows each rank holds; ``rank``: whose these are.
        history: the mark, shared by all tensors that are this weight.
    """

    shard: torch.Tensor
    cut: WeightRows
    rank: int
    history: History

    @staticmethod
    def __new__(
        cls: type[ShardedWeight], shard: torch.Tensor, cut: WeightRows, rank: int, history: History
    ) -> ShardedWeight:
        """``shard`` as the rows of ``rank`` of a weight."""
        assert tuple(shard.shape) == cut.local_shape(rank), (shard.shape, cut, rank)
        weight: ShardedWeight = wrapper_tensor(cls, cut.shape, shard)
        without_memory(weight, _no_memory(cut.shape))
        weight.shard, weight.cut, weight.rank, weight.history = shard, cut, rank, history
        return weight

    __torch_function__ = no_torch_function

    @not_traced
    def whole(self) -> torch.Tensor:
        """Collective: all of it, as a plain tensor of this rank's own."""
        return self.history.gather(self)

    def rows_of(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a plain value that a whole weight could be combined with."""
        start, stop = self.cut.rows(self.rank)
        return value if value.dim() == 0 else value.expand(self.cut.shape)[start:stop]

    @property
    def data(self) -> torch.Tensor:
        """The same weight, without a gradient; set: other values, of which each rank takes its rows."""
        with torch.no_grad():
            return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if tuple(value.shape) != tuple(self.shape) or value.dtype != self.dtype or value.device != self.device:
            raise UnsupportedError(
                f"a sharded weight {self.dtype}{list(self.shape)} on {self.device} is given data {value.dtype}"
                f"{list(value.shape)} on {value.device}",
                "each rank takes its rows of it, in the place of the old ones",
                "give it data of the same shape and dtype, or load and shard another model",
            )
        with torch.no_grad():
            self.copy_(value)

    def __repr__(self) -> str:  # type: ignore[override]
        start, stop = self.cut.rows(self.rank)
        return f"ShardedWeight({list(self.shape)}, {self.dtype}, rows {start} to {stop} on rank {self.rank})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["shard"], (self.cut, self.rank)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], facts: Any, size: Any, stride: Any) -> ShardedWeight:
        cut, rank = facts
        return ShardedWeight(inner["shard"], cut, rank, History(_refuse_gather, 0))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise WeightsError(
            f"a sharded weight {list(self.shape)} is saved or sent, and this rank holds "
            f"{self.shard.shape[0]} of its {self.shape[0]} rows",
            "what is in the file would be a part of it",
            "first make it whole, on every rank: {name: value.whole() if hasattr(value, 'whole') else value for "
            "name, value in model.state_dict().items()}",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                copied: torch.Tensor = self.clone()
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied
        result: torch.Tensor = memo[id(self)]
        return result

    @classmethod
    @not_traced
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is done with it, beside a compiled graph."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, ShardedWeight):
            if func in _SAME:
                return ShardedWeight(first.shard, first.cut, first.rank, first.history)
            if func in _ROW_BY_ROW and _stays(first, kwargs):
                kwargs = {**kwargs, "memory_format": torch.contiguous_format}
                mark = zlib.crc32(_words(func, args[1:], kwargs).encode(), first.history.mark)
                history = History(first.history.gather, mark)
                return ShardedWeight(func(first.shard, **kwargs), first.cut, first.rank, history)
            if func in _WRITES and not isinstance(first.shard, FakeTensor) and _alike(first, args, kwargs):
                return _write_rows(func, first, args, kwargs)
        return _on_wholes(func, args, kwargs)


def _no_memory(shape: Sequence[int]) -> Callable[[str], WeightsError]:
    """Why a weight's memory cannot be had."""
    return lambda name: WeightsError(
        f"{name}() of a sharded weight {list(shape)} is asked for",
        "it has no memory of its own: this rank holds some of its rows",
        "make it whole first, on every rank: weight.whole()",
    )


def _without_memory(name: str) -> Callable[..., NoReturn]:
    def refuse(weight: ShardedWeight, *args: Any, **kwargs: Any) -> NoReturn:
        raise _no_memory(weight.shape)(name)

    return refuse


for _name in OF_MEMORY:
    setattr(ShardedWeight, _name, _without_memory(_name))


def _is_a_copy(shape: Sequence[int]) -> Callable[[str], WeightsError]:
    """Why the memory of a view cannot be had."""
    return lambda name: WeightsError(
        f"{name}() of a view {list(shape)} of a sharded weight is asked for",
        "the view is a copy of what was gathered, and what is written there would be lost",
        "to read it, copy it first: view.clone(); to write, write to the weight itself",
    )


class WeightView(torch.Tensor):
    """A view of a whole weight that was gathered: to be read. It is a copy, so a write to it would be lost.

    Attributes:
        value: a plain tensor.
    """

    value: torch.Tensor

    @staticmethod
    def __new__(cls: type[WeightView], value: torch.Tensor) -> WeightView:
        """``value``, not to be written to."""
        view: WeightView = wrapper_tensor(cls, value.shape, value)
        without_memory(view, _is_a_copy(value.shape))
        view.value = value
        return view

    __torch_function__ = no_torch_function

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WeightView({self.value!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value.__reduce_ex__(protocol)

    @classmethod
    @not_traced
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reads see a plain tensor."""
        return ShardedWeight.__torch_dispatch__(func, types, args, kwargs)


_OURS = (ShardedWeight, WeightView)


def _of_value(name: str) -> Callable[..., Any]:
    return lambda view, *args, **kwargs: getattr(view.value, name)(*args, **kwargs)


def _refused_to_view(name: str) -> Callable[..., NoReturn]:
    def refuse(view: WeightView, *args: Any, **kwargs: Any) -> NoReturn:
        raise _is_a_copy(view.shape)(name)

    return refuse


def _read_only(view: WeightView, *args: Any, **kwargs: Any) -> Any:
    array = view.value.numpy(*args, **kwargs)
    array.flags.writeable = False
    return array


_WRITE = ("apply_", "map_", "map2_", "share_memory_")
for _name in OF_MEMORY:
    setattr(WeightView, _name, _refused_to_view(_name) if _name in _WRITE else _of_value(_name))
WeightView.numpy = _read_only  # type: ignore[assignment, method-assign]


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Of the tensors of these classes those that an op writes to: its first argument, ``out=``, or some in a list."""
    named = {argument.name: argument for argument in func._schema.arguments}
    passed = [*zip(func._schema.arguments, args, strict=False), *((named[key], kwargs[key]) for key in kwargs)]
    writes = [value for argument, value in passed if argument.alias_info is not None and argument.alias_info.is_write]
    return [value for value in tree_leaves(writes) if isinstance(value, _OURS)]


def _on_wholes(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An op on whole values. Views of them are WeightViews; of a weight that it writes to, this rank takes its rows.

    Raises:
        UnsupportedError: it writes to a view, or gives a weight another shape.
    """
    whole: dict[int, torch.Tensor] = {}

    def as_whole(value: Any) -> Any:
        if isinstance(value, WeightView):
            return value.value
        if not isinstance(value, ShardedWeight):
            return value
        if isinstance(value.shard, FakeTensor):  # what it would be
            return value.shard.new_empty(value.cut.shape)
        if id(value.shard) not in whole:
            whole[id(value.shard)] = value.whole()
        return whole[id(value.shard)]

    written = _written(func, args, kwargs)
    if any(isinstance(value, WeightView) for value in written):
        raise UnsupportedError(
            f"{func} writes to a view of a sharded weight",
            "this rank holds some rows of the weight, and what it reads is a copy: the write would be lost",
            "write to the weight itself: weight.copy_(values), weight.add_(values) or weight.data = values",
        )
    weights = [value for value in tree_leaves((args, kwargs)) if isinstance(value, ShardedWeight)]
    tracing = any(isinstance(weight.shard, FakeTensor) for weight in weights)
    words = "" if tracing or not written else _words(func, args, kwargs)
    result = func(*tree_map(as_whole, args), **tree_map(as_whole, kwargs))
    if tracing:
        return written[0] if written and isinstance(result, torch.Tensor) else result
    for weight in written:
        _take_rows(weight, whole[id(weight.shard)], words, func)
    again = {id(whole[id(weight.shard)]): weight for weight in written}
    result = tree_map(lambda value: again.get(id(value), value), result)
    if any(output.alias_info is not None and not output.alias_info.is_write for output in func._schema.returns):
        # In inference mode, too, a view of a tensor from outside of it is one from outside of it: torch insists.
        inside = any(value.is_inference() for value in tree_leaves((args, kwargs)) if isinstance(value, _OURS))
        with torch.inference_mode(inside and torch.is_inference_mode_enabled()):
            return tree_map(lambda value: WeightView(value) if isinstance(value, torch.Tensor) else value, result)
    return result


def _take_rows(weight: ShardedWeight, value: torch.Tensor, words: str, func: Any) -> None:
    """Give a weight this rank's rows of what an op made of all of it.

    Raises:
        UnsupportedError: that has another shape.
    """
    if tuple(value.shape) != tuple(weight.shape):
        raise UnsupportedError(
            f"{func} gives a sharded weight {list(weight.shape)} the shape {list(value.shape)}",
            "each rank holds some of its rows, and other ranks expect them where they were",
            "put a new parameter in its place, or change the model before its weights are sharded",
        )
    weight.shard.copy_(weight.rows_of(value))
    weight.history.mark = zlib.crc32(f"{words}|{fingerprint([value])}".encode(), weight.history.mark)


def why_whole(weight: torch.Tensor, ranks: int) -> str:
    """Why a plain weight cannot be cut into shares; "" if it can be."""
    if weight.dim() == 0 or weight.shape[0] < ranks or not weight.is_contiguous():
        return f"it has fewer rows than the {ranks} ranks, or is laid out in another order"
    return obstacle_of(weight)


def marks_of(weights: Sequence[ShardedWeight]) -> int:
    """One mark for some weights."""
    mark = 0
    for weight in weights:
        mark = zlib.crc32(weight.history.mark.to_bytes(4, "little"), mark)
    return mark


def _refuse_gather(weight: ShardedWeight) -> torch.Tensor:
    raise UnsupportedError(
        f"a sharded weight {list(weight.shape)} that a compiler made of its parts is read",
        "it does not know the other ranks",
        "read the model's own weight",
    )


def _stays(weight: ShardedWeight, kwargs: dict[str, Any]) -> bool:
    """Whether a copy is one with values, laid out as a weight in shares is."""
    device, layout = kwargs.get("device"), kwargs.get("memory_format")
    return (device is None or torch.device(device).type != "meta" or weight.is_meta) and layout in (
        None, torch.preserve_format, torch.contiguous_format,
    )  # fmt: skip


def _alike(weight: ShardedWeight, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the other weights among some operands are cut as this one is."""
    return all(not isinstance(x, ShardedWeight) or x.cut == weight.cut for x in tree_leaves((args[1:], kwargs)))


def _write_rows(func: Any, weight: ShardedWeight, args: Any, kwargs: dict[str, Any]) -> ShardedWeight:
    """Write to this rank's rows of a weight, from what each row needs."""
    args, kwargs = tree_map(lambda value: value.value if isinstance(value, WeightView) else value, (args, kwargs))

    def rows(value: Any) -> Any:
        if isinstance(value, ShardedWeight):
            return value.shard
        return weight.rows_of(value) if isinstance(value, torch.Tensor) else value

    words = _words(func, args[1:], kwargs)
    func(weight.shard, *tree_map(rows, list(args[1:])), **tree_map(rows, kwargs))
    weight.history.mark = zlib.crc32(words.encode(), weight.history.mark)
    return weight


_SAID = (bool, int, float, complex, str, torch.dtype, torch.memory_format, torch.layout)


def _words(func: Any, args: Any, kwargs: dict[str, Any]) -> str:
    """An op and its operands, the same words on all ranks that do the same: of tensors their marks, numbers as they
    are. A generator or a device is another one on every rank."""
    words = [str(func), *sorted(kwargs)]
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, ShardedWeight):
            words.append(str(value.history.mark))
        elif isinstance(value, torch.Tensor) and value.device.type != "meta":
            words.append(str(fingerprint([value.value if isinstance(value, WeightView) else value])))
        elif value is None or isinstance(value, _SAID):
            words.append(repr(value))
    return "|".join(words)
