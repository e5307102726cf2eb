"""Values that share memory: a functional graph must not write to one input behind another's back, and what it returns
must be a view of an input, or of another result, where the model's own result is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.rank.sharded_value import ShardedValue
from sfcompile.torch_private import same_storage


def overlap(inputs: Sequence[Any], written: Iterable[int]) -> tuple[int, int] | None:
    """The first pair ``(written input, other input)`` whose elements may share memory, or None.

    Views that only lie between each other's elements count too: their extents overlap.
    """
    for i in written:
        first, last = _extent(inputs[i])
        for j, other in enumerate(inputs):
            if j == i or not isinstance(other, torch.Tensor):
                continue
            in_shards = next((value for value in (inputs[i], other) if isinstance(value, ShardedValue)), None)
            if in_shards is not None:  # its own memory holds nothing
                if in_shards.shares_memory(other if in_shards is inputs[i] else inputs[i]):
                    return i, j
                continue
            if not same_storage(inputs[i], other):
                continue
            start, stop = _extent(other)
            if max(first, start) < min(last, stop):
                return i, j
    return None


def refuse_overlap(inputs: Sequence[Any], written: Iterable[int], names: Sequence[str]) -> None:
    """Refuse inputs that share memory where one of them is written to.

    Args:
        names: of the inputs, for the message.

    Raises:
        UnsupportedError: two inputs overlap and the graph writes to one; the same on every rank whose inputs are alike.
    """
    pair = overlap(inputs, written)
    if pair is not None:
        one, other = (names[i] for i in pair)
        raise UnsupportedError(
            f"input {one!r} is written to in place and shares memory with input {other!r}",
            "a sharded graph reads its inputs before it writes to them, so the other one would keep its old values",
            f"pass {other!r} as a clone, or write to {one!r} outside the compiled model",
        )


class Alias(NamedTuple):
    """An output that is a view of an input: who writes to one changes the other.

    Attributes:
        output, input: their positions.
        offset: of the view's first element behind the input's, in elements.
    """

    output: int
    input: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of that input."""
        return tensor.as_strided(self.shape, self.stride, int(tensor.storage_offset()) + self.offset)


def aliases(outputs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Alias, ...]:
    """Which outputs of a traced function are views of its inputs, which begin their storages.

    Those that read the memory as another dtype, or conjugated or negated, are values of their own: left out.
    """
    views = []
    for at, value in enumerate(outputs):
        for i, tensor in enumerate(inputs):
            if not isinstance(value, torch.Tensor) or not isinstance(tensor, torch.Tensor):
                continue
            alike = (value.dtype, value.is_conj(), value.is_neg()) == (tensor.dtype, tensor.is_conj(), tensor.is_neg())
            if alike and same_storage(value, tensor):
                offset = int(value.storage_offset())
                views.append(Alias(at, i, tuple(map(int, value.shape)), tuple(map(int, value.stride())), offset))
                break
    return tuple(views)


class Shared(NamedTuple):
    """An output that is a view of another output, which covers all of the memory between its first and last element.

    Attributes:
        output, base: their positions.
        laid: strides of the base.
        offset: of the view's first element behind the base's, in elements.
    """

    output: int
    base: int
    laid: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def based(self, value: torch.Tensor) -> torch.Tensor:
        """The base laid out as the view expects it: a graph may return it in another order of its own."""
        if all(n == 1 or a == b for n, a, b in zip(value.shape, value.stride(), self.laid, strict=True)):
            return value
        return torch.empty_strided(value.shape, self.laid, dtype=value.dtype, device=value.device).copy_(value)

    def of(self, base: torch.Tensor) -> torch.Tensor:
        """The view of that base."""
        return base.as_strided(self.shape, self.stride, int(base.storage_offset()) + self.offset)


def shared_outputs(outputs: Sequence[Any], views: Iterable[int]) -> tuple[Shared, ...]:
    """Which outputs of a traced function are views of others of its outputs: who writes to one changes the other.

    Queries, keys and values that are chunks of one product share its memory and no element: they are values of their
    own. Parts of a value that overlap, where the whole value is no output, :func:`joined_outputs` finds.

    Args:
        views: outputs that are views of inputs.
    """
    left = {*views}
    plain = {i: x for i, x in enumerate(outputs) if isinstance(x, torch.Tensor) and x.numel() and i not in left}
    shared, moved = [], set[int]()
    # The largest first: what covers another is no view of it, unless both cover the same; then the first is the base.
    order = sorted(plain, key=lambda i: (-plain[i].numel(), i))
    for n, at in enumerate(order):
        value = plain[at]
        first, last = _extent(value)
        for base in order[:n]:
            whole = plain[base]
            start, stop = _extent(whole)
            alike = (value.dtype, value.is_conj(), value.is_neg()) == (whole.dtype, whole.is_conj(), whole.is_neg())
            dense = whole.numel() * whole.element_size() == stop - start and not _repeats(whole)
            if base in moved or not alike or not dense or not (start <= first and last <= stop):
                continue
            if same_storage(value, whole):
                offset = int(value.storage_offset()) - int(whole.storage_offset())
                laid, shape, stride = (tuple(map(int, t)) for t in (whole.stride(), value.shape, value.stride()))
                shared.append(Shared(at, base, laid, shape, stride, offset))
                moved.add(at)
                break
    return tuple(shared)


class Joined(NamedTuple):
    """Outputs that overlap, none of which covers the others: parts of a value that is no output itself. Or one output
    that holds elements several times.

    Attributes:
        places: of each its position, shape and strides, and where it begins in a buffer for all, in elements.
        size: elements of that buffer.
    """

    places: tuple[tuple[int, tuple[int, ...], tuple[int, ...], int], ...]
    size: int

    def put_together(self, values: list[Any]) -> None:
        """Make the outputs views of one buffer: what they hold in common they hold alike."""
        first = values[self.places[0][0]]
        buffer = torch.empty(self.size, dtype=first.dtype, device=first.device)
        for at, shape, stride, offset in self.places:
            # What is repeated along a dim is written once: every element of it is the same one.
            once = tuple(1 if step == 0 else n for n, step in zip(shape, stride, strict=True))
            rows = values[at][tuple(slice(0, n) for n in once)]
            buffer.as_strided(once, stride, offset).copy_(rows)
        for at, shape, stride, offset in self.places:
            values[at] = buffer.as_strided(shape, stride, offset)


def joined_outputs(outputs: Sequence[Any], views: Iterable[int]) -> tuple[Joined, ...]:
    """Which outputs of a traced function overlap, or hold an element several times, and are views of no output.

    Args:
        views: outputs that are views of inputs, or of other outputs.
    """
    left = {*views}
    plain = [i for i, x in enumerate(outputs) if isinstance(x, torch.Tensor) and x.numel() and i not in left]
    groups: list[list[int]] = []
    for at in plain:
        touched = [group for group in groups if any(_meet(outputs[at], outputs[other]) for other in group)]
        groups = [group for group in groups if group not in touched]
        groups.append(sorted([at, *(i for group in touched for i in group)]))
    joined = []
    for group in groups:
        if len(group) > 1 or _repeats(outputs[group[0]]):
            start = min(int(outputs[i].storage_offset()) for i in group)
            end = max(_extent(outputs[i])[1] // outputs[i].element_size() for i in group)
            places = [
                (i, tuple(map(int, x.shape)), tuple(map(int, x.stride())), int(x.storage_offset()) - start)
                for i in group for x in (outputs[i],)
            ]  # fmt: skip
            joined.append(Joined(tuple(places), end - start))
    return tuple(joined)


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether a tensor may hold an element of its memory several times (``expand``, ``unfold``)."""
    reach = 0
    for step, n in sorted((int(step), int(n)) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += (n - 1) * step
    return False


_MOST_STEPS = 100_000


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage, read alike, have an element in common.

    That is whether ``sum(step * i) = distance`` has a solution with an ``i`` in the range of each dim of either; it is
    looked for dim by dim, the longest step first, where what is left is in the reach of the shorter ones. What takes
    too long to decide counts as common.
    """
    alike = (a.dtype, a.is_conj(), a.is_neg()) == (b.dtype, b.is_conj(), b.is_neg())
    if not alike or not same_storage(a, b):
        return False
    ranges: dict[int, tuple[int, int]] = {}  # by step, the least and the largest multiple of it
    for tensor, sign in ((a, 1), (b, -1)):
        for n, step in zip(tensor.shape, tensor.stride(), strict=True):
            if n > 1 and step:
                low, high = ranges.get(int(step), (0, 0))
                reach = int(n) - 1
                ranges[int(step)] = (low, high + reach) if sign > 0 else (low - reach, high)
    steps = sorted(ranges, reverse=True)
    below, above = [0], [0]  # what the shorter steps can make at least, and at most
    for step in reversed(steps):
        below.append(below[-1] + step * ranges[step][0])
        above.append(above[-1] + step * ranges[step][1])
    tried = 0

    def reached(n: int, distance: int) -> bool:
        nonlocal tried
        if n == len(steps):
            return distance == 0
        step, rest = steps[n], len(steps) - n - 1
        low = max(ranges[step][0], -((above[rest] - distance) // step))
        high = min(ranges[step][1], (distance - below[rest]) // step)
        for times in range(low, high + 1):
            tried += 1
            if tried > _MOST_STEPS or reached(n + 1, distance - step * times):
                return True
        return False

    return reached(0, int(b.storage_offset()) - int(a.storage_offset()))


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and end of what a tensor covers of its storage."""
    if tensor.numel() == 0:
        return 0, 0
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    reach = sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * size
