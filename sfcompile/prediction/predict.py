"""Predict a step of a model on a topology, in one process: no ranks, no GPU, weights on the meta device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from sfcompile.capture.fewer_breaks import fewer_breaks
from sfcompile.capture.graph import Captured, capture
from sfcompile.capture.wrappers import without_wrappers
from sfcompile.codegen.plan.choose_plan import SitePlan
from sfcompile.codegen.plan.step import DRAWN_LAYERS, Drawn, Step, draw
from sfcompile.codegen.plan.volumes import volume
from sfcompile.codegen.proof.checker import check
from sfcompile.errors import OptionError, UnsupportedError
from sfcompile.one_style import merged, model_call
from sfcompile.options import AS_IT_IS, Options
from sfcompile.passes.report.report import groups_do
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, Choices, ShardedWeights, State
from sfcompile.prediction.timeline import write_perfetto, write_png
from sfcompile.runtime.program.formats import words
from sfcompile.runtime.program.intervals import count
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import can_be_cut, count_of, held_in_shares


@dataclass(frozen=True)
class Prediction:
    """The plan of every distinct attention of a model, and what a step is predicted to take.

    Attributes:
        name: of the model.
        topology: what it was planned for.
        choices: plans, counts, sites.
        steps: one per graph, as rank 0 runs it; what the model takes is their sum.
        seconds: how long tracing and planning took.
        warnings: what the passes would have a user know, e.g. that nothing is sharded because that would not pay.
    """

    name: str
    topology: Topology
    choices: Choices
    steps: tuple[Step, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def _parts(self) -> list[tuple[int, AttentionSite, SitePlan]]:
        return [(n, self.choices.sites[key], self.choices.plans[key]) for key, n in self.choices.counts.items()]

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step on rank 0: what it computes, and every attention and exchange."""
        return sum(step.seconds for step in self.steps)

    @property
    def exposed_s(self) -> float:
        """Predicted seconds of it in which the rank is blocked in waits."""
        return sum(step.exposed_s for step in self.steps)

    @property
    def limit_s(self) -> float:
        """No order of this work and these bytes is faster: the larger of compute alone and bytes / bandwidth."""
        return sum(step.limit_s for step in self.steps)

    def timeline(self, layers: int = DRAWN_LAYERS) -> Drawn:
        """Every event of a few layers of the step, around the attention on which the model spends most.

        Raises:
            UnsupportedError: no attention is sharded over tokens; says why.
        """
        drawn = draw(self.steps, layers)
        if drawn is None:
            if self.choices.counts:
                raise UnsupportedError(
                    f"{self.name} is not sharded on this topology, so there are no layers to draw",
                    "every rank computing the whole model is predicted to take less",
                    'ask for placement="shard", or for another topology',
                )
            raise UnsupportedError(
                f"{self.name} has no attention that can be sharded over tokens", "there is nothing to simulate"
            )
        return drawn

    def write(self, stem: Path) -> list[Path]:
        """Write ``STEM.png`` (a picture) and ``STEM.json`` (a Perfetto trace) of two layers; the paths.

        Raises:
            OptionError: a file cannot be written, or matplotlib is missing.
        """
        drawn = self.timeline()
        title = f"{self.name} on {_words(self.topology)}, {caption(drawn, self.choices, self._num_groups)}"
        paths = [stem.with_suffix(".png"), stem.with_suffix(".json")]
        write_png(paths[0], drawn.spans, drawn.topology.machine_of, title)
        write_perfetto(paths[1], drawn.spans, drawn.topology.machine_of, title)
        return paths

    @property
    def _num_groups(self) -> int:
        return self.choices.batch * self.choices.copies

    def __str__(self) -> str:
        lines = [f"{self.name} on {_words(self.topology)}, traced and planned in {self.seconds:.1f} s"]
        lines += [*self.choices.notes, *self.warnings]
        if self._num_groups > 1:
            doing = groups_do(self.choices.batch, self.choices.copies)
            lines.append(f"{self._num_groups} groups of {_words(self.choices.topology)} {doing}:")
        for n, site, plan in self._parts():
            schedule = plan.best.schedule(site, self.choices.topology)
            check(schedule)
            tokens = sum(count(p) for p in site.q_positions)
            grouped = f" over {site.kv_heads} K/V heads" if site.kv_heads != site.heads else ""
            lines += [
                "",
                f"{n} attention{'s' * (n > 1)}: {tokens} tokens, {site.heads} heads{grouped} x {site.head_dim}, "
                f"batch {site.batch}{travels(site)}; {self.choices.other_s * 1e3:.3f} ms of other compute before each",
                str(plan),
                "bytes of one attention over all ranks, in closed form:",
                *(f"  {text}" for text in str(volume(schedule, self.choices.topology)).splitlines()),
            ]
        if not self.choices.counts:
            alone = "groups of one rank share no attention" if self._num_groups > 1 else (
                "no attention can be sharded over tokens: every rank would compute the whole model"
            )  # fmt: skip
            lines.append(alone)
        if self.step_s:
            lines += [
                "",
                f"step       {self.step_s * 1e3:10.2f} ms predicted",
                f"exposed    {self.exposed_s * 1e3:10.2f} ms of it in waits ({self.exposed_s / self.step_s:.1%})",
                f"limit      {self.limit_s * 1e3:10.2f} ms: the larger of compute alone and bytes / bandwidth",
                f"efficiency {self.limit_s / self.step_s:10.1%} of the limit",
            ]
        return "\n".join(lines)


def travels(site: AttentionSite) -> str:
    """How its chunks travel, in words to be added to others; "": as they are."""
    return "" if site.wire == AS_IT_IS else f", travels with {words(site.wire)}"


def caption(drawn: Drawn, choices: Choices, groups: int) -> str:
    """What a picture of layers shows: how many, of which plan, on which ranks of ``groups`` groups."""
    best = choices.plans[drawn.schedule.site.geometry()].best
    layers = f"{drawn.layers} layer{'s' * (drawn.layers > 1)} of {best}, predicted"
    return layers + (f"; one of {groups} groups that share the batch" if groups > 1 else "")


def _words(topology: Topology) -> str:
    machines = topology.num_machines
    return f"{machines} machine{'s' * (machines > 1)}, {topology.num_ranks} ranks"


def simulate(
    model: torch.nn.Module,
    *inputs: Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    topology: Topology | str,
    options: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    schedule: str = "auto",
    placement: str = "auto",
    wire: str | Mapping[str, str] = "same",
    name: str = "",
    **named: Any,
) -> Prediction:
    """Trace a model, plan every attention for a topology, and predict a step. Nothing is computed.

    Args:
        model: may be on the meta device.
        args, kwargs: what it is called with; or ``inputs`` and ``named``, behind the model.
        topology: as in the backend's option: "4x8:a100-efa", a file, or a Topology.
        options: the backend's; those that do not change the plan (timeouts, transports) are only checked.
        mesh, schedule, placement, wire: as in the backend's options, of which they are.
        name: of the model, for titles.

    Raises:
        TopologyError: it cannot be read.
        MeshError: mesh or schedule are not possible.
        OptionError: a bad option, or something is given twice.
        UnsupportedError: the model's first graph cannot be captured.
    """
    where = topology if isinstance(topology, Topology) else Topology.parse(topology)
    args, kwargs = model_call(model, inputs, named, args, kwargs)
    wish, weights = asked_of(options, {"mesh": mesh, "schedule": schedule, "placement": placement, "wire": wire})
    begun = time.perf_counter()
    planned: list[Choices] = []
    steps: list[Step] = []
    warnings: list[str] = []

    def visit(gm: fx.GraphModule, captured: Captured) -> None:
        state = State(captured.gm, captured.mode, where, 0, with_shares(wish, weights, captured, where, 0))
        compiled = run_pipeline(state)
        steps.append(step_of(compiled, 0, where))
        warnings.extend(compiled.report.warnings)
        batch, copies = (state.group.batch, state.group.copies) if state.group is not None else (1, 1)
        planned.append(replace(state.choices, batch=batch, copies=copies))

    each_graph(model, args, kwargs, visit)
    taken_s = time.perf_counter() - begun
    # Several graphs: the one with most attention stands for the model; the others add their own.
    return Prediction(name or type(model).__name__, where, _joined(planned), tuple(steps), taken_s, tuple(warnings))


def asked_of(options: Mapping[str, Any] | None, spelled: Mapping[str, Any]) -> tuple[Asked, str]:
    """What the passes read of the backend's options, some perhaps spelled as keywords, and the option "weights".

    Raises:
        OptionError: a bad option, one that is given twice, or one that no prediction knows.
    """
    chosen = merged(options, spelled, {"mesh": None, "schedule": "auto", "placement": "auto", "wire": "same"})
    if "topology" in chosen:
        raise OptionError("topology is an argument of its own here", "a prediction needs one", "write topology=...")
    asked = Options.from_dict(chosen)
    if asked.attention == "triton":
        raise OptionError(
            "attention='triton' cannot be predicted",
            "the plan is priced for attention that computes chunk by chunk, not for kernels that hold the waits",
            "leave attention out; sfcompile kernels shows what would be generated",
        )
    if asked.boundaries != "whole":
        raise OptionError(
            f"boundaries={asked.boundaries!r} cannot be predicted",
            "which values cross between graphs in shards is seen when the graphs run; here all of them are gathered",
            "leave boundaries out for the plan with whole values; the report of a compile says what crosses",
        )
    shard = asked.placement == "shard"
    wish = Asked(asked.mesh, asked.schedule, shard_everything=shard, order=asked.passes, wire=asked.wire)
    return wish, asked.weights


def with_shares(asked: Asked, weights: str, captured: Captured, topology: Topology, rank: int) -> Asked:
    """What is asked of one graph: where ranks of a topology keep shares of large weights, these are in shares.

    Raises:
        OptionError: they shall, on machines that are not alike, and cannot.
    """
    cut = held_in_shares(weights, topology.of_gpus, topology.machine_of)
    if cut is None:
        return asked
    inputs = [node.meta["val"] for node in captured.gm.graph.nodes if node.op == "placeholder"]
    candidates = set(captured.parameters) - set(captured.written)
    places = tuple(
        at
        for at, (i, value) in enumerate(zip(captured.tensor_inputs, inputs, strict=True))
        if i in candidates and can_be_cut(value.shape, value.stride(), value.element_size(), count_of(cut))
    )
    by_machine = weights == "sharded-by-machine"
    return replace(asked, parts=(), weights=ShardedWeights(places, topology, rank, by_machine)) if places else asked


def step_of(compiled: Compiled, rank: int, job: Topology) -> Step:
    """The step of a graph whose passes have run for a rank of a job."""
    assert compiled.report.stages is not None
    return Step(compiled.report.stages, compiled.programs, rank, job)


def each_graph(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    visit: Callable[[fx.GraphModule, Captured], None],
    refused: Callable[[fx.GraphModule, UnsupportedError], None] | None = None,
) -> None:
    """Trace a call of a model and visit each of its graphs. Nothing is computed: graphs return zeros, or meta tensors.

    Args:
        visit: gets a graph of Dynamo and what was captured of it.
        refused: gets a graph that cannot be captured; it then runs as it is, so that those behind it are found too.
            None: that is an error.

    Raises:
        UnsupportedError: torch.compile traced no graph.
        StreamFusionError: what ``visit`` raised first.
    """
    failed: list[Exception] = []
    graphs = 0

    @fewer_breaks
    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        try:
            captured = capture(*without_wrappers(gm, inputs)[:2])
        except UnsupportedError as error:
            if refused is None:
                failed.append(error)
            else:
                refused(gm, error)
            return gm.forward
        try:
            visit(gm, captured)
        except Exception as error:  # torch.compile would wrap it
            failed.append(error)
            return gm.forward
        meta = any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in inputs)
        outputs = captured.gm.graph.output_node().args[0]
        assert isinstance(outputs, (tuple, list))
        own = outputs[: len(outputs) - len(captured.written)]
        return lambda *args: fx.map_arg(own, lambda node: _zeros(node.meta["val"], meta))

    torch.compiler.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend=backend)(*args, **kwargs)
    except Exception:
        if not failed:
            raise
    finally:
        torch.compiler.reset()
    if failed:
        raise failed[0]
    if not graphs:
        raise UnsupportedError("the model has no graph to plan", "torch.compile traced nothing of it")


def _zeros(value: Any, meta: bool) -> Any:
    device = torch.device("meta") if meta else value.device
    return torch.zeros(tuple(map(int, value.shape)), dtype=value.dtype, device=device)


def _joined(planned: Sequence[Choices]) -> Choices:
    first = max(planned, key=lambda choices: sum(choices.counts.values()))
    counts: dict[tuple[Any, ...], int] = {}
    plans: dict[tuple[Any, ...], SitePlan] = {}
    sites: dict[tuple[Any, ...], AttentionSite] = {}
    for choices in planned:
        for key, n in choices.counts.items():
            counts[key] = counts.get(key, 0) + n
            plans.setdefault(key, choices.plans[key])
            sites.setdefault(key, choices.sites[key])
    return replace(first, plans=plans, counts=counts, sites=sites)
