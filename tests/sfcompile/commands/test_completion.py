"""Completion, asked as bash asks."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from sfcompile.commands.cli import build_parser, main
from sfcompile.commands.completion import completion_script
from sfcompile.options import SCHEDULES

BASH = shutil.which("bash")


def offered(line: str) -> list[str]:
    """What bash offers for a line whose last word is being typed."""
    assert BASH is not None
    words = line.split(" ")
    typed = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _sfcompile; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    code = completion_script(build_parser().commands) + ask
    done = subprocess.run([BASH, "--norc", "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_what_bash_offers() -> None:
    assert offered("sfcompile ex") == ["explain", "export"]
    assert set(offered("sfcompile ")) >= {"demo", "run", "doctor", "completion", "--version"}
    assert offered("sfcompile simulate --to") == ["--tokens", "--topology"]
    assert offered("sfcompile simulate flux --schedule ") == list(SCHEDULES)
    assert offered("sfcompile simulate flux --schedule u") == ["ulysses", "usp"]
    assert offered("sfcompile run --ranks 2 scr") == []  # files, which bash knows itself
    assert offered("sfcompile unknown --t") == []


def test_it_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 0
    assert "complete -o default -F _sfcompile sfcompile" in capsys.readouterr().out
