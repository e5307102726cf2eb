"""The rules by which every job is judged, whatever its fault was.

No value differs from eager's; every error is one of ours, comes within ``timeout_s`` + 5 s and on every rank that had
to see it; every process ends; nothing is left.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torture.job import JobRecord, RankRecord

LATE_AFTER_S = 5.0
"""An error may come so many seconds after ``timeout_s`` has passed."""


@dataclass(frozen=True)
class Verdict:
    """A row of the result.

    Attributes:
        problems: by severity, each with the rank: "SILENT WRONG", "HANG", "RAW ERROR", ...; none: the fault passes.
        seen: what the ranks saw, by attempt.
        seconds: from the fault (or the last rank's arrival) to the last error, without the time that no core was free.
        whole_s: of the whole job.
    """

    name: str
    kind: str
    expected: str
    seen: str
    seconds: float
    whole_s: float
    left: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


def judge(job: JobRecord) -> Verdict:
    """Judge a job by the records of its ranks."""
    victims = set(job.struck)
    times = [*job.faults_at]
    for record in job.ranks:
        for line in record.lines:
            if line["what"] == "fault":
                times.append(line["at"])
                victims |= {record.number} if line["victim"] else set()
    latest = _latest_begins(job)
    problems: list[str] = []
    waits: list[float] = []
    for record in job.ranks:
        victim = record.number in victims
        problems += _of_process(record, victim)
        for began, ended in _attempts(record):
            since = max([began["at"], latest[began["name"]], *(t for t in times if ended and t < ended["at"])])
            if ended is not None and ended["outcome"] in ("ours", "raw", "own"):
                waits.append(max(0.0, ended["at"] - since - _queued(job, began["at"], ended["at"])))
            problems += _of_attempt(record, victim, began, ended, waits[-1] if waits else 0.0, job.fault.timeout_s)
        problems += _of_exit(record, victim, times, job.fault.timeout_s)
    if not any(line["what"] == "exit" for record in job.ranks for line in record.lines) and len(victims) < len(
        job.ranks
    ):
        problems.append("BROKEN FAULT no rank came to its end")
    if job.outside_error:
        problems.append(f"BROKEN FAULT {job.outside_error.splitlines()[-1]}")
    if job.left:
        problems.append(f"LEFTOVERS {', '.join(job.left[:4])}")
    fault = job.fault
    whole = max(record.ended_at for record in job.ranks) - job.began_at
    return Verdict(
        fault.name, fault.kind, fault.expected, _seen(job, victims), max(waits, default=0.0), whole,
        tuple(job.left), tuple(dict.fromkeys(problems)),
    )  # fmt: skip


def _queued(job: JobRecord, began: float, ended: float) -> float:
    """The longest time that a rank had no core between two moments: a busy machine is no late error."""
    longest = 0.0
    for record in job.ranks:
        inside = [line["queued_s"] for line in record.lines if began <= line["at"] <= ended and "queued_s" in line]
        longest = max(longest, inside[-1] - inside[0]) if inside else longest
    return longest


def _latest_begins(job: JobRecord) -> Counter[str]:
    """When the last rank began an attempt of each name: an error cannot come before all are there."""
    latest: Counter[str] = Counter()
    for record in job.ranks:
        for began, _ in _attempts(record):
            latest[began["name"]] = max(latest[began["name"]], began["at"])
    return latest


def _attempts(record: RankRecord) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    pairs: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    for line in record.lines:
        if line["what"] == "begin":
            pairs.append((line, None))
        elif line["what"] == "end":
            index = max(i for i, (began, ended) in enumerate(pairs) if began["name"] == line["name"] and not ended)
            pairs[index] = (pairs[index][0], line)
    return pairs


def _of_process(record: RankRecord, victim: bool) -> list[str]:
    who = f"rank {record.number}"
    armed = {line["target"] for line in record.lines if line["what"] == "armed"}
    sprung = {line["target"] for line in record.lines if line["what"] == "sprung"}
    problems = [f"BROKEN FAULT {who} never came to {target}" for target in sorted(armed - sprung)]
    if record.exit_code is None and not victim:
        where = [began["name"] for began, ended in _attempts(record) if ended is None]
        problems.append(f"HANG {who} in {where[-1] if where else 'its exit or its beginning'}")
    elif record.exit_code is not None and record.exit_code < 0 and not victim:
        problems.append(f"CRASH {who} ended by signal {-record.exit_code}")
    problems += [
        f"RAW ERROR {who} ended with {line['error']}: {line['text'].splitlines()[0] if line['text'] else ''}"
        for line in record.lines
        if line["what"] == "uncaught" and not victim
    ]
    return problems


def _of_attempt(
    record: RankRecord,
    victim: bool,
    began: dict[str, Any],
    ended: dict[str, Any] | None,
    waited_s: float,
    timeout: float,
) -> list[str]:
    if ended is None:
        return []  # the process was killed in it, or hangs: _of_process
    who, name, outcome = f"rank {record.number}", began["name"], ended["outcome"]
    first = str(ended.get("text", "")).split("\n")[0][:160]
    problems = []
    if outcome == "wrong":
        problems.append(f"SILENT WRONG {who} {name}: {first}")
    elif outcome == "broken":
        problems.append(f"BROKEN RULE {who} {name}: {first}")
    elif victim:
        pass
    elif outcome == "raw":
        problems.append(f"RAW ERROR {who} {name}: {ended['error']}: {first}")
    elif outcome == "ours" and began["must"] == "exact":
        problems.append(f"NOT EXACT {who} {name}: {ended['error']}: {first}")
    elif outcome == "exact" and began["must"] == "error":
        problems.append(f"NO ERROR {who} {name}")
    if outcome in ("ours", "raw") and not victim and waited_s > timeout + LATE_AFTER_S:
        problems.append(f"LATE {who} {name}: {ended['error']} after {waited_s:.1f} s")
    return problems


def _of_exit(record: RankRecord, victim: bool, times: list[float], timeout: float) -> list[str]:
    over = [line["at"] for line in record.lines if line["what"] == "over"]
    if victim or not over or record.exit_code is None:
        return []
    took = record.ended_at - max([over[-1], *times])
    return [f"LATE rank {record.number} took {took:.1f} s to exit"] if took > timeout + LATE_AFTER_S else []


def _seen(job: JobRecord, victims: set[int]) -> str:
    """By attempt: how often which outcome."""
    by_name: dict[str, Counter[str]] = {}
    for record in job.ranks:
        for began, ended in _attempts(record):
            outcome = "ended in it" if ended is None else ended["outcome"]
            if ended is not None and outcome in ("ours", "raw", "own"):
                outcome = ended["error"]
            by_name.setdefault(began["name"], Counter())[outcome] += 1
    said = [
        f"{name}: " + ", ".join(f"{outcome}" + (f" x{n}" if n > 1 else "") for outcome, n in counted.items())
        for name, counted in by_name.items()
    ]
    ends = [f"rank {r.number} killed" for r in job.ranks if r.number in victims and (r.exit_code or 0) < 0]
    return "; ".join([*said, *ends])
