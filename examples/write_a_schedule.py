"""A schedule of your own: Ulysses that attends every key chunk as it lands, and sends each output home when it is done.

    sfcompile run --ranks 2 examples/write_a_schedule.py

A schedule is written once, for all ranks, in offsets (docs/schedules.md). The planner prices it beside its own, the
checker proves it for every rank before it runs; a version with a mistake is refused with the rule that it breaks.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from hello import DiT

from sfcompile import extend
from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.chunk_flow import ChunkFlow
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import MeshError, ScheduleError
from sfcompile.runtime.program.instructions import Wait
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology


def prompt(site: AttentionSite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1) -> AttentionSchedule:
    """The attend phase is ours; which chunks travel where is ChunkFlow's."""
    if mesh.ring > 1:
        raise MeshError(f"prompt splits heads only, and the mesh has a ring of {mesh.ring}")
    flow = ChunkFlow(site, mesh, q_parts, kv_parts)
    queries = flow.all_queries()  # own first
    *early, last = flow.keys(range(flow.groups), hops=[0])
    steps = [flow.wait_query(q) for q in queries if q.src != 0]
    for chunk in early:
        steps += [*flow.arrive(chunk), flow.attend(queries, [chunk])]
    steps += flow.arrive(last)
    for q in reversed(queries):  # the others' outputs first: they have a way to go
        steps.append(flow.attend([q], [last]))
        if q.src != 0:
            steps.append(flow.push(q))
    return flow.schedule("prompt", steps, staged=True)


def hasty(site: AttentionSite, mesh: Mesh) -> AttentionSchedule:
    """The same with a mistake: it does not wait for the last chunk of keys."""
    made = prompt(site, mesh)
    attend = list(made.origin.phases["attend"])
    attend.remove([step for step in attend if isinstance(step, Wait)][-1])
    return replace(made, origin=replace(made.origin, phases={**made.origin.phases, "attend": tuple(attend)}))


@torch.no_grad()
def main() -> None:
    """Register, ask for it, compare; then show that the mistake does not pass."""
    extend.register_schedule("prompt", prompt)
    torch.manual_seed(0)
    model = DiT(width=128, depth=2).eval()
    latents, t = torch.randn(1, 4, 32, 32), torch.tensor([500.0])
    options = {"placement": "shard", "inner": "eager", "schedule": "prompt"}
    got = torch.compile(model, backend="streamfusion", options=options)(latents, t)
    want = model(latents, t)
    if os.environ.get("RANK", "0") != "0":
        return
    from sfcompile.backend import last_report

    report = last_report()
    assert report is not None
    print(*report.plans[0].splitlines()[:4], sep="\n")
    tokens = (((0, 8),), ((8, 8),))
    site = AttentionSite("site", 1, 4, 4, 16, 16, torch.float32, tokens, tokens, 0.25)
    mesh = Mesh.of(Topology.grid(1, 2), 2, 1)
    print(prompt(site, mesh))
    try:
        check(hasty(site, mesh))
    except ScheduleError as error:
        print(f"the mistake is refused: {error.what}")
    error = float((got - want).abs().max() / want.abs().max())
    print(f"difference from one process: {error:.1e} of the output's scale")


if __name__ == "__main__":
    main()
