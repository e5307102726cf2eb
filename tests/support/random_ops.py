"""What the tests of the op rules share: sizes to draw, few examples each, inputs that depend on their shape only."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

sizes = st.integers(1, 7)
tokens = st.integers(2, 11)
ranks = st.integers(2, 5)

# What `make test` sets: half of the examples, which are drawn anew on every run.
QUICK = os.environ.get("SFCOMPILE_TESTS") == "quick"


def examples(count: int) -> settings:
    """So many random examples, half of them in `make test`."""
    return settings(max_examples=count // 2 if QUICK else count, deadline=None)


few = examples(12)
Fn = Callable[..., Any]


def rand(*shape: int) -> torch.Tensor:
    """The same numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
