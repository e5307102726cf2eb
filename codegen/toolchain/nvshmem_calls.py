# mypy: ignore-errors
"""NVSHMEM's device functions as Triton builtins.

``extern_elementwise`` refuses to run in the interpreter, but plain Python functions in a kernel's globals are called:
the loader can put stand-ins there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triton.language import core

_I64, _U64, _I32 = core.dtype("int64"), core.dtype("uint64"), core.dtype("int32")

_PUT_SIGNAL = (_I64, _I64, _I64, _I64, _U64, _I32, _I32)

SYMBOLS = {
    f"putmem_signal_nbi_{group}": (f"nvshmemx_putmem_signal_nbi_{group}", _PUT_SIGNAL, _I32)
    for group in ("block", "warp")
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

putmem_signal_nbi_warp = _declare(*SYMBOLS["putmem_signal_nbi_warp"])
"""The same, called by every thread of a warp."""
