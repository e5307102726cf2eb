"""Order the communication: every put leaves as soon as its tensor exists, every collect waits for its first reader.

Between them lie the other projections, norms and RoPE, and those run while the chunks travel. The heap has two banks,
so of the sites ``s0, s1, ...`` (in graph order) site ``s[i]`` may open only after ``s[i - 2]`` has ended; sites open in
order. The pass then threads the ticket anew: the order it chose becomes a data dependence, the same on every rank,
which no compiler can undo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from sfcompile.codegen.plan.step import Step
from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.graph.op_view import is_getitem
from sfcompile.passes.graph.stages import stages_of
from sfcompile.passes.graph.tickets import argument_of, by_site, kind_of, tie, untie
from sfcompile.passes.state import State
from sfcompile.runtime.program.phases import ENDS, EXCHANGE_LINEAR, STARTS
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS

EARLY = ("when it is read", "while the rank computes", "while it attends, too")
"""When the exchange of a weight starts: right before the weight is read; as soon as there is a bank for it, but not
under an attention, which then has the links to itself; under an attention, too, once that has sent its own."""


def run(state: State) -> None:
    """The pass: reorders ``local``, this rank's graph; how early weights are gathered, its price decides."""
    graph, weights = state.local.graph, state.weights
    if weights is None:
        order_puts(graph)
        return
    weights.early = state.asked.agree(lambda: _cheapest(state, weights.program))
    order_puts(graph, weights.program, weights.early)


def _cheapest(state: State, weights: str) -> str:
    """Of EARLY what is predicted to take least; the first of equals."""
    schedules, seconds = state.schedules(), dict[str, float]()
    job = state.asked.weights
    assert job is not None
    for early in EARLY:
        graph = fx.Graph()
        graph.output(graph.graph_copy(state.local.graph, {}))
        order_puts(graph, weights, early)
        seconds[early] = Step(stages_of(graph, state.topology), schedules, job.rank, job.topology).seconds
    return min(EARLY, key=seconds.__getitem__)


def order_puts(graph: fx.Graph, weights: str = "", early: str = EARLY[0]) -> int:
    """Move puts up and collects down, then thread the ticket. Returns the number of communication nodes.

    Args:
        weights: the program that gathers weights, if there is one; ``early``: of EARLY.
    """
    nodes = [node for node in graph.nodes if node.target in COMMUNICATION]
    if not nodes:
        return 0
    start = untie(graph, nodes)
    sites = by_site(nodes)
    if any("part" in node.meta for node in nodes):
        _order_parts(graph, nodes, sites)
        tie(graph, nodes, start)
        return len(nodes)
    for i, site in enumerate(sites):
        if kind_of(site[-1]) == EXCHANGE_LINEAR:
            continue  # it computes: it stays where its product was
        _sink(site[-1], sites[i + NUM_BANKS][0] if i + NUM_BANKS < len(sites) else None)
    opened: fx.Node = start
    attention: list[fx.Node] = []  # the last one before
    for i, site in enumerate(sites):
        free = _last_pick(sites[i - NUM_BANKS][-1]) if i >= NUM_BANKS else start
        after = max(free, opened)
        starts = [node for node in site if kind_of(node) in STARTS]
        if weights and site[0].args[argument_of(site[0], "program")] == weights:
            if early != EARLY[0]:
                first = [_last_pick(node) for node in attention if early == EARLY[1] or kind_of(node) in STARTS]
                for node in starts:  # of the weights of one exchange in their order
                    after = _hoist(node, max([after, *(other for other in first if other < node)]))
        else:
            starts = [_hoist(node, after) for node in starts]
            attention = site if any(kind_of(node) == "attend" for node in site) else attention
        opened = min(starts)
    tie(graph, nodes, start)
    return len(nodes)


def _order_parts(graph: fx.Graph, nodes: list[fx.Node], sites: list[list[fx.Node]]) -> None:
    """Order a graph whose tokens come in parts: one part runs up to its next puts before the next part starts.

    Every value belongs to a group (``_turns``): that of the latest end (the collect of a part, the end of a gather)
    that it hangs on, ends numbered in graph order. The ends of an attention's parts follow one another, so all that
    part 0 needs up to its next puts is computed before the collect of part 1, whose outputs travel meanwhile. In a
    group the end comes first, then puts, each after just what it needs: V (no norm, no RoPE, so the link starts at
    once), K, and Q last, for receivers start on keys. What no put needs (the MLP of a parallel block) waits for the
    next attend, and runs while chunks travel. Values that belong to no part (modulation, embeddings), or hang on no end
    (keys and values of the text in every layer), are computed for their first reader.

    The order of the communication follows from groups, sites and kinds alone, so it is the same on all ranks:
    * an attend is in the group of the last of its puts, and after them; its ends have later numbers;
    * sites open in their order, and site i in a group no earlier than the last end of site i - 2, so that the bank of
      site i has been read.
    """
    site_of = {node: i for i, site in enumerate(sites) for node in site}
    ends = {node: i + 1 for i, node in enumerate(node for node in nodes if kind_of(node) in ENDS)}
    members: dict[_Turn, list[fx.Node]] = {}
    for node, turn in _turns(graph, sites, site_of, ends).items():
        members.setdefault(turn, []).append(node)
    order = _Order(graph)
    urgency = {"put_v": 0, "put_k": 1, "put_q": 2, "exchange_start": 3}
    pending: list[fx.Node] = []
    for turn in sorted(members):
        starts = [node for node in members[turn] if node in site_of and kind_of(node) in STARTS]
        starts.sort(key=lambda node: (site_of[node], urgency[kind_of(node)], order.position[node]))
        attends = [node for node in members[turn] if node in site_of and kind_of(node) == "attend"]
        order.place([node for node in members[turn] if node in ends])
        order.place(starts)
        pending += [node for node in members[turn] if node not in attends and node.op != "output"]
        if attends:
            order.place([*pending, *attends])
            pending = []
    order.place(pending)
    output = graph.output_node()
    for node in order.placed:
        output.prepend(node)


_Turn = tuple[int, int]
"""When a value is computed: after the end of this number (0: before the first), and there the part, in that order."""


def _turns(
    graph: fx.Graph, sites: list[list[fx.Node]], site_of: Mapping[fx.Node, int], ends: Mapping[fx.Node, int]
) -> dict[fx.Node, _Turn]:
    """The turn of every node, in graph order (the groups of _order_parts)."""
    closed = [max(ends[node] for node in site if node in ends) for site in sites]
    opened = [(0, 0)] * len(sites)
    turns: dict[fx.Node, _Turn] = {}
    for node in graph.nodes:
        mine = max((turns[value] for value in node.all_input_nodes), default=(0, 0))
        if mine[0] == 0:  # before the first end, too, part 0 comes first
            mine = (0, max(mine[1], node.meta.get("part", 0)))
        if node in ends:
            mine = (ends[node], 0)
        elif node in site_of:
            i = site_of[node]
            earlier = [turns[other] for other in sites[i] if other in turns]
            if kind_of(node) in STARTS:
                free = (closed[i - NUM_BANKS], 0) if i >= NUM_BANKS else (0, 0)
                mine = max(mine, free, opened[i - 1] if i else (0, 0))
                opened[i] = min([mine, *earlier])
            else:
                mine = max([mine, *earlier])
        turns[node] = mine
    for node in reversed(graph.nodes):
        anywhere = "part" not in node.meta or turns[node][0] == 0
        if anywhere and node not in site_of and node.op in ("call_function", "get_attr") and node.users:
            turns[node] = max(turns[node], min(turns[user] for user in node.users))
    return turns


class _Order:
    """A new order of a graph's nodes: each is placed after what it reads, which is placed when it is wanted."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        # A dict for its order: what is placed, in turn.
        self.placed = dict.fromkeys(node for node in graph.nodes if node.op == "placeholder")

    def place(self, wanted: Iterable[fx.Node]) -> None:
        """Place nodes in this order, each with what it needs before it."""
        for last in wanted:
            stack = [last]
            while stack:
                missing = [value for value in stack[-1].all_input_nodes if value not in self.placed]
                if missing and stack[-1] not in self.placed:
                    stack.extend(sorted(missing, key=self.position.__getitem__, reverse=True))
                    continue
                self.placed.setdefault(stack.pop())


def _last_pick(end: fx.Node) -> fx.Node:
    """The last of the nodes that take an end node's outputs (they move with it)."""
    return max([end, *(user for user in end.users if is_getitem(user))])


def _sink(end: fx.Node, limit: fx.Node | None) -> None:
    """Move an end node down to its first reader, but not past ``limit``, which needs its bank."""
    picks = [user for user in end.users if is_getitem(user)]
    stops = [reader for pick in picks for reader in pick.users]
    if limit is not None:
        stops.append(limit)
    if stops:
        target = min(stops)
        for node in (end, *picks):
            target.prepend(node)


def _hoist(put: fx.Node, after: fx.Node) -> fx.Node:
    """Move a put up to its tensor, but not above ``after``."""
    tensor = put.args[0]
    assert isinstance(tensor, fx.Node)
    anchor = after if tensor.op in ("placeholder", "get_attr") else max(tensor, after)
    anchor.append(put)
    return put
