"""A progress bar of steps that only rank 0 draws."""

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
    moves = out.isatty()
    start, drawn, done = time.monotonic(), -1, 0
    try:
        for done, step in enumerate(steps, start=1):
            yield step
            tenth = done * LINES // total if total else done
            if moves or tenth != drawn:
                drawn = tenth
                line = _line(text, done, total, time.monotonic() - start)
                out.write(f"\r{line}\x1b[K" if moves else f"{line}\n")
                out.flush()
    finally:
        if moves and done:
            out.write("\n")
            out.flush()


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
