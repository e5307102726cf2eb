"""What a terminal sees is coloured and fits; what is piped is the text itself."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

from sfcompile.commands.screen import draw, show, show_error

TABLE = """\
plan                         ms/layer  exposed    limit  across MiB  why not
torus 8x1 by 2                 21.407    1.752   18.083       657.0  <- taken
usp 4x2 ring across            28.023    9.337   18.083       876.0  1.31 x the best, 33% of it exposed, and more

  ! torch: 2.9 is installed
warning: a very long warning that goes on and on until it no longer fits into a terminal of 80 columns by far
"""
ESCAPES = re.compile(r"\x1b\[[\d;]*m")


def drawn(width: int, colour: bool = True) -> str:
    out = io.StringIO()
    system = "standard" if colour else None
    draw(TABLE, Console(file=out, width=width, force_terminal=True, color_system=system, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_and_say_the_same(width: int) -> None:
    plain = ESCAPES.sub("", drawn(width))
    assert all(len(line) <= width for line in plain.splitlines())
    assert plain.split() == TABLE.split()
    assert "torus 8x1 by 2                 21.407    1.752" in plain, "columns stay"


def test_the_pick_is_green_and_without_colours_there_are_none() -> None:
    (taken,) = [line for line in drawn(120).splitlines() if "<- taken" in line]
    assert taken.startswith("\x1b[1;32m")
    assert not re.search(r"\x1b\[[\d;]*3\dm", drawn(120, colour=False))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_piped_is_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    show(TABLE)
    show_error("no such model")
    said = capsys.readouterr()
    assert said.out == TABLE + "\n" and said.err == "sfcompile: no such model\n"


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, error = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    show(TABLE)
    show_error("no such [model]")
    assert "\x1b[1;32m" in out.getvalue()
    assert error.getvalue().startswith("\x1b[1;31msfcompile: ") and "[model]" in error.getvalue()
