"""The compiler: the list of passes in the order in which they run.

An entry names a pass, the fields of the state (state.py) that it needs and makes, and why it stands there. ``Restart``
runs all above it once more, ``cheapest`` tries every way. runner.py runs the list; sfcompile/extend.py is your door.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# isort: off
from sfcompile.passes import analyse_attention, analyse_tokens, choose_axes, choose_layouts, choose_schedules
from sfcompile.passes import place_features, place_min_cut, rewrite_batch, rewrite_local, rewrite_weights, order_puts
from sfcompile.passes import fuse_puts, build_schedules, report_graph

# isort: on
from sfcompile.passes.state import Layouts, State


@dataclass(frozen=True)
class Pass:
    """A function of the state, and the names of the fields that it needs and makes, with blanks between."""

    name: str
    run: Callable[[State], Any]
    needs: str = ""
    makes: str = ""
    why: str = "from outside"


class Restart(Pass):
    """A pass that may change the graph, or what is asked; it then returns True, and all above it runs once more."""


def cheapest(ways: Callable[[State], list[Layouts]], price: Callable[[State, Layouts], float]) -> Callable[..., None]:
    """A search: of several ways to lay values out the one of the least price in seconds, the first of equals."""

    def search(state: State) -> None:
        tried = ways(state)
        if len(tried) > 1:
            state.layouts = min(tried, key=lambda layouts: price(state, layouts))

    return search


# fmt: off
PIPELINE: list[Pass] = [
    Pass("analyse_attention", analyse_attention.run, "", "sites",
         "the only places where tokens meet; seeds of everything below"),
    Pass("analyse_tokens", analyse_tokens.run, "sites", "tokens",
         "labels flow both ways from the seeds through every op rule"),
    Pass("choose_layouts", choose_layouts.run, "sites tokens", "layouts",
         "label classes are final: owners of tokens, one layout per value"),
    Pass("choose_axes", cheapest(choose_axes.ways, place_min_cut.price), "sites tokens layouts", "layouts",
         "where an attention could be sharded along its batch instead: prices each way, and switches"),
    Pass("choose_schedules", choose_schedules.run, "sites tokens layouts", "choices",
         "searches every way to run each attention, by price; needs the owners of tokens"),
    Restart("rewrite_batch", rewrite_batch.run, "choices", "group",
            "if the plan splits the batch: the passes above once more, for one group's part"),
    Pass("place_min_cut", place_min_cut.run, "tokens layouts choices", "placement",
         "needs layouts, to know which ops have a local form, and prices of traffic"),
    Pass("place_features", place_features.run, "tokens choices placement", "", "products left whole, by features"),
    Pass("rewrite_local", rewrite_local.run, "tokens layouts choices placement", "local traffic choices",
         "every decision is made: write this rank's graph, in parts if planned; once more, whole, if an op forbids it"),
    Pass("rewrite_weights", rewrite_weights.run, "local", "weights", "weights in shares: gathered before readers"),
    Pass("order_puts", order_puts.run, "local", "", "moves communication inside the finished graph"),
    Pass("fuse_puts", fuse_puts.run, "local", "fused_puts",
         "on GPUs: what makes q, k, v moves into the kernel that sends them"),
    Pass("build_schedules", build_schedules.run, "choices local", "programs",
         "one schedule per attention and exchange, for all ranks, proved before use"),
    Pass("report_graph", report_graph.run, "sites tokens layouts choices placement local traffic programs", "report",
         "counts what was decided, for people"),
]
# fmt: on

REGISTERED: dict[str, Pass] = {}
"""Passes from outside, by name; they run where an order names them."""
