"""Inputs that share memory: a functional graph must not write to one of them behind the other's back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.torch_private import same_storage


def overlap(inputs: Sequence[Any], written: Iterable[int]) -> tuple[int, int] | None:
    """The first pair ``(written input, other input)`` whose elements may share memory, or None.

    Views that only lie between each other's elements count too: their extents overlap.
    """
    for i in written:
        first, last = _extent(inputs[i])
        for j, other in enumerate(inputs):
            if j == i or not isinstance(other, torch.Tensor) or not same_storage(inputs[i], other):
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


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and end of what a tensor covers of its storage."""
    if tensor.numel() == 0:
        return 0, 0
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    reach = sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * size
