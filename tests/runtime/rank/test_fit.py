"""What a phase is given is compared with its schedule before anything is sent."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from random_sites import gather_site, random_case
from rank_workers import schedules_of, sf
from threads import run_threads

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.weight_gather import build_assembled
from sfcompile.errors import InternalError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import WeightRows
from sfcompile.runtime.rank.fit import check_end, check_fused, check_linear, check_put
from sfcompile.runtime.rank.session import current_session

TICKET = torch.zeros(1, dtype=torch.int64)


def test_every_shape_of_a_random_attention_is_what_is_planned() -> None:
    for seed in range(8):
        case = random_case(seed)
        schedule = schedules_of(case)[0]
        for rank in range(case.mesh.num_ranks):
            q, k, v = case.shard(rank)
            for phase, tensor in (("put_q", q), ("put_k", k), ("put_v", v)):
                check_put(schedule, rank, phase, tensor)
                with pytest.raises(InternalError, match=phase):
                    check_put(schedule, rank, phase, tensor.double())
                with pytest.raises(InternalError, match="was planned for float32"):
                    check_put(schedule, rank, phase, tensor[:, :, :-1] if tensor.shape[2] else tensor[:, :-1])


def test_parts_are_looked_at_one_by_one() -> None:
    case = random_case(7, ranks=2)
    schedule = schedules_of(case)[0]
    site = replace(case.site, parts=2)
    schedule = replace(schedule, site=site)
    q = case.shard(0)[0]
    start, stop = site.rows(True, 0, 2, 1)
    check_put(schedule, 0, "put_q", q[:, :, start:stop], 1)
    check_end(schedule, 0, torch.empty(site.local_shape("o", 0, 1)), 1)
    with pytest.raises(InternalError, match="collect of .* is given"):
        check_end(schedule, 0, torch.empty(site.local_shape("o", 0)).new_empty(1, 1), 1)


def test_a_row_program_is_looked_at_with_its_sources() -> None:
    case = random_case(7, ranks=2)
    schedule = schedules_of(case)[0]
    q = case.shard(0)[0]
    rows = SimpleNamespace(shapes=((3, 4), tuple(q.shape)))
    check_fused(schedule, 0, "put_q", [torch.zeros(3, 4)], rows)
    with pytest.raises(InternalError, match=r"float32\[4, 4\]"):
        check_fused(schedule, 0, "put_q", [torch.zeros(4, 4)], rows)
    with pytest.raises(InternalError, match="planned for"):
        check_fused(schedule, 0, "put_q", [torch.zeros(3, 4)], SimpleNamespace(shapes=((3, 4), (1, 2))))


def test_what_is_multiplied_fits_the_weight_that_comes_together() -> None:
    weights = [WeightRows((6, 4), (0, 1)), WeightRows((5, 3), (0, 1))]
    schedule = build_assembled("w", weights, torch.float32, (0, 1))
    check_put(schedule, 1, "exchange_start", torch.zeros(3, 4), 0)
    check_linear(schedule, 1, torch.zeros(2, 7, 3), 5, 1)
    for x, features, part in ((torch.zeros(2, 3), 5, 0), (torch.zeros(2, 3), 6, 1), (torch.zeros(2, 3).double(), 5, 1)):
        with pytest.raises(InternalError, match="exchange_linear of .* is given"):
            check_linear(schedule, 1, x, features, part)
    with pytest.raises(InternalError, match="exchange_start of .* is given"):
        check_put(schedule, 1, "exchange_start", torch.zeros(3, 4), 1)


@pytest.mark.parametrize("wrong", ["dtype", "shape", "out"])
def test_nothing_is_sent_of_a_wrong_tensor(wrong: str) -> None:
    """All ranks learn of it, and none has got a chunk."""
    site = gather_site(2)
    schedule = build_exchange(site, Mesh.of(Topology.grid(1, 2), 1, 2))

    def work(rank: int) -> None:
        session = current_session()
        session.load("g", [schedule])
        x = torch.zeros(site.local_shape(rank))
        if wrong == "dtype":
            x = x.to(torch.bfloat16)
        elif wrong == "shape":
            x = x.mT.contiguous()
        with pytest.raises(InternalError, match="The other ranks would read"):
            ticket = sf.exchange_start(x, TICKET, "g", 0)
            sf.exchange_finish(ticket, "g", 0, [1, 1] if wrong == "out" else list(site.shape), torch.float32)
        assert wrong == "out" or not session._runs

    run_threads(2, work, timeout_s=5.0)
