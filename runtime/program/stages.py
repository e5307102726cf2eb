"""A step of one rank's graph as plain data: stretches of compute, and between them the nodes that talk to other ranks.

The compiler writes it down when a graph is finished (passes/graph/stages.py); codegen/plan/step.py plays it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One node of a graph that talks to other ranks.

    Attributes:
        program, site: which of the session's schedules.
        phase: of that schedule, e.g. "put_q", "attend", "collect".
        part: of this rank's tokens; -1: all of them.
        before_s: what the rank computes between the stage before (or the graph's start) and this one, in seconds.
    """

    program: str
    site: int
    phase: str
    part: int = -1
    before_s: float = 0.0


@dataclass(frozen=True)
class GraphStages:
    """All stages of a graph in their order. ``after_s``: seconds that the rank computes behind the last of them."""

    stages: tuple[Stage, ...] = ()
    after_s: float = 0.0

    @property
    def compute_s(self) -> float:
        """Seconds that the rank computes outside of its stages."""
        return sum(stage.before_s for stage in self.stages) + self.after_s
