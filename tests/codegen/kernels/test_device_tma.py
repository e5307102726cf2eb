"""Text that device functions make for the assembler: which registers it names, where a thread's words lie."""

from __future__ import annotations

import re

from sfcompile.codegen.kernels.device_tma import hidden_text, keep_text


def test_scores_of_a_column_are_hidden_by_its_number() -> None:
    """64 x 16 scores are 8 a thread: columns c, c + 1 of two rows, then the same of columns c + 8."""
    results, scores = [f"$o{i}" for i in range(8)], [f"$i{i}" for i in range(8)]
    lines = hidden_text.fn((results,), (scores, ["$n"])).split("\n")
    column, columns = -1, {}
    for line in lines:
        compared = re.match(r"setp\.gt\.s32 hidden, lane, (\d+);", line)
        selected = re.match(r"selp\.f32 \$o(\d), 0fFF800000, \$i(\d), hidden;", line)
        column = int(compared[1]) if compared else column
        if selected:
            assert selected[1] == selected[2]
            columns[int(selected[1])] = column
    assert columns == {0: 0, 1: 1, 2: 0, 3: 1, 4: 8, 5: 9, 6: 8, 7: 9}
    assert "sub.s32 lane, $n, lane;" in lines


def test_every_word_of_a_state_has_a_place_of_its_own_for_each_thread() -> None:
    groups = (["$m0", "$m1"], ["$l0", "$l1"], ["$a0", "$a1", "$a2", "$a3"])
    stored = keep_text.fn((), (*groups, ["$p"]))
    assert "st.global.v4.f32 [place + 0], {$m0, $m1, $l0, $l1};" in stored
    assert f"st.global.v4.f32 [place + {16 * 128}], {{$a0, $a1, $a2, $a3}};" in stored
    loaded = keep_text.fn(groups, (["$p"],))
    assert "ld.global.v4.f32 {$m0, $m1, $l0, $l1}, [place + 0];" in loaded and "st.global" not in loaded
    assert "mul.wide.u32 place, thread, 16;" in stored and "and.b32 thread, thread, 127;" in stored
