"""The progress bar: rank 0 draws, the others only go through their steps."""

from __future__ import annotations

import io
import re

import pytest

import sfcompile
from sfcompile.commands.progress_bar import LINES, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_is_found_on_the_package() -> None:
    assert sfcompile.progress is progress


def test_rank_0_draws_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    out = io.StringIO()
    assert list(progress(range(100), "denoise", stream=out)) == list(range(100))
    lines = out.getvalue().splitlines()
    assert len(lines) == LINES + 1 and lines[-1].startswith("denoise [####") and "100/100" in lines[-1]
    assert "0:00 left" in lines[-1]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_one_line_that_fits(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    out = Terminal()
    assert list(progress((n for n in range(3)), "denoise", total=3, stream=out)) == [0, 1, 2]
    drawn = [
        line for line in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n").splitlines() if line
    ]
    assert all(line.startswith("denoise") and len(line) <= width for line in drawn)
    assert "\x1b[?25l" not in out.getvalue(), "a cursor that was hidden stays so after a rank is killed"
    assert "3/3" in drawn[-1] and "s each" in drawn[-1] and "0:00:00" in drawn[-1]
    out = Terminal()
    assert list(progress((n for n in range(3)), stream=out)) == [0, 1, 2] and "3/?" in out.getvalue()


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    out = Terminal()
    assert list(progress([1, 2], stream=out)) == [1, 2] and out.getvalue() == ""


def test_a_loop_that_is_left_ends_its_line() -> None:
    out = Terminal()
    for step in progress(range(9), stream=out):
        if step == 4:
            break
    assert out.getvalue().rstrip("\x1b[?25hl").endswith("\n") and "4/9" in out.getvalue()


def test_a_terminal_that_cannot_move_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    assert list(progress([1, 2], stream=out)) == [1, 2] and "\x1b" not in out.getvalue() and "#" in out.getvalue()
