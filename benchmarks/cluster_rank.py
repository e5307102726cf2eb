"""One rank of benchmarks/cluster.py: every model at every link rate, all contenders in turn, in one job.

Rank 0 appends one JSON line per cell to the file it is given.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import cluster_hand_peers
import cluster_models
import cluster_peers
import cluster_times
import torch
import torch.distributed as dist
from cluster_cell import SETTINGS
from cluster_contender import Contender, silenced
from emulated_machines import shape_command

import sfcompile
from sfcompile.backend import last_report, streamfusion_backend
from sfcompile.codegen.toolchain.loader import cache_folder
from sfcompile.errors import StreamFusionError
from sfcompile.measuring import auto
from sfcompile.measuring.precise import measure
from sfcompile.measuring.wording import table
from sfcompile.passes import choose_schedules
from sfcompile.passes.state import Asked
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.process_group import ProcessWorld
from sfcompile.runtime.rank.session import get_session

FORCED = ("torus", "ulysses", "ring", "usp")
TYPED, TUNED = "ours", "ours, tuned"
"""As a user types it, links measured by the compile; and with what doctor --measure finds handed in."""
PAYLOAD = 1448 / 1514
"""Part of a shaped link's rate that is payload: Ethernet, IP and TCP headers count against it."""
TIMEOUT_S = 120.0


class _Stop(Exception):
    """The arguments are known; nothing need be computed."""


class Rank:
    """What this rank keeps through the job."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        torch._dynamo.config.recompile_limit = 10_000
        torch._dynamo.config.accumulated_recompile_limit = 100_000
        self.session = get_session(lambda: ProcessWorld("auto", TIMEOUT_S))
        self.rank = self.session.rank
        self.loaded: list[str] = []
        self.graph: Any = None
        load = self.session.load

        def noted(program: str, *args: Any) -> None:
            self.loaded.append(program)
            load(program, *args)

        self.session.load = noted  # type: ignore[method-assign]
        if config["parts"]:  # an experiment: other cuts than the planner's own
            Asked.parts = tuple(config["parts"])
        if config["peers"]:
            cluster_peers.prepare()
            topology = self.session.topology
            ranks = topology.num_ranks // topology.num_machines
            self.yunchang = cluster_peers.yunchang(topology.num_machines, ranks)
            self.groups = cluster_hand_peers.groups(topology.num_machines, ranks)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def set_rate(self, rate: str) -> None:
        """Shape this machine's uplink anew, from inside its namespace."""
        self.session.meet()
        if os.environ["LOCAL_RANK"] == "0":
            subprocess.run(shape_command(rate), check=True)
        if self.rank == 0:  # other links than those that were measured before
            shutil.rmtree(cache_folder() / "links", ignore_errors=True)
        auto.forget(self.session)
        self.session.meet()

    # ------------------------------------------------------------------ contenders

    def ours(
        self, model: torch.nn.Module, inputs: dict[str, Any], topology: Topology, wanted: list[str]
    ) -> Iterator[Contender]:
        """The planner's choice first, then every schedule that is asked for and possible.

        Args:
            topology: what doctor --measure found; TYPED is not told.
        """
        for name in wanted:
            options: dict[str, Any] = {"inner": self.config["inner"], "timeout_s": TIMEOUT_S}
            if name != TYPED:
                options["topology"] = topology
            if name not in (TYPED, TUNED):
                options |= {"schedule": name.removeprefix("ours "), "placement": "shard"}
            self.loaded.clear()
            before = last_report()
            try:
                if name in (TYPED, TUNED):
                    compiled = torch.compile(model, backend="streamfusion", options=options)
                    run = lambda run=compiled: first(run(**inputs))  # noqa: E731
                    run()
                else:  # the same graph for every forced schedule: Dynamo traces once
                    gm, examples, args = self.traced(model, inputs)
                    local = streamfusion_backend(gm, examples, options=options)
                    run = lambda run=local, args=args: first(run(*args))  # noqa: E731
            except StreamFusionError as error:
                self.say(f"    {name}: {str(error).splitlines()[0]}")
                continue
            report = last_report()
            if report is None or report is before:
                raise SystemExit(f"{name}: Dynamo took what an earlier cell had compiled, planned on other links")
            if name == TYPED:
                self.say(f"    links: {report.links}")
            programs = self.session.programs  # what measured the links is gone
            schedules: Any = [one for program in self.loaded for one in programs.get(program, ())]
            across = sum(one.bytes_by_link(topology)[1] for one in schedules)
            key = repr([(one.title, one.mesh, one.site.geometry()) for one in schedules])
            yield Contender(name, run, key, report.schedule, across)

    def traced(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Dynamo's graph of the model, its example inputs and the arguments that it is called with; kept."""
        if self.graph is None or self.graph[0] is not model:
            found: list[Any] = []

            def backend(gm: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
                def stop(*args: Any) -> Any:
                    found[:] = [gm, examples, args]
                    raise _Stop

                return stop

            with suppress(_Stop):
                torch.compile(model, backend=backend, fullgraph=True)(**inputs)
            self.graph = (model, *found)
        return self.graph[1:]

    def peers(self, name: str, model: Any, inputs: dict[str, Any]) -> list[Contender]:
        """diffusers, as its users run it."""
        topology = self.session.topology
        machines, total = topology.num_machines, topology.num_ranks
        streams = [t.shape[1] for t in inputs.values() if isinstance(t, torch.Tensor) and t.dim() == 3]
        divides = name in ("wan", "guided", "cogvideox") or all(tokens % total == 0 for tokens in [4096, *streams])
        found = []
        for peer, degrees in cluster_peers.peers(machines, total // machines).items():
            if not self.wanted(peer):
                continue
            try:
                twin: Any = cluster_peers.parallel(name, model, degrees, divides)
            except ValueError as error:
                self.say(f"    {peer} cannot run {name}: {error}")
                continue
            if self.config["inner"] != "eager":
                twin = torch.compile(twin)
            found.append(Contender(peer, lambda run=twin: first(run(**inputs)), peer, str(degrees)))
        # Attention of their own under diffusers' plan, whatever degrees that is told.
        heads, degrees = (
            model.config["num_attention_heads"],
            cluster_peers.peers(machines, total // machines)["diffusers usp"],
        )
        by_hand = {
            "yunchang usp": self.yunchang,
            "chunked ulysses": cluster_hand_peers.chunked_ulysses(None, heads),
            "gathered kv": cluster_hand_peers.gathered_kv(*self.groups, heads),
        }
        for peer, attention in by_hand.items():
            if attention is not None and self.wanted(peer) and divides and self.config["inner"] == "eager":
                twin = cluster_peers.parallel(name, model, degrees, divides, attention)
                found.append(Contender(peer, lambda run=twin: first(run(**inputs)), peer, peer))
        return found

    @property
    def layout(self) -> str:
        """``machines x ranks``."""
        topology = self.session.topology
        return f"{topology.num_machines}x{topology.num_ranks // topology.num_machines}"

    def wanted(self, name: str) -> bool:
        chosen = self.config["contenders"]
        return not chosen or any(part == name or (part != "ours" and part in name) for part in chosen)

    # ------------------------------------------------------------------ timing

    def timed(self, contender: Contender) -> None:
        """One step: the slowest rank's seconds."""
        session = self.session
        before = sum(session.blocked_s.values())
        dist.barrier()
        start = time.perf_counter()
        contender.run()
        mine = torch.tensor([time.perf_counter() - start, sum(session.blocked_s.values()) - before])
        everyone = [torch.empty(2) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        slowest, waited = torch.stack(everyone).amax(dim=0).tolist()
        contender.seconds.append(slowest)
        contender.blocked.append(waited)

    def check(self, contender: Contender, want: torch.Tensor) -> None:
        """Worst rank's error against one process, in parts of the output's largest magnitude."""
        error = (contender.run() - want).abs().max() / want.abs().max()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        contender.error = float(error)
        if not contender.error <= 1e-5:
            raise SystemExit(f"{contender.name} ({contender.plan}) is off by {contender.error:.1e}")

    def cell(
        self, name: str, rate: str, topology: Topology, fixed: list[Contender], model: Any, inputs: Any, want: Any
    ) -> None:
        """All contenders of one cell in turn."""
        names = [n for n in (TYPED, TUNED, *(f"ours {kind}" for kind in FORCED)) if self.wanted(n)]
        mine: list[Contender] = []
        same: dict[str, str] = {}
        start = time.perf_counter()
        for contender in self.ours(model, inputs, topology, names):
            twin = next((c for c in mine if c.key == contender.key), None)
            if twin is None:
                mine.append(contender)
            else:
                same[contender.name] = twin.name
        compile_s = time.perf_counter() - start
        for contender in fixed:
            contender.seconds, contender.blocked = [], []
        for contender in mine:
            self.check(contender, want)
        for contender in list(fixed):
            try:
                self.check(contender, want)
            except RuntimeError as error:  # on every rank alike: no later turns of it, at any rate
                self.say(f"    {contender.name} cannot run {name}: {str(error).splitlines()[0]}")
                fixed.remove(contender)
        running = [*mine, *fixed]
        bare = next((c for c in mine if c.plan.startswith("ulysses")), mine[0] if mine else None)
        alone = [Contender("compute alone", bare.run, "", bare.plan, bare.across_bytes)] if bare is not None else []
        if bare is not None and mine[0].across_bytes != bare.across_bytes:  # it shards less, or elsewhere
            alone.append(Contender("ours alone", mine[0].run, "", mine[0].plan, mine[0].across_bytes))
        for _ in range(self.config["rounds"]):
            for contender in running:
                self.timed(contender)
            for contender in alone:
                with silenced(self.session):
                    self.timed(contender)
        if self.config["trace"] and mine:
            with sfcompile.trace(Path(self.config["trace"]) / f"{self.layout}-{rate}-{name}"):
                mine[0].run()
        where = self.where_time_goes(mine[0]) if mine and mine[0].name == TYPED else {}
        for name_, twin_name in same.items():
            twin = next(c for c in mine if c.name == twin_name)
            running.append(
                Contender(
                    name_,
                    twin.run,
                    twin.key,
                    f"= {twin_name}",
                    twin.across_bytes,
                    twin.error,
                    twin.seconds,
                    twin.blocked,
                )
            )
        if self.rank == 0:
            took_s = time.perf_counter() - start
            self.write(name, rate, topology, [*running, *alone], {"compile_s": compile_s, "took_s": took_s}, where)

    def where_time_goes(self, contender: Contender) -> dict[str, float]:
        """Parts of the slowest rank's step (cluster_times.py), means of traced steps; on rank 0, else empty."""

        def steps() -> list[list[dict[str, float]]]:
            mine = []
            for _ in range(self.config["rounds"]):
                dist.barrier()
                mine.append(cluster_times.traced(contender.run, self.rank))
            return self.session.exchange(mine, "tell where their time went")

        everyone = steps()
        with silenced(self.session):
            silent = steps()
        if self.rank:
            return {}
        slowest = [max(of_ranks, key=lambda parts: parts["step"]) for of_ranks in zip(*everyone, strict=True)]
        alone = [max(of_ranks, key=lambda parts: parts["step"]) for of_ranks in zip(*silent, strict=True)]
        parts = cluster_times.mean(slowest)
        return {**parts, "slowed": cluster_times.slowed(parts, cluster_times.mean(alone))}

    def write(
        self,
        name: str,
        rate: str,
        topology: Topology,
        rows: list[Contender],
        seconds: dict[str, float],
        where: dict[str, float],
    ) -> None:
        """A finished cell: a line of the results, and one for people."""
        machines, layout = topology.num_machines, self.layout
        report = last_report()
        cell = {
            "layout": layout, "rate": rate, "model": name,
            **{name: self.config[name] for name in SETTINGS}, "times": where,
            "payload_bytes_per_s": bits(rate) / 8 * PAYLOAD, "machines": machines,
            "sites": report.sharded_sites if report else 0, "heap_bytes": self.session.heap_bytes,
            **seconds, "topology": topology.to_toml(),
            "rows": [
                {
                    "name": row.name, "plan": row.plan, "seconds": row.seconds, "blocked": row.blocked,
                    "error": row.error, "across_bytes": row.across_bytes,
                }
                for row in rows
            ],
        }  # fmt: skip
        with open(self.config["results"], "a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        shown = ", ".join(f"{row.name} {statistics.median(row.seconds):.2f}" for row in rows if row.seconds)
        print(
            f"  {layout} {rate:>8} {name:<10} {shown}  (plan {rows[0].plan}; compiled in {seconds['compile_s']:.0f} s; "
            f"the cell took {seconds['took_s']:.0f} s)", flush=True,
        )  # fmt: skip

    def memory(self) -> None:
        """One contender for some steps: the heap after each, peak RSS, and the CPU time that is not about tokens."""
        config, session = self.config, self.session
        name, contender = config["models"][0], config["contenders"][0]
        self.set_rate(config["rates"][0])
        topology = session.exchange(measure(session), "measure")[0]
        model, inputs = cluster_models.build(name, config["scale"], config["blocks"])
        if contender == TYPED:
            running = next(self.ours(model, inputs, topology, [TYPED]))
        else:
            running = self.peers(name, model, inputs)[0]
        heaps, cpu = [], []
        for _ in range(config["steps"]):
            start = time.process_time()
            self.timed(running)
            cpu.append(time.process_time() - start)
            heaps.append(session.heap_bytes)
        peak = [0.0 for _ in range(topology.num_ranks)]
        dist.all_gather_object(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        self.say(
            f"  {contender:<18} {config['blocks']} x blocks, {config['steps']} steps of "
            f"{statistics.median(running.seconds):.2f} s: "
            f"peak RSS {', '.join(f'{mib:.0f}' for mib in peak)} MiB; symmetric heap after steps 1, {len(heaps) // 2}, "
            f"{len(heaps)}: {', '.join(f'{heaps[i] / 2**20:.1f}' for i in (0, len(heaps) // 2, -1))} MiB"
        )
        if contender != TYPED:
            return
        # The same graph and plan with so little in every tensor that what is left is Python, dispatch and messages.
        loaded: Any = [one for program in self.loaded for one in self.session.programs[program]]
        parts = max(getattr(schedule.site, "parts", 1) for schedule in loaded)
        Asked.parts = (parts,) if parts > 1 else ()
        choose_schedules._WORTH = float("inf")
        few, small = cluster_models.build(name, 1 / 256, config["blocks"], head_dim=12)
        tiny = next(self.ours(few, small, topology, ["ours torus"]))
        times, plain = [], []
        for _ in range(50):
            session.meet()
            start = time.process_time()
            tiny.run()
            times.append(time.process_time() - start)
            start = time.process_time()
            few(**small)
            plain.append(time.process_time() - start)
        whole, ours_s, plain_s = (statistics.median(one) for one in (cpu, times, plain))
        self.say(
            f"  CPU time that is not about tokens (16 + 4 of them, heads of 12; {tiny.plan}): {ours_s * 1e3:.1f} ms a "
            f"step, {ours_s / whole:.1%} of a whole one's {whole:.2f} s; the plain model in one process: "
            f"{plain_s * 1e3:.1f} ms; added: {(ours_s - plain_s) / whole:.1%}"
        )

    def is_over(self) -> bool:
        """Whether the time for the run is over, by rank 0's clock: the same answer on every rank."""
        stop_at = self.config["stop_at"]
        over = stop_at is not None and time.time() > stop_at
        return bool(self.session.exchange(over, "agree on the time")[0])

    def main(self) -> None:
        """Every cell, in order; weights and peers are made once for cells of a model that follow one another."""
        config = self.config
        constants: dict[str, Topology] = {}
        for rate in dict.fromkeys(rate for _, rate in config["cells"]):
            self.set_rate(rate)
            constants[rate] = self.session.exchange(measure(self.session), "measure")[0]
            self.say(f"  {rate}: {table(constants[rate]).replace(chr(10), ';')}")
        for name, cells in groupby(config["cells"], key=lambda cell: cell[0]):
            self.set_rate("10gbit")
            model, inputs = cluster_models.build(name, config["scale"], config["blocks"])
            want = first(model(**inputs)) if self.rank == 0 else torch.empty_like(first_meta(model, inputs))
            dist.broadcast(want, 0)
            fixed = self.peers(name, model, inputs) if config["peers"] else []
            for _, rate in cells:
                if self.is_over():
                    return
                self.set_rate(rate)
                # Equal options are an equal backend to Dynamo: it would run the last rate's plan again.
                torch._dynamo.reset()
                self.cell(name, rate, constants[rate], fixed, model, inputs, want)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.say(
            f"  peak RSS of rank 0: {peak / 1024:.0f} MiB, symmetric heap {self.session.heap_bytes / 2**20:.1f} MiB"
        )


def first(output: Any) -> torch.Tensor:
    """The tensor that a diffusers transformer returns."""
    return output[0]  # type: ignore[no-any-return]


def first_meta(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A tensor of the output's shape, without computing it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = tuple(first(model(**inputs)).shape)
    return torch.empty(shape)


def bits(rate: str) -> float:
    """Bits per second of tc's notation."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"a rate looks like 200mbit, not {rate!r}")


if __name__ == "__main__":
    this = Rank(json.loads(Path(sys.argv[1]).read_text()))
    this.memory() if this.config["memory"] else this.main()
