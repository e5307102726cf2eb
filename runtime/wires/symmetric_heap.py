"""The symmetric heap: one segment per rank, the same offsets in each, two banks, signals, credits and an abort notice.

    [ header: done epoch | abort flag | left flag | abort text | left text | scratch ]
    [ signals: bank x slot, one cache line each ][ credits: rank, one cache line each ][ bank 0 ][ bank 1 ]

A chunk of epoch e lives in bank e % 2. Words are written by one side only:

    signal[bank][slot]  by the sender of the slot's chunk: the epoch that has fully arrived, and its call's tag
    done                by the segment's owner: every epoch up to this one has been read, its bank may be overwritten
    credit[rank]        the same told by that rank to the segment's owner, for GPUs: they look at their own memory only
    abort               by whoever fails first; everyone who waits looks at it
    left                by the segment's owner as its last word: how it ended

Segments that ranks of a machine share are made in shared_segments.py.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sfcompile.runtime.program.sites import LINE_BYTES

NUM_BANKS = 2
"""How many epochs lie in the heap at a time: one is read while the next is written."""
_HEADER_BYTES = 4096
_ABORT_TEXT, _LEFT_TEXT = 64, 3072
_SCRATCH_BYTES = 64
_WORDS_PER_LINE = LINE_BYTES // 8
_DONE, _ABORT, _LEFT = 0, 1, 2


def bank_of(epoch: int) -> int:
    """The bank that an epoch's chunks and signals lie in."""
    return epoch % NUM_BANKS


PLACE = (
    "epoch", "signal", "banks_at", "bank_bytes", "signals_at", "signals_bytes", "credits_at", "scratch_at", "status",
    "abort", "limit_ns", "site",
)  # fmt: skip
"""What ``place_ptr`` points to, int64: the epoch of a site's call; what its signals hold (the epoch and, below it, the
call's tag); where things lie in every rank's segment (HeapSize); the address of this rank's
status (STATUS), and of the word in which the host says that waits shall end; how long a wait may last, in
nanoseconds; and a number of the site, for reports. Epoch and signal are read from memory and are no arguments, so that
a captured CUDA graph can be replayed: what raises them is part of the graph."""
STATUS = ("stranger", "gave_up", "site", "slot", "wanted", "seen")
"""The words of a rank's status, int64, which its kernels write: the signal of a chunk of another call that came; not 0
if a wait gave up, and then the site, the slot (below 0: -1 - rank, for a credit), the word that was waited for, and
what was there instead."""


NO_LIMIT_NS = 1 << 61
"""So long a wait lasts that something else ends (73 years)."""


class Watched(NamedTuple):
    """What kernels look at while they wait: addresses of the status and of the host's abort word; a limit."""

    status: int
    abort: int
    limit_ns: int


@dataclass(frozen=True)
class HeapSize:
    """Capacity of every segment: slots per bank, bytes per bank, ranks that give credits (GPUs only)."""

    num_slots: int
    bank_bytes: int
    num_credits: int = 0

    @property
    def signals_at(self) -> int:
        """Offset of the signal words."""
        return _HEADER_BYTES

    @property
    def scratch_at(self) -> int:
        """Offset of 64 bytes that anybody may overwrite at any time and nobody reads."""
        return _HEADER_BYTES - _SCRATCH_BYTES

    @property
    def credits_at(self) -> int:
        """Offset of the credit words."""
        return self.signals_of(NUM_BANKS)

    @property
    def banks_at(self) -> int:
        """Offset of bank 0."""
        return self.credits_at + self.num_credits * LINE_BYTES

    def signals_of(self, bank: int) -> int:
        """Offset of a bank's signal words."""
        return self.signals_at + bank * self.num_slots * LINE_BYTES

    def signal_at(self, bank: int, slot: int) -> int:
        """Offset of the signal word of a slot."""
        return self.signals_of(bank) + slot * LINE_BYTES

    def credit_at(self, rank: int) -> int:
        """Offset of the word in which ``rank`` gives credit."""
        return self.credits_at + rank * LINE_BYTES

    def bank_at(self, bank: int) -> int:
        """Offset of a bank."""
        return self.banks_at + bank * self.bank_bytes

    @property
    def segment_bytes(self) -> int:
        """Bytes of one segment."""
        return self.banks_at + NUM_BANKS * self.bank_bytes

    def place(self, epoch: int, signal: int, watched: Watched, site: int = 0) -> list[int]:
        """What kernels read: PLACE.

        Args:
            signal: what signals of the epoch hold.
            site: a number of the caller's, for reports.
        """
        signals = self.signals_of(1) - self.signals_of(0)
        offsets = [self.banks_at, self.bank_bytes, self.signals_at, signals, self.credits_at, self.scratch_at]
        return [epoch, signal, *offsets, *watched, site]

    def holds(self, other: HeapSize) -> bool:
        """Whether ``other`` fits in."""
        pairs = ((self.num_slots, other.num_slots), (self.bank_bytes, other.bank_bytes))
        return all(own >= its for own, its in (*pairs, (self.num_credits, other.num_credits)))

    def grown(self, other: HeapSize) -> HeapSize:
        """The smallest size that holds both."""
        return HeapSize(
            max(self.num_slots, other.num_slots),
            max(self.bank_bytes, other.bank_bytes),
            max(self.num_credits, other.num_credits),
        )


def view_at(memory: torch.Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that lies ``start`` bytes behind the beginning of ``memory`` (uint8)."""
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


class Segment:
    """One rank's memory as this process sees it.

    Attributes:
        address: where the segment lies in this process; ``done_address``: where its done word does.
    """

    def __init__(self, buffer: mmap.mmap | bytearray, size: HeapSize) -> None:
        self._buffer = buffer
        self.size = size
        self._bytes = torch.frombuffer(buffer, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()
        self.done_address = self.address + 8 * _DONE
        self._signals_at = tuple(self.address + size.signals_of(bank) for bank in range(NUM_BANKS))
        self._views: dict[tuple[int, int, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        words = np.frombuffer(buffer, dtype=np.int64)
        self._header: NDArray[np.int64] = words[: _HEADER_BYTES // 8]
        first = size.signals_at // 8
        lines = words[first : first + NUM_BANKS * size.num_slots * _WORDS_PER_LINE]
        self.signals: NDArray[np.int64] = lines.reshape(NUM_BANKS, size.num_slots, _WORDS_PER_LINE)[:, :, 0]

    def signal_address(self, bank: int, slot: int) -> int:
        """Where a signal lies in this process."""
        return self._signals_at[bank] + slot * LINE_BYTES

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of the bank at ``offset`` bytes; kept, for every step asks for the same ones."""
        key = (bank, offset, tuple(shape), dtype)
        view = self._views.get(key)
        if view is None:
            with torch.inference_mode(False):  # a view made in it could be written in it only, and it is kept
                view = view_at(self._bytes, self.size.bank_at(bank) + offset, shape, dtype)
                self._views[key] = view
        return view

    @property
    def done(self) -> int:
        """Every epoch up to this one has been read by the owner."""
        return int(self._header[_DONE])

    @done.setter
    def done(self, epoch: int) -> None:
        self._header[_DONE] = epoch

    def abort(self, text: str) -> None:
        """Tell the owner that somebody failed; the first notice stays."""
        if self._header[_ABORT] == 0:
            self._write(_ABORT, _ABORT_TEXT, text, _LEFT_TEXT)

    @property
    def aborted(self) -> str | None:
        """The abort notice, if any."""
        return self._read(_ABORT, _ABORT_TEXT)

    def leave(self, text: str) -> None:
        """The owner's last word: it ends, and why; what it has stored before is seen by whoever sees the word."""
        self._write(_LEFT, _LEFT_TEXT, text, _HEADER_BYTES - _SCRATCH_BYTES)

    @property
    def left(self) -> str | None:
        """The owner's last word, if it has left."""
        return self._read(_LEFT, _LEFT_TEXT)

    def _write(self, flag: int, start: int, text: str, end: int) -> None:
        raw = text.encode(errors="replace")[: end - start]
        self._header.view(np.uint8)[start : start + len(raw)] = np.frombuffer(raw, np.uint8)
        self._header[flag] = len(raw)  # after the text: whoever sees the length sees the text (x86 keeps stores)

    def _read(self, flag: int, start: int) -> str | None:
        length = int(self._header[flag])
        if length == 0:
            return None
        return self._header.view(np.uint8)[start : start + length].tobytes().decode(errors="replace")


def local_segment(size: HeapSize) -> Segment:
    """A segment in this process's own memory, for ranks that are threads."""
    return Segment(bytearray(size.segment_bytes), size)
