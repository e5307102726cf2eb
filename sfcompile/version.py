"""The version, and the range of torch that it runs with. A leaf: rooms need it, and none imports the package for it."""

from __future__ import annotations

import codecs
import re

from sfcompile.errors import UnsupportedError

__version__ = "0.1.0"
TORCH = ((2, 11), (2, 16))
"""The first release of torch that is supported, and the first that is not: as in pyproject.toml."""


def torch_range() -> str:
    """As pip writes it."""
    least, below = (f"{major}.{minor}" for major, minor in TORCH)
    return f"torch>={least},<{below}"


def is_supported(installed: str) -> bool:
    """Whether a release of torch is one of the range."""
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    release = (int(numbers[1]), int(numbers[2])) if numbers is not None else (0, 0)
    return TORCH[0] <= release < TORCH[1]


def refuse_other_torch(installed: str) -> None:
    """That this torch is one that is supported. Another one's private parts may do something else without saying so.

    Raises:
        UnsupportedError: it is not.
    """
    if is_supported(installed):
        return
    raise UnsupportedError(
        f"torch {installed} is installed, and sfcompile {__version__} runs with {torch_range()}",
        "It relies on private parts of torch, which were tested with these releases only",
        f"Run: pip install '{torch_range()}'",
    )


def refuse_ascii(encoding: str) -> None:
    """That text files are read in more than ASCII, which is a choice of its own (LC_ALL=C with PYTHONUTF8=0).

    Raises:
        UnsupportedError: they are not.
    """
    if codecs.lookup(encoding).name == "ascii":
        raise UnsupportedError(
            f"Python reads text files as {encoding} here",
            "torch's Inductor has files with other letters, so that it cannot be imported",
            "Leave PYTHONUTF8=0 out, or set LC_ALL=C.UTF-8",
        )
