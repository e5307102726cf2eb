"""Every example runs on CPU ranks, ends well and prints its result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from example_table import EXAMPLES

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SFCOMPILE = str(Path(sys.executable).with_name("sfcompile"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    flags, text = EXAMPLES[name]
    path = str(FOLDER / f"{name}.py")
    command = [SFCOMPILE, "run", *flags, path] if flags else [sys.executable, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert text in done.stdout, done.stdout[-3000:]
    for line in done.stdout.splitlines():
        if "difference from one process" in line:
            assert float(line.split("difference from one process: ")[1].split()[0]) <= 1e-5, line


def test_every_example_is_listed_and_short() -> None:
    paths = sorted(FOLDER.glob("*.py"))
    assert [path.stem for path in paths] == sorted(EXAMPLES)
    for path in paths:
        assert len(path.read_text().splitlines()) < 120, path
