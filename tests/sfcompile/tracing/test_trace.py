"""Traces of real ranks: files, one clock, what is left when something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_workers
from processes import run_processes

import sfcompile
from sfcompile.errors import OptionError
from sfcompile.runtime.program.spans import Span
from sfcompile.runtime.rank import recorder
from sfcompile.runtime.rank.recorder import Event
from sfcompile.tracing import trace as tracing
from sfcompile.tracing.report import Predicted, Times
from sfcompile.tracing.trace import RankTrace, main, merge, merge_files

pytestmark = pytest.mark.ranks


def record(rank: int, host: str, met_s: float) -> RankTrace:
    """Two seconds before all ranks meet a call of one second begins, on a clock of its own."""
    stages = [("put_k", -2.0, -1.8), ("attend", -1.8, -1.2), ("collect", -1.2, -1.0)]
    events = [Event(rank, "stage", name, met_s + a, met_s + b, 0, None, 0, 0, 1) for name, a, b in stages]
    events.insert(2, Event(rank, "wait", f"k from rank {1 - rank}", met_s - 1.5, met_s - 1.3, 0, 1 - rank, 0, 0, 1))
    made = RankTrace(rank, (0, 1), host, met_s, events)
    if rank == 0:
        made.predicted = {(0, 0): Predicted("sdpa", "attention", Times(0.1, 0.5, 1.0))}
        made.predicted_spans = [Span(0, "network", "put k", 0.0, 0.5, 64, 1)]
    return made


def test_hosts_are_brought_to_one_clock(tmp_path: Path) -> None:
    report = merge([record(0, "a", 1000.0), record(1, "b", 5.0)], tmp_path)
    assert report.ranks == 2 and report.rows[0].measured.blocked_s == pytest.approx(0.2)
    trace = json.loads((tmp_path / "trace.json").read_text())
    starts = {event["pid"]: event["ts"] for event in trace["traceEvents"] if event["name"] == "put_k"}
    assert starts == {0: pytest.approx(0.0), 1: pytest.approx(0.0)}
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert names == {f"{what}rank {r} (machine {r})" for what in ("", "predicted ") for r in range(2)}
    assert {"measured.png", "predicted.png", "summary.txt", "trace.json"} == {p.name for p in tmp_path.iterdir()}
    assert "attention sdpa" in (tmp_path / "summary.txt").read_text()


def test_records_survive_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        first = record(rank, "a", 7.0)
        assert RankTrace.load(json.loads(json.dumps(first.dump()))) == first
        (tmp_path / f"rank{rank}.record.json").write_text(json.dumps(first.dump()))
    assert merge_files(tmp_path).ranks == 2
    assert main([str(tmp_path)]) == 0 and "attention sdpa" in capsys.readouterr().out
    (tmp_path / "rank1.record.json").write_text("{}")
    assert main([str(tmp_path)]) == 2 and "cannot be read" in capsys.readouterr().err
    with pytest.raises(OptionError, match="holds no rank"):
        merge_files(tmp_path / "gone")
    assert main([]) == 2


def test_ranks_record_their_steps(tmp_path: Path) -> None:
    texts = run_processes(2, rank_workers.traced, (str(tmp_path), False))
    assert "2 steps of 2 ranks" in texts[0] and "(predicted" in texts[0] and texts[1] == ""
    assert {"rank0.json", "rank1.json", "trace.json", "summary.txt"} <= {path.name for path in tmp_path.iterdir()}
    events = json.loads((tmp_path / "rank1.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {1}
    stages = [event["name"] for event in events if event.get("cat") == "stage"]
    assert stages.count("attend") == stages.count("collect") == stages.count("exchange_start") == 2


def test_the_environment_needs_no_agreement(tmp_path: Path) -> None:
    run_processes(2, rank_workers.traced, (str(tmp_path / "new"), True))
    assert "2 steps of 2 ranks" in (tmp_path / "new" / "summary.txt").read_text()


def test_without_ranks_nothing_is_recorded(tmp_path: Path) -> None:
    with sfcompile.trace(tmp_path / "t") as found:
        assert recorder.active is not None
    assert recorder.active is None and found.report is not None and "nothing was recorded" in str(found.report)
    with pytest.raises(ValueError, match="mine"), sfcompile.trace(tmp_path):
        raise ValueError("mine")
    assert recorder.active is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be made"), sfcompile.trace(tmp_path / "file" / "t"):
        pass


def test_the_variable_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracing.VARIABLE, raising=False)
    tracing.follow_environment()
    assert recorder.active is None
