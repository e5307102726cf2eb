"""A value that one compiled graph hands to the next in shards: a tensor that looks whole.

Where a graph ends at a break, its results are whole on every rank, as Python may do anything with them; mostly it hands
them to the next graph, which takes this rank's rows of them again. With ``options={"boundaries": "shards"}`` they are
tensors of this class. A compiled graph that only takes a rank's own rows takes the shard as it is
(sfcompile/lowering/arrivals.py). Everything else that is done with one goes through here: it gathers the value, in a
call of its own that all ranks have to make, and from then on the value is an ordinary one behind this name: what is
written to it, or to a view of it, is what any later reader sees.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.rank.no_memory import OF_MEMORY, without_memory
from sfcompile.torch_private import (
    FakeTensor,
    no_torch_function,
    not_traced,
    same_storage,
    tree_leaves,
    tree_map,
    wrapper_tensor,
)

_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}

Gather = Callable[["ShardedValue"], torch.Tensor]
"""Collective: all of a value, as a plain contiguous tensor."""


class Held:
    """What all tensors that are one value share.

    Attributes:
        gather: how it becomes whole.
        mark: which value it is: equal on ranks that hold shards of the same one, as far as their inputs were compared.
        whole: all of it, once somebody has read it; from then on the shard is out of date.
    """

    def __init__(self, gather: Gather, mark: int) -> None:
        self.gather, self.mark = gather, mark
        self.whole: torch.Tensor | None = None


class ShardedValue(torch.Tensor):
    """A value in shards.

    Attributes:
        shard: this rank's rows, contiguous, as they were when the graph ended.
        cut: which rows each rank holds; ``rank``: whose these are.
        held: what is known of the whole value.
    """

    shard: torch.Tensor
    cut: ValueRows
    rank: int
    held: Held

    @staticmethod
    def __new__(cls: type[ShardedValue], shard: torch.Tensor, cut: ValueRows, rank: int, held: Held) -> ShardedValue:
        """``shard`` as the rows of ``rank`` of a value."""
        assert tuple(shard.shape) == cut.local_shape(rank), (shard.shape, cut, rank)
        value: ShardedValue = wrapper_tensor(cls, cut.shape, shard)
        without_memory(value, _no_memory(cut.shape))
        value.shard, value.cut, value.rank, value.held = shard, cut, rank, held
        return value

    __torch_function__ = no_torch_function

    @not_traced
    def whole(self) -> torch.Tensor:
        """All of it, as a plain tensor, the same one each time. Collective the first time."""
        if self.held.whole is None:
            self.held.whole = self.held.gather(self)
        return self.held.whole

    def shares_memory(self, other: torch.Tensor) -> bool:
        """Whether another tensor, in shards too or not, is this value or a view of it."""
        if isinstance(other, ShardedValue):
            return other.held is self.held
        return self.held.whole is not None and same_storage(self.held.whole, other)

    def rows(self) -> torch.Tensor:
        """This rank's rows as they are now, contiguous."""
        whole = self.held.whole
        if whole is None:
            return self.shard
        runs = [whole.narrow(self.cut.dim, first, length) for first, length in self.cut.owned[self.rank]]
        return torch.cat(runs, self.cut.dim) if runs else self.shard

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedValue({list(self.shape)}, {self.dtype}, cut along dim {self.cut.dim}, rank {self.rank})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["shard"], (self.cut, self.rank)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], facts: Any, size: Any, stride: Any) -> ShardedValue:
        cut, rank = facts
        return ShardedValue(inner["shard"], cut, rank, Held(_refuse_gather, 0))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.whole().clone()
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __setattr__(self, name: str, value: Any) -> None:
        """``value.data = other`` would go by dispatch, and readers would find the shard as it was."""
        if name == "data":
            raise _stays(self, ".data =")
        super().__setattr__(name, value)

    @classmethod
    @not_traced
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is done with it, beside a compiled graph."""
        if func in _SAME and isinstance(args[0], ShardedValue):
            return ShardedValue(args[0].shard, args[0].cut, args[0].rank, args[0].held)
        if torch.Tag.inplace_view in func.tags and isinstance(args[0], ShardedValue):
            raise _stays(args[0], str(func))
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs or {}))


def _no_memory(shape: Sequence[int]) -> Callable[[str], UnsupportedError]:
    """Why the memory of a value cannot be had at once."""
    return lambda name: UnsupportedError(
        f"{name}() of a value {list(shape)} that crosses between graphs in shards is asked for",
        "this rank holds some of its rows until somebody reads all of it",
        "make it whole first, on every rank: value.whole()",
    )


def _stays(value: ShardedValue, what: str) -> UnsupportedError:
    """What gives a tensor another shape or other memory in place would do so to the whole value alone, behind it."""
    return UnsupportedError(
        f"{what} gives a value {list(value.shape)} that crosses between graphs in shards another shape or other memory",
        "it stands for rows on every rank, and keeps its shape and its memory",
        "write into it (copy_()), make a view (transpose() for transpose_()), or leave options={'boundaries': 'whole'}",
    )


def _whole(value: Any) -> Any:
    if not isinstance(value, ShardedValue):
        return value
    if isinstance(value.shard, FakeTensor):  # what it would be
        return value.shard.new_empty(value.cut.shape)
    return value.whole()


def _of_whole(name: str) -> Callable[..., Any]:
    return lambda value, *args, **kwargs: getattr(value.whole(), name)(*args, **kwargs)


for _name in OF_MEMORY:
    setattr(ShardedValue, _name, _of_whole(_name))  # they read a tensor's memory and pass no dispatch


@not_traced
def with_wholes(result: Any) -> Any:
    """A result in which values in shards are whole; the same object if there are none. Collective if there are.

    In objects of dataclasses that torch does not take for containers they are made whole in place.
    """
    leaves = tree_leaves(result)
    for leaf in leaves:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                value = getattr(leaf, field.name, None)
                if (whole := with_wholes(value)) is not value:
                    object.__setattr__(leaf, field.name, whole)
    if not any(isinstance(leaf, ShardedValue) for leaf in leaves):
        return result
    return tree_map(lambda leaf: leaf.whole() if isinstance(leaf, ShardedValue) else leaf, result)


def marks_of(values: Sequence[ShardedValue]) -> int:
    """One mark for some values."""
    mark = 0
    for value in values:
        mark = zlib.crc32(value.held.mark.to_bytes(4, "little"), mark)
    return mark


def _refuse_gather(value: ShardedValue) -> torch.Tensor:
    raise UnsupportedError(
        f"a value {list(value.shape)} that crosses between graphs in shards is read in a graph of another compiler",
        "it does not know the other ranks",
        "compile both with this backend, or leave options={'boundaries': 'whole'}",
    )
