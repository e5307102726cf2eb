"""Every example runs on CPU ranks, ends well and prints its result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SFCOMPILE = str(Path(sys.executable).with_name("sfcompile"))
# Example -> how it is started, and what it prints at least.
EXAMPLES = {
    "hello": (["--ranks", "2"], "difference from one process"),
    "diffusers_pipeline": (["--ranks", "2"], "picture (1, 3, 32, 40), difference from one process"),
    "own_dit": (["--ranks", "2"], "3 programs, largest difference from one process"),
    "explain_plan": ([], "explained for 4x8:a100-efa"),
    "export_and_load": (["--ranks", "2"], "another size is refused: latents must be float32[1, 4, 32, 32]"),
    "write_a_pass": (["--ranks", "2"], "with bf16 gathers"),
    "write_a_schedule": (["--ranks", "2"], "the mistake is refused"),
    "two_machines": (["--ranks", "4", "--machines", "2"], "ranks sit on machines (0, 0, 1, 1)"),
}


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
