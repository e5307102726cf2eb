"""docs/first-pass.md, and the first model of docs/getting-started.md, done as they say: files saved, commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("first-pass.md", "getting-started.md"))
FILES = dict(re.findall(r"Save this as `(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the page, which must stand there."""
    assert f"```\n{command}\n```" in PAGE
    program, *words = command.split()
    start = [sys.executable, "-m", "sfcompile"] if program == "sfcompile" else [sys.executable]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*start, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.ranks
def test_the_pass_that_counts(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(FILES["count.py"])
    done = run("sfcompile run --ranks 2 count.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    calls, talks = map(int, re.search(r"rank 0 calls (\d+) ops, (\d+) of them talk", done.stdout).groups())  # type: ignore[union-attr]
    assert calls > talks > 3, done.stdout
    assert float(done.stdout.split("largest difference: ")[1].split()[0]) < 1e-5
    (folder,) = (tmp_path / "plan").glob("graph-*")
    assert len(list(folder.glob("*_count.txt"))) == 1


@pytest.mark.thorough  # as examples/hello.py
@pytest.mark.ranks
def test_a_first_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILES["mine.py"])
    done = run("sfcompile run --ranks 2 mine.py", tmp_path)
    assert done.returncode == 0 and "3 sharded and 0 local attentions" in done.stderr, done.stdout + done.stderr
    assert float(done.stdout.split("largest difference from one process: ")[1].split()[0]) < 1e-5


def test_the_rule_and_the_wrong_one(tmp_path: Path) -> None:
    text = FILES["rule.py"]
    (tmp_path / "rule.py").write_text(text)
    done = run("python rule.py", tmp_path)
    assert done.returncode == 0 and "in 12 cases" in done.stdout, done.stdout + done.stderr

    mixed = text.replace("x.abs().amax(-1, keepdim=True)", "x.abs().amax()").replace(
        "import torch\n", "import torch\n\ntorch.manual_seed(0)\n", 1
    )
    assert mixed.count("x.abs().amax()") == 1 and "`x.abs().amax()`" in PAGE
    (tmp_path / "rule.py").write_text(mixed)
    done = run("python rule.py", tmp_path)
    said = "RuleError: output 0 of rank " + done.stderr.partition("RuleError: output 0 of rank ")[2]
    shape = r"RuleError: output 0 of rank \d, \d+ tokens on \d ranks differs by \S+ at \[.*?\]; the largest magnitude"
    assert done.returncode != 0 and re.match(shape, said), done.stderr
    assert re.search(shape, PAGE)
