"""Whether what a phase is given, or has to fill, is what its schedule was made for: its dtype and its shape.

Slots are laid out and kernels are made for the schedule's shapes; a tensor of another shape or dtype would be read as
something else by the ranks that get it. So the tensor is looked at first, and nothing has been sent when it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sfcompile.errors import InternalError
from sfcompile.runtime.program.phases import TENSORS
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.rank.sides import RunningSite
from sfcompile.runtime.rank.site_call import SiteSchedule, is_assembled


def check_put(schedule: SiteSchedule, job_rank: int, phase: str, tensor: torch.Tensor, part: int = -1) -> None:
    """A local tensor that is to be sent.

    Raises:
        InternalError: it has another dtype or shape than the schedule says.
    """
    _compare(schedule, job_rank, phase, tensor.shape, tensor.dtype, _expected(schedule, job_rank, phase, part))


def check_fused(schedule: SiteSchedule, job_rank: int, phase: str, sources: Sequence[torch.Tensor], rows: Any) -> None:
    """What a row program (codegen/rows/rows.py) is to make and send: its result, and the sources it reads.

    Raises:
        InternalError: as for :func:`check_put`.
    """
    *wanted, result = rows.shapes
    _compare(schedule, job_rank, phase, result, schedule.site.dtype, _expected(schedule, job_rank, phase, -1))
    for source, shape in zip(sources, wanted, strict=True):
        _compare(schedule, job_rank, phase, source.shape, source.dtype, shape, source.dtype)


def check_end(schedule: SiteSchedule, job_rank: int, out: torch.Tensor, part: int = -1) -> None:
    """A tensor that the end of a site is to fill.

    Raises:
        InternalError: as for :func:`check_put`.
    """
    site, rank = schedule.site, schedule.members(job_rank)[0]
    attention = isinstance(site, AttentionSite)
    wanted = site.local_shape("o", rank, part) if attention else site.wanted_shape(rank)
    wanted = schedule.whole(0)[1] if is_assembled(schedule) else wanted
    _compare(schedule, job_rank, "collect" if attention else "exchange_finish", out.shape, out.dtype, wanted)


def check_linear(schedule: SiteSchedule, job_rank: int, x: torch.Tensor, features: int, part: int) -> None:
    """What is multiplied with a weight [features, in] that comes together in the bank.

    Raises:
        InternalError: as for :func:`check_put`.
    """
    assert is_assembled(schedule)
    wanted = schedule.whole(max(part, 0))[1]
    _compare(schedule, job_rank, "exchange_linear", (features, *x.shape[-1:]), x.dtype, wanted)


def check_held(run: RunningSite, schedule: SiteSchedule, job_rank: int, held: Sequence[torch.Tensor]) -> None:
    """What the graph holds for the puts of a site that ends to wait for them.

    Raises:
        InternalError: puts may still read memory that nobody has held for them.
    """
    if not run.late_reads:
        return
    missing = set(run.late_reads) - {tensor.data_ptr() for tensor in held}
    if missing:
        raise InternalError(
            f"{len(missing)} of {len(run.late_reads)} tensors that puts of {schedule.site.name} read lie elsewhere in "
            "memory than what the graph holds for them",
            "the compiler copied a tensor for each of its readers, so that the memory of one may have gone to others "
            "before it was sent",
            "use options={'inner': 'eager'} for this model, and report this graph",
            rank=job_rank,
        )


def _expected(schedule: SiteSchedule, job_rank: int, phase: str, part: int) -> Sequence[int]:
    site, rank = schedule.site, schedule.members(job_rank)[0]
    if is_assembled(schedule):
        return schedule.share(rank, max(part, 0))
    shape: Sequence[int] = (
        site.local_shape(TENSORS[phase], rank, part) if isinstance(site, AttentionSite) else site.local_shape(rank)
    )
    return shape


def _compare(
    schedule: SiteSchedule,
    job_rank: int,
    phase: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    wanted: Sequence[int],
    wanted_dtype: torch.dtype | None = None,
) -> None:
    wanted_dtype = wanted_dtype or schedule.site.dtype
    if dtype == wanted_dtype and (shape == wanted or tuple(shape) == tuple(wanted)):
        return
    raise InternalError(
        f"{phase} of {schedule.site.name} is given {_words(dtype, shape)} and was planned for "
        f"{_words(wanted_dtype, wanted)}",
        "the other ranks would read the bytes as something else",
        "report this graph",
        rank=job_rank,
    )


def _words(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
