"""What generated source is put together from."""

from __future__ import annotations

import ast

from sfcompile.codegen.kernels.text import (
    HEAP,
    Lines,
    columns,
    device_functions,
    entry_name,
    heap_of,
    line_of,
    module,
    prologue,
)
from sfcompile.runtime.program.sites import LINE_BYTES
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, PLACE, HeapSize, Watched


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
    assert heap_of("dst") == f"tl.load(heaps_ptr + {len(HEAP)} * dst)"


def test_a_module_brings_the_device_functions_that_it_uses_and_no_others() -> None:
    text = device_functions("last_of(a, b)")
    assert "def last_of" in text and "def copy_words" not in text
    wait = device_functions("wait_word(a, b, c, d)")
    assert "LOOK_EVERY" in wait and wait.index("def word(") < wait.index("def unbroken(") < wait.index("def wait_word(")
    whole = module("Title.", "x = 1\nputmem_signal_nbi_block(x, SIGNAL_SET)\n", ("a note",))
    assert whole.startswith('"""Title.\na note\n"""') and "import putmem_signal_nbi_block" in whole
    assert "SIGNAL_SET = tl.constexpr(9)" in whole and "globaltimer" not in whole
    assert "import globaltimer" in module("Title.", "wait_word(a, b, c, d)\n")
    ast.parse(whole)


def test_heads_are_code_and_know_the_heap() -> None:
    ast.parse("\n".join(prologue()))
    assert entry_name("put", "peer") == "put" and entry_name("put", "mixed") == "put_nvshmem"
    size = HeapSize(3, 128, 2)
    assert size.signals_of(1) - size.signals_of(0) == 3 * LINE_BYTES and line_of("slot") == f"slot * {LINE_BYTES}"
    assert size.credits_at - size.signals_at == 3 * LINE_BYTES * NUM_BANKS
    assert len(size.place(1, 2, Watched(3, 4, 5), 6)) == len(PLACE)
