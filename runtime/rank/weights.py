"""Which weights a call runs with: models of one architecture share a compiled graph and differ in them alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from sfcompile.runtime.rank.calls import fingerprint


class Weights:
    """The weights of one compiled graph's calls, by their fingerprint.

    It is taken when other tensors come than at the last call, or when one of them was written to since, or (on CPUs)
    was given other memory; else a call costs a fraction of a microsecond a tensor. A write through ``.data`` into the
    same memory leaves no trace in torch and is not seen here.
    """

    def __init__(self) -> None:
        # One reference, replaced whole: threads may ask at once, each of them gets the mark of what it gave.
        self._last: tuple[list[weakref.ref[torch.Tensor]], int, int] = ([], 0, 0)

    def mark(self, tensors: Sequence[torch.Tensor]) -> int:
        """The fingerprint of these weights (calls.fingerprint)."""
        known, versions, mark = self._last
        # Versions only grow, and memory hardly moves by just as much.
        now = sum(map(_trace, tensors))
        same = len(tensors) == len(known) and all(
            reference() is tensor for reference, tensor in zip(known, tensors, strict=True)
        )
        if not same or versions != now:
            mark = fingerprint(tensors)
            self._last = [weakref.ref(tensor) for tensor in tensors], now, mark
        return mark


def _trace(tensor: torch.Tensor) -> int:
    """A number that another memory or another version changes. On GPUs, where reading the values makes the host wait,
    offloading gives weights other memory at every step: there only the version counts."""
    memory = tensor.data_ptr() if tensor.device.type == "cpu" else 0
    return memory + (0 if tensor.is_inference() else tensor._version)
