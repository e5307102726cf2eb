"""What kernels call of NVSHMEM, and what stands in for it in the interpreter."""

from __future__ import annotations

import ctypes

import pytest
from emulated_nvshmem import DeviceCalls

from sfcompile.codegen.toolchain import nvshmem_calls
from sfcompile.codegen.toolchain.nvshmem_calls import SYMBOLS


def test_puts_land_before_their_signal() -> None:
    memory = [(ctypes.c_char * 64)() for _ in range(2)]
    base = [ctypes.addressof(entry) for entry in memory]
    emulated = DeviceCalls(lambda address, pe: address - base[0] + base[pe])
    memory[0].raw = b"abcdefgh".ljust(64, b"\0")
    emulated.putmem_signal_nbi(base[0] + 16, base[0], 8, base[0] + 32, 3, 9, 1)
    assert memory[1].raw[16:24] == b"abcdefgh" and memory[1].raw[:16] == bytes(16)
    assert ctypes.c_uint64.from_address(base[1] + 32).value == 3


def test_constants_of_the_header_are_insisted_on() -> None:
    emulated = DeviceCalls(lambda address, pe: address)
    with pytest.raises(AssertionError, match="SIGNAL_SET"):
        emulated.putmem_signal_nbi(0, 0, 0, 0, 1, 0, 0)
    assert set(emulated.names()) == set(SYMBOLS)


def test_there_is_a_put_for_all_threads_of_a_program_and_one_for_a_warp() -> None:
    """Under the name that generated text imports; a call of one is none of the other."""
    for group in ("block", "warp"):
        name = f"putmem_signal_nbi_{group}"
        assert callable(getattr(nvshmem_calls, name)) and SYMBOLS[name][0] == f"nvshmemx_{name}"
    assert {entry[1:] for entry in SYMBOLS.values()} == {SYMBOLS["putmem_signal_nbi_warp"][1:]}
