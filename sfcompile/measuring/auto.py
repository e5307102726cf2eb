"""topology="auto": what a session's links and ranks do, measured at its first compile, or read from the cache.

Rank 0 decides for all: its file counts, its numbers are sent to every rank, and so all plan alike to the last bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from sfcompile.errors import OptionError
from sfcompile.measuring import cache
from sfcompile.measuring.quick import Quick, measure_quickly
from sfcompile.measuring.wording import in_a_line
from sfcompile.options import ASSUMED
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import Session

VARIABLE = "SFCOMPILE_LINKS"
"""Environment variable: "assumed" makes topology="auto" mean "auto:assumed"."""
UNSTEADY = 0.2
"""A rate between machines that may be off by more, or was seen on machines so busy, is not kept for later jobs."""

CROWDED = 0.5
"""Ranks that had no core for more of the time measure again, MORE times at most: a link of 1 Gbit/s was taken for one
of 55 Mbit/s by ranks whose cores others had all the time."""
MORE = 2


@dataclass(frozen=True)
class SourcedTopology:
    """The machines of a job with their constants, and a line that says where these come from."""

    topology: Topology
    source: str


class _Decided(NamedTuple):
    """What rank 0 tells the others; ``how`` for people."""

    kept: cache.Kept
    how: str


_known: WeakKeyDictionary[Session, dict[tuple[str, torch.dtype], SourcedTopology]] = WeakKeyDictionary()


def resolved(topology: object) -> object:
    """The option, after the environment variable had its say.

    Raises:
        OptionError: the variable has another value than it may have.
    """
    said = os.environ.get(VARIABLE, "measured")
    if said not in ("measured", "assumed"):
        raise OptionError(
            f"{VARIABLE}={said!r}",
            "it says whether topology='auto' measures links and compute or assumes them",
            f"set it to measured or assumed, or unset {VARIABLE}",
        )
    return ASSUMED if topology == "auto" and said == "assumed" else topology


def assumed_links(base: Topology) -> SourcedTopology:
    """Constants as they are assumed of such ranks."""
    return SourcedTopology(base, f"assumed: {in_a_line(base)}")


def given_links(topology: Topology) -> SourcedTopology:
    """Constants that the user gave."""
    return SourcedTopology(topology, f"given: {in_a_line(topology)}")


def measured_links(session: Session, base: Topology, transport: str, dtype: torch.dtype) -> SourcedTopology:
    """Collective, at a session's first call; later ones, on the same kind of device and with the same dtype, know.

    Args:
        base: the job's machines, with constants for what is not measured.
        transport: the option.
        dtype: of the model.
    """
    known = _known.setdefault(session, {})
    key = session.side.device.type, dtype
    if key not in known:
        kept, how = _decide(session, base, transport, dtype)
        topology = base.with_constants(kept.quick.constants)
        known[key] = SourcedTopology(topology, f"{how}: {in_a_line(topology, kept.quick.spread)}")
    return known[key]


def forget(session: Session) -> None:
    """The next compile of the session asks the cache again, or measures: its links have changed."""
    _known.pop(session, None)


def _decide(session: Session, base: Topology, transport: str, dtype: torch.dtype) -> _Decided:
    identities = session.exchange(cache.own_identity(session.side.device), "describe their machines")
    setting = cache.setting_of(base, identities, transport, dtype)
    first = session.rank == 0
    kept: cache.Kept | None = session.exchange(cache.read(setting) if first else None, "ask for measured links")[0]
    if kept is not None:
        return _Decided(kept, f"from the cache of {kept.date}")
    quick = measure_quickly(session, base, dtype)
    for _ in range(MORE):
        if quick.busy <= CROWDED:  # the busiest rank's, and so the same on all
            break
        quick = quick.better_with(measure_quickly(session, base, dtype))
    decided: list[Any] = session.exchange(_keep(setting, quick) if first else None, "agree on measured links")
    first_says: _Decided = decided[0]
    return first_says


def _keep(setting: dict[str, Any], quick: Quick) -> _Decided:
    """What was measured, written down unless the links were too unsteady: the next job measures anew then."""
    kept = cache.Kept(quick, cache.today())
    if quick.busy > UNSTEADY:
        problem = f"other work had the cores for {min(quick.busy, 1.0):.0%} of the time, links may carry more"
    else:
        problem = "links were unsteady" if (quick.spread or 0.0) > UNSTEADY else cache.write(setting, quick)
    more = f", not kept ({problem})" if problem else ""
    return _Decided(kept, f"measured {kept.date} in {quick.seconds:.2f} s{more}")
