"""NVSHMEM for tests: PEs are processes of this machine, symmetric memory lies in /dev/shm."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sfcompile.runtime.gpu.nvshmem import SIGNAL_SET


class Library:
    """Both modules of nvshmem4py in one object, for one PE.

    Args:
        meet: a barrier of all PEs.
        reaches: whether ``ptr`` finds the memory of another PE; puts and signals always do.
    """

    def __init__(self, rank: int, meet: Callable[[], object], reaches: Callable[[int], bool]) -> None:
        self.rank, self._meet, self._reaches = rank, meet, reaches
        self.num_ranks = 0
        self.job = ""
        self.finalized = False
        self.modules: list[int] = []
        self._allocations = 0
        self._mapped: dict[int, list[torch.Tensor]] = {}  # own base address -> every PE's copy as this process sees it

    # ------------------------------------------------------------------ nvshmem.core

    def get_unique_id(self, empty: bool) -> Any:
        raw = np.zeros(128, np.uint8) if empty else np.frombuffer(os.urandom(128), np.uint8).copy()
        return SimpleNamespace(_data=raw)

    def init(self, device: object, uid: Any, rank: int, nranks: int, initializer_method: str) -> None:
        assert initializer_method == "uid" and rank == self.rank
        self.num_ranks, self.job = nranks, uid._data[:8].tobytes().hex()

    def get_version(self) -> Any:
        return SimpleNamespace(libnvshmem_version="3.4.5")

    def tensor(self, shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
        (nbytes,) = shape
        self._allocations += 1
        # Not a name of ours: a job beside this one may just be looking whether there are any.
        paths = [f"/dev/shm/emulated-pe-{self.job}-{self._allocations}-{pe}" for pe in range(self.num_ranks)]
        with open(paths[self.rank], "wb") as file:
            file.write(os.urandom(nbytes))  # what the last owner left there
        try:
            self._meet()
            copies = [torch.frombuffer(_map_file(path, nbytes), dtype=torch.uint8) for path in paths]
            self._meet()
        finally:
            os.unlink(paths[self.rank])
        own = copies[self.rank]
        self._mapped[own.data_ptr()] = copies
        return own.view(dtype)

    def free_tensor(self, tensor: torch.Tensor) -> None:
        del self._mapped[tensor.data_ptr()]

    def finalize(self) -> None:
        assert not self._mapped, "memory was not given back"
        self.finalized = True

    # ------------------------------------------------------------------ nvshmem.bindings

    def ptr(self, address: int, pe: int) -> int:
        return self.address_of(address, pe) if self._reaches(pe) else 0

    def cumodule_init(self, module: int) -> int:
        self.modules.append(module)
        return 0

    def cumodule_finalize(self, module: int) -> int:
        self.modules.remove(module)
        return 0

    def putmem_signal_nbi_on_stream(
        self, dst: int, src: int, nbytes: int, signal: int, value: int, op: int, pe: int, stream: int
    ) -> None:
        assert op == SIGNAL_SET
        ctypes.memmove(self.address_of(dst, pe), src, nbytes)
        self.signal_op_on_stream(signal, value, op, pe, stream)

    def signal_op_on_stream(self, signal: int, value: int, op: int, pe: int, stream: int) -> None:
        assert op == SIGNAL_SET and value >= 0
        ctypes.c_uint64.from_address(self.address_of(signal, pe)).value = value

    # ------------------------------------------------------------------ common

    def address_of(self, address: int, pe: int) -> int:
        for base, copies in self._mapped.items():
            if base <= address < base + copies[self.rank].numel():
                return copies[pe].data_ptr() + address - base
        raise AssertionError(f"address {address:#x} is not symmetric")


class DeviceCalls:
    """NVSHMEM's functions on the device, for kernels in Triton's interpreter, over memory that this process can reach.

    Args:
        address_of: ``(own symmetric address, pe)`` -> address of the same place in that PE's heap.
    """

    def __init__(self, address_of: Callable[[int, int], int]) -> None:
        self._address_of = address_of

    def putmem_signal_nbi(self, dst: Any, src: Any, nbytes: Any, signal: Any, value: Any, op: Any, pe: Any) -> None:
        """A program is one thread here: there is one put for every group of threads."""
        dst, src, nbytes, signal, value, op, pe = map(_int, (dst, src, nbytes, signal, value, op, pe))
        assert op == SIGNAL_SET, f"signal operation {op} is not NVSHMEM_SIGNAL_SET"
        ctypes.memmove(self._address_of(dst, pe), src, nbytes)
        ctypes.c_int64.from_address(self._address_of(signal, pe)).value = value  # x86 keeps the order of stores

    def names(self) -> dict[str, Callable[..., None]]:
        """What to put into a generated module's globals."""
        from sfcompile.codegen.toolchain.nvshmem_calls import SYMBOLS  # imports Triton

        return dict.fromkeys(SYMBOLS, self.putmem_signal_nbi)


def _int(x: Any) -> int:
    return int(x.handle.data.flat[0]) if hasattr(x, "handle") else int(getattr(x, "value", x))


def _map_file(path: str, nbytes: int) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), nbytes)
