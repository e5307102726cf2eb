"""All passes over a captured graph, as the user's options ask for."""

from __future__ import annotations

from sfcompile.capture.graph import Captured
from sfcompile.options import Options
from sfcompile.passes.choose_schedules import Agree
from sfcompile.passes.pipeline import Compiled, run_pipeline
from sfcompile.passes.state import State
from sfcompile.runtime.program.topology import Topology


def run_passes(
    captured: Captured,
    topology: Topology,
    rank: int,
    asked: Options,
    agree: Agree,
    split_batch: bool,
    dump: bool = False,
) -> Compiled:
    """All passes over a captured graph for one rank.

    Args:
        agree: see choose_schedules.py.
        dump: write what ``asked.dump`` asks for.
    """
    values = [node.meta["val"] for node in captured.gm.graph.nodes if node.op == "placeholder"]
    on_gpu = any(value.device.type == "cuda" for value in values)
    kernels = asked.attention == "triton" or (on_gpu and asked.attention == "auto")
    state = State(
        captured.gm,
        captured.mode,
        topology,
        rank,
        asked.mesh,
        asked.schedule,
        agree,
        shard_everything=asked.placement == "shard",
        split_batch=split_batch,
        order=asked.passes,
        kernels=kernels,
        fuse_puts=kernels and on_gpu,
        parts=() if kernels else State.parts,  # kernels take all tokens at a time: they overlap inside
    )
    return run_pipeline(state, strict=asked.strict, dump=asked.dump if dump else None)
