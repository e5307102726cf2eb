"""The nodes of a compiled graph that talk to other ranks: ``torch.ops.streamfusion.*``.

Every op takes and returns a *ticket*, a one-element tensor that means nothing but order: the chain of tickets is a data
dependence through all communication of a graph, so no compiler can reorder it, drop it, merge it, or order it in two
ways on two ranks. Ops are functional: outputs never alias inputs. ``program`` and ``site`` name the schedule in the
session; ``part`` says which part of this rank's tokens a tensor holds if they come and go in several, -1: all; or which
of the weights that one exchange gathers.
``held`` are the tensors that puts of the site read after they have returned (passes/graph/lifetimes.py): who waits for
the puts takes them, so that their memory is nobody else's before. In a graph that is called several times in one call
of the model, a repeated block's, ``site`` counts from where :func:`sites_from` says.

``exchange_linear`` ends the gather of a weight and multiplies with it where it came together, in the bank. No value of
a graph could lie there: compilers give a value's memory to the next value, and order readers as they like, while in the
bank the next weight comes as soon as the site has ended.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.program.instructions import Attend, Chunk
from sfcompile.runtime.program.phases import ATTEND as ATTEND_PHASE
from sfcompile.runtime.program.phases import COLLECT, EXCHANGE_FINISH, EXCHANGE_LINEAR, EXCHANGE_START
from sfcompile.runtime.rank.fit import check_linear
from sfcompile.runtime.rank.profiles import named
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.rank.site_call import AttentionSiteSchedule, is_attention
from sfcompile.torch_private import functions_transformed

_library = torch.library.Library("streamfusion", "DEF")
_OPS = {
    "put_q": "(Tensor x, Tensor ticket, str program, int site, int part=-1) -> Tensor",
    "put_k": "(Tensor x, Tensor ticket, str program, int site, int part=-1) -> Tensor",
    "put_v": "(Tensor x, Tensor ticket, str program, int site, int part=-1) -> Tensor",
    "put_fused": "(Tensor[] sources, Tensor ticket, str program, int site, str phase, str key) -> Tensor",
    "attend": "(Tensor ticket, Tensor? mask, str program, int site, *, Tensor[]? held=None) -> Tensor",
    "collect": (
        "(Tensor ticket, str program, int site, SymInt[] size, ScalarType dtype, int part=-1) -> (Tensor, Tensor)"
    ),
    "exchange_start": "(Tensor x, Tensor ticket, str program, int site, int part=-1) -> Tensor",
    "exchange_finish": (
        "(Tensor ticket, str program, int site, SymInt[] size, ScalarType dtype, *, Tensor[]? held=None) "
        "-> (Tensor, Tensor)"
    ),
    "exchange_linear": (
        "(Tensor x, Tensor? bias, Tensor ticket, str program, int site, int features, int part=-1) -> (Tensor, Tensor)"
    ),
}
for _name, _schema in _OPS.items():
    # Flexible: a copy for each reader, to give it the strides of the trace, would be held by nobody.
    _library.define(_name + _schema, tags=(torch.Tag.flexible_layout,))

COMMUNICATION = tuple(getattr(torch.ops.streamfusion, name).default for name in _OPS)
"""Targets of the nodes that talk to other ranks."""
PUT_FUSED = torch.ops.streamfusion.put_fused.default
"""A put (``phase`` says which) of what the row program ``key`` makes of its sources."""
ATTEND = torch.ops.streamfusion.attend.default

Held = Sequence[torch.Tensor] | None
"""What an op that waits for puts holds for them."""


class sites_from:
    """Around a call of a graph whose sites, by program, count from others than 0."""

    __slots__ = ("_before", "_first")

    def __init__(self, first: Mapping[str, int]) -> None:
        self._first = first

    def __enter__(self) -> None:
        self._before, _counted.first = _counted.first, self._first

    def __exit__(self, *_: object) -> None:
        _counted.first = self._before


class _Counted(threading.local):
    """From where sites count, by program: on this thread, which is where a graph's ops run."""

    first: Mapping[str, int] = MappingProxyType({})


_counted = _Counted()


def _number(program: str, site: int) -> int:
    """Of a site in its program, as the session counts."""
    return _counted.first.get(program, 0) + site


def _start(phase: str) -> Any:
    kind = "exchange" if phase == EXCHANGE_START else "attention"

    def run(x: torch.Tensor, ticket: torch.Tensor, program: str, site: int, part: int = -1) -> torch.Tensor:
        session, site = current_session(), _number(program, site)
        with session.guard(), named(kind, site, phase, program):
            session.put(program, site, phase, x, part)
        return torch.empty_like(ticket)

    return run


ROW_PROGRAMS: dict[str, Any] = {}
"""By the key that ``streamfusion.put_fused`` is called with (passes/fuse_puts.py fills it)."""


def _put_fused(
    sources: list[torch.Tensor], ticket: torch.Tensor, program: str, site: int, phase: str, key: str
) -> torch.Tensor:
    session, site = current_session(), _number(program, site)
    with session.guard(), named("attention", site, phase, program):
        session.put_fused(program, site, phase, sources, ROW_PROGRAMS[key])
    return torch.empty_like(ticket)


def _fake_put_fused(
    sources: list[torch.Tensor], ticket: torch.Tensor, program: str, site: int, phase: str, key: str
) -> torch.Tensor:
    return torch.empty_like(ticket)


def _attend(
    ticket: torch.Tensor,
    mask: torch.Tensor | None,
    program: str,
    site: int,
    *,
    held: Held = None,
) -> torch.Tensor:
    session, site = current_session(), _number(program, site)
    with session.guard(), named("attention", site, ATTEND_PHASE, program):
        session.attend(program, site, mask, held or ())
    return torch.empty_like(ticket)


def _fake_attend(
    ticket: torch.Tensor,
    mask: torch.Tensor | None,
    program: str,
    site: int,
    *,
    held: Held = None,
) -> torch.Tensor:
    return torch.empty_like(ticket)


def _collect(
    ticket: torch.Tensor, program: str, site: int, size: list[int], dtype: torch.dtype, part: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    session, site = current_session(), _number(program, site)
    begun = session.output(program, site)
    out = torch.empty(size, dtype=dtype, device=ticket.device) if begun is None else begun
    with session.guard(), named("attention", site, COLLECT, program):
        session.collect(program, site, out, part)
    return out, torch.empty_like(ticket)


def _exchange_finish(
    ticket: torch.Tensor,
    program: str,
    site: int,
    size: list[int],
    dtype: torch.dtype,
    *,
    held: Held = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    session, site = current_session(), _number(program, site)
    out = torch.empty(size, dtype=dtype, device=ticket.device)
    with session.guard(), named("exchange", site, EXCHANGE_FINISH, program):
        session.receive(program, site, out, held or ())
    return out, torch.empty_like(ticket)


def _exchange_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    ticket: torch.Tensor,
    program: str,
    site: int,
    features: int,
    part: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    session, site = current_session(), _number(program, site)

    def multiply(weight: torch.Tensor) -> torch.Tensor:
        check_linear(session.schedule(program, site), session.rank, x, features, part)
        out: torch.Tensor = torch.ops.aten.linear.default(x, weight, bias)
        return out.contiguous()

    with session.guard(), named("exchange", site, EXCHANGE_FINISH, program):
        out = session.read(program, site, part, multiply)
    return out, torch.empty_like(ticket)


def _fake_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    ticket: torch.Tensor,
    program: str,
    site: int,
    features: int,
    part: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty([*x.shape[:-1], features]), torch.empty_like(ticket)


def _fake_start(x: torch.Tensor, ticket: torch.Tensor, program: str, site: int, part: int = -1) -> torch.Tensor:
    return torch.empty_like(ticket)


def _fake_end(
    ticket: torch.Tensor,
    program: str,
    site: int,
    size: list[int],
    dtype: torch.dtype,
    part: int = -1,
    *,
    held: Held = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(size, dtype=dtype, device=ticket.device), torch.empty_like(ticket)


_IMPLEMENTED: dict[str, tuple[Any, Any]] = {
    "put_fused": (_put_fused, _fake_put_fused),
    ATTEND_PHASE: (_attend, _fake_attend),
    COLLECT: (_collect, _fake_end),
    EXCHANGE_FINISH: (_exchange_finish, _fake_end),
    EXCHANGE_LINEAR: (_exchange_linear, _fake_linear),
}
"""What an op does, and what it says of its outputs; the others start something."""
for _name in _OPS:
    _run, _fake = _IMPLEMENTED.get(_name) or (_start(_name), _fake_start)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"streamfusion::{_name}", _fake, lib=_library)


@dataclass(frozen=True)
class Opaque:
    """A function that a graph calls as it is, the shapes and dtypes that it returns, and its FLOPs.

    ``per_head``, if it is an attention whose heads may be computed apart, with one result like q: by the places of q,
    k, v and of what else has heads or samples the letters of their dims (passes/rules/per_head.py), q's first.
    """

    run: Callable[..., list[torch.Tensor]]
    outputs: list[tuple[list[int], torch.dtype]]
    flops: float
    per_head: Mapping[int, str] | None = None


OPAQUE: dict[str, Opaque] = {}
"""By the key that ``streamfusion.opaque`` is called with (sfcompile/capture/opaque.py fills it)."""


def narrowed(key: str, sizes: list[int]) -> str:
    """The key of the same function where it is called with fewer samples or heads; ``sizes`` are B, H and L of its
    result."""
    whole = OPAQUE[key]
    ((old, dtype),) = whole.outputs
    fewer = f"{key} of {sizes[0]} x {sizes[1]} heads"
    part = math.prod(sizes) / max(1, math.prod(old[:-1]))
    OPAQUE[fewer] = replace(whole, outputs=[([*sizes, old[-1]], dtype)], flops=whole.flops * part)
    return fewer


def _opaque(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    opaque = OPAQUE[key]
    with functions_transformed():
        outputs = opaque.run(*tensors)
    facts = [(list(out.shape), out.dtype) for out in outputs]
    if facts != opaque.outputs:
        raise UnsupportedError(
            f"a call that the graph runs as it is returned {facts} and was captured as returning {opaque.outputs}",
            "what follows in the graph was compiled for that: an operator whose fake implementation does not know what "
            "autocast does inside it is the usual reason",
            "cast what the operator returns to a dtype of its own choice, or give it torch.library.register_autocast",
        )
    return [out.clone(memory_format=torch.contiguous_format) for out in outputs]


def _fake_opaque(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    device = tensors[0].device if tensors else torch.device("cpu")
    return [torch.empty(size, dtype=dtype, device=device) for size, dtype in OPAQUE[key].outputs]


_library.define("opaque(Tensor[] tensors, str key) -> Tensor[]")
_library.impl("opaque", _opaque, "CompositeExplicitAutograd")
torch.library.register_fake("streamfusion::opaque", _fake_opaque, lib=_library)


@register_flop_formula(torch.ops.streamfusion.exchange_linear)
def _linear_flops(
    x: Any, bias: Any, ticket: Any, program: str, site: int, features: int, part: int = -1, **kwargs: Any
) -> int:
    """FLOPs of the product; of a tensor or, as formulas get them, its shape."""
    flops: int = 2 * math.prod(getattr(x, "shape", x)) * features
    return flops


@register_flop_formula(torch.ops.streamfusion.attend)
def _attend_flops(ticket: Any, mask: Any, program: str, site: int, *args: Any, **kwargs: Any) -> int:
    """FLOPs of this rank's pairs."""
    session = current_session()
    schedule = session.schedule(program, _number(program, site))
    assert is_attention(schedule)
    return attention_flops(schedule, schedule.members(session.rank)[0])


def attention_flops(schedule: AttentionSiteSchedule, rank: int) -> int:
    """FLOPs of a rank of a schedule: two products of Lq x Lk for every head of its slice."""
    facts, mine = schedule.site, schedule.program(rank)
    start, stop = schedule.heads(rank)
    pairs: int = sum(
        _tokens(schedule, "q", step.q) * _tokens(schedule, "k", step.kv)
        for step in mine.phases["attend"]
        if isinstance(step, Attend)
    )
    per_pair: int = 2 * facts.batch * (stop - start) * (facts.head_dim + facts.v_head_dim)
    return per_pair * pairs


def _tokens(schedule: AttentionSiteSchedule, tensor: str, chunks: tuple[Chunk, ...]) -> int:
    spans = [schedule.rows(tensor, chunk) for chunk in chunks]
    return sum(stop - start for start, stop in spans)
