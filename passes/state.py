"""What the passes hand on to each other: what was asked for, and what each pass makes.

Read :class:`State` first. Its fields below ``asked`` are those that passes make (the table in pipeline.py says which);
until then they are not there, and the runner (runner.py) says which pass should have made them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from sfcompile.codegen.plan.choose_plan import SitePlan
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.options import AS_IT_IS, Wire
from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Key, Layout, Need, OpLayouts, Ownership, Window
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import FakeMode, OpView, is_getitem, shape_of
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.rules.rule import Rule
from sfcompile.runtime.program.sites import AnySite, AttentionSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.program.weight_rows import places_of

Agree = Callable[[Callable[[], Any]], Any]
"""Calls its argument on one rank and gives every rank the result, so that all run one plan."""

Geometry = tuple[Any, ...]
"""What tells sites apart (AttentionSite.geometry): attentions of one geometry share a plan and a schedule."""


@dataclass(frozen=True)
class ShardedWeights:
    """The weights of a graph of which each rank of the job holds some rows.

    Attributes:
        places: which of the graph's placeholders they are.
        topology, rank: of the job, whatever group of it computes a part of the batch, and on the machines that the
            weights were cut for, whatever is planned for.
        by_machine: each machine holds all of them.
    """

    places: tuple[int, ...]
    topology: Topology
    rank: int
    by_machine: bool = False

    @property
    def cut(self) -> tuple[int, ...]:
        """By rank, the how-manieth stretch of rows it holds."""
        return places_of(self.topology.machine_of, self.by_machine)


@dataclass(frozen=True)
class Asked:
    """What a compile was asked for (sfcompile/options.py), as far as the passes read it.

    Attributes:
        mesh: sizes of the mesh's axes "batch", "ulysses", "ring"; None: the planner's choice.
        schedule: the kind of schedule of every attention; "auto": the planner's choice.
        agree: see :data:`Agree`.
        shard_everything: shard whatever has a rule, whatever traffic that takes (place_min_cut.py).
        order: names of passes, to run instead of PIPELINE.
        kernels: attention runs as generated kernels.
        fuse_puts: puts are kernels too, and may compute what they send.
        late_reads: puts may read what they send after they have returned, as on GPUs (passes/graph/lifetimes.py).
        split_batch: groups of ranks may take whole samples each; not if the batch was split before.
        not_batch: ways to split the batch that turned out to cost more than they save (rewrite_batch.py).
        copies: groups of machines may compute the same each; not if ranks were split into groups before.
        parts: into how many parts a rank's tokens may be cut; the cheapest is taken, or none.
        wire: how the chunks of attentions are written while they travel.
        crossing: which outputs may leave in shards, for the graph behind a break.
        arrivals: which placeholders come in shards from the graph before one, and how they are cut.
        weights: which inputs are weights that ranks hold in shares; None: all are whole.
    """

    mesh: Mapping[str, int] | None = None
    schedule: str = "auto"
    agree: Agree = lambda plan: plan()  # noqa: E731
    shard_everything: bool = False
    order: tuple[str, ...] = ()
    kernels: bool = False
    fuse_puts: bool = False
    late_reads: bool = False
    split_batch: bool = True
    not_batch: tuple[int, ...] = ()
    copies: bool = True
    parts: tuple[int, ...] = (2, 3)
    wire: Wire = AS_IT_IS
    crossing: tuple[int, ...] = ()
    arrivals: Mapping[int, ValueRows] = field(default_factory=dict)
    weights: ShardedWeights | None = None

    @property
    def batch(self) -> int:
        """The "batch" degree of the mesh that was asked for; 1 if none was."""
        return int((self.mesh or {}).get("batch", 1))


@dataclass(frozen=True)
class Site:
    """One softmax attention of the captured graph: ``q [..., Lq, D]``, ``k [..., Lk, D]``, ``v [..., Lk, E]``."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node

    @property
    def flops(self) -> float:
        """Multiply-adds counted twice: ``2 * heads * Lq * Lk * (D + E)``."""
        q, k, v = shape_of(self.q), shape_of(self.k), shape_of(self.v)
        rows = 1.0
        for size in q[:-1]:
            rows *= size
        return 2.0 * rows * k[-2] * (q[-1] + v[-1])


@dataclass
class Tokens:
    """Where tokens sit (analyse_tokens.py).

    ``layouts[value][key]`` are the places where tokens sit in a value; ``views`` all calls, ``rules`` those that have
    a rule; ``clashes`` the ops at which two vectors could not be united (a shifted copy of the same tokens); ``rows``
    the seeds beyond the given ones, with the FLOPs of the op; ``turned`` seeds along which grids could be cut instead
    of along their rows; ``held`` labels that ranks hold already: the first, how many, and whose.
    """

    space: LabelSpace = field(default_factory=LabelSpace)
    layouts: dict[fx.Node, dict[Key, Layout]] = field(default_factory=dict)
    views: dict[fx.Node, OpView] = field(default_factory=dict)
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    clashes: list[fx.Node] = field(default_factory=list)
    rows: list[tuple[fx.Node, int, float]] = field(default_factory=list)
    turned: list[tuple[fx.Node, int]] = field(default_factory=list)
    held: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Layouts:
    """The chosen layout per value, the ownership of labels, and the token axes: ``(tokens, segments, flops)``.

    ``kin``: of an axis that runs along the same direction of a grid as others, at another size of it, the first of
    them.
    """

    chosen: dict[fx.Node, Layout]
    owners: Ownership
    axes: tuple[tuple[int, int, float], ...]
    kin: Mapping[int, int] = field(default_factory=dict)

    def of(self, op: OpView) -> OpLayouts:
        """The layouts of an op's operands and outputs."""
        return OpLayouts(
            [self.chosen.get(operand.node) for operand in op.operands],
            [self.chosen.get(output) if output is not None else None for output in op.outputs],
            self.owners,
        )


@dataclass(frozen=True)
class Choices:
    """How the attentions of a graph run (choose_schedules.py).

    Attributes:
        topology: of one group, where the batch is split.
        plans: per geometry of a site.
        counts: how many attentions share it.
        exchange_s: per attention node, predicted seconds beyond its share of the compute.
        sites: one site per geometry, with the name of the first attention of that kind.
        other_s: what a rank computes between two attentions.
        batch: into how many parts the batch is split, each for a group of ranks.
        copies: how many groups of machines compute the same.
        saved_s: what splitting the batch is predicted to save in attentions.
        notes: prices of other splits of the batch, and why some are not possible.
        parts: into how many parts a rank's tokens are cut, so that one is computed while another travels.
        whole: what to do if this graph cannot be cut into parts.
    """

    topology: Topology
    plans: Mapping[Geometry, SitePlan] = field(default_factory=dict)
    counts: Mapping[Geometry, int] = field(default_factory=dict)
    exchange_s: Mapping[fx.Node, float] = field(default_factory=dict)
    sites: Mapping[Geometry, AttentionSite] = field(default_factory=dict)
    other_s: float = 0.0
    batch: int = 1
    copies: int = 1
    saved_s: float = 0.0
    notes: tuple[str, ...] = ()
    parts: int = 1
    whole: Choices | None = None

    def schedule(self, site: AnySite) -> Schedule:
        """The schedule of a site of this graph."""
        if not isinstance(site, AttentionSite):
            return build("exchange", site, Mesh.of(self.topology, 1, self.topology.num_ranks))
        return self.plans[site.geometry()].best.schedule(site, self.topology)

    @property
    def main(self) -> SitePlan | None:
        """The plan on which the graph spends most."""
        if not self.plans:
            return None
        return self.plans[max(self.plans, key=lambda key: self.counts[key] * (self.plans[key].price.seconds or 0.0))]

    def __str__(self) -> str:
        halves = f" in {self.parts} parts" if self.parts > 1 else ""
        return "\n".join(f"{self.counts[key]} x {plan.best}{halves}" for key, plan in self.plans.items())


COPIES = "copies"
"""Name of the exchange by which groups that compute the same compare the marks of their calls."""


@dataclass(frozen=True)
class Group:
    """One of the groups of ranks that share out the batch, or compute the same (rewrite_batch.py): its graph, and the
    exchanges at its end.

    Attributes:
        gm: the group's part of the batch as a captured graph.
        program: key of the program that gathers the samples of all groups; ``sites`` are its exchanges.
        groups: the ranks of each group, all of one size; those that share a batch follow one another.
        copies: how often the batch is shared out.
        share: a group's FLOPs over an equal part: 1.0 is perfect.
        num_machines: those of the whole job.
        left: the ops that mix samples, or have no rule, with the reason: every group computes them for all samples.
        notes: prices of other splits of the batch.
    """

    gm: fx.GraphModule
    program: str
    sites: tuple[AnySite, ...]
    groups: tuple[tuple[int, ...], ...]
    share: float
    num_machines: int
    left: dict[fx.Node, tuple[OpView, str]]
    notes: tuple[str, ...]
    copies: int = 1

    @property
    def batch(self) -> int:
        """Into how many parts the batch is split."""
        return len(self.groups) // self.copies

    def schedule(self, site: AnySite) -> Schedule:
        """The schedule of one of ``sites``: ranks of equal place in their groups hold equal shards."""
        count = self.copies if site.name == COPIES else self.batch
        if site.name == COPIES:  # groups that do the same meet
            together = [self.groups[part :: self.batch] for part in range(self.batch)]
        else:
            together = [self.groups[at : at + count] for at in range(0, len(self.groups), count)]
        peers = tuple(ranks for groups in together for ranks in zip(*groups, strict=True))
        return replace(build("exchange", site, Mesh(1, count, tuple(range(count)))), groups=peers)


@dataclass(frozen=True)
class Features:
    """Products ``nodes`` of an input ``source`` that all ranks have whole: each rank computes some features of each,
    by its place among them (``places``, by rank)."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    places: tuple[int, ...]


@dataclass
class Placement:
    """The ops computed on shards, what they need of their operands, and what the cut cost (place_min_cut.py).

    An op in ``needs`` whose ``chosen.outs`` are all None sums over tokens: its outputs are all-reduced and whole.

    ``reasons`` says, for every op that touches tokens and is nevertheless replicated, why. ``features``: what is
    computed neither whole nor on shards of tokens (place_features.py).
    """

    needs: dict[fx.Node, list[Need]] = field(default_factory=dict)
    chosen: dict[fx.Node, OpLayouts] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    seconds: float = 0.0
    features: tuple[Features, ...] = ()

    def sharded(self, node: fx.Node) -> bool:
        """Whether this value is made as shards."""
        maker = maker_of(node)
        return maker in self.needs and any(self.chosen[maker].outs)


def maker_of(value: fx.Node) -> fx.Node:
    """The op that computes a value (a getitem's source)."""
    if is_getitem(value):
        source = value.args[0]
        assert isinstance(source, fx.Node)
        return source
    return value


class Move(NamedTuple):
    """A value of which ranks get other rows than they own, and the dtype in which these travel."""

    value: fx.Node
    need: Layout | Window
    dtype: torch.dtype


@dataclass
class Traffic:
    """What rewrite_local.py moved beside attention: values gathered whole, and values that ranks exchange in part; and
    what it did not: outputs that leave in shards, by their places. ``features``: products put together in one exchange
    each."""

    gathers: list[fx.Node] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    crossing: dict[int, ValueRows] = field(default_factory=dict)
    features: list[Features] = field(default_factory=list)


@dataclass
class WeightTraffic:
    """The exchanges by which ranks gather weights (rewrite_weights.py).

    Attributes:
        program: their key; ``schedules`` are its sites, one or two for every gathering.
        gathers: how many gatherings there are, of ``count`` weights: one that is read here and there needs several.
        whole_bytes: of those weights; ``own_bytes``: of this rank's rows of them.
        early: how early a gathering starts (order_puts.py).
    """

    program: str
    schedules: list[Schedule]
    gathers: int = 0
    count: int = 0
    whole_bytes: int = 0
    own_bytes: int = 0
    early: str = ""


def _by_a_pass() -> Any:
    """A field that a pass makes: to read it before is an AttributeError, which the runner puts into words."""
    return field(init=False, repr=False)


@dataclass(eq=False)
class State:
    """One graph on its way through the passes: a captured graph for a rank of a topology, and what was asked for.

    When ranks work in groups, ``gm``, ``topology`` and ``rank`` become those of this rank's group; ``group`` says so.
    """

    gm: fx.GraphModule
    mode: FakeMode
    topology: Topology
    rank: int
    asked: Asked = Asked()
    sites: list[Site] = _by_a_pass()
    tokens: Tokens = _by_a_pass()
    layouts: Layouts = _by_a_pass()
    choices: Choices = _by_a_pass()
    group: Group | None = field(default=None, init=False)
    placement: Placement = _by_a_pass()
    local: LocalGraph = _by_a_pass()  # this rank's graph
    traffic: Traffic = _by_a_pass()
    weights: WeightTraffic | None = field(default=None, init=False)
    fused_puts: tuple[int, int] | None = field(default=None, init=False)  # how many, of how many; None: no kernels
    programs: dict[str, list[Schedule]] = _by_a_pass()  # one proved schedule per site, by program
    report: GraphReport = _by_a_pass()

    @property
    def arrivals(self) -> dict[fx.Node, ValueRows]:
        """The values that come in shards, and how they are cut."""
        places = [node for node in self.gm.graph.nodes if node.op == "placeholder"] if self.asked.arrivals else []
        return {places[i]: cut for i, cut in self.asked.arrivals.items()}

    @property
    def num_groups(self) -> int:
        """Into how many groups of ranks the job is split; 1: it is not."""
        return 1 if self.group is None else len(self.group.groups)

    def schedules(self) -> dict[str, list[Schedule]]:
        """The schedules of the sites of ``local``, and of those that gather the batch and weights; none proved yet."""
        groups = self.group.groups if self.group is not None else ()
        built: dict[Geometry, Schedule] = {}
        for site in self.local.sites:
            if site.geometry() not in built:
                built[site.geometry()] = replace(self.choices.schedule(site), groups=groups)
        programs = {self.local.program: [built[site.geometry()] for site in self.local.sites]}
        if self.group is not None and self.group.sites:
            programs[self.group.program] = [self.group.schedule(site) for site in self.group.sites]
        if self.weights is not None:
            programs[self.weights.program] = self.weights.schedules
        return programs

    @property
    def program(self) -> str:
        """Key of this program: the same on every rank, different for another graph, topology or option."""
        text = f"{self.gm.code}|{self.topology}|{self.choices}|{self.asked.shard_everything}|{self.asked.wire}"
        shapes = [tuple(n.meta["val"].shape) for n in self.gm.graph.nodes if n.op == "placeholder"]
        if self.asked.crossing or self.asked.arrivals:
            text += f"|{self.asked.crossing}|{self.asked.arrivals}"
        if self.asked.weights is not None:  # other sites (place_features.py)
            text += f"|{self.asked.weights.places}|{self.asked.weights.cut}"
        return hashlib.sha256(f"{text}|{shapes}".encode()).hexdigest()[:16]
