"""Which weights a call runs with: models of one architecture share a compiled graph and differ in them alone."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch

from sfcompile.runtime.rank.calls import fingerprint, sampled_places

_WORDS: dict[int, Any] = {
    1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64, 16: ctypes.c_uint64,
}  # fmt: skip
"""By the bytes of an element, what reads it (of sixteen: the first half)."""


_KEPT = 256
"""Of so many models, or blocks of one, that share a graph what was read is kept."""


class _Known(NamedTuple):
    """The weights of an earlier call.

    Attributes:
        traces: of each what torch knows of it, see :func:`_trace`.
        words: some elements in their memory, good as long as the traces are; ``values``: what they held.
    """

    tensors: list[weakref.ref[torch.Tensor]]
    traces: list[tuple[int, int]]
    words: list[Any]
    values: list[int]
    mark: int


class Weights:
    """The weights of one compiled graph's calls, by their fingerprint.

    It is taken when other tensors come than at the last calls, when one of them was written to since, or (on CPUs) was
    given other memory or holds other values. Writes that torch counts are all seen. Those that it does not, through
    ``.data`` or in inference mode, are seen by two elements of every weight, which each call reads: a write to a whole
    weight shows there, one to a few of its rows need not. All that costs about a microsecond a tensor. At every call
    the same elements are read, so that ranks which write alike see it at the same call.
    """

    def __init__(self) -> None:
        # By the weights' ids, those asked for last at the end. Each step on it is one of a dict's own: threads may ask
        # at once, each of them gets the mark of what it gave.
        self._known: dict[tuple[int, ...], _Known] = {}

    def mark(self, tensors: Sequence[torch.Tensor]) -> int:
        """The fingerprint of these weights (calls.fingerprint)."""
        key = tuple(map(id, tensors))
        known = self._known.pop(key, None)
        if known is not None and not _are(known.tensors, tensors):  # an id may be another tensor's by now
            known = None
        traces = [_trace(tensor) for tensor in tensors]
        # In this order: where a weight has other memory, what the words point to may be gone.
        if known and traces == known.traces and [word.value for word in known.words] == known.values:
            self._known[key] = known
            return known.mark
        words = [word for tensor in tensors if tensor.is_cpu for word in _words(tensor)]
        references = [weakref.ref(tensor) for tensor in tensors]
        fresh = _Known(references, traces, words, [word.value for word in words], fingerprint(tensors))
        self._known[key] = fresh
        for oldest in list(self._known)[:-_KEPT]:
            self._known.pop(oldest, None)
        return fresh.mark


def _are(references: Sequence[weakref.ref[torch.Tensor]], tensors: Sequence[torch.Tensor]) -> bool:
    same = map(is_, (reference() for reference in references), tensors)
    return len(references) == len(tensors) and all(same)


def _trace(tensor: torch.Tensor) -> tuple[int, int]:
    """Memory and version. On GPUs, where reading the values makes the host wait, offloading gives weights other memory
    at every step: there only the version counts."""
    memory = tensor.data_ptr() if tensor.is_cpu else 0
    return memory, 0 if tensor.is_inference() else tensor._version


def _words(tensor: torch.Tensor) -> list[Any]:
    """Two of the elements that make the fingerprint, a third and two thirds of the way, where they lie in memory."""
    places, size = sampled_places(tensor), tensor.element_size()
    memory = tensor.data_ptr()
    if not places or not memory:
        return []
    chosen = {places[len(places) // 3], places[2 * len(places) // 3]}
    return [_WORDS[size].from_address(memory + size * place) for place in sorted(chosen)]
