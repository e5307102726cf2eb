"""The step with weights in shares beside whole ones, and beside torch's FSDP2 around diffusers' context parallelism.

    python benchmarks/emulated_machines.py --machines 2 --ranks 2 --rate 1gbit benchmarks/weights_step.py

Every rank runs this script; contenders take turns in one job (A B C D, A B C D), on the same weights and inputs, one
thread a rank, and every output is compared with the plain model's. Eager runs inside all of them. "ours" is
what a user types but for that and a longer ``timeout_s``; "ours, in shares" is that with
``options={"weights": "sharded"}`` after ``sfcompile.shard_weights``. The peers are diffusers' unified context
parallelism (Ulysses inside machines, ring across) with whole weights, and with ``fully_shard`` around each block and
the model: FSDP2 gathers one block ahead of the one that computes.

The limit of each of ours is the larger of compute alone (the same step with communication replaced by nothing, all
ranks at once) and its bytes over the payload rate of an uplink. A limit for FSDP2 is not stated: it is the same bytes
of weights, and diffusers' of attention.

"CPU" is what a rank's process computes in a step, all of its threads, in the mean of the ranks: where ranks share a
core it adds up to the step; other work on the machine hardly changes it.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import cluster_models
import cluster_peers
import torch
import torch.distributed as dist
from cluster_contender import silenced
from torch import nn

import sfcompile
from sfcompile.backend import last_report
from sfcompile.runtime.rank.process_group import ProcessWorld
from sfcompile.runtime.rank.session import Session, get_session

WHOLE, SHARES, USP, FSDP = "ours", "ours, in shares", "diffusers usp", "diffusers usp, fsdp2"
TIMEOUT_S = 300.0
_SAME = 1e-5


class Ours:
    """One of our two: its compiled model, and the programs that it runs."""

    def __init__(self, session: Session, model: nn.Module, weights: str, inputs: dict[str, Any]) -> None:
        options = {"inner": "eager", "weights": weights, "timeout_s": TIMEOUT_S}
        if weights == "sharded":
            sfcompile.shard_weights(model)
        self.compiled = torch.compile(model, backend="streamfusion", options=options)
        self.compiled(**inputs)
        report = last_report()
        assert report is not None
        self.links, self.plan = report.links, report.schedule
        self.programs = list(report.programs)

    def across_bytes(self, session: Session) -> int:
        """Between machines, all ranks, a step."""
        schedules: list[Any] = [one for name in self.programs for one in session.programs[name]]
        return sum(one.bytes_by_link(session.topology)[1] for one in schedules)


def under_fsdp2(model: nn.Module) -> nn.Module:
    """``fully_shard`` around each block of each list of blocks, and around the rest, on a mesh of all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def slowest(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the slowest rank, and CPU seconds of the mean rank."""
    dist.barrier()
    start, computed = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_s = torch.tensor(time.perf_counter() - start), torch.tensor(time.process_time() - computed)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(cpu_s)
    return float(seconds), float(cpu_s) / dist.get_world_size()


@torch.no_grad()
def main() -> None:
    """The table, said by rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=("flux", "flux6", "wan"))
    parser.add_argument("--blocks", type=int, default=2, help="times the model's one or two blocks")
    parser.add_argument("--scale", type=float, default=1.0, help="of the token count")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--payload-mbit", type=float, default=1000.0, help="of an uplink, for the limit")
    args = parser.parse_args()
    torch.set_num_threads(1)
    session = get_session(lambda: ProcessWorld("auto", TIMEOUT_S))
    topology = session.topology
    machines, ranks = topology.num_machines, topology.num_ranks // topology.num_machines
    model, inputs = cluster_models.build(args.model, args.scale, args.blocks)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    want = model(**inputs)[0]

    cluster_peers.prepare()
    degrees = cluster_peers.peers(machines, ranks)["diffusers usp"]
    peer = cluster_peers.parallel(args.model, model, degrees, True)
    in_fsdp = under_fsdp2(cluster_peers.parallel(args.model, copy.deepcopy(model), degrees, True))
    ours = {WHOLE: Ours(session, model, "whole", inputs)}
    ours[SHARES] = Ours(session, copy.deepcopy(model), "sharded", inputs)
    runs: dict[str, Callable[..., Any]] = {name: one.compiled for name, one in ours.items()}
    runs |= {USP: peer, FSDP: in_fsdp}

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_s: dict[str, list[float]] = {name: [] for name in runs}
    alone: dict[str, list[float]] = {name: [] for name in ours}
    for name, run in runs.items():
        error = (run(**inputs)[0] - want).abs().max() / want.abs().max()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        if not error <= _SAME:
            raise SystemExit(f"{name} is off by {float(error):.1e} of the largest value; {_SAME:.0e} is allowed")
    for _ in range(args.rounds):
        for name, run in runs.items():
            took, computed = slowest(lambda run=run: run(**inputs))
            seconds[name].append(took)
            cpu_s[name].append(computed)
        for name, one in ours.items():
            with silenced(session):
                alone[name].append(slowest(lambda one=one: one.compiled(**inputs))[0])
    if session.rank:
        return
    print(
        f"benchmarks/weights_step.py --model {args.model} --blocks {args.blocks} --scale {args.scale}: {machines} x "
        f"{ranks} ranks, weights {weights / 2**20:.0f} MiB, {args.rounds} rounds, load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores\nlinks: {ours[WHOLE].links}"
    )
    print(
        f"{'':<22}{'s a step':>9}{'range':>16}{'over ours':>10}{'CPU':>7}{'limit':>8}{'compute':>9}{'MiB across':>12}"
        "  plan"
    )
    base = seconds[WHOLE]
    for name, each in seconds.items():
        ratio = statistics.median(mine / whole for mine, whole in zip(each, base, strict=True))
        row = f"{name:<22}{statistics.median(each):>9.3f}{f'{min(each):.3f}..{max(each):.3f}':>16}{ratio:>9.3f}x"
        row += f"{statistics.median(cpu_s[name]):>7.3f}"
        if name in ours:
            across = ours[name].across_bytes(session)
            wire_s = across / machines / (args.payload_mbit * 1e6 / 8)
            compute_s = statistics.median(alone[name])
            row += f"{max(wire_s, compute_s):>8.3f}{compute_s:>9.3f}{across / 2**20:>12.1f}  {ours[name].plan}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
