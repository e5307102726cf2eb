"""Sleep until a word of shared memory changes: Linux futexes, between processes or threads.

``wait`` tells the kernel the value it has seen; the kernel compares and goes to sleep in one step, so a store and a
``wake`` that come in between are not missed. A futex looks at 32 bits: the low half of an epoch, which is enough to see
a change. Elsewhere than on Linux ``wait`` is a short nap and ``wake`` does nothing.
"""

from __future__ import annotations

import ctypes
import sys
import time

_SYS_FUTEX = 202  # x86-64; DirectTransport refuses other processors
_WAIT, _WAKE = 0, 1
_NAP_S = 1e-4
_LINUX = sys.platform == "linux"


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


if _LINUX:
    _syscall = ctypes.CDLL(None).syscall
    _syscall.restype = ctypes.c_long
    _syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p]


def wait(address: int, seen: int, timeout_s: float) -> None:
    """Sleep while the word at ``address`` holds ``seen``, at most ``timeout_s``; may also return for no reason."""
    if not _LINUX:
        time.sleep(min(_NAP_S, timeout_s))
        return
    limit = _Timespec(int(timeout_s), int(timeout_s % 1.0 * 1e9))
    _syscall(_SYS_FUTEX, address, _WAIT, seen & 0xFFFFFFFF, ctypes.addressof(limit))


def wake(address: int) -> None:
    """Wake everyone who waits for the word at ``address``; call it after the store."""
    if _LINUX:
        _syscall(_SYS_FUTEX, address, _WAKE, 0x7FFFFFFF, None)
