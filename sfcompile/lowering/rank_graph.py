"""All passes over a captured graph, as the user's options ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from sfcompile.capture.graph import Captured
from sfcompile.errors import InternalError
from sfcompile.options import BATCH_AXIS, Options
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Agree, Asked, ShardedWeights, State
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.value_rows import ValueRows

T = TypeVar("T")


def compile_alike(compile: Callable[[bool], T], orders: Callable[[T], Iterable[Sequence[str]]]) -> T:
    """Compile until the graphs of all ranks talk in one order: with groups for the batch, else once more without.

    Groups that hold different samples may come to different graphs, and ranks of different graphs would wait for one
    another for ever. This loop is not a pass: it needs what the passes made on every rank.

    Args:
        compile: runs the passes; told whether groups of ranks may share out the batch.
        orders: of what that gave, every rank's communication (Compiled.order).

    Raises:
        InternalError: they never do; on every rank.
    """
    compiled = compile(True)
    if len(set(map(tuple, orders(compiled)))) <= 1:
        return compiled
    compiled = compile(False)
    if len(set(map(tuple, orders(compiled)))) > 1:
        error = InternalError(
            "the ranks' graphs talk to one another in different orders",
            "they would wait for one another for ever",
            "report this model, with the folder that options={'dump': DIR} writes",
        )
        error.on_every_rank = True
        raise error
    return compiled


def run_passes(
    captured: Captured,
    topology: Topology,
    rank: int,
    asked: Options,
    agree: Agree,
    split_batch: bool,
    dump: bool = False,
    kernels_put: bool = True,
    weights: Sequence[int] = (),
    homes: Sequence[int] = (),
    by_machine: bool = False,
    crossing: Sequence[int] = (),
    arrivals: Mapping[int, ValueRows] = MappingProxyType({}),
) -> Compiled:
    """All passes over a captured graph for one rank.

    Args:
        agree: see passes/state.py.
        kernels_put: whether generated kernels of these ranks could reach the others.
        dump: write what ``asked.dump`` asks for.
        weights: which inputs are weights that ranks hold in shares, as ``homes`` says: the machine of each rank, which
            need not be those that are planned for. Left out: it is. ``by_machine``: each machine holds all of them.
        crossing: which outputs may leave in shards.
        arrivals: which inputs come in shards, and how they are cut.
    """
    values = [node.meta["val"] for node in captured.gm.graph.nodes if node.op == "placeholder"]
    on_gpu = any(value.device.type == "cuda" for value in values)
    kernels = asked.attention == "triton" or (on_gpu and kernels_put and asked.attention == "auto")
    places = tuple(k for k, i in enumerate(captured.tensor_inputs) if i in weights)
    crosses = bool(crossing or arrivals)
    wish = Asked(
        mesh=asked.mesh,
        schedule=asked.schedule,
        agree=agree,
        shard_everything=asked.placement == "shard",
        order=asked.passes,
        kernels=kernels,
        fuse_puts=kernels and on_gpu,
        late_reads=on_gpu,
        # Shards that cross are of all tokens over all ranks. Groups of ranks, which share out samples or compute the
        # same, would have others.
        split_batch=split_batch and not crosses,
        copies=not crosses,
        wire=asked.wire,
        # A group of ranks holds rows of its own samples only: what it hands on would be no shard of the value.
        crossing=() if asked.mesh and asked.mesh.get(BATCH_AXIS, 1) > 1 else tuple(crossing),
        arrivals={captured.tensor_inputs.index(i): cut for i, cut in arrivals.items()},
        # Kernels take all tokens at a time: they overlap inside. And a gathered weight is read once.
        parts=() if kernels or weights else Asked.parts,
        weights=ShardedWeights(places, topology.on(tuple(homes)) if homes else topology, rank, by_machine)
        if places
        else None,
    )
    state = State(captured.gm, captured.mode, topology, rank, wish)
    return run_pipeline(state, strict=asked.strict, dump=asked.dump if dump else None)
