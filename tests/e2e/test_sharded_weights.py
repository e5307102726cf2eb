"""A model whose large weights lie once on every machine, or in shares on all: exact, and one error for all ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sharded_weight_ranks
import weight_share_ranks
from processes import run_outcomes, run_processes

from sfcompile.errors import OptionError, PeerDiedError, RankMismatchError, WeightsError
from sfcompile.runtime.program.intervals import slice_of
from sfcompile.runtime.program.weight_rows import places_of

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


@pytest.mark.parametrize(
    ("machine_of", "topology"),
    [pytest.param((0, 1), "auto:assumed", marks=pytest.mark.thorough), ((0, 0, 1, 1), "1x4")],
)
def test_weights_in_shares_are_exact(machine_of: tuple[int, ...], topology: str) -> None:
    """To the last bit those of whole weights, after every write, in a graph and beside it, whatever is planned for."""
    everyone = run_processes(len(machine_of), weight_share_ranks.exact, (topology,), machine_of=machine_of)
    for rank, seen in enumerate(everyone):
        steps = ("first", "again", "eager", "cut", "tied", "fused", "other weights", "shares", "state")
        assert [name for name in steps if not seen[name]] == []
        assert ["in shares: a rank holds" in line for line in seen["lines"]] == [True, False]
        places = places_of(machine_of)
        start, stop = slice_of(211, len(machine_of), places[rank])
        assert seen["rows"] == stop - start
        # Two banks, each of twice the largest weight at most, beside signals and the pieces of what is gathered outside
        # of a graph.
        assert seen["heap"] <= 2 * max(2 * seen["largest"], len(machine_of) << 20) + (1 << 16)


@pytest.mark.parametrize(
    ("machine_of", "inner"),
    [((0, 0, 1), "eager"), pytest.param((0, 1), "inductor", marks=pytest.mark.thorough)],
)
def test_weights_in_shares_that_were_never_whole(folder: str, machine_of: tuple[int, ...], inner: str) -> None:
    held = run_processes(len(machine_of), weight_share_ranks.loaded, (folder, inner), machine_of=machine_of)
    assert all(worst <= 1e-5 for worst, _, _ in held)
    assert sum(own for _, own, _ in held) == held[0][2] > 0


@pytest.mark.parametrize(
    ("machine_of", "called"),
    [((0, 0), True), pytest.param((0, 1), False, marks=pytest.mark.thorough), ((0, 0, 1, 1), False)],
)
def test_what_torch_has_cut_becomes_shares(machine_of: tuple[int, ...], called: bool) -> None:
    """As it lies where torch cuts as we do: a whole weight is nowhere. Rows change hands where it does not."""
    for seen in run_processes(len(machine_of), weight_share_ranks.from_torch, (called,), machine_of):
        assert seen["error"] <= 1e-5
        assert seen["hooks"] == [] and seen["cut"] and seen["tied"] and seen["others"] == {"Parameter"}
        assert "in shares: a rank holds" in seen["line"]
        # On four ranks of two machines neighbouring rows lie on ranks of one place in their machines.
        assert set(seen["kept"]) == {len(machine_of) == 2}


def test_what_torch_has_cut_in_other_ways_is_refused() -> None:
    for columns, cast in run_processes(2, weight_share_ranks.other_cuts):
        assert columns.startswith("UnsupportedError") and "qkv.weight" in columns and "full_tensor()" in columns
        assert cast.startswith("UnsupportedError") and "output_dtype=torch.float64" in cast


def test_what_cannot_be_captured_gathers_what_it_reads() -> None:
    assert run_processes(2, weight_share_ranks.odd, machine_of=(0, 1)) == [True, True]


def test_blocks_with_weights_in_shares_are_compiled_once() -> None:
    for compiled, said, alike in run_processes(2, weight_share_ranks.blocks, machine_of=(0, 1)):
        assert alike and "1 distinct, compiled once each" in said and compiled <= 4


def test_what_goes_wrong_with_shares_is_an_error_on_both() -> None:
    for errors in run_processes(2, weight_share_ranks.faults, machine_of=(0, 1)):
        assert [type(error) for error in errors] == [OptionError, *[RankMismatchError] * 4]
        whole, other, *files, alone = map(str, errors)
        assert all("rank 1 loads other weights than rank 0" in text for text in files)
        assert "sfcompile.shard_weights(model)" in whole and "weights differ between rank 0 and rank 1" in other
        assert "not in the same call" in alone


def test_a_rank_that_is_killed_while_weights_are_gathered() -> None:
    first, second = run_outcomes(2, weight_share_ranks.killed, machine_of=(0, 1))
    assert isinstance(first.error, PeerDiedError) and "rank 1" in str(first.error)
    assert second.exit_code == -9


@pytest.mark.thorough
def test_a_rank_with_a_share_stays_within_its_bound() -> None:
    """Peak memory as benchmarks/memory.py takes it: whole, less weights, plus a share, two layers and 5 %."""
    command = [sys.executable, "benchmarks/memory.py", "--cases", "2x2", "--steps", "0", "--depth", "6"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "in shares" in done.stdout, done.stdout + done.stderr
