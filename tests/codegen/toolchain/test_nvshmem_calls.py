"""What stands in for NVSHMEM in the interpreter."""

from __future__ import annotations

import ctypes

import pytest

from sfcompile.codegen.toolchain.nvshmem_calls import SYMBOLS, Emulated


class Given(Exception):
    """The poll gave up."""


def give_up() -> None:
    raise Given


def test_puts_land_before_their_signal_and_waits_see_it() -> None:
    memory = [(ctypes.c_char * 64)() for _ in range(2)]
    base = [ctypes.addressof(entry) for entry in memory]
    emulated = Emulated(lambda address, pe: address - base[0] + base[pe], give_up)
    memory[0].raw = b"abcdefgh".ljust(64, b"\0")
    emulated.putmem_signal_nbi_block(base[0] + 16, base[0], 8, base[0] + 32, 3, 9, 1)
    assert memory[1].raw[16:24] == b"abcdefgh" and memory[1].raw[:16] == bytes(16)
    peer = Emulated(lambda address, pe: address, give_up)
    peer.signal_wait_until(base[1] + 32, 5, 3)
    with pytest.raises(Given):
        peer.signal_wait_until(base[1] + 32, 5, 4)
    with pytest.raises(Given):  # compared without a sign, as NVSHMEM does: -1 is never reached
        peer.signal_wait_until(base[1] + 32, 5, -1)


def test_constants_of_the_header_are_insisted_on() -> None:
    emulated = Emulated(lambda address, pe: address, give_up)
    with pytest.raises(ValueError, match="SIGNAL_SET"):
        emulated.putmem_signal_nbi_block(0, 0, 0, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="CMP_GE"):
        emulated.signal_wait_until(0, 3, 1)
    assert set(emulated.names()) == set(SYMBOLS)
