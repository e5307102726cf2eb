"""Would the plan be another one, if what is only assumed about the software were otherwise?

The best plans of a search are priced again with the costs at both ends of their range (runtime/program/presets.py),
first all at an end together; where the best one changes, each cost alone is asked, and the plan says which decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfcompile.codegen.plan.choose_plan import Candidate, SitePlan
from sfcompile.codegen.plan.step import price
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.runtime.program.presets import SOFTWARE
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology

COMPARED = 4
"""So many of the best plans are priced again."""
WORTH = 0.98
"""A plan that is hardly faster is no other plan."""


def doubts(plan: SitePlan, site: AttentionSite, topology: Topology, other_s: float) -> list[str]:
    """Sentences: at which assumed costs another plan is faster than the one taken, and by how much. None: at none.

    Only of attentions that take their tokens whole.

    Args:
        other_s: as the plan was made with.
    """
    ranges = SOFTWARE.get(topology.software, {})
    candidates = [row.candidate for row in plan.rows if row.seconds is not None][:COMPARED]
    if not ranges or len(candidates) < 2:
        return []
    schedules = [(candidate, candidate.schedule(site, topology)) for candidate in candidates]
    sentences = []
    for end in ("low", "high"):
        costs = {name: getattr(assumed, end) for name, assumed in ranges.items()}
        if _better(schedules, topology, costs, other_s) is None:
            continue
        alone = [
            (name, better)
            for name, cost in costs.items()
            if (better := _better(schedules, topology, {name: cost}, other_s)) is not None
        ]
        for name, (other, ratio) in alone:
            sentences.append(
                f"{name} is assumed to be {ranges[name].value:g}; were it {costs[name]:g}, {other} would be "
                f"{ratio:.2f} x as fast as {plan.best}"
            )
        if not alone:
            other, ratio = _better(schedules, topology, costs, other_s) or (plan.best, 1.0)
            all_of_them = "least" if end == "low" else "most"
            sentences.append(
                f"were all costs of software that are assumed the {all_of_them} they may be, {other} would be "
                f"{ratio:.2f} x as fast as {plan.best}"
            )
    return sentences


def _better(
    schedules: Sequence[tuple[Candidate, AttentionSchedule]],
    topology: Topology,
    costs: Mapping[str, float],
    other_s: float,
) -> tuple[Candidate, float] | None:
    """The plan that is faster than the first one with other costs, and how much; None: there is none."""
    changed = topology.with_constants(costs)
    seconds = [price(built, changed, other_s).seconds for _, built in schedules]
    least = min(seconds)
    if least > WORTH * seconds[0]:
        return None
    return schedules[seconds.index(least)][0], seconds[0] / least
