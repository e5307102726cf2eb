"""A group of its own for messages between GPU ranks, by NCCL."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sfcompile.errors import HeapError, UnsupportedError
from sfcompile.runtime.gpu.together import Share, together
from sfcompile.runtime.rank.bounded import within


def connect(rank: int, members: Sequence[int], device: torch.device, timeout_s: float, share: Share) -> Any:
    """Collective: a group of these ranks, tried with one sum over all of them.

    The sum also makes the communicator, which NCCL wants of all ranks together; groups of messages between some of them
    follow on it.

    Args:
        members: ranks of the whole job, by rank.
        timeout_s: of the group: how long NCCL lets a message wait for its peer before it ends the process.

    Raises:
        UnsupportedError: this torch has no NCCL, or two ranks share a GPU.
        HeapError: NCCL does not start.
    """
    together(share, "look for NCCL", _require_nccl)
    places = share(_place_of(device), "compare their GPUs")
    together(share, "start NCCL", lambda: refuse_shared_gpus(places))
    return together(share, "start NCCL", lambda: _started(rank, members, device, timeout_s))


def _require_nccl() -> None:
    if not dist.is_nccl_available():
        raise UnsupportedError(
            "this torch was built without NCCL",
            "NCCL carries the chunks of GPU ranks that do not reach each other's memory",
            "install a CUDA build of torch: pip install torch",
        )


def _place_of(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def refuse_shared_gpus(places: Sequence[str]) -> None:
    """Refuse ranks of one GPU; ``places`` names every rank's, "" where there is none.

    Raises:
        UnsupportedError: two ranks have the same.
    """
    for rank, place in enumerate(places):
        first = places.index(place)
        if place and first != rank:
            raise UnsupportedError(
                f"ranks {first} and {rank} are on one GPU",
                "NCCL takes a GPU for each rank",
                "move the model to a GPU of its own on each rank: torch.cuda.set_device(LOCAL_RANK)",
            )


def _started(rank: int, members: Sequence[int], device: torch.device, timeout_s: float) -> Any:
    def start() -> Any:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread: see within()
        group = dist.new_group(
            list(members), backend="nccl", timeout=datetime.timedelta(seconds=timeout_s), use_local_synchronization=True
        )
        one = torch.ones(1, device=device)
        dist.all_reduce(one, group=group)
        return group, float(one)

    try:
        group, total = within(timeout_s, start)
    except (RuntimeError, TimeoutError) as error:
        raise HeapError(
            f"NCCL does not start on rank {rank}: {str(error).splitlines()[0]}",
            "it needs a GPU per rank, and a network interface that all ranks reach",
            "set NCCL_SOCKET_IFNAME to that interface; NCCL_DEBUG=INFO says more",
            rank=rank,
        ) from error
    if total != len(members):
        raise HeapError(
            f"NCCL's first sum of a one from each of {len(members)} ranks is {total:g} on rank {rank}",
            "the library, its driver or a link carries wrong values",
            "look at `sfcompile doctor` and at NCCL_DEBUG=INFO; leave out transport='nccl'",
            rank=rank,
        )
    return group
