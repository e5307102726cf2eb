"""Names in profiles: while torch.profiler records, every stage of a site is a range such as ``attention 3: put_k``.

Under ``torch.autograd.profiler.emit_nvtx()`` the same ranges are NVTX's, which Nsight Systems shows above the kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sfcompile.torch_private import profiler_runs

_UNSEEN: AbstractContextManager[None] = nullcontext()


def named(kind: str, site: int, stage: str, program: str) -> AbstractContextManager[object]:
    """A range around one stage; nothing while nobody profiles this thread.

    Args:
        kind: "attention" or "exchange".
        site: its number in the graph, as traces count it.
        program: the key of the graph, an argument of the range.
    """
    if not profiler_runs():
        return _UNSEEN
    return torch.profiler.record_function(f"{kind} {site}: {stage}", program)
