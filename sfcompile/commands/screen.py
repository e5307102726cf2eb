"""What commands show in a terminal: colours, and lines that fit it. A file or a pipe gets the plain text, unchanged.

Plain text is what scripts read: its words and columns stay. rich lays out the rest, knows terminals without colour
(``NO_COLOR``, ``TERM=dumb``), and is imported only where there is a terminal.
"""

from __future__ import annotations

import re
import sys
import textwrap
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = (
    (re.compile(r"<- taken"), "bold green"),
    (re.compile(r"^\s*(warning:| ! )"), "yellow"),
    (re.compile(r"^\d+ problems?$"), "bold yellow"),
    (re.compile(r"^no problems found$"), "green"),
    (re.compile(r"^\S.*:$|^\w[\w /-]*$|^\s*plan\s+ms/layer"), "bold"),
)
"""How lines look that match: the pick of a table, warnings and problems, heads."""
_MORE = 4
"""Columns by which what is left of a line is moved in."""


def show(text: str) -> None:
    """Print what a command has to say to stdout."""
    if sys.stdout.isatty():
        draw(text, _console(sys.stdout))
    else:
        print(text)


def show_error(text: str) -> None:
    """Say on stderr why the command ends."""
    if not sys.stderr.isatty():
        print(f"sfcompile: {text}", file=sys.stderr)
        return
    from rich.text import Text

    console = _console(sys.stderr)
    console.print(Text.assemble(("sfcompile: ", "bold red"), text))


def draw(text: str, console: Console) -> None:
    """Print lines in their styles; what is wider than the console goes on below, moved in."""
    from rich.text import Text

    for line in text.splitlines():
        style = next((style for pattern, style in _STYLES if pattern.search(line)), "")
        for part in _fitted(line, console.width):
            console.print(Text(part, style), soft_wrap=True)


def _fitted(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    more = (indent + " " * _MORE) if len(indent) + _MORE < width // 2 else ""
    # Columns are kept: only where a line ends are blanks dropped.
    return textwrap.wrap(line, width, subsequent_indent=more, drop_whitespace=True, break_on_hyphens=False) or [""]


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False)
