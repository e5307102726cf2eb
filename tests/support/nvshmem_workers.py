"""Ranks that start the real NVSHMEM, as far as that goes without a GPU: up to its first memory."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import torch
from rank_workers import session_of

from sfcompile.errors import StreamFusionError
from sfcompile.runtime.gpu.nvshmem import Nvshmem, load


def starts(rank: int, how: str) -> list[str]:
    """What a rank sees: the release, or an error; then the error of its first memory.

    Args:
        how: "well"; or what is wrong with rank 1: "other release", "IBGDA", "no interface", "killed".
    """
    session = session_of(timeout_s=5.0)
    if rank == 1 and how == "IBGDA":
        os.environ["NVSHMEM_IB_ENABLE_IBGDA"] = "1"
    if rank == 0 and how == "no interface":
        os.environ["NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"] = "nowhere0"
    core, bindings = load()
    broken: dict[str, Any] = {}
    if rank == 1 and how == "other release":
        broken["get_version"] = lambda: SimpleNamespace(libnvshmem_version="3.8.0")
    if rank == 1 and how == "killed":
        broken["init"] = lambda **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    names = ("get_unique_id", "init", "get_version", "tensor")
    modules = SimpleNamespace(**{name: getattr(core, name) for name in names} | broken), bindings
    said = []
    try:
        nvshmem = Nvshmem(rank, session.topology.num_ranks, torch.device("cpu"), session.exchange, modules, 5.0)
        said.append(nvshmem.version())
        nvshmem.allocate(1 << 16)
    except StreamFusionError as error:
        said.append(f"{type(error).__name__}: {error}")
    return said
