"""Tables for a terminal, and units."""

from __future__ import annotations

import pytest
from models import build

from sfcompile.passes.report.report import Left
from sfcompile.prediction.explain import explain
from sfcompile.prediction.text import alike, duration, size, step_rows, text_of


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")]
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0"), (2.5e-6, "2.5 us"), (0.0035, "3.50 ms"), (2.0, "2.00 s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rows_alike_are_counted() -> None:
    rows = [Left(f"mul_{i}", "mul", "dit.py:3: x * y", f"read whole by add_{i}", 0.0, 64) for i in range(3)]
    rows.append(Left("mul_9", "mul", "dit.py:4: x * z", "read whole by add_9", 0.0, 64))
    assert [(row.node, count) for row, count in alike(rows)] == [("mul_0", 3), ("mul_9", 1)]


def test_short_and_full() -> None:
    model, inputs = build("self")
    found = explain(model, *inputs, topology="2x2", placement="shard")
    short, full = str(found), text_of(found, full=True)
    assert found.full() == full and len(full) > len(short)
    assert "SelfDiT on 2x2: 4 ranks on 2 machines" in short and "sequence axes" in short and "<- taken" in short
    assert "more candidates" in short and "more candidates" not in full
    assert "smaller lines not shown" in short and "smaller lines" not in full and "attend Q here" in full
    assert all(len(line) < 400 for line in short.splitlines())


def test_the_parts_of_a_step_add_up() -> None:
    model, inputs = build("cross")
    found = explain(model, *inputs, topology="2x2", placement="shard")
    assert sum(seconds for _, seconds, _ in step_rows(found)) == pytest.approx(found.step_s)
