# mypy: ignore-errors
"""NVSHMEM's device functions as Triton builtins, and what stands in for them in Triton's interpreter.

``extern_elementwise`` refuses to run in the interpreter, but plain Python functions found in a kernel's globals are
called: the loader puts :class:`Emulated`'s methods there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from triton.language import core

_I64, _U64, _I32 = core.dtype("int64"), core.dtype("uint64"), core.dtype("int32")

SYMBOLS = {
    "putmem_signal_nbi_block": (
        "nvshmemx_putmem_signal_nbi_block",
        (_I64, _I64, _I64, _I64, _U64, _I32, _I32),
        _I32,
    ),
}
"""Name in generated source -> symbol of the device library, argument types, result (void is declared as int32)."""


def _declare(symbol: str, arguments: Sequence[Any], result: Any) -> Any:
    @core.extern
    def call(*args: Any, _semantic: Any = None) -> Any:
        values = [_semantic.to_tensor(arg) for arg in args]
        values = [core.cast(value, kind, _semantic=_semantic) for value, kind in zip(values, arguments, strict=True)]
        table = {tuple(arguments): (symbol, result)}
        return core.extern_elementwise("", "", values, table, is_pure=False, _semantic=_semantic)

    return call


putmem_signal_nbi_block = _declare(*SYMBOLS["putmem_signal_nbi_block"])
"""``(dst, src, nbytes, signal, value, op, pe)``: every thread of the program calls it; addresses are this PE's own."""


class Emulated:
    """Stand-ins over memory that this process can reach.

    Args:
        address_of: ``(own symmetric address, pe)`` -> address of the same place in that PE's heap.
    """

    def __init__(self, address_of: Callable[[int, int], int]) -> None:
        self._address_of = address_of

    def putmem_signal_nbi_block(
        self, dst: Any, src: Any, nbytes: Any, signal: Any, value: Any, op: Any, pe: Any
    ) -> None:
        dst, src, nbytes, signal, value, op, pe = map(_int, (dst, src, nbytes, signal, value, op, pe))
        if op != 9:
            raise ValueError(f"signal operation {op} is not NVSHMEM_SIGNAL_SET")
        ctypes.memmove(self._address_of(dst, pe), src, nbytes)
        ctypes.c_int64.from_address(self._address_of(signal, pe)).value = value  # x86 keeps the order of stores

    def names(self) -> dict[str, Callable[..., None]]:
        """What to put into a generated module's globals."""
        return {name: getattr(self, name) for name in SYMBOLS}


def _int(x: Any) -> int:
    return int(x.handle.data.flat[0]) if hasattr(x, "handle") else int(getattr(x, "value", x))
