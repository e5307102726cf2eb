"""What would carry chunks between GPU ranks here, as far as one process knows without starting anything."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.distributed as dist

from sfcompile.runtime.gpu.carriers import CARRIERS
from sfcompile.runtime.gpu.message_side import MessageSide


def gpu_transport() -> tuple[str, str]:
    """The first carrier that may start, with why none before it; why generated kernels cannot put over it, or ""."""
    reasons: list[str] = []
    for name, hindrance in (("nvshmem", _no_nvshmem()), ("symm_mem", _no_peer_access()), ("nccl", _no_nccl())):
        if not hindrance:
            text = "\n".join([f"{name}: {CARRIERS[name]}", *reasons, "not shm, c10d: they serve CPU ranks"])
            return text, "" if name == "nvshmem" else MessageSide.no_kernels
        reasons.append(f"not {name}: {hindrance}")
    return "\n".join(["none: several GPU ranks cannot run", *reasons]), "there is nothing to put over"


def _no_nvshmem() -> str:
    try:
        import nvshmem.core  # noqa: F401
    except Exception as error:  # a broken library raises whatever it likes
        return f"nvshmem4py does not load ({' '.join(str(error).split())})"[:160]
    return _no_triton()


def _no_peer_access() -> str:
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        return f"GPUs {apart[0][0]} and {apart[0][1]} do not map each other's memory"
    return _no_triton() if pairs else "there is one GPU"


def _no_triton() -> str:
    return "" if find_spec("triton") else "Triton, in which its waits are written, is not installed"


def _no_nccl() -> str:
    return "" if dist.is_available() and dist.is_nccl_available() else "this torch was built without it"
