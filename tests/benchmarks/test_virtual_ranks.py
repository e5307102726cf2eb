"""All ranks of a schedule in one launch, in Triton's interpreter: the same kernels as on a GPU, one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from deadline import Deadline
from emulated_nvshmem import DeviceCalls
from kernel_ranks import Job, expected, inputs_of, make_site
from virtual_ranks import VirtualRanks

from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.schedule.builders import BUILDERS
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.errors import CodegenError, RuntimeTimeoutError

CPU = torch.device("cpu")
POLL = Deadline(10.0)
MESHES = {"ulysses": (4, 1), "ring": (1, 4)}
NETS = {"peer": None, "mixed": (0, 0, 1, 1), "nvshmem": (0, 1, 2, 3)}


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with interpreting(POLL):
        yield


def job_of(kind: str, mask: str = "none", drop: str = "") -> Job:
    site = make_site([40, 21, 0, 33], 4, 4, torch.float32)
    return Job(kind, 2, 2, *MESHES.get(kind, (2, 2)), replace(site, mask=mask), mask=mask, drop=drop)


def ranks_of(job: Job, machine_of: tuple[int, ...] | None = None, limit_s: float = 60.0) -> VirtualRanks:
    calls = DeviceCalls(lambda address, pe: address).names() if machine_of else None
    kind = (job.mask, job.mask_is_bool)
    target = KernelTarget(CPU, calls=calls)
    return VirtualRanks(job.schedule(), target, machine_of, kind, limit_s=limit_s)


def error_of(job: Job, out: torch.Tensor, sign: int = 1) -> float:
    want = sign * expected(job)
    return float((out.double() - want).norm() / want.norm())


# The rows of `make test`; every schedule runs over processes in tests/codegen/kernels/test_attend.py.
QUICK = (("usp", "peer"), ("torus", "mixed"))


@pytest.mark.parametrize(
    ("kind", "net"),
    [
        pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.thorough)
        for cell in (*((kind, "peer") for kind in BUILDERS), ("torus", "mixed"))
    ],
)
def test_every_schedule_in_one_launch(kind: str, net: str) -> None:
    """Two epochs, each with values of its own, through both banks."""
    job = job_of(kind)
    ranks = ranks_of(job, NETS[net])
    q, k, v, _ = inputs_of(job)
    for sign in (-1, 1):
        assert error_of(job, ranks.run(q, k, sign * v), sign) < 1e-5
    assert ranks.places[:, 0].tolist() == [2] * 4


def test_everything_by_nvshmem_and_masked() -> None:
    job = job_of("torus", mask="full")
    assert error_of(job, ranks_of(job, NETS["nvshmem"]).run(*inputs_of(job))) < 1e-5


def test_one_rank_is_its_own_kernel() -> None:
    job = Job("torus", 1, 1, 1, 1, make_site(70, 1, 2, torch.float32))
    assert error_of(job, ranks_of(job).run(*inputs_of(job))) < 1e-5


def test_the_rank_that_waits_in_vain_is_named() -> None:
    job = job_of("torus", drop="put")
    ranks = ranks_of(job, limit_s=0.2)
    ranks.put(*inputs_of(job)[:3])
    ranks.attend(ranks.outputs())
    with pytest.raises(RuntimeTimeoutError, match="did not come") as failure:
        ranks.check()
    error = failure.value
    assert (error.epoch, error.seen_epoch) == (1, 0)
    assert error.rank != error.peer and error.slot is not None


def test_outputs_of_different_strides_are_refused() -> None:
    ranks = ranks_of(job_of("torus"))
    outs = [out.contiguous() for out in ranks.outputs()]
    with pytest.raises(CodegenError, match="strides"):
        ranks.attend(outs)
