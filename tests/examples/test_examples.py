"""Every example runs on CPU ranks, ends well and prints its result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rank_workers
from example_table import EXAMPLES
from processes import preload, run_outcomes

pytestmark = pytest.mark.ranks
FOLDER = Path(__file__).resolve().parents[2] / "examples"
SFCOMPILE = str(Path(sys.executable).with_name("sfcompile"))

PROGRAMS = [name for name, example in EXAMPLES.items() if not example.is_server]

# In `make test`; `make test-all` starts every example so. (test_one_value.py runs the one that is left out below.)
BY_COMMAND = ("hello",)

preload("sfcompile.backend")


def check(name: str, said: str) -> None:
    """It printed what the table says, and a difference that is none."""
    assert EXAMPLES[name].says in said, said[-3000:]
    for line in said.splitlines():
        if "difference from one process" in line:
            assert float(line.split("difference from one process: ")[1].split()[0]) <= 1e-5, line


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in (*BY_COMMAND, "one_value")])
def test_example_on_ranks(name: str) -> None:
    """As a program of every rank; that ours or any launcher starts such ranks is in the test below."""
    example = EXAMPLES[name]
    homes = [rank * example.machines // example.ranks for rank in range(example.ranks)]
    outcomes = run_outcomes(example.ranks, rank_workers.script, (str(FOLDER / f"{name}.py"),), homes, timeout_s=300)
    for outcome in outcomes:
        assert outcome.exit_code == 0 and outcome.error is None, outcome.log[-3000:]
    check(name, outcomes[0].log)


@pytest.mark.parametrize(
    "name", [name if name in BY_COMMAND else pytest.param(name, marks=pytest.mark.thorough) for name in PROGRAMS]
)
def test_example_as_its_page_says(name: str) -> None:
    example = EXAMPLES[name]
    path = str(FOLDER / f"{name}.py")
    flags = ["--ranks", str(example.ranks), "--machines", str(example.machines)]
    command = [SFCOMPILE, "run", *flags, path] if example.ranks > 1 else [sys.executable, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check(name, done.stdout)


def test_every_example_is_listed_and_short() -> None:
    paths = sorted(FOLDER.glob("*.py"))
    assert [path.stem for path in paths] == sorted(EXAMPLES)
    for path in FOLDER.rglob("*.py"):  # an example is one short file; what the server consists of may be longer
        assert len(path.read_text().splitlines()) <= (120 if path.parent == FOLDER else 160), path
