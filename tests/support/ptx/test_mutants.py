"""Mistakes in kernels that the machine must see. ``mutants.main`` prints the table."""

from __future__ import annotations

import pytest
from hopper_text import needs_tensor_copies

from ptx.mutants import MUTANTS, Mutant, caught

# One of each side of an edge; they share what is compiled.
QUICK = {"acquire of an output to relaxed", "release of a put's signal to relaxed"}


def marks(mutant: Mutant) -> list[pytest.MarkDecorator]:
    thorough = [] if mutant.name in QUICK else [pytest.mark.thorough]
    return [*thorough, *([needs_tensor_copies] if mutant.fetch == "tma" else [])]


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name, marks=marks(m)) for m in MUTANTS])
def test_caught(mutant: Mutant) -> None:
    said, _ = caught(mutant, seeds=4)
    assert said, mutant.name


def test_the_quick_ones_are_in_the_table() -> None:
    assert {m.name for m in MUTANTS} >= QUICK
