"""A call of a compiled graph, around what Inductor runs: what ranks compare or share first, and what is written back.

What must be equal on all ranks is more than the inputs that a caller sees: weights, buffers that calls write to, the
state of the generator if the graph draws. Here is who looks at which of them, and when.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from sfcompile.boundary import NO_BOUNDARY, Boundary
from sfcompile.capture.aliases import Alias, refuse_overlap
from sfcompile.capture.graph import CaptureFacts, present
from sfcompile.capture.randomness import generator_state, set_generator_state, state_mark
from sfcompile.codegen.plan.step import Step
from sfcompile.device import device_of, engines_for
from sfcompile.errors import OptionError, UnsupportedError
from sfcompile.options import Options
from sfcompile.passes.report.steps import PredictedStep, StepWatch
from sfcompile.passes.runner import Compiled
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import held_in_shares
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.rank.session import Session
from sfcompile.runtime.rank.sharded_weight import marks_of
from sfcompile.runtime.rank.shared_weights import SharedWeights
from sfcompile.runtime.rank.weights import Weights
from sfcompile.shared_inputs import SharedInputs
from sfcompile.torch_private import autocast_off, autocast_state, inductor_mode_options, is_comparable, is_static_input
from sfcompile.verify import Verifier

GPU_LOOKS = 3
"""At so many first calls of a graph GPU ranks compare their inputs."""


class CallFacts(NamedTuple):
    """What surrounds the local graph at every call.

    Attributes:
        name: of the graph, the same on every rank.
        names: of the inputs.
        compared: which inputs must be equal on all ranks, or (``shared``) are made so.
        weights: which inputs are weights that must be.
        talks: whether a call has sites; if not, it needs no other rank.
        draws: whether it draws random numbers, which must be the same too.
        kept: the weights that are shared by the ranks of a machine; None: every rank holds its own.
        shares: which inputs are weights of which each rank holds some rows.
        verifier: compares first calls with one process; None: nobody does.
        boundary: which inputs come, and which outputs leave, in shards.
    """

    session: Session
    name: str
    names: Sequence[str]
    captured: CaptureFacts
    compared: Sequence[int]
    weights: Sequence[int]
    shared: SharedInputs | None
    talks: bool
    draws: bool
    kept: SharedWeights | None = None
    shares: Sequence[int] = ()
    verifier: Verifier | None = None
    boundary: Boundary = NO_BOUNDARY


def as_called(local: Callable[..., Any], call: CallFacts) -> Callable[..., Any]:
    """What Dynamo calls: all inputs in, sizes among them; the graph's outputs back; inputs written to where it does."""
    tensors, written = call.captured.tensor_inputs, call.captured.written
    weights, loaded = Weights(), call.weights
    session, shared, kept, calls = call.session, call.shared, call.kept, itertools.count(1)
    boundary = call.boundary
    # With rank 0's values in the step, an input that the graph does not write to holds other ones here.
    views = [view for view in call.captured.aliases if shared is None or view.input in written]

    def run(*args: Any) -> Any:
        refuse_overlap(args, written, call.names)  # Dynamo has no guard on it
        passed = args
        args = tuple(call.captured.as_tensors(args))
        mark = weights.mark([args[i] for i in loaded]) if loaded else 0
        called = f"{call.name}/{mark}" if loaded else call.name
        if call.shares:
            called = f"{called}/{marks_of([args[i] for i in call.shares])}"
        if boundary.inputs:
            called = f"{called}/{boundary.mark(args)}"
        mine, device = [args[i] for i in call.compared], session.side.device
        looks = shared is None and _can_look(device, next(calls))
        verifier = call.verifier if call.verifier is not None and call.verifier.calls else None
        # Before the call: what they are gathered by has calls of its own.
        wholes = {} if verifier is None else {i: args[i].whole() for i in (*call.shares, *boundary.inputs)}
        arrived = boundary.arrived(args)
        around = {} if verifier is None else autocast_state()
        looked_at = [*mine, *boundary.read(args), *([state_mark(device)] if call.draws else [])] if looks else []
        # The graph writes to no weight in shares (shares_of refuses it), and its caller to none before it returns.
        shards = [args[i].shard for i in call.shares]
        with session.call(called, looked_at, call.talks, shards), autocast_off():
            inputs = list(args)
            for i in call.shares:
                inputs[i] = args[i].shard
            for i, value in arrived.items():
                inputs[i] = value
            if shared is not None:
                values = shared.share(session, [*mine, *([generator_state(device)] if call.draws else [])])
                for i, value in zip(call.compared, values, strict=False):
                    inputs[i] = value
                if call.draws:
                    set_generator_state(device, values[-1])
            want = None
            if verifier is not None:
                want = verifier.expected(passed, [wholes.get(i, x) for i, x in enumerate(inputs)], around, device)
            out = local(*(inputs[i] for i in tensors))
            if verifier is not None and want is not None:
                verifier.compare(out, boundary.own_rows(want, session.rank), session.exchange)
            if kept is not None and loaded and call.talks:  # a call that talks has compared the marks
                kept.share_again(mark, [args[i] for i in loaded])
        for i, value in zip(written, out[len(out) - len(written) :], strict=True):
            args[i].copy_(value)
        own = out[: len(out) - len(written)]
        if boundary.outputs:
            own = boundary.leave(own, session.rank, f"{called} {fingerprint(looked_at)}")
        own = _with_views(own, views, args) if views else own
        return _one_memory(own, call.captured) if call.captured.shared or call.captured.joined else own

    return run


def _with_views(outputs: Sequence[Any], views: Sequence[Alias], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The outputs, of which those that are views of inputs are made so: gathered they are copies."""
    values = list(outputs)
    for view in views:
        values[view.output] = view.of(inputs[view.input])
    return tuple(values)


def _one_memory(outputs: Sequence[Any], captured: CaptureFacts) -> tuple[Any, ...]:
    """The outputs, of which those that share memory are made to: a graph returns each by itself."""
    values = list(outputs)
    for several in captured.joined:
        several.put_together(values)
    for view in captured.shared:
        values[view.base] = view.based(values[view.base])
        values[view.output] = view.of(values[view.base])
    return tuple(values)


def _can_look(device: torch.device, call: int) -> bool:
    """Whether inputs are compared at a graph's how-manieth call: on GPUs the host has to wait for what it reads."""
    if device.type != "cuda":
        return True
    return call <= GPU_LOOKS and not torch.cuda.is_current_stream_capturing()


def watched(
    run: Callable[..., Any],
    compiled: Compiled,
    session: Session,
    topology: Topology,
    shared: SharedInputs | None = None,
    verifier: Verifier | None = None,
) -> Callable[..., Any]:
    """``run``, whose times the graph's report compares with the predicted step. On GPUs a call ends before its work.

    Args:
        shared: what gives all ranks rank 0's inputs before the step: a call takes that too.
        verifier: compares first calls with one process, which takes a whole step more: they do not count.
    """
    stages, programs = compiled.report.stages, compiled.programs
    if stages is None:
        return run

    def predict() -> PredictedStep:
        step = Step(stages, programs, session.rank, topology)
        inputs_s = 0.0 if shared is None else shared.seconds(topology)
        return PredictedStep(inputs_s + step.seconds, inputs_s + step.exposed_s)

    watch = compiled.report.steps = StepWatch(session.rank, topology, predict)

    def timed(*args: Any) -> Any:
        compares = verifier is not None and verifier.calls
        start = time.perf_counter()
        out = run(*args)
        if not compares:
            watch.note(time.perf_counter() - start, session.waited_s)
        return out

    return timed


def compared_inputs(inputs: Sequence[Any], asked: Options, captured: CaptureFacts) -> tuple[int, ...]:
    """The inputs whose values ranks compare at calls, or get from rank 0; of weights see :func:`compared_weights`.

    A buffer that the graph writes to is no weight: what one call leaves there, the next one reads. Numbers that the
    graph takes are inputs like others.
    """
    if asked.inputs == "trusted":
        return ()
    values = [value if is_comparable(value) else None for value in captured.as_tensors(inputs)]
    written = captured.written
    return tuple(
        i for i, value in enumerate(values) if value is not None and (i in written or not is_static_input(value))
    )


def compared_weights(inputs: Sequence[Any], asked: Options) -> tuple[int, ...]:
    """The inputs that are weights and are compared: Dynamo gives one compiled graph to all models of an architecture,
    so a call's weights need not be those of the compile."""
    if asked.inputs == "trusted":
        return ()
    return tuple(i for i, value in enumerate(inputs) if is_comparable(value) and is_static_input(value))


def share_weights(
    names: Sequence[str], inputs: Sequence[Any], captured: CaptureFacts, session: Session, asked: Options
) -> SharedWeights | None:
    """Collective: the large weights of a graph lie once on every machine of CPU ranks, if that is asked for.

    Raises:
        WeightsError: there is no room, or the ranks of a machine share no memory.
        RankMismatchError: they hold different weights.
    """
    if asked.weights == "whole" or session.side.on_gpu:  # no memory of a GPU is every rank's
        return None
    places = [i for i in compared_weights(inputs, replace(asked, inputs="checked")) if i not in captured.written]
    kept = SharedWeights(session, [names[i] for i in places])
    kept.share([inputs[i] for i in places])
    return kept


def refuse_sharded(asked: Options, device: torch.device, topology: Topology) -> None:
    """Refuse to shard weights where that is not possible.

    Args:
        topology: the machines that the ranks run on, whatever they plan for.

    Raises:
        OptionError: GPU ranks that record CUDA graphs, or whose machines are not alike; CPU ranks that share no memory.
    """
    what = f"weights={asked.weights!r}"
    if asked.weights == "whole":
        return
    if device.type != "cpu":
        held_in_shares(asked.weights, True, topology.machine_of)  # machines that are not alike: an error
        if records_cuda_graphs(asked.mode):
            raise OptionError(
                f"{what} with a model on {device} and mode={asked.mode!r}",
                "that mode records CUDA graphs, which keep copies of what comes in, shares of weights too, and the "
                "memory of every gathered weight",
                "use another mode, or weights='whole'",
            )
        return
    if asked.transport == "c10d":
        raise OptionError(
            f"{what} with transport='c10d'",
            "that transport shares no memory between ranks, and the ranks of a machine share their weights in memory",
            "use transport='auto', or weights='whole'",
        )


def records_cuda_graphs(mode: str | None) -> bool:
    """Whether Inductor records CUDA graphs in a mode of torch.compile."""
    return bool(mode and mode != "default" and inductor_mode_options(mode).get("triton.cudagraphs"))


def share_inputs(
    name: str, inputs: Sequence[Any], captured: CaptureFacts, session: Session, asked: Options
) -> SharedInputs | None:
    """Collective: what gives all ranks rank 0's inputs, if that is asked for.

    Raises:
        UnsupportedError: an input cannot be sent.
    """
    if asked.inputs != "rank0":
        return None
    inputs = captured.as_tensors(inputs)
    device, places = device_of(inputs), compared_inputs(inputs, asked, captured)
    for i, value in enumerate(inputs):
        if i in captured.tensor_inputs and i not in places and not is_static_input(value):
            raise UnsupportedError(
                f"input {i} is a {type(value).__name__} with layout {value.layout}, and options={{'inputs': 'rank0'}}",
                "plain dense tensors can be sent from rank 0 to all",
                "use options={'inputs': 'checked'} and give every rank the same values",
            )
    facts = [(tuple(map(present, inputs[i].shape)), inputs[i].dtype) for i in places]
    if captured.draws:
        facts.append((tuple(generator_state(device).shape), torch.uint8))
    shared = SharedInputs(name, facts, session.topology.num_ranks, device)
    programs = {shared.program: shared.schedules}
    engines, _ = engines_for(programs, device, session, asked)
    session.load(shared.program, shared.schedules, engines[shared.program])
    return shared


def not_shared(cause: UnsupportedError) -> UnsupportedError:
    error = UnsupportedError(
        f"a graph cannot be captured ({cause.what}), and options={{'inputs': 'rank0'}}",
        "every rank would compute it from inputs of its own",
        "mend that, or use options={'inputs': 'checked'} and give every rank the same inputs",
    )
    error.on_every_rank = True
    return error
