"""Calls have names: which program a rank runs for the how-manieth time, and with which inputs.

A call's *tag* goes out with every chunk (runtime/wires/transport.py), so that chunks of different calls never meet in
silence: ranks that make their calls in another order, skip one, or are given other inputs find out at the first chunk.
Calls of one process queue: threads take turns, and if they take them differently on different ranks the tags say so.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.wires.transport import TAG_BITS
from sfcompile.torch_private import as_of_torch, is_of_torch

_LIKE = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""For torch's dtypes that cannot be indexed, one of the same bytes that can."""

SAMPLES = 64
"""So many elements of each input make its fingerprint."""


@dataclass(frozen=True)
class Call:
    """One run of a program on this rank.

    Attributes:
        number: how many calls this rank has begun.
        inputs: fingerprint of the inputs; 0 where they are not looked at.
    """

    program: str
    number: int
    inputs: int

    def tag(self, site: int = -1) -> int:
        """What tells a chunk of this call's ``site`` (-1: of any) from others, below 2**TAG_BITS."""
        return zlib.crc32(f"{self.program}/{self.number}/{self.inputs}/{site}".encode()) & (1 << TAG_BITS) - 1

    def __str__(self) -> str:
        return f"call {self.number} of program {self.program[:8]} with inputs {self.inputs:08x}"


def fingerprint(tensors: Sequence[torch.Tensor]) -> int:
    """A number that differs, nearly always, between inputs that differ: up to SAMPLES elements of each, and its shape.

    Elements are taken at equal steps along the flattened tensor, the first and the last among them, so that other
    noise, another timestep or another prompt is seen. Cost: some microseconds a tensor, whatever its size.
    """
    mark = 0
    for value in tensors:
        plain = value if is_of_torch(value) else as_of_torch(value)
        tensor = plain.detach().resolve_conj().resolve_neg()  # that may be a copy, which lies otherwise
        places, span, geometry = _places(tuple(tensor.shape), tensor.stride(), tensor.dtype)
        mark = zlib.crc32(geometry, mark)
        if places.numel():
            flat = tensor.as_strided((span,), (1,))
            if tensor.dtype in _LIKE:
                flat = flat.view(_LIKE[tensor.dtype])
            taken = flat.index_select(0, places.to(tensor.device)).cpu()
            mark = zlib.crc32(taken.view(torch.uint8).numpy().data, mark)
    return mark


def sampled_places(tensor: torch.Tensor) -> list[int]:
    """Where the elements that make a tensor's fingerprint lie, in elements from its first one."""
    places: list[int] = _places(tuple(tensor.shape), tensor.stride(), tensor.dtype)[0].tolist()
    return places


@lru_cache(maxsize=1024)
def _places(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, int, bytes]:
    """Where the sampled elements lie behind the first one, how far the last reaches, and the geometry as bytes."""
    total = math.prod(shape)
    offsets = []
    for i in range(min(SAMPLES, total)):
        left, place = i * (total - 1) // max(1, min(SAMPLES, total) - 1), 0
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            left, index = divmod(left, size)
            place += index * step
        offsets.append(place)
    places = torch.tensor(offsets, dtype=torch.int64, device="cpu")  # whatever the caller's default device is
    return places, max(offsets, default=0) + 1, f"{shape}{dtype}".encode()


class Calls:
    """The calls of one rank, one at a time.

    Attributes:
        current: the call under way, from its first op to its last; None between calls.
    """

    def __init__(self) -> None:
        self.current: Call | None = None
        self._count = 0
        self._turn = threading.Lock()
        self._caller = 0  # the thread whose call is under way; no thread has this number

    @property
    def turn(self) -> threading.Lock:
        """Held while a call is under way.

        Raises:
            UnsupportedError: by this thread, which would wait for itself for ever.
        """
        if self._caller == threading.get_ident():
            raise UnsupportedError(
                "a compiled model is called, or compiled, inside a call of a compiled model on the same ranks",
                "an operator or a hook that runs inside a graph does it, and ranks run one call at a time",
                "call it before or after, write both as one model, or leave the inner one uncompiled",
            )
        return self._turn

    @contextmanager
    def under_way(self, program: str, inputs: int) -> Iterator[Call]:
        """One call; waits for the call of another thread to end."""
        with self.turn:
            self._count += 1
            self.current, self._caller = Call(program, self._count, inputs), threading.get_ident()
            try:
                yield self.current
            finally:
                self.current, self._caller = None, 0

    @property
    def count(self) -> int:
        """How many calls this rank has begun."""
        return self._count

    def restart(self, count: int) -> None:
        """Go on from a number that all ranks agreed on; a call that is under way gets it."""
        self._count = count
        if self.current is not None:
            self.current = replace(self.current, number=count)


class Guard:
    """Tells of an error that leaves the body. Every node of a graph that talks to other ranks runs in one: a context
    made of a generator would cost more than it."""

    __slots__ = ("_fail",)

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        self._fail = fail

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)
