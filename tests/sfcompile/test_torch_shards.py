"""Rows as torch cuts them, and as they become ours. With fully_shard, on ranks: tests/e2e/test_sharded_weights.py."""

from __future__ import annotations

import math

import pytest
import torch
from threads import run_threads

from sfcompile.runtime.program.weight_rows import WeightRows, places_of
from sfcompile.runtime.rank.session import current_session
from sfcompile.torch_shards import _made_whole, _relaid, _rows_by_torch, is_dtensor


@pytest.mark.parametrize("rows", [2, 3, 5, 8, 211])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_torch_cuts_as_chunk_does(rows: int, ranks: int) -> None:
    chunks = torch.arange(rows).chunk(ranks)
    want = [((int(chunk[0]), len(chunk)),) for chunk in chunks]
    assert list(_rows_by_torch(rows, ranks)) == want + [()] * (ranks - len(chunks))


@pytest.mark.parametrize("machine_of", [(0, 1, 2), (0, 0, 1, 1)])
@pytest.mark.parametrize("rows", [5, 12])
def test_rows_change_hands(machine_of: tuple[int, ...], rows: int) -> None:
    ranks, whole = len(machine_of), torch.arange(rows * 3.0).view(rows, 3)
    theirs, cut = _rows_by_torch(rows, ranks), WeightRows((rows, 3), places_of(machine_of))

    def work(rank: int) -> bool:
        own = torch.cat([whole[:0], *(whole[first : first + length] for first, length in theirs[rank])])
        got = [_relaid(current_session(), own, (rows, 3), theirs, cut) for _ in range(2)]
        return all(torch.equal(each, whole[slice(*cut.rows(rank))]) for each in got)

    assert all(run_threads(ranks, work, machine_of))


@pytest.mark.parametrize("machine_of", [(0, 1, 2), (0, 0, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_ones_are_made_whole_in_one_exchange(machine_of: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the last bit; ranks may have no row of some."""
    ranks, shapes = len(machine_of), [(5, 3), (1, 4, 2), (16,), (2,), (3, 0)]
    wholes = [torch.arange(math.prod(shape)).view(shape).to(dtype) for shape in shapes]

    def work(rank: int) -> tuple[bool, int]:
        session = current_session()
        shards = [
            torch.cat([whole[:0], *(whole[a : a + n] for a, n in _rows_by_torch(len(whole), ranks)[rank])])
            for whole in wholes
        ]
        came = _made_whole(session, shards, shapes)
        equal = all(torch.equal(one, other) for one, other in zip(came, wholes, strict=True))
        return equal and not any(one.is_inference() for one in came), len(session.programs)

    assert run_threads(ranks, work, machine_of) == [(True, 1)] * ranks


def test_a_plain_tensor_is_no_dtensor() -> None:
    assert not is_dtensor(torch.ones(2)) and not is_dtensor(None)
