"""Which weights a call runs with: models of one architecture share a compiled graph and differ in them alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from sfcompile.runtime.rank.calls import fingerprint


class Weights:
    """The weights of one compiled graph's calls, by their fingerprint.

    It is taken when other tensors come than at the last call, or when one of them was written to since; else a call
    costs some ten nanoseconds a tensor.
    """

    def __init__(self) -> None:
        # One reference, replaced whole: threads may ask at once, each of them gets the mark of what it gave.
        self._last: tuple[list[weakref.ref[torch.Tensor]], int, int] = ([], 0, 0)

    def mark(self, tensors: Sequence[torch.Tensor]) -> int:
        """The fingerprint of these weights (calls.fingerprint)."""
        known, versions, mark = self._last
        now = sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        same = len(tensors) == len(known) and all(
            reference() is tensor for reference, tensor in zip(known, tensors, strict=True)
        )
        if not same or versions != now:
            mark = fingerprint(tensors)
            self._last = [weakref.ref(tensor) for tensor in tensors], now, mark
        return mark
