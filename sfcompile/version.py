"""The version, and the range of torch that it runs with. A leaf: rooms need it, and none imports the package for it."""

from __future__ import annotations

import re

from sfcompile.errors import UnsupportedError

__version__ = "0.1.0"
TORCH = ((2, 11), (2, 14))
"""The first release of torch that is supported, and the first that is not: as in pyproject.toml."""


def torch_range() -> str:
    """As pip writes it."""
    least, below = (f"{major}.{minor}" for major, minor in TORCH)
    return f"torch>={least},<{below}"


def refuse_other_torch(installed: str) -> None:
    """That this torch is one that is supported. Another one's private parts may do something else without saying so.

    Raises:
        UnsupportedError: it is not.
    """
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is not None and TORCH[0] <= (int(numbers[1]), int(numbers[2])) < TORCH[1]:
        return
    raise UnsupportedError(
        f"torch {installed} is installed, and sfcompile {__version__} runs with {torch_range()}",
        "It relies on private parts of torch, which were tested with these releases only",
        f"Run: pip install '{torch_range()}'",
    )
