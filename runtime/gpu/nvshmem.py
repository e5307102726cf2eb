"""NVSHMEM through nvshmem4py: joined by all ranks of the job, symmetric memory, the table of peers.

The host library is initialised with a unique id that rank 0 makes and the job's store carries (128 bytes). Low-level
bindings are used where the high-level calls do more than they say: puts of parts of a buffer, peers' addresses that
keep no reference, the state of a kernel's module.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from sfcompile.errors import HeapError, StreamFusionError, UnsupportedError
from sfcompile.runtime.gpu.together import Share, together, waited
from sfcompile.runtime.program.sites import LINE_BYTES
from sfcompile.runtime.rank.bounded import within
from sfcompile.runtime.wires.symmetric_heap import HeapSize, view_at

T = TypeVar("T")
SIGNAL_SET = 9
_log = logging.getLogger("sfcompile")
IBGDA = "NVSHMEM_IB_ENABLE_IBGDA"
"""Environment variable of NVSHMEM: kernels drive the network card themselves, by code that links of 3.4.5 lack."""
_INSTALL = "pip install nvshmem4py-cu13 nvidia-nvshmem-cu13==3.4.5"


def load() -> tuple[Any, Any]:
    """nvshmem4py's modules ``nvshmem.core`` and ``nvshmem.bindings``.

    Raises:
        UnsupportedError: one of the packages, or a library that they load, is missing; says what to install.
    """
    try:
        import nvshmem.bindings
        import nvshmem.core
    except Exception as error:  # a library that is not found is no ImportError
        raise UnsupportedError(
            f"transport='nvshmem' needs nvshmem4py, which cannot be imported ({' '.join(str(error).split())})",
            "GPU ranks store into each other's memory through NVSHMEM's symmetric heap",
            _INSTALL,
        ) from error
    return nvshmem.core, nvshmem.bindings


def refuse_ibgda() -> None:
    """Whatever is set and does not begin like "0", "no" or "false" counts as yes for NVSHMEM.

    Raises:
        UnsupportedError: kernels would have to drive the network card.
    """
    value = os.environ.get(IBGDA)
    if value is not None and value[:1].lower() not in ("0", "n", "f"):
        raise UnsupportedError(
            f"{IBGDA}={value} in the environment",
            "the device code that generated kernels are linked with (NVSHMEM 3.4.5's bitcode) has no IBGDA in it: "
            "their puts to other machines would be lost",
            f"unset {IBGDA}, or set it to 0: NVSHMEM's proxy thread then drives the network card",
        )


class Nvshmem:
    """This process as one PE. One per process; PE numbers are the job's ranks.

    Args:
        share: all-gather of Python values between the ranks.
        modules: what emulates :func:`load`'s result on machines without a GPU, in the dry run of
            benchmarks/gpu_check.py and in tests: only a job of GPUs could start the real ones.
        limit_s: how long the start may take. What fails on one rank, or lasts longer there, fails on all of them.

    Attributes:
        broken: what has failed on some ranks and not on others; "": nothing. From then on their memory differs, and
            offsets into it name other places: none is made or given back any more. The same on every rank.

    Raises:
        UnsupportedError: nvshmem4py is missing on some rank, NVSHMEM is set up there for what kernels cannot do, or
            the ranks have several releases of it.
        HeapError: NVSHMEM does not start.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        share: Share,
        modules: tuple[Any, Any] | None = None,
        limit_s: float = 60.0,
    ) -> None:
        self.rank, self.num_ranks, self.device = rank, num_ranks, device
        self._share, self._limit_s = share, limit_s
        self.broken = ""
        self._stranded: list[torch.Tensor] = []

        def loaded() -> tuple[Any, Any]:
            refuse_ibgda()
            return modules or load()

        self.core, self.bindings = together(share, "load NVSHMEM", loaded)
        release = together(share, "ask for NVSHMEM's release", self.version)
        self._refuse_several(share(release, "compare releases of NVSHMEM"))
        uid = together(share, "make NVSHMEM's unique id", self._unique_id)
        raw = np.asarray(uid._data).view(np.uint8).reshape(-1)
        raw[:] = np.frombuffer(share(raw.tobytes(), "exchange NVSHMEM's unique id")[0], np.uint8)
        together(share, "start NVSHMEM", lambda: self._start(uid))

    def _refuse_several(self, releases: Sequence[str]) -> None:
        """Every rank sees the same list."""
        if len(set(releases)) > 1:
            listed = ", ".join(f"rank {rank} {release}" for rank, release in enumerate(releases))
            refusal = UnsupportedError(
                f"the ranks have several releases of NVSHMEM: {listed}",
                "its ranks describe their memory to each other, and releases do so differently",
                "install the same nvidia-nvshmem wheel on every machine",
                rank=self.rank,
            )
            refusal.on_every_rank = True
            raise refusal

    def _unique_id(self) -> Any:
        try:
            return self.core.get_unique_id(empty=self.rank != 0)
        except Exception as error:
            raise self._not_started(error) from error

    def _start(self, uid: Any) -> None:
        """Join; the library itself waits for a rank that does not come without end."""

        def join() -> None:
            self.core.init(
                device=self._current_device(), uid=uid, rank=self.rank, nranks=self.num_ranks, initializer_method="uid"
            )

        try:
            within(self._limit_s, join)
            self._current_device()  # of this thread too: join() ran in another
        except Exception as error:
            raise self._not_started(error) from error

    def _not_started(self, error: Exception) -> HeapError:
        return HeapError(
            f"NVSHMEM does not start on rank {self.rank}: {error}",
            "it needs a GPU per rank, and a network interface that all ranks reach for its bootstrap",
            "set NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME to that interface; NVSHMEM_DEBUG=INFO says more",
            rank=self.rank,
        )

    def _current_device(self) -> Any:
        if self.device.type != "cuda":
            return None
        from cuda.core import Device

        torch.cuda.set_device(self.device)
        device = Device(self.device.index or 0)
        device.set_current()
        return device

    def version(self) -> str:
        """Release of the host library, as "3.4.5".

        Raises:
            HeapError: the library does not say.
        """
        try:
            return str(self.core.get_version().libnvshmem_version)
        except Exception as error:
            raise self._not_started(error) from error

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Collective: zeroed symmetric memory, uint8 [nbytes]; give it back with :meth:`free`.

        Raises:
            HeapError: no room, or a rank does not come, or memory has become :attr:`broken`; on every rank.
            UnsupportedError: another rank has none; on every rank.
        """
        if self.broken:
            failure = HeapError(
                f"NVSHMEM has no more memory to give: before, on some ranks and not on others, {self.broken}",
                "symmetric memory lies at the same offset on every rank, and no longer does",
                "start the job again; NVSHMEM_SYMMETRIC_SIZE, or fewer tokens per call, if there was no room",
                rank=self.rank,
            )
            failure.on_every_rank = True
            raise failure
        how = ["made"]

        def make() -> torch.Tensor:
            self._current_device()  # of this thread
            memory: torch.Tensor = self.core.tensor((nbytes,), dtype=torch.uint8)
            return memory

        def memory_in_time() -> torch.Tensor:
            try:
                memory = self._in_time(
                    make,
                    f"a symmetric heap of {nbytes / 2**20:.1f} MiB per rank cannot be had from NVSHMEM",
                    "every rank keeps two banks of chunk buffers in symmetric memory, and all make them together",
                    "if there is no room, set NVSHMEM_SYMMETRIC_SIZE to more, or use fewer tokens per call",
                )
            except HeapError as error:
                how[0] = "late" if waited(error) else "refused"
                raise
            self._stranded.append(memory)  # until every rank has some: nothing may give it back alone
            return memory

        try:
            memory = together(self._share, "make the symmetric heap", memory_in_time)
        except StreamFusionError as error:
            if error.on_every_rank and set(self._share(how[0], "compare their symmetric heaps")) != {"refused"}:
                self.broken = error.what
            raise
        self._stranded.clear()
        memory.zero_()
        return memory

    def free(self, memory: torch.Tensor) -> None:
        """Collective: the end of what :meth:`allocate` gave.

        Raises:
            HeapError: NVSHMEM refuses, or a rank does not come; on this rank.
        """

        def give_back() -> None:
            self._current_device()  # of this thread
            self.core.free_tensor(memory)

        self._in_time(
            give_back,
            f"a symmetric heap of {memory.nbytes / 2**20:.1f} MiB per rank is not given back",
            "all ranks give it back together: one has not come, or has failed",
            "look at the logs of the other ranks",
        )

    def give_back(self, memory: torch.Tensor) -> None:
        """:meth:`free`, on every rank or on none.

        Raises:
            HeapError: NVSHMEM refuses, or a rank does not come; on every rank, and memory is :attr:`broken`.
            UnsupportedError: it is so on another rank.
        """
        try:
            together(self._share, "give a symmetric heap back", lambda: self.free(memory))
        except StreamFusionError as error:
            self.broken = error.what
            raise

    def _in_time(self, work: Callable[[], T], what: str, why: str, cure: str) -> T:
        """What all ranks do together, if it is done before the limit.

        Raises:
            HeapError: NVSHMEM refuses, or a rank does not come.
        """
        try:
            return within(self._limit_s, work)
        except Exception as error:
            said = " ".join(str(error).split())
            raise HeapError(f"{what} ({said})", why, cure, rank=self.rank) from error

    def addresses(self, memory: torch.Tensor) -> list[int]:
        """Where loads and stores of this rank reach every rank's copy of a symmetric tensor; 0: nowhere.

        Raises:
            HeapError: the library does not say.
        """
        base = memory.data_ptr()
        try:
            return [base if pe == self.rank else int(self.bindings.ptr(base, pe)) for pe in range(self.num_ranks)]
        except Exception as error:
            raise self._not_started(error) from error

    def close(self) -> None:
        """Collective: leave NVSHMEM. If a rank does not come to leave with this one, this one leaves alone."""

        def leave() -> None:
            self._current_device()
            self.core.finalize()

        try:
            within(self._limit_s, leave)
        except TimeoutError as error:
            _log.warning("rank %d leaves NVSHMEM alone: %s from the other ranks", self.rank, error)


class NvshmemHeap:
    """One generation of the symmetric heap on GPUs; the layout is runtime/wires/symmetric_heap.py's.

    Attributes:
        table: int64 [ranks, 3] on the device: see HEAP in codegen/kernels/text.py.
        domains: by rank of the job; ranks of equal number reach each other's memory by load and store.
    """

    def __init__(self, nvshmem: Nvshmem, size: HeapSize, machine_of: Sequence[int], share: Share) -> None:
        self.size = size
        self._nvshmem = nvshmem
        self._memory = nvshmem.allocate(size.segment_bytes)
        base = self._memory.data_ptr()
        try:
            reached = together(share, "find each other's memory", lambda: nvshmem.addresses(self._memory))
        except StreamFusionError as error:
            if error.on_every_rank:
                nvshmem.give_back(self._memory)
            raise
        self.domains = domains_of(share([bool(address) for address in reached], "map the heap"), machine_of)
        mine = self.domains[nvshmem.rank]
        rows = [(address if self.domains[rank] == mine else 0, rank, base) for rank, address in enumerate(reached)]
        self.table = torch.tensor(rows, dtype=torch.int64, device=nvshmem.device)
        share(None, "zero the heap")  # nobody puts into a heap that its owner has not zeroed yet

    @property
    def address(self) -> int:
        """Where this rank's segment lies."""
        return self._memory.data_ptr()

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of a bank at ``offset`` bytes."""
        return view_at(self._memory, self.size.bank_at(bank) + offset, shape, dtype)

    def words(self, offset: int, count: int) -> torch.Tensor:
        """Words of this rank's segment that lie on cache lines of their own: int64 [count]."""
        return view_at(self._memory, offset, (count, LINE_BYTES // 8), torch.int64)[:, 0]

    def give_back(self) -> None:
        """Collective: give the memory back, on every rank or on none."""
        self._nvshmem.give_back(self._memory)

    def close(self) -> None:
        """Collective, at the end: give the memory back, and tell nobody if that fails."""
        self._nvshmem.free(self._memory)


def domains_of(reached: Sequence[Sequence[bool]], machine_of: Sequence[int]) -> tuple[int, ...]:
    """Which ranks reach each other's memory, the same answer on every rank.

    Ranks of a machine are a domain if all of them reach all of them; else each is its own, and NVSHMEM carries what
    they send each other.

    Args:
        reached: ``reached[a][b]``: whether rank a maps rank b's memory.
    """
    domains = []
    for rank, machine in enumerate(machine_of):
        together = [other for other, home in enumerate(machine_of) if home == machine]
        whole = all(reached[a][b] for a in together for b in together)
        domains.append(together[0] if whole else rank)
    return tuple(domains)
