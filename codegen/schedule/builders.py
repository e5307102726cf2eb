"""Every way to schedule one site, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import overload

from sfcompile.codegen.schedule.allgather import build_allgather
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.codegen.schedule.usp import build_usp
from sfcompile.errors import OptionError
from sfcompile.runtime.program.sites import AnySite, AttentionSite, ExchangeSite

Builder = Callable[[AttentionSite, Mesh, int, int], AttentionSchedule]
"""``(site, mesh, q_parts, kv_parts) -> schedule``."""

BUILDERS: dict[str, Builder] = {
    "torus": build_torus,
    "tas": partial(build_usp, kind="tas"),
    "usp": partial(build_usp, kind="usp"),
    "ulysses": partial(build_usp, kind="ulysses"),
    "ring": partial(build_usp, kind="ring"),
    "allgather": build_allgather,
}
"""Names of the unstaged ones differ by the mesh they are laid on; see usp.py."""


REGISTERED: dict[str, Builder] = {}
"""Builders from outside, by name (sfcompile/extend.py). They may refuse a site or mesh with a MeshError."""


@overload
def build(kind: str, site: AttentionSite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1) -> AttentionSchedule: ...


@overload
def build(kind: str, site: AnySite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1) -> Schedule: ...


def build(kind: str, site: AnySite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1) -> Schedule:
    """The schedule of a site; an exchange has one way only.

    Raises:
        OptionError: unknown kind, less than one part.
        MeshError: fewer heads than Ulysses ranks.
    """
    if isinstance(site, ExchangeSite):
        return build_exchange(site, mesh)
    known = BUILDERS | REGISTERED
    if kind not in known:
        raise OptionError(f"schedule {kind!r} is unknown", "", f"schedules are {', '.join(known)}")
    return known[kind](site, mesh, q_parts, kv_parts)
