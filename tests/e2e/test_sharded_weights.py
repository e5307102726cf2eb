"""A model whose large weights lie once on every machine: exact, private to write to, and one error for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_weight_ranks
from processes import run_outcomes, run_processes

from sfcompile.errors import OptionError, PeerDiedError, RankMismatchError, WeightsError

pytestmark = pytest.mark.ranks


@pytest.fixture
def folder(tmp_path: Path) -> str:
    sharded_weight_ranks.write_files(tmp_path, 0)
    return str(tmp_path)


def test_four_ranks_on_two_machines(folder: str) -> None:
    """fp32 results within 1e-5 of one process. Own pages come with a write and go at the end of the next call."""
    for seen in run_processes(4, sharded_weight_ranks.one_copy, (folder,), machine_of=(0, 0, 1, 1)):
        steps = {name: value[1:] for name, value in seen.items() if isinstance(value, tuple)}
        assert steps == {
            "loaded": (False, False),
            "again": (False, False),
            "fused": (True, False),
            "shared again": (False, False),
            "unfused": (True, False),
            "other weights": (True, False),
        }
        assert all(value[0] <= 1e-5 for value in seen.values() if isinstance(value, tuple))
        assert not seen["moved"] and seen["tied"] and seen["saved"]
        assert "lie once for the 2 ranks of a machine" in seen["line"]


def test_what_one_rank_cannot_do_is_an_error_on_both(folder: str) -> None:
    mine, its = run_processes(2, sharded_weight_ranks.faults, (folder,))
    kinds = [WeightsError, RankMismatchError, OptionError, RankMismatchError, OptionError]
    assert [type(error) for error in mine] == [type(error) for error in its] == kinds
    missing, other, alone, differing, messages = map(str, mine)
    assert "rank 1: " in missing and "1.norm.bias is in none of the files" in missing and "rank 0: " not in missing
    assert "rank 1 loads other weights than rank 0" in other
    assert "transport='c10d'" in alone and "transport='c10d'" in messages
    assert "weights differ between the ranks of a machine" in differing and "of rank 1" in differing


def test_a_rank_that_is_killed_meanwhile(folder: str) -> None:
    first, second = run_outcomes(2, sharded_weight_ranks.killed, (folder,))
    assert isinstance(first.error, PeerDiedError) and "rank 1" in str(first.error)
    assert second.exit_code == -9
