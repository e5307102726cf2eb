"""A checker of op rules: the op on shards must be the shard of the op, for many numbers of tokens and ranks.

    extend.check_op_rule(torch.ops.mylib.scale, lambda n: [torch.randn(2, n, 8)], tokens={0: 1})

A function that calls the op is captured and rewritten for every rank, as a compile would, with everything sharded that
has a rule. The ranks' graphs then run in this process, one after the other from one exchange to the next, and what each
of them gets is compared with what the function gives. Token counts below the number of ranks, prime ones and even ones
are tried: uneven and empty shards are where rules are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.capture.attention_calls import read_call
from sfcompile.capture.graph import Captured, capture
from sfcompile.errors import InternalError, NotShardedError, OptionError, RuleError
from sfcompile.passes.analyse_tokens import analyse_tokens
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.place_min_cut import place_min_cut
from sfcompile.passes.rewrite_local import rewrite_local
from sfcompile.runtime.program import intervals
from sfcompile.runtime.program.intervals import Runs
from sfcompile.runtime.program.sites import AttentionSite, ExchangeSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.torch_private import tree_leaves

COUNTS = (2, 3, 7, 12)
"""Token counts that are tried."""
RANKS = (2, 3, 5)


def check_op_rule(
    function: Callable[..., Any],
    inputs: Callable[[int], Sequence[torch.Tensor]],
    tokens: Mapping[int, int],
    *,
    counts: Sequence[int] = COUNTS,
    ranks: Sequence[int] = RANKS,
    tolerance: float = 1e-5,
) -> int:
    """Hold an op's rule against the op. Nothing is started; every rank's part runs in this process.

    Args:
        function: calls the op on tensors and returns a tensor or several. What else it calls needs rules too.
        inputs: its inputs for a number of tokens.
        tokens: which inputs hold the tokens, and in which dim: ``{0: 1}`` for ``[batch, tokens, width]``.
        counts, ranks: the numbers of tokens and of ranks to try.
        tolerance: largest difference, over the largest magnitude of the output; 0 asks for equal values.

    Returns:
        How many cases were compared.

    Raises:
        RuleError: on some rank the result has another shape, or other values.
        NotShardedError: the rule does not shard the op, or there is none.
        OptionError: nothing to check, or no such input.
    """
    if not tokens or not counts or not ranks:
        raise OptionError("nothing is checked", "tokens, counts or ranks is empty", "say tokens={0: 1}, for example")
    for count in counts:
        operands = list(inputs(count))
        for index, dim in tokens.items():
            if index >= len(operands) or dim >= operands[index].ndim or operands[index].shape[dim] != count:
                shape = list(operands[index].shape) if index < len(operands) else "not there"
                raise OptionError(
                    f"tokens={{{index}: {dim}}}, but input {index} for {count} tokens is {shape}",
                    "that dim must have as many entries as there are tokens",
                    "name the dim that holds them",
                )
        captured = capture(_as_graph(function, len(operands)), operands)
        with torch.no_grad():  # the function itself: a reader of attention may say of its op what it is not
            copies = [operand.clone() for operand in operands]
            want = [*tree_leaves(function(*copies)), *(copies[i] for i in captured.written)]
        for number in ranks:
            _compare(captured, operands, want, tokens, number, f"{count} tokens on {number} ranks", tolerance)
    return len(counts) * len(ranks)


def _as_graph(function: Callable[..., Any], arity: int) -> fx.GraphModule:
    """A graph of what a function calls, if a reader says what one of the calls is; else of one call of the function."""
    try:
        traced = fx.symbolic_trace(function)
    except Exception:  # it asks tensors for what only a real one has
        return _calling(function, arity)
    return traced if any(map(read_call, traced.graph.nodes)) else _calling(function, arity)


def _calling(function: Callable[..., Any], arity: int) -> fx.GraphModule:
    """A graph of one call, which whoever runs the graph with fake tensors sees into."""
    graph = fx.Graph()
    graph.output(graph.call_function(function, tuple(graph.placeholder(f"x{i}") for i in range(arity))))
    return fx.GraphModule(torch.nn.Module(), graph)


def _compare(
    captured: Captured,
    operands: Sequence[torch.Tensor],
    want: Sequence[torch.Tensor],
    seeds: Mapping[int, int],
    ranks: int,
    case: str,
    tolerance: float,
) -> None:
    for rank, result in enumerate(_run(_graphs(captured, seeds, ranks, case), operands)):
        for index, (mine, whole) in enumerate(zip(result, want, strict=True)):
            where = f"output {index} of rank {rank}, {case}"
            if mine.shape != whole.shape or mine.dtype != whole.dtype:
                _wrong(f"{where} is {mine.dtype}{list(mine.shape)}, and the op gives {whole.dtype}{list(whole.shape)}")
            if whole.numel() == 0:
                continue
            scale = float(whole.abs().max()) if whole.dtype != torch.bool else 1.0
            differs = (mine.to(torch.complex128) - whole.to(torch.complex128)).abs()
            worst = float(differs.max())
            if not worst <= tolerance * scale and not torch.equal(mine, whole):
                place = [int(i) for i in torch.unravel_index(differs.argmax(), whole.shape)]
                _wrong(f"{where} differs by {worst:.2e} at {place}; the largest magnitude is {scale:.2e}")


def _wrong(what: str) -> None:
    raise RuleError(
        what,
        "The op on shards is not the shard of the op, so a model with this op would get a wrong picture",
        "Mend the rule: which dims does the op mix, and which does it keep? Or the reader: is the call what it says?",
    )


def _graphs(
    captured: Captured, seeds: Mapping[int, int], ranks: int, case: str
) -> list[tuple[fx.GraphModule, list[Any]]]:
    """Every rank's graph and its sites."""
    inputs = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    tokens = analyse_tokens(captured.gm.graph, [(inputs[index], dim) for index, dim in seeds.items()])
    layouts = choose_layouts(tokens, [], ranks)
    placement = place_min_cut(captured.gm.graph, tokens, layouts, Topology.grid(1, ranks), shard_everything=True)
    if placement.reasons or not placement.needs:
        left = "; ".join(f"{node.name}: {reason}" for node, reason in placement.reasons.items())
        calls = ", ".join(str(node.target) for node in captured.gm.graph.nodes if node.op == "call_function")
        raise NotShardedError(
            f"{case}: {left or f'no token is followed through {calls}'}",
            "The rule is not asked where the op is computed whole, so there is nothing to check",
            "Register a rule for the op, or look at why its own declines",
        )
    graphs = []
    for rank in range(ranks):
        local = LocalGraph(captured.mode, layouts.owners, rank, "check")
        try:
            rewrite_local(captured.gm, tokens, layouts, placement, local)
        except InternalError as error:  # the rule's own answer does not fit what it wrote
            raise RuleError(f"rank {rank}, {case}: {error.what}", error.why, "Mend the rule") from error
        graphs.append((fx.GraphModule(local.root, local.graph), local.sites))
    return graphs


def _run(graphs: Sequence[tuple[fx.GraphModule, list[Any]]], inputs: Sequence[torch.Tensor]) -> list[Any]:
    """What every rank's graph returns: all run up to an exchange, then all go on."""
    sent: dict[tuple[Any, int], Any] = {}
    running = [_steps(gm, sites, rank, len(graphs), inputs, sent) for rank, (gm, sites) in enumerate(graphs)]
    results: list[Any] = [None] * len(graphs)
    with torch.no_grad():
        while running:
            ended = 0
            for rank, steps in enumerate(running):
                try:
                    next(steps)
                except StopIteration as end:
                    results[rank] = end.value
                    ended += 1
            if ended:
                if ended != len(running):
                    raise InternalError("Some ranks end before others", "Their graphs exchange in other orders")
                return results
    return results


def _steps(
    gm: fx.GraphModule,
    sites: Sequence[Any],
    rank: int,
    ranks: int,
    inputs: Sequence[torch.Tensor],
    sent: dict[tuple[Any, int], Any],
) -> Generator[None, None, Any]:
    """Run a rank's graph; stops before each exchange is finished, when the others must have come as far."""
    values: dict[fx.Node, Any] = {}
    operands = iter(inputs)
    ticket = torch.zeros(1, dtype=torch.int64)
    for node in gm.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        name = str(node.target)
        if node.op == "placeholder":
            values[node] = next(operands)
        elif node.op == "get_attr":
            values[node] = getattr(gm, node.target)
        elif node.op == "output":
            return args[0]
        elif name.startswith("streamfusion.exchange_start"):
            sent[args[3], rank] = args[0]
            values[node] = ticket
        elif name.startswith("streamfusion.exchange_finish"):
            yield
            parts = [sent[args[2], other] for other in range(ranks)]
            values[node] = (_exchanged(sites[args[2]], parts, rank), ticket)
        elif name.startswith("streamfusion.put_"):
            sent[(name[17], args[3]), rank] = args[0]
            values[node] = ticket
        elif name.startswith("streamfusion.attend"):
            sent[("mask", args[3]), rank] = args[1]
            values[node] = ticket
        elif name.startswith("streamfusion.collect"):
            yield
            values[node] = (_attended(sites[args[2]], args[2], sent, rank, ranks), ticket)
        else:
            values[node] = node.target(*args, **kwargs)
    raise InternalError("A graph has no output")


def _attended(
    site: AttentionSite, index: int, sent: Mapping[tuple[Any, int], Any], rank: int, ranks: int
) -> torch.Tensor:
    """What a rank has of an attention, of what every rank had before it."""

    def whole(tensor: str, owned: Sequence[Runs]) -> torch.Tensor:
        parts = [sent[(tensor, index), other] for other in range(ranks)]
        shape = (*parts[0].shape[:2], sum(map(intervals.count, owned)), parts[0].shape[3])
        return _exchanged(ExchangeSite.gather(site.name, shape, site.dtype, 2, tuple(owned)), parts, rank)

    out = torch.nn.functional.scaled_dot_product_attention(
        whole("q", site.q_positions), whole("k", site.kv_positions), whole("v", site.kv_positions),
        sent[("mask", index), rank], is_causal=site.causal, scale=site.scale, enable_gqa=site.heads != site.kv_heads,
    )  # fmt: skip
    rows = [row for first, length in site.q_positions[rank] for row in range(first, first + length)]
    return out[:, :, torch.tensor(rows, dtype=torch.int64)].contiguous()


def _exchanged(site: ExchangeSite, parts: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """What a rank has after an exchange, of what every rank had before it."""
    shape, dim = list(site.shape), site.dim
    count = shape[dim] // (site.outer * site.inner)
    whole = parts[0].new_zeros([*shape[:dim], site.outer, count, site.inner, *shape[dim + 1 :]])
    for part, runs in zip(parts, site.owned, strict=True):
        rows = [row for first, length in runs for row in range(first, first + length)]
        if rows:
            split = part.reshape([*shape[:dim], site.outer, len(rows), site.inner, *shape[dim + 1 :]])
            whole.index_copy_(dim + 1, torch.tensor(rows), split)
    whole = whole.reshape(shape)
    if site.is_gather:
        return whole
    rows = [row for first, length in site.wanted[rank] for row in range(first, first + length)]
    return whole.index_select(site.into, torch.tensor(rows, dtype=torch.int64))
