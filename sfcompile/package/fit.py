"""Whether a graph can run: its calls on tensors without values, and its communication against its schedules.

Nothing is computed and nothing is allocated. Every call is made once on fake tensors, so what does not fit, needs a
size that depends on data or is larger than this machine is found at load. What talks to other ranks is compared with
the site that it names: the shapes and dtypes that the plan has for this rank, in an order that ends (puts, attend,
collect; start, finish), each once, with no more sites open than the heap has banks. One chain of tickets goes through
all of it, so no compiler can order it otherwise. That the order is the same on every rank is seen where ranks meet
(load.py).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import PackageError
from sfcompile.package.calls import CallList, OperatorCall, Ref, filled, refs_of
from sfcompile.package.graph import empty_of
from sfcompile.package.limits import LIST, fits_memory, refused
from sfcompile.package.operators import OURS
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS
from sfcompile.torch_private import FakeTensorMode

Shape = tuple[int, ...]
Geometry = tuple[Shape, torch.dtype]


def check_fit(
    calls: CallList, inputs: Sequence[Mapping[str, Any]], programs: Mapping[str, Sequence[Schedule]], rank: int
) -> tuple[list[Geometry], list[str]]:
    """Make every call on tensors without values.

    Args:
        inputs: shape, strides and dtype of each.
        programs: the schedules that the graph's communication may name.

    Returns:
        Shape and dtype of each output, and the communication in its order, in words that are equal on all ranks.

    Raises:
        PackageError: a call does not fit; it names the node.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values: list[Any] = [None] * len(calls.names)
    wire = _Wire(programs, rank)
    with mode, torch.no_grad():
        values[: len(inputs)] = [empty_of(facts) for facts in inputs]
        for index, value in calls.constants.items():
            values[index] = mode.from_tensor(value)
        for call in calls.calls:
            try:
                values[call.index] = wire.run(call, values) if call.target in OURS else _run(call, values)
                wire.follow(call)
                _check_value(values[call.index], calls.names[call.index])
            except PackageError:
                raise
            except Exception as error:
                raise PackageError(
                    f"a call of the package does not fit its operands ({type(error).__name__}: {str(error)[:300]})",
                    "it was changed by hand, or another version of torch wrote it",
                    "export the model again",
                    node=call.name,
                ) from error
    wire.close()
    _check_reached(calls)
    outputs = [filled(entry, values) for entry in calls.outputs]
    if not all(isinstance(value, torch.Tensor) for value in outputs):
        raise refused("a graph returns something that is no tensor")
    return [(tuple(value.shape), value.dtype) for value in outputs], wire.order


def _run(call: OperatorCall, values: Sequence[Any]) -> Any:
    return call.target(*filled(call.args, values), **{key: filled(v, values) for key, v in call.kwargs.items()})


def _check_value(value: Any, name: str) -> None:
    entries = value if isinstance(value, (list, tuple)) else (value,)
    if len(entries) > LIST:
        raise refused(f"{name} has {len(entries)} results")
    for entry in entries:
        if isinstance(entry, torch.Tensor):
            if entry.device.type != "cpu" or entry.layout is not torch.strided or entry.is_quantized:
                raise refused(f"{name} is no dense tensor of the CPU")
            fits_memory(entry.untyped_storage().nbytes(), f"the result of {name}")
        elif entry is not None:
            raise refused(f"{name} gives a {type(entry).__name__}")


def _check_reached(calls: CallList) -> None:
    """All communication is needed for the outputs: what is not, a compiler would drop on this rank."""
    live = {ref.index for ref in refs_of(calls.outputs)}
    for call in reversed(calls.calls):
        if call.index in live:
            live.update(ref.index for ref in call.refs())
        elif call.target in OURS:
            raise refused(f"{call.name} talks to other ranks and no output needs it")


class _Wire:
    """What a rank does with its sites while the calls go by."""

    def __init__(self, programs: Mapping[str, Sequence[Schedule]], rank: int) -> None:
        self.order: list[str] = []
        self._programs = programs
        self._numbers = {program: i for i, program in enumerate(programs)}
        self._rank = rank
        self._done: dict[tuple[str, int], list[tuple[str, int]]] = {}
        self._epochs: dict[tuple[str, int], int] = {}
        self._ended: set[int] = set()
        self._finished = 0
        self._tickets: set[int] | None = None  # results that are the last ticket; None: no communication yet
        self._pair: int | None = None  # a call whose second result is the last ticket

    def run(self, call: OperatorCall, values: Sequence[Any]) -> Any:
        """A call that talks: check it, and give what it will."""
        arguments = _bound(call)
        program, site, part = arguments["program"], arguments["site"], arguments.get("part", -1)
        phase = call.target._schema.name.split("::")[1]
        if program not in self._programs or not 0 <= site < len(self._programs[program]):
            raise refused(f"{call.name} names site {site} of program {program!r}, which is not there")
        schedule = self._programs[program][site]
        self._take_ticket(call, arguments["ticket"], values)
        self._advance(call.name, (program, site), schedule, phase, part)
        self.order.append(f"{phase} {self._numbers[program]} {site} {part}")
        member = schedule.members(self._rank)[0]
        want = _expected(schedule.site, phase, member, part)
        ticket = torch.empty(1, dtype=torch.int64)
        if phase == "attend":
            _check_mask(call.name, schedule.site, filled(arguments["mask"], values))
            return ticket
        if "x" in arguments:
            operand = filled(arguments["x"], values)
            if not isinstance(operand, torch.Tensor) or (tuple(operand.shape), operand.dtype) != want:
                raise refused(f"{call.name} sends {_said(operand)}, and its site plans {want[1]}{list(want[0])}")
            return ticket
        size, dtype = tuple(arguments["size"]), arguments["dtype"]
        if (size, dtype) != want:
            raise refused(f"{call.name} is given as {dtype}{list(size)}, and its site plans {want[1]}{list(want[0])}")
        return torch.empty(size, dtype=dtype), ticket

    def follow(self, call: OperatorCall) -> None:
        """The last ticket may be taken out of a pair."""
        if call.target is operator.getitem and call.args == (Ref(-1 if self._pair is None else self._pair), 1):
            self._tickets = (self._tickets or set()) | {call.index}

    def _take_ticket(self, call: OperatorCall, ticket: Any, values: Sequence[Any]) -> None:
        first = self._tickets is None
        value = filled(ticket, values)
        if (
            not isinstance(ticket, Ref)
            or not isinstance(value, torch.Tensor)
            or (tuple(value.shape), value.dtype) != ((1,), torch.int64)
            or not (first or ticket.index in (self._tickets or ()))
        ):
            raise refused(f"{call.name} does not take the ticket of the communication before it")
        ends = len(call.target._schema.returns) == 2
        self._tickets, self._pair = (set(), call.index) if ends else ({call.index}, None)

    def _advance(self, name: str, key: tuple[str, int], schedule: Schedule, phase: str, part: int) -> None:
        """One step of a site.

        Raises:
            PackageError: it may not come here.
        """
        steps = _phases(schedule.site)
        if key not in self._epochs:
            epoch = len(self._epochs) + 1
            if epoch - NUM_BANKS > self._finished:
                raise refused(f"{name} opens a site while {NUM_BANKS} others are open")
            self._epochs[key] = epoch
        done = self._done.setdefault(key, [])
        stage = next((i for i, stage in enumerate(steps) if (phase, part) in stage), None)
        before = sum(steps[: stage or 0], ())
        if stage is None or (phase, part) in done or any(step not in done for step in before):
            raise refused(f"{name} does not come in the order of its site, or comes twice")
        done.append((phase, part))
        if len(done) == sum(map(len, steps)):
            self._ended.add(self._epochs[key])
            while self._finished + 1 in self._ended:
                self._finished += 1

    def close(self) -> None:
        """
        Raises:
            PackageError: a site is left open.
        """
        if self._finished != len(self._epochs):
            raise refused("a graph leaves communication unfinished")


def _bound(call: OperatorCall) -> dict[str, Any]:
    """A call's arguments by name, defaults filled in."""
    schema = call.target._schema.arguments
    defaults = {entry.name: entry.default_value for entry in schema if entry.has_default_value()}
    return defaults | {entry.name: value for entry, value in zip(schema, call.args, strict=False)} | dict(call.kwargs)


def _phases(site: Any) -> list[tuple[tuple[str, int], ...]]:
    """What a site goes through, in stages whose steps may come in any order: phase and part."""
    if not isinstance(site, AttentionSite):
        return [(("exchange_start", -1),), (("exchange_finish", -1),)]
    parts = (-1,) if site.parts == 1 else tuple(range(site.parts))
    puts = tuple((put, part) for put in ("put_q", "put_k", "put_v") for part in parts)
    return [puts, (("attend", -1),), tuple(("collect", part) for part in parts)]


def _expected(site: Any, phase: str, rank: int, part: int) -> Geometry:
    """Shape and dtype of what a rank of the site gives to a phase or gets of it."""
    if not isinstance(site, AttentionSite):
        shape = site.local_shape(rank) if phase == "exchange_start" else site.wanted_shape(rank)
        return tuple(shape), site.dtype
    queries = phase in ("put_q", "collect")
    start, stop = site.rows(queries, rank, 1 if part < 0 else site.parts, max(part, 0))
    heads = site.heads if queries else site.kv_heads
    width = site.head_dim if phase in ("put_q", "put_k") else site.v_head_dim
    return (site.batch, heads, stop - start, width), site.dtype


def _check_mask(name: str, site: Any, mask: Any) -> None:
    if (mask is None) != (site.mask is None):
        raise refused(f"{name} has {'no' if mask is None else 'a'} mask, and its site plans otherwise")
    if mask is None:
        return
    queries, keys = (
        max((first + length for runs in places for first, length in runs), default=0)
        for places in (site.q_positions, site.kv_positions)
    )
    whole = (site.batch, site.heads, queries, keys)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, whole, strict=True)):
        raise refused(f"{name} has a mask of {list(mask.shape)} for {list(whole)}")
    if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
        raise refused(f"{name} has a mask of {mask.dtype}")


def _said(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
