"""Memory that the GPUs of a machine map from each other: torch's symmetric memory.

torch exchanges handles of the memory between the processes (CUDA IPC, or fabric handles over NVLink) and gives each a
tensor of every other's memory. Its signals are not used: a wait for one that never comes ends in an error of CUDA's,
which says neither who was waited for nor what to do. Ours are words of the memory itself (words.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from sfcompile.errors import HeapError, UnsupportedError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.bounded import within
from sfcompile.torch_private import symmetric_memory


class SharedMemory(Protocol):
    """One allocation on every rank of a machine.

    Attributes:
        segments: by rank of the job: its memory as this rank reaches it, uint8; None: out of reach.
    """

    segments: Sequence[torch.Tensor | None]


class TorchMemory:
    """A :class:`SharedMemory` of torch's. Making one is collective among the machine's ranks.

    Args:
        rank: this one, of the job.
        num_ranks: of the job.
        neighbours: the machine's ranks, in the group's order.
        group: their process group.

    Raises:
        UnsupportedError: this torch, or the GPUs, cannot do it.
        HeapError: no room.
    """

    def __init__(
        self,
        nbytes: int,
        rank: int,
        num_ranks: int,
        neighbours: Sequence[int],
        group: Any,
        device: torch.device,
    ) -> None:
        library = symmetric_memory()
        try:
            memory = library.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise HeapError(
                f"{nbytes / 2**20:.1f} MiB of symmetric memory cannot be had on {device} ({error})",
                "every rank keeps two banks of chunk buffers there",
                "use fewer tokens per call, or leave more of the GPU's memory free",
                rank=rank,
            ) from error
        except RuntimeError as error:
            raise _refused(rank, error) from error
        memory.zero_()
        torch.cuda.synchronize(device)
        try:
            self._handle: Any = library.rendezvous(memory, group.group_name)
        except RuntimeError as error:
            raise _refused(rank, error) from error
        self._memory = memory
        segments: list[torch.Tensor | None] = [None] * num_ranks
        for place, peer in enumerate(neighbours):
            mine = peer == rank
            segments[peer] = memory if mine else self._handle.get_buffer(place, (nbytes,), torch.uint8, 0)
        self.segments: Sequence[torch.Tensor | None] = segments


def memory_maker(
    rank: int, topology: Topology, members: Sequence[int], device: torch.device, timeout_s: float
) -> Callable[[int], SharedMemory]:
    """What makes memory of so many bytes on all ranks of this one's machine; each call is collective there.

    Args:
        members: by rank, its number in the whole job.

    Raises:
        UnsupportedError: no machine has two ranks; on every rank.
    """
    if topology.num_machines == topology.num_ranks:
        failure = UnsupportedError(
            "no machine has two ranks",
            "symmetric memory is for GPUs of one machine",
            "use transport='nccl' or 'auto'",
        )
        failure.on_every_rank = True
        raise failure
    neighbours = [peer for peer in range(topology.num_ranks) if topology.same_machine(peer, rank)]
    groups: list[Any] = []

    def make(nbytes: int) -> SharedMemory:
        torch.cuda.set_device(device)  # of this thread: see within()
        if not groups:
            near = [members[peer] for peer in neighbours]
            groups.append(dist.new_group(near, backend="gloo", use_local_synchronization=True))
        return TorchMemory(nbytes, rank, topology.num_ranks, neighbours, groups[0], device)

    def bounded(nbytes: int) -> SharedMemory:
        try:
            return within(timeout_s, lambda: make(nbytes))
        except TimeoutError as error:
            raise _refused(rank, error) from error

    return bounded


def _refused(rank: int, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"the GPUs of rank {rank}'s machine do not map each other's memory: {str(error).splitlines()[0]}",
        "torch's symmetric memory needs peer access between all GPUs of the machine, and processes that may pass each "
        "other file descriptors",
        "look at `nvidia-smi topo -p2p r`; in a container allow ptrace (--cap-add SYS_PTRACE) and share the IPC "
        "namespace",
    )
