"""Traces of real runs: what every rank did in its steps, with the simulator's prediction beside it.

    with sfcompile.trace("traces/"):          # on every rank, around some steps
        for _ in range(3):
            model(x)

    SFCOMPILE_TRACE=traces/ torchrun ...      # or without touching the script: all steps of the run

The folder then holds ``rank<r>.json`` of each rank and, merged by rank 0, ``trace.json`` (both open in
https://ui.perfetto.dev: a process per rank, and beside them the simulator's ranks), ``measured.png`` and
``predicted.png`` (two layers), and ``summary.txt``, a table of the layers: time blocked in waits, time in attention,
overlap, each measured and predicted. Recording costs microseconds a stage while it is on and nothing while it is off.

What is recorded is the work of the executor, that is of CPU ranks. On GPU ranks a stage is a kernel on a stream, which
the clock of the host does not see: trace those with torch.profiler.

The environment variable needs no agreement between ranks: each leaves its file when it ends, and rank 0 merges those
it finds. Where ranks share no folder, copy the files together and run ``python -m sfcompile.tracing.trace FOLDER``.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfcompile.errors import OptionError, StreamFusionError
from sfcompile.passes.report.history import reports
from sfcompile.prediction.timeline import write_perfetto, write_png, write_text
from sfcompile.runtime.program.spans import Span
from sfcompile.runtime.rank import recorder
from sfcompile.runtime.rank.recorder import Event, Recorder
from sfcompile.runtime.rank.session import Session, current_session
from sfcompile.tracing.report import (
    Key,
    Predicted,
    Times,
    TraceReport,
    last_layers,
    predict_layers,
    report_of,
    spans_of,
)

log = logging.getLogger("sfcompile")

VARIABLE = "SFCOMPILE_TRACE"
PATIENCE_S = 10.0
"""How long rank 0 waits at its end for the files of the others, in seconds (environment variable only)."""


@dataclass
class Trace:
    """What ``trace`` yields. ``report`` is filled on rank 0 when the block ends."""

    folder: Path
    report: TraceReport | None = None


@dataclass
class RankTrace:
    """What one rank recorded. ``met_s``: its clock when all ranks met; ``host``: ranks of one host share a clock."""

    rank: int
    machine_of: tuple[int, ...]
    host: str
    met_s: float
    events: list[Event]
    predicted: dict[Key, Predicted] = field(default_factory=dict)
    predicted_steps: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    predicted_spans: list[Span] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """As plain values, for a file."""
        plain = asdict(self)
        plain["events"] = [list(event) for event in self.events]
        plain["predicted"] = [[*key, asdict(value)] for key, value in self.predicted.items()]
        return plain

    @classmethod
    def load(cls, plain: dict[str, Any]) -> RankTrace:
        """What :meth:`dump` gave."""
        predicted = {
            (program, site): Predicted(entry["name"], entry["kind"], Times(**entry["times"]))
            for program, site, entry in plain["predicted"]
        }
        events = [Event(*event) for event in plain["events"]]
        spans = [Span(**span) for span in plain["predicted_spans"]]
        steps = [(tuple(programs), seconds) for programs, seconds in plain["predicted_steps"]]
        machine_of = tuple(plain["machine_of"])
        return cls(plain["rank"], machine_of, plain["host"], plain["met_s"], events, predicted, steps, spans)


@contextmanager
def trace(folder: str | Path) -> Iterator[Trace]:
    """Record the steps that run in the block; every rank must enter and leave it (leaving is collective).

    Args:
        folder: created if it is not there; rank 0 writes the merged trace and the table into it.

    Raises:
        OptionError: the folder or a file cannot be written.
    """
    result = Trace(_folder(folder))
    before, mine = recorder.active, Recorder()
    recorder.active = mine
    try:
        yield result
    except BaseException:
        # The other ranks may never come: leave what this one did, for whoever looks for the reason.
        session = _session()
        if session is not None:
            with suppress(OptionError):
                _write_rank(result.folder, _rank_trace(session, mine, time.perf_counter()))
        raise
    finally:
        recorder.active = before
    session = _session()
    if session is not None and session.group:  # beside the other groups' files, not over them
        result.folder = _folder(result.folder / session.group)
    if session is None:
        result.report = report_of([], {})
        log.info("trace: %s", result.report.headline)
        return
    session.exchange(None, "end a trace")
    own = _rank_trace(session, mine, time.perf_counter())
    everyone = session.exchange(own.dump(), "merge their traces")
    _write_rank(result.folder, own)
    if session.rank == 0:
        result.report = merge([RankTrace.load(record) for record in everyone], result.folder)
        log.info("trace in %s: %s", result.folder, result.report.headline)


def follow_environment() -> None:
    """Start recording for the rest of the process if ``SFCOMPILE_TRACE`` names a folder; the end of the process writes.

    Raises:
        OptionError: the folder cannot be made.
    """
    folder = os.environ.get(VARIABLE)
    if not folder or recorder.active is not None:
        return
    session = current_session()
    path = _folder(Path(folder) / session.group)
    recorder.active = Recorder()
    with suppress(FileNotFoundError):
        _record_of(path, session.rank).unlink()  # left by an earlier run
    atexit.register(at_exit, path)


def at_exit(folder: Path) -> None:
    """Leave this rank's files. Runs before the session closes: exit handlers run in the reverse of their order."""
    session, mine = _session(), recorder.active
    if session is None or mine is None:
        return
    own = _rank_trace(session, mine, time.perf_counter() - time.time())  # unlike monotonic clocks, hosts agree on this
    try:
        _write_rank(folder, own)
        write_text(_record_of(folder, session.rank), json.dumps(own.dump()))
        if session.rank == 0:
            missing = _await_files(folder, session.topology.num_ranks)
            report = merge_files(folder)
            some = f"; {missing} ranks left no file" if missing else ""
            log.info("trace in %s: %s%s", folder, report.headline, some)
    except StreamFusionError as error:
        log.warning("the trace could not be written: %s", error)


def _await_files(folder: Path, ranks: int) -> int:
    """Wait for the records of all ranks; how many are missing."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        missing = sum(not _record_of(folder, rank).is_file() for rank in range(ranks))
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.05)


def merge_files(folder: Path) -> TraceReport:
    """Merge the records that ranks left in a folder.

    Raises:
        OptionError: there are none, or one cannot be read.
    """
    paths = sorted(folder.glob("rank*.record.json"))
    if not paths:
        raise OptionError(
            f"{folder} holds no rank*.record.json",
            "ranks leave them at their end",
            f"run the ranks with {VARIABLE} set",
        )
    records = []
    for path in paths:
        try:
            records.append(RankTrace.load(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{path} cannot be read: {error}", "it is not what a rank leaves", "remove it") from error
    return merge(records, folder)


def merge(records: Sequence[RankTrace], folder: Path) -> TraceReport:
    """Bring the ranks to one clock; write ``trace.json``, the pictures and ``summary.txt``; the table.

    Ranks of one host share a clock. Hosts are aligned where all ranks met.

    Raises:
        OptionError: a file cannot be written.
    """
    met = {record.host: min(r.met_s for r in records if r.host == record.host) for record in records}
    events = [
        event._replace(start_s=event.start_s - met[record.host], stop_s=event.stop_s - met[record.host])
        for record in records
        for event in record.events
    ]
    predicted = {key: value for record in records for key, value in record.predicted.items()}
    beside = next((record.predicted_spans for record in records if record.predicted_spans), [])
    machine_of = records[0].machine_of
    report = report_of(events, predicted, [step for record in records for step in record.predicted_steps])
    title = f"{report.steps} steps of {report.ranks} ranks, measured; predicted: layers of the heaviest attention"
    write_perfetto(folder / "trace.json", spans_of(events), machine_of, title, beside)
    pictures = ""
    if report.rows:
        try:
            shown = spans_of(last_layers(events, report))
            write_png(folder / "measured.png", shown, machine_of, "two attentions and what lies between, measured")
            if beside:
                write_png(folder / "predicted.png", beside, machine_of, "layers of the heaviest attention, predicted")
        except OptionError as error:
            pictures = f"\nno pictures: {error}"
    write_text(folder / "summary.txt", f"{report}{pictures}\n")
    return report


def _rank_trace(session: Session, mine: Recorder, met_s: float) -> RankTrace:
    events = [event for event in mine.events if event.rank == session.rank]
    record = RankTrace(session.rank, session.topology.machine_of, _host(), met_s, events)
    if session.rank == 0:
        expected = predict_layers(session, reports())
        record.predicted, record.predicted_steps, record.predicted_spans = (
            expected.layers,
            expected.steps,
            expected.spans,
        )
    return record


def _write_rank(folder: Path, own: RankTrace) -> None:
    title = f"rank {own.rank}, measured"
    write_perfetto(folder / f"rank{own.rank}.json", spans_of(own.events), own.machine_of, title, ranks=[own.rank])


def _record_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.record.json"


def _session() -> Session | None:
    try:
        return current_session()
    except StreamFusionError:
        return None


def _host() -> str:
    """Processes with the same answer read the same monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _folder(folder: str | Path) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"the folder {path} cannot be made", error.strerror or str(error), "name one that you may write"
        ) from error
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m sfcompile.tracing.trace FOLDER``: merge the files that ranks left, print the table."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1:
        print("python -m sfcompile.tracing.trace FOLDER: merge the traces that ranks left in it", file=sys.stderr)
        return 2
    try:
        print(merge_files(Path(arguments[0])))
    except StreamFusionError as error:
        print(f"sfcompile: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
