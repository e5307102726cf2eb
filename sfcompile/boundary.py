"""``options={"boundaries": "shards"}``: what crosses from one compiled graph to the next stays cut over the ranks.

Only what a graph hands on at a break may cross so (:func:`may_cross`): what a model returns is the caller's, who may do
with it on one rank what the others do not. With "regions" what compiled functions return crosses too: they are parts of
a model whose own results are made whole (sfcompile/repeated_blocks.py). Which outputs do, the passes decide
(passes/rewrite_local.py); which inputs are taken as they come, is seen of the graph that reads them
(sfcompile/lowering/arrivals.py).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph import Captured, CaptureFacts, break_reason
from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.device import engines_for
from sfcompile.lowering.arrivals import take_shards, takes_shard
from sfcompile.options import Options
from sfcompile.passes.runner import Compiled
from sfcompile.runtime.program.phases import EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.rank.session import Session, use_session
from sfcompile.runtime.rank.sharded_value import Gather, Held, ShardedValue, marks_of
from sfcompile.torch_private import FakeTensorMode


@dataclass(frozen=True)
class Boundary:
    """What of a graph's inputs and outputs is in shards.

    Attributes:
        inputs: which inputs are; the graph takes the shard of those in ``taken``, the others are made whole before it.
        outputs: which outputs are, by place.
        gather: how an output becomes whole when somebody reads it.
        compares: whether ranks compare what they are called with.
    """

    inputs: tuple[int, ...] = ()
    taken: frozenset[int] = frozenset()
    outputs: Mapping[int, ValueRows] = field(default_factory=dict)
    gather: Gather | None = None
    compares: bool = True

    def mark(self, args: Sequence[Any]) -> int:
        """Which values came, the same on all ranks that were given shards of the same ones."""
        return marks_of([args[i] for i in self.inputs])

    def read(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The inputs in shards that somebody has read, whole: Python may have written to them, on each rank what it
        likes, so they are compared as inputs that come whole are. All ranks have read the same ones."""
        values = [args[i].held.whole for i in self.inputs] if self.compares else []
        return [value for value in values if value is not None]

    def arrived(self, args: Sequence[Any]) -> dict[int, torch.Tensor]:
        """The inputs in shards as the graph takes them. Collective where one has to be made whole."""
        return {i: args[i].rows() if i in self.taken else args[i].whole() for i in self.inputs}

    def leave(self, results: Sequence[Any], rank: int, called: str) -> list[Any]:
        """A call's results, of which some are this rank's shards of values.

        Args:
            called: tells calls of other graphs, or with other inputs, from this one; the same on every rank.
        """
        assert self.gather is not None
        values = list(results)
        for place, cut in self.outputs.items():
            held = Held(self.gather, zlib.crc32(f"{called} {place}".encode()))
            shard = values[place].reshape(-1).view(values[place].shape)  # contiguous, strides of dims of one entry too
            values[place] = ShardedValue(shard, cut, rank, held)
        return values

    def own_rows(self, results: Sequence[Any], rank: int) -> list[Any]:
        """Whole results, of which those that leave in shards are cut to this rank's."""
        values = list(results)
        for place, cut in self.outputs.items():
            runs = [values[place].narrow(cut.dim, first, length) for first, length in cut.owned[rank]]
            values[place] = torch.cat(runs, cut.dim) if runs else values[place].narrow(cut.dim, 0, 0)
        return values

    @property
    def line(self) -> str:
        """In words, for the report; "": all is whole."""
        if not self.inputs and not self.outputs:
            return ""
        came, left = len(self.inputs), len(self.outputs)
        whole = f", {came - len(self.taken)} made whole first" if came > len(self.taken) else ""
        return f"{came} input{'s' * (came != 1)} in shards{whole}; {left} output{'s' * (left != 1)} in shards"


NO_BOUNDARY = Boundary()


def may_cross(gm: fx.GraphModule, captured: Captured, asked: Options) -> tuple[int, ...]:
    """The outputs of a Dynamo graph that may leave in shards: values of its own, if it ends at a break or is a region.

    Views of inputs are the caller's. Outputs that share memory with one another leave whole.
    """
    if asked.boundaries == "whole" or (asked.boundaries == "shards" and not break_reason(gm)):
        return ()
    (results,) = next(node for node in reversed(captured.gm.graph.nodes) if node.op == "output").args
    assert isinstance(results, (tuple, list))
    views = {view.output for view in captured.aliases}
    views |= {place for view in captured.shared for place in (view.output, view.base)}
    views |= {place for several in captured.joined for place, *_ in several.places}
    own = range(len(results) - len(captured.written))
    return tuple(i for i in own if i not in views and isinstance(results[i], fx.Node))


def across(
    compiled: Compiled,
    captured: CaptureFacts,
    mode: FakeTensorMode,
    arrivals: Mapping[int, ValueRows],
    session: Session,
    asked: Options,
) -> tuple[fx.GraphModule, Boundary]:
    """Collective: a rank's graph that takes shards of what arrives in shards, where it does on every rank.

    Args:
        mode: of the values in the rank's graph.
        arrivals: which inputs of the Dynamo graph are in shards.
    """
    gm, taken = compiled.gm, frozenset[int]()
    if arrivals:
        places = {i: captured.tensor_inputs.index(i) for i in arrivals}
        mine = [
            i not in captured.written and takes_shard(gm, places[i], cut, session.rank) for i, cut in arrivals.items()
        ]
        everyone = session.exchange(mine, "compare which shards their graphs take")
        taken = frozenset(i for n, i in enumerate(arrivals) if all(its[n] for its in everyone))
        if taken:
            gm = take_shards(gm, mode, {places[i]: arrivals[i] for i in taken}, session.rank)
    gather = gather_of(session, asked) if compiled.crossing else None
    return gm, Boundary(tuple(arrivals), taken, compiled.crossing, gather, asked.inputs != "trusted")


def gather_of(session: Session, asked: Options) -> Gather:
    """How a value becomes whole beside a compiled graph: by an exchange of its own, loaded when it is first wanted."""

    def gather(value: ShardedValue) -> torch.Tensor:
        cut, dtype = value.cut, value.dtype
        site = ExchangeSite.gather("a value between graphs", cut.shape, dtype, cut.dim, cut.owned)
        program = f"value-{hashlib.sha256(repr(site.geometry()).encode()).hexdigest()[:16]}"
        if program not in session.programs:
            ranks = session.topology.num_ranks
            schedule = build_exchange(site, Mesh(1, ranks, tuple(range(ranks))))
            check(schedule)
            with session.turn(), session.guard(), use_session(session):
                engines, _ = engines_for({program: [schedule]}, value.device, session, asked)
                session.load(program, [schedule], engines[program])
        name = f"read a value {list(cut.shape)} that crosses between graphs in shards/{value.held.mark}"
        with session.call(name, []), torch.inference_mode(value.is_inference()), torch.no_grad():
            out = torch.empty(cut.shape, dtype=dtype, device=value.device)
            session.put(program, 0, EXCHANGE_START, value.shard)
            session.receive(program, 0, out)
        return out

    return gather
