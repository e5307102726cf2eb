"""What the tests of the op rules share: sizes to draw, few examples each, inputs that depend on their shape only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

sizes = st.integers(1, 7)
tokens = st.integers(2, 11)
ranks = st.integers(2, 5)
few = settings(max_examples=12, deadline=None)
Fn = Callable[..., Any]


def rand(*shape: int) -> torch.Tensor:
    """The same numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
