"""A job's edges on real processes: options refused later, children of ranks, ranks that end before the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import edge_cases
import pytest
from processes import preload, run_outcomes, run_processes

from sfcompile.errors import PeerDiedError, PeerFailedError

pytestmark = pytest.mark.ranks

preload("edge_cases")


@pytest.mark.parametrize("where", ["all", "one"])
def test_wrong_options_of_a_later_model_leave_the_first_one_running(where: str) -> None:
    run_processes(2, edge_cases.run, ("refused_options", where), timeout_s=240.0)


@pytest.mark.parametrize("homes", [pytest.param((0, 0), marks=pytest.mark.thorough), (0, 1)])
def test_a_child_of_a_rank_has_no_session(homes: tuple[int, ...]) -> None:
    run_processes(2, edge_cases.run, ("forks",), homes, timeout_s=240.0)


@pytest.mark.parametrize("homes", [(0, 0), (0, 1)])
def test_a_rank_that_ends_early_is_told_as_what_it_was(homes: tuple[int, ...]) -> None:
    waiting, gone = run_outcomes(2, edge_cases.run, ("leaves", "end"), homes)
    assert gone.error is None
    text = str(waiting.error)
    assert isinstance(waiting.error, PeerDiedError | PeerFailedError), waiting.log[-3000:]
    assert "rank 1 has left the job" in text and "its script ended" in text
    assert "memory" not in text and "killed" not in text
    assert waiting.seconds < 30.0  # its timeout


def test_the_error_that_ended_a_rank_is_told_to_the_others(tmp_path: Path) -> None:
    """As a user would see it: ranks that our launcher started."""
    argv = [str(edge_cases.__file__), "leaves", "error"]
    code = (
        "import sys; from pathlib import Path; from sfcompile.commands.launch import launch; "
        f"sys.exit(launch({argv!r}, 2, log_dir=Path({str(tmp_path)!r}), timeout_s=240))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode not in (0, 124), done.stderr[-3000:]
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.rglob("*")) if path.is_file())
    assert "ValueError: no such prompt" in logs
