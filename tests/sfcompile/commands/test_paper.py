"""The paper's table: rows, ratios, and a print that hides nothing."""

from __future__ import annotations

from dataclasses import replace

from sfcompile.commands.paper import COLUMNS, TABLE, Row, format_table, predict, predict_table
from sfcompile.runtime.program.topology import Topology


def test_every_row_is_predicted_with_one_set_of_constants() -> None:
    rows = predict_table()
    assert [row.workload for row in rows] == list(TABLE)
    assert max(abs(error) for row in rows for error in row.errors) < 0.155


def test_other_constants_change_the_answer() -> None:
    slow = replace(Topology.parse("1x8:a100-efa"), network_bytes_per_s=1e9, pair_bytes_per_s=None)
    assert predict_table(slow)[1].predicted != predict_table()[1].predicted


def test_where_traffic_is_all_the_ratio_is_half_the_machines() -> None:
    """V_usp / V_tas = N / 2: with links slow enough nothing else counts."""
    crawl = Topology.grid(4, 8, network_bytes_per_s=1e6, local_bytes_per_s=1e14, flops_per_s=1e18, pairing_s=0.0)
    row = predict(TABLE[1], replace(crawl, copy_bytes_per_s=None, message_s=0.0, launch_s=0.0))
    assert abs(row.predicted[0] - 2.0) < 0.05


def test_the_table_shows_both_and_the_errors() -> None:
    rows = [Row(TABLE[0], (1.11, 1.01, 2.22))]
    text = format_table(rows)
    assert all(column in text for column in COLUMNS)
    assert "1.11 / 1.11 (+0%)" in text and "2.22 / 1.11 (+100%)" in text
    assert "2 of 3 ratios within 15 %; largest error 100%" in text
