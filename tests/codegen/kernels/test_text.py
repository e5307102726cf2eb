"""Pieces of generated source."""

from __future__ import annotations

import ast

import pytest

from sfcompile.codegen.kernels.text import (
    HEAP,
    PLACE,
    Lines,
    columns,
    device_functions,
    entry_name,
    heap_of,
    module,
    prologue,
    put_signal,
    wait_lines,
)


def test_lines_are_indented_by_blocks() -> None:
    out = Lines()
    with out.block("if x:"):
        out("y = 1")
        with out.block("while y:"):
            out("y -= 1", "")
    assert out.text == "if x:\n    y = 1\n    while y:\n        y -= 1\n\n"


def test_columns_are_read_by_name() -> None:
    assert columns("row", ("a", "b"), {"x": "b"}) == ["x = tl.load(row + 1)"]
    assert columns("row", ("a", "b"), {"x": "a"}, small=True) == ["x = tl.load(row + 0).to(tl.int32)"]
    assert len(PLACE) == 7 and heap_of("dst") == f"tl.load(heaps_ptr + {len(HEAP)} * dst)"


def test_a_module_brings_the_device_functions_that_it_uses_and_no_others() -> None:
    text = device_functions("last_of(a, b)")
    assert "def last_of" in text and "def copy_words" not in text
    bounded = device_functions("wait_word_bounded(a, b, c, d)")
    assert (
        "SPINS" in bounded and "def word(" in bounded and bounded.index("def word(") < bounded.index("def wait_word_b")
    )
    whole = module("Title.", "x = 1\nsignal_wait_until(x, CMP_GE, 1)\n", ("a note",))
    assert whole.startswith('"""Title.\na note\n"""') and "import putmem_signal_nbi_block" in whole
    assert "CMP_GE = tl.constexpr(5)" in whole
    ast.parse(whole)


@pytest.mark.parametrize("reach", ["peer", "nvshmem", "mixed"])
@pytest.mark.parametrize("bounded", [False, True])
def test_waits_by_reach(reach: str, bounded: bool) -> None:
    text = "\n".join(wait_lines(reach, bounded, "at", "epoch", "slot"))
    ast.parse(text)
    assert ("signal_wait_until" in text) == (reach != "peer")
    assert ("wait_word" in text) == (reach != "nvshmem" or bounded)
    assert ("report_ptr" in text) == bounded
    if bounded and reach != "peer":  # whoever gave up must not wait for ever in NVSHMEM
        assert text.index("wait_word_bounded") < text.index("if tl.atomic_add(report_ptr") < text.index("signal_wait")


def test_heads_and_puts_are_code() -> None:
    ast.parse("\n".join([*prologue(), *put_signal("dst", "bank", "bank_at + 1", "nbytes", "signals_at + 2")]))
    assert entry_name("put", "peer") == "put" and entry_name("put", "mixed") == "put_nvshmem"
