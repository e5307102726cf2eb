"""Timelines: the trace reads back, the picture is a picture."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from sfcompile.errors import OptionError
from sfcompile.prediction.timeline import LANES, write_perfetto, write_png, write_text
from sfcompile.runtime.program.spans import Span

SPANS = [
    Span(0, "compute", "attend Q0 x KV0", 0.0, 0.002),
    Span(0, "network", "put k -> rank 1", 0.001, 0.0035, 4096, 1),
    Span(1, "wait", "wait k(1,0)", 0.0, 0.0035),
    Span(1, "compute", "attend Q1 x KV0", 0.0035, 0.005),
]


def test_the_trace_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_perfetto(path, SPANS, (0, 1), "two ranks")
    trace = json.loads(path.read_text())
    events = trace["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"}
    assert names == {(0, "rank 0 (machine 0)"), (1, "rank 1 (machine 1)")}
    assert sum(e["name"] == "thread_name" for e in events) == 2 * len(LANES)
    (put,) = [e for e in events if e["ph"] == "X" and e["cat"] == "network"]
    assert (put["ts"], put["dur"], put["args"]) == (1000.0, 2500.0, {"bytes": 4096})
    start, end = ([e for e in events if e["ph"] == ph] for ph in "sf")
    assert [(e["pid"], e["id"]) for e in start] == [(0, 1)] and [(e["pid"], e["id"]) for e in end] == [(1, 1)]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    write_png(path, SPANS, (0, 1), "two ranks")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    assert [p.name for p in tmp_path.iterdir()] == ["line.png"]


def test_many_ranks_and_spans_are_drawn_in_part(tmp_path: Path) -> None:
    spans = [Span(r, lane, "x", i * 1e-3, i * 1e-3 + 5e-4) for r in range(64) for lane in LANES for i in range(100)]
    write_png(tmp_path / "many.png", spans, tuple(r // 8 for r in range(64)), "many")
    assert (tmp_path / "many.png").stat().st_size > 5000


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="There is no folder"):
        write_perfetto(tmp_path / "gone" / "trace.json", SPANS, (0, 1), "")
    with pytest.raises(OptionError, match="nothing to draw"):
        write_png(tmp_path / "line.png", [], (0, 1), "")
    write_perfetto(tmp_path / "empty.json", [], (0,), "")
    assert json.loads((tmp_path / "empty.json").read_text())["traceEvents"]


def test_a_pipe_or_a_link_stays_what_it_is(tmp_path: Path) -> None:
    """As /dev/stdout and /dev/null, which a new file would take away from everybody."""
    pipe, link, target = (tmp_path / name for name in ("pipe", "link", "target"))
    os.mkfifo(pipe)
    link.symlink_to(target)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "into the pipe")
        assert os.read(reader, 100) == b"into the pipe" and pipe.is_fifo()
    finally:
        os.close(reader)
    write_text(link, "through the link")
    assert link.is_symlink() and target.read_text() == "through the link"


def test_without_matplotlib_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r'pip install "sfcompile\[plot\]"'):
        write_png(tmp_path / "line.png", SPANS, (0, 1), "")
