"""What the passes hand on to each other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.passes.analyse_attention import Site
from sfcompile.passes.analyse_tokens import Tokens
from sfcompile.passes.choose_layouts import Layouts
from sfcompile.passes.choose_schedules import Agree, Choices
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import FakeMode
from sfcompile.passes.place_min_cut import Placement
from sfcompile.passes.rewrite_batch import BatchPart
from sfcompile.runtime.program.topology import Topology


@dataclass
class State:
    """What the passes hand on. Inputs first; each pass fills the field named in its line of ``PIPELINE``.

    ``mesh_asked``, ``schedule_asked`` and ``agree`` are those of choose_schedules.py.
    """

    gm: fx.GraphModule
    mode: FakeMode
    topology: Topology
    rank: int
    mesh_asked: Mapping[str, int] | None = None
    schedule_asked: str = "auto"
    agree: Agree = lambda plan: plan()  # noqa: E731
    shard_everything: bool = False
    order: tuple[str, ...] = ()  # names of passes; none: PIPELINE
    kernels: bool = False  # attention runs as generated kernels
    fuse_puts: bool = False  # puts are kernels too, and may compute what they send
    sites: list[Site] = field(default_factory=list)
    tokens: Tokens = field(default_factory=Tokens)
    layouts: Layouts | None = None
    choices: Choices | None = None
    part: BatchPart | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    split_batch: bool = True
    parts: tuple[int, ...] = (2, 3)
    placement: Placement | None = None
    local: LocalGraph | None = None
    fused_puts: tuple[int, int] | None = None  # how many, of how many
    schedules: list[Schedule] = field(default_factory=list)

    @property
    def program(self) -> str:
        """Key of this program: the same on every rank, different for another graph, topology or option."""
        assert self.choices is not None
        text = f"{self.gm.code}|{self.topology}|{self.choices}|{self.shard_everything}"
        shapes = [tuple(n.meta["val"].shape) for n in self.gm.graph.nodes if n.op == "placeholder"]
        return hashlib.sha256(f"{text}|{shapes}".encode()).hexdigest()[:16]
