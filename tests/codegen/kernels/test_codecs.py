"""Text that writes and reads what travels encoded; what it does is in test_device.py, test_moves.py, test_attend.py."""

from __future__ import annotations

import ast

import pytest

from sfcompile.codegen.kernels.codecs import loaded, pointers, stored
from sfcompile.runtime.program.formats import BF16, FP8


@pytest.mark.parametrize("written", [BF16, FP8])
def test_lines_are_code_and_read_what_was_set_before(written: str) -> None:
    given = {"tl", "base", "n", "values", "i", "inside", "live", "factor_of", "inverse_of", "e4m3_of"}
    given |= {"from_e4m3", "at_most"}
    lines = pointers(written, "k", "base", "n", 64)
    lines += stored(written, "k", "values", "i", "inside", "i", "live")
    lines += loaded(written, "k", "bf16", "i", ["inside"], "i", [], "[:, None]")
    known = set(given)
    for line in lines:
        (statement,) = ast.parse(line).body
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        assert {name.id for name in names if isinstance(name.ctx, ast.Load)} <= known, line
        known |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    assert "k" in known and ("k_factors" in known) == (written == FP8)


def test_wide_loads_where_rows_allow_them() -> None:
    """A pointer made of an integer has no alignment until it is given one."""
    assert "multiple_of" in pointers(FP8, "k", "base", "n", 64)[0]
    assert "multiple_of" not in pointers(FP8, "k", "base", "n", 40)[0]
    assert "multiple_of" in pointers(BF16, "k", "base", "n", 40)[0]


def test_factors_begin_at_a_multiple_of_their_size() -> None:
    assert pointers(FP8, "k", "base", "n", 8)[1].startswith("k_factors = (base + n * 8)")
    assert pointers(FP8, "k", "base", "n", 6)[1].startswith("k_factors = (base + (n * 6 + 3) // 4 * 4)")


def test_only_fp8_brings_what_is_too_large_back_to_the_largest() -> None:
    assert "at_most(" in loaded(FP8, "v", "fp16", "i", [], "i", [], "[:, None]")[-1] and "65504.0" in "".join(
        loaded(FP8, "v", "fp16", "i", [], "i", [], "[:, None]")
    )
    assert loaded(BF16, "v", "fp32", "i", [], "i", [], "[:, None]") == [
        "v = tl.load(v_codes + i).to(tl.float32).to(tl.float32)"
    ]
