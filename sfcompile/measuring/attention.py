"""attention="auto" on GPUs: whether the generated kernel or the library is faster, timed on the GPU at hand.

The attentions of a graph that compute the most are run both ways by rank 0 alone, as its own part of them
(codegen/engines/trial.py), before the graph runs for the first time. What rank 0 finds counts for all and is kept in a
file, by attentions, GPU and versions. A way that fails is left out, with a word. Where nothing can be timed, rates of
gpu-check decide, with their date.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from sfcompile.codegen.engines import trial
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.gpu_results import result_of
from sfcompile.codegen.toolchain.loader import cache_folder
from sfcompile.measuring.cache import today
from sfcompile.runtime.program.intervals import count
from sfcompile.runtime.rank.session import Session
from sfcompile.torch_private import autocast_off
from sfcompile.version import __version__

BUDGET_S = 20.0
"""After that no further attention is begun; the first one is timed however long its kernel takes to compile."""
ROUNDS = 5
TITLES = {"triton": "the generated kernel", "aten": "the library"}
"""Values of the option ``attention``, in words. Of two equally fast ones the first is taken."""
_FORMAT = 1


class Work(NamedTuple):
    """Attentions of one geometry: how often the graph has them, and the kind of mask that they bring."""

    schedule: AttentionSchedule
    mask: tuple[str, bool]
    calls: int


Make = Callable[[AttentionSchedule, tuple[str, bool]], tuple[trial.Step, trial.Step, trial.Step]]
"""What comes before a run, the run, and a look at whether it was right; for a geometry and a kind of mask."""


class Clock(Protocol):
    """Of a device."""

    def now(self) -> float:
        """Seconds of the host."""

    def seconds(self, step: trial.Step) -> float:
        """What a step takes on the device's stream."""


class DeviceClock:
    """Of a GPU's current stream; of the host for the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> float:
        """See :class:`Clock`."""
        return time.monotonic()

    def seconds(self, step: trial.Step) -> float:
        """See :class:`Clock`."""
        if not self._on_gpu:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Comparison:
    """What rank 0 saw.

    Attributes:
        seconds: of all attentions that were timed, by way; ways that failed are left out.
        problems: why, by way.
        timed, geometries: how many geometries were timed, of how many.
        date: the day.
    """

    seconds: dict[str, float]
    problems: dict[str, str]
    timed: int
    geometries: int
    date: str = field(default_factory=today)

    @property
    def best(self) -> str | None:
        """The fastest way; None: none ran."""
        return min(self.seconds, key=lambda name: (self.seconds[name], list(TITLES).index(name)), default=None)

    @property
    def line(self) -> str:
        """Why, for people."""
        told = [f"{TITLES[name]} {1e3 * seconds:.3g} ms" for name, seconds in self.seconds.items()]
        told += [f"{TITLES[name]} left out: {problem}" for name, problem in self.problems.items()]
        some = "" if self.timed == self.geometries else f", {self.timed} of {self.geometries} geometries"
        return f"timed {self.date} on rank 0's GPU{some}: {', '.join(told)}"


def decide_attention(
    session: Session, device: torch.device, work: Sequence[Work], measure: bool = True, clock: Clock | None = None,
    ways: dict[str, Make] | None = None,
) -> tuple[str, str]:  # fmt: skip
    """Collective: ``("triton" or "aten", reason)``, the same on every rank.

    Args:
        measure: whether something may be timed; else rates of gpu-check decide.
        clock, ways: stand-ins for the device's own, of tests; ``ways`` by the names of TITLES.
    """
    if not work:
        return "triton", "there is no attention"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    arch = KernelTarget(device).architecture
    if not measure:
        why = "nothing is measured where the topology is assumed"
        told: list[Any] = session.exchange(from_results(gpu, work, why, arch), "agree on the attention")
        return told[0][0], told[0][1]
    domains = tuple(session.side.domains)
    first, setting = session.rank == 0, _setting(gpu, work, domains)
    known: list[Comparison | None]
    known = session.exchange(_read(setting) if first else None, "ask which attention is faster")
    comparison = known[0]
    how = "cached, "
    if comparison is None:
        how = ""
        mine = (
            _measured(work, ways or ways_on(device, domains), clock or DeviceClock(device), setting) if first else None
        )
        known = session.exchange(mine, "time which attention is faster")
        comparison = known[0]
    assert comparison is not None
    if comparison.best is not None:
        return comparison.best, how + comparison.line
    told = session.exchange(from_results(gpu, work, comparison.line, arch), "agree on the attention")
    return told[0][0], told[0][1]


def attention_work(kinds: Mapping[Schedule, Sequence[tuple[str, bool]]]) -> list[Work]:
    """The attentions among some schedules, by geometry and kind of mask.

    Args:
        kinds: by schedule, the kind of mask of each of its sites.
    """
    calls: Counter[tuple[AttentionSchedule, tuple[str, bool]]] = Counter()
    for schedule, masks in kinds.items():
        if isinstance(schedule, AttentionSchedule):
            nameless = replace(schedule, site=replace(schedule.site, name=""))
            calls.update((nameless, mask) for mask in masks)
    return [Work(schedule, mask, times) for (schedule, mask), times in calls.items()]


def _measured(work: Sequence[Work], ways: dict[str, Make], clock: Clock, setting: dict[str, Any]) -> Comparison:
    with torch.no_grad(), autocast_off():
        comparison = compare(work, ways, clock)
    if len(comparison.seconds) == len(TITLES):  # one that failed may do better the next time
        with suppress(OSError):
            _write(setting, comparison)
    return comparison


def ways_on(device: torch.device, domains: Sequence[int] = ()) -> dict[str, Make]:
    """Both ways, for rank 0 of the job, on its device.

    Args:
        domains: by rank of the job; those of equal number reach each other's memory. (): all do.
    """
    target = KernelTarget(device)

    def fused(schedule: AttentionSchedule, mask: tuple[str, bool]) -> tuple[trial.Step, trial.Step, trial.Step]:
        rank, members = schedule.members(0)
        return trial.fused(schedule, rank, target, mask, [domains[member] for member in members] if domains else ())

    def library(schedule: AttentionSchedule, mask: tuple[str, bool]) -> tuple[trial.Step, trial.Step, trial.Step]:
        return trial.library(schedule, schedule.members(0)[0], device, mask)

    return {"triton": fused, "aten": library}


def compare(work: Sequence[Work], ways: dict[str, Make], clock: Clock, budget_s: float = BUDGET_S) -> Comparison:
    """Time the geometries both ways, those that compute the most first, while there is time.

    A way that fails once is out of the whole comparison: it could not run the graph.
    """
    until = clock.now() + budget_s
    seconds, problems, timed = dict.fromkeys(ways, 0.0), dict[str, str](), 0
    for entry in sorted(work, key=lambda entry: entry.calls * flops(entry.schedule), reverse=True):
        if timed and clock.now() >= until:
            break
        steps_of: dict[str, tuple[trial.Step, trial.Step, trial.Step]] = {}
        turns: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 + ROUNDS):
            for name, make in ways.items():
                if name in problems:
                    continue
                try:
                    if turn == 0:
                        steps_of[name] = make(entry.schedule, entry.mask)
                    turns[name].append(_once(steps_of[name], clock))
                except Exception as error:  # a way that cannot run here raises whatever it likes, at any time
                    problems[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        for name, values in turns.items():
            if name not in problems:
                seconds[name] += entry.calls * statistics.median(values[1:])  # it was compiled in the first
        timed += 1
    kept = {name: value for name, value in seconds.items() if name not in problems}
    return Comparison(kept, problems, timed, len(work))


def _once(steps: tuple[trial.Step, trial.Step, trial.Step], clock: Clock) -> float:
    before, run, look = steps
    before()
    seconds = clock.seconds(run)
    look()
    return seconds


def flops(schedule: AttentionSchedule) -> float:
    """Of all ranks."""
    site = schedule.site
    queries = sum(count(positions) for positions in site.q_positions)
    keys = sum(count(positions) for positions in site.kv_positions)
    return 2.0 * site.batch * site.heads * queries * keys * (site.head_dim + site.v_head_dim)


def from_results(gpu: str, work: Sequence[Work], why_not_timed: str, arch: int = 0) -> tuple[str, str]:
    """What rates of gpu-check say, or that there are none: then the library from sm_100 on, whose tensor cores the
    generated kernel drives at half their rate or less (docs/kernels.md).

    Args:
        arch: the GPU's architecture, 90, 100, ...; 0: none.
    """
    result = result_of(gpu)
    both = (
        {} if result is None else {size: of for size, of in result.rates.items() if {"fused", "library"} <= of.keys()}
    )
    if result is None or not both:
        why = f"gpu-check has no rates of {gpu}"
        if arch >= 100:
            return "aten", f"on sm_{arch} the library unless a figure speaks for the kernel; {why_not_timed}, and {why}"
        return "triton", f"puts, waits and attention in one kernel; not timed ({why_not_timed}), and {why}"
    seconds = dict.fromkeys(TITLES, 0.0)
    for entry in work:
        size = min(both, key=lambda size: abs(size - entry.schedule.site.head_dim))
        for name, of in (("triton", "fused"), ("aten", "library")):
            seconds[name] += entry.calls * flops(entry.schedule) / both[size][of]
    best = min(seconds, key=lambda name: (seconds[name], list(TITLES).index(name)))
    ratio = max(seconds.values()) / max(min(seconds.values()), 1e-30)
    return best, f"{ratio:.2f} x as fast by gpu-check of {result.measured} on {gpu}; not timed ({why_not_timed})"


# ---------------------------------------------------------------------- comparisons as files


def _setting(gpu: str, work: Sequence[Work], domains: tuple[int, ...]) -> dict[str, Any]:
    """All that two compiles must have in common to share a comparison."""
    described = sorted(repr((_geometry(entry.schedule), entry.mask, entry.calls)) for entry in work)
    return {
        "format": _FORMAT,
        "attentions": hashlib.sha256("\n".join(described).encode()).hexdigest(),
        "gpu": gpu,
        "domains": list(domains),
        "versions": {"sfcompile": __version__, "torch": str(torch.__version__), "triton": _version("triton")},
    }


def _geometry(schedule: AttentionSchedule) -> tuple[object, ...]:
    """Everything of a schedule that its kernels and its library calls depend on; names do not count."""
    site = schedule.site
    sizes = (site.batch, site.heads, site.kv_heads, site.head_dim, site.v_head_dim, site.dtype, site.causal, site.wire)
    program = schedule.program(schedule.members(0)[0])
    return schedule.kind, sizes, site.q_positions, site.kv_positions, schedule.mesh, program


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _place(setting: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "attention" / f"{digest[:24]}.json"


def _read(setting: dict[str, Any]) -> Comparison | None:
    try:
        raw = json.loads(_place(setting).read_text(encoding="utf-8"))
        comparison = Comparison(**raw["found"])
        datetime.date.fromisoformat(comparison.date)
        sound = raw["setting"] == setting and set(comparison.seconds) == set(TITLES) and not comparison.problems
        sound &= all(type(value) is float and 0.0 < value < math.inf for value in comparison.seconds.values())
        sound &= type(comparison.timed) is int and type(comparison.geometries) is int
        return comparison if sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write(setting: dict[str, Any], comparison: Comparison) -> None:
    path = _place(setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".new")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"setting": setting, "found": asdict(comparison)}, file, indent=1)
    os.replace(new, path)
