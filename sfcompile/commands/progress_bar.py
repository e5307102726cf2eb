"""A progress bar of steps that only rank 0 draws: by rich in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

T = TypeVar("T")

WIDTH = 24
LINES = 10
"""Lines that a stream which is no terminal gets for all steps together."""


def progress(
    steps: Iterable[T], text: str = "step", total: int | None = None, stream: TextIO | None = None
) -> Iterator[T]:
    """Go through ``steps``; rank 0 draws how far it is, seconds a step, and the time left.

        for t in sfcompile.progress(timesteps):
            ...

    Args:
        text: what stands before the bar.
        total: number of steps, for iterables without a length.
        stream: where to draw (default: stderr). A terminal gets one line that moves, anything else a line now and then.
    """
    if total is None and isinstance(steps, Sized):
        total = len(steps)
    if not _is_first():
        yield from steps
        return
    out = sys.stderr if stream is None else stream
    if out.isatty() and os.environ.get("TERM") != "dumb":
        yield from _in_terminal(steps, text, total, out)
        return
    start, drawn = time.monotonic(), -1
    for done, step in enumerate(steps, start=1):
        yield step
        tenth = done * LINES // total if total else done
        if tenth != drawn:
            drawn = tenth
            out.write(f"{_line(text, done, total, time.monotonic() - start)}\n")
            out.flush()


def _in_terminal(steps: Iterable[T], text: str, total: int | None, out: TextIO) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[each]}"),
        TimeRemainingColumn(),
    )  # fmt: skip

    class Uncovered(Console):
        """Leaves the cursor where it is seen: who ends a rank by a signal could not bring it back."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

    start = time.monotonic()
    # No thread that draws and nothing redirected: a debugger's prompt in the loop stays readable.
    with Progress(
        *columns, console=Uncovered(file=out), auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task(text, total=total, each="")
        for done, step in enumerate(steps, start=1):
            yield step
            bar.update(task, completed=done, each=f"{(time.monotonic() - start) / done:.3g} s each", refresh=True)


def _line(text: str, done: int, total: int | None, seconds: float) -> str:
    each = seconds / done
    if not total:
        return f"{text} {done}  {each:.3g} s each"
    full = min(WIDTH, done * WIDTH // total)
    left = max(0, round(each * (total - done)))
    bar = "#" * full + "." * (WIDTH - full)
    return f"{text} [{bar}] {done}/{total}  {each:.3g} s each, {left // 60}:{left % 60:02d} left"


def _is_first() -> bool:
    """Rank 0 of a process group, or of torchrun's environment; a process that is no rank is the first too."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"
