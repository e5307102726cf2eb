"""Runs generated kernels on CPUs in Triton's interpreter, with what it lacks: right bf16, polls that give up.

The interpreter holds bf16 as bit patterns and multiplies those (Triton 3.6 to 3.9: wrong, and no error), and cuts off
what a GPU rounds to the nearest bf16. It knows nothing of other processes, so a poll would spin for ever on a core that
the awaited rank may need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton.ir import ATOMIC_OP
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction

with suppress(ImportError):
    import triton.experimental.gluon  # noqa: F401  # else it is imported at the first launch, while tl is swapped

Poll = Callable[[], None]
"""Called at every look in vain while a kernel waits; gives the core away, raises to give up. One that has a method
``arrived`` is told of what has come."""


@contextmanager
def interpreting(poll: Poll) -> Iterator[None]:
    """Inside, kernels loaded for the interpreter may be launched. Not for several threads at a time."""
    dot, rmw, cast = InterpreterBuilder.create_dot, InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.cast_impl
    arrived = getattr(poll, "arrived", lambda: None)
    last: list[int] = []

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def create_atomic_rmw(self: Any, op: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        before = rmw(self, op, pointer, value, *rest)
        if op == ATOMIC_OP.OR:  # a look at the status, between polls
            return before
        if value.data.any():
            arrived()
        else:  # an add of 0 is a poll
            seen = [int(pointer.data.flat[0]), int(before.data.flat[0])]
            if seen == last:
                poll()
            else:
                arrived()
            last[:] = seen
        return before

    def cast_impl(self: Any, value: Any, target: Any) -> Any:
        return (
            _rounded(value) if (value.dtype, target.scalar) == (tl.float32, tl.bfloat16) else cast(self, value, target)
        )

    language = [(owner, dict(vars(owner))) for owner in _language()]
    # What triton.language defines with @jit (max, sum, zeros, ...) was compiled for a GPU when it was imported.
    for module in _MODULES:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))
    InterpreterBuilder.create_dot, InterpreterBuilder.create_atomic_rmw = create_dot, create_atomic_rmw
    InterpreterBuilder.cast_impl = cast_impl
    try:
        yield
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.create_atomic_rmw = dot, rmw
        InterpreterBuilder.cast_impl = cast
        # Triton swaps parts of its language for each launch, and for every call of a device function without putting
        # them back: nothing could be compiled in this process any more.
        for owner, entries in language:
            _put_back(owner, entries)


_MODULES = (tl, tl.standard, tl.math, tl.core)


def _language() -> list[Any]:
    """Modules and classes of triton.language whose entries the interpreter swaps."""
    classes = {
        value
        for module in _MODULES
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("triton.language")
    }
    return [*_MODULES, *classes]


def _put_back(owner: Any, entries: dict[str, Any]) -> None:
    now = dict(vars(owner))
    if isinstance(owner, type):  # names added to modules are what rewritten functions read
        for name in now.keys() - entries.keys():
            delattr(owner, name)
    for name, value in entries.items():
        if now.get(name) is not value:
            setattr(owner, name, value)


def _rounded(handle: Any) -> Any:
    """fp32 to the nearest bf16, ties to even, as GPUs do (NaN stays NaN)."""
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return type(handle)(np.where(np.isnan(handle.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)


def _widened(handle: Any) -> Any:
    if handle.dtype != tl.bfloat16:
        return handle
    return type(handle)((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
