"""Mistakes in kernels that the machine must see. ``mutants.main`` prints the table."""

from __future__ import annotations

import pytest

from ptx.mutants import MUTANTS, Mutant, caught

# One of each side of an edge; they share what is compiled.
QUICK = {"acquire of an output to relaxed", "release of a put's signal to relaxed"}


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, id=m.name, marks=[] if m.name in QUICK else pytest.mark.thorough) for m in MUTANTS]
)
def test_caught(mutant: Mutant) -> None:
    said, _ = caught(mutant, seeds=4)
    assert said, mutant.name


def test_the_quick_ones_are_in_the_table() -> None:
    assert {m.name for m in MUTANTS} >= QUICK
