"""Every way to schedule one attention site, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sfcompile.codegen.schedule.allgather import build_allgather
from sfcompile.codegen.schedule.gather import build_gather
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.reshard import build_reshard
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.codegen.schedule.usp import build_usp
from sfcompile.errors import OptionError
from sfcompile.runtime.program.sites import AttentionSite, GatherSite, ReshardSite

Builder = Callable[[AttentionSite, Mesh, int, int], Schedule]
"""``(site, mesh, q_pieces, kv_pieces) -> schedule``."""

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


def build(
    kind: str, site: AttentionSite | GatherSite | ReshardSite, mesh: Mesh, q_pieces: int = 1, kv_pieces: int = 1
) -> Schedule:
    """The schedule of a site; a gather and a reshard have one way only.

    Raises:
        OptionError: unknown kind, less than one piece.
        MeshError: fewer heads than Ulysses ranks.
    """
    if isinstance(site, GatherSite):
        return build_gather(site, mesh)
    if isinstance(site, ReshardSite):
        return build_reshard(site, mesh)
    known = BUILDERS | REGISTERED
    if kind not in known:
        raise OptionError(f"schedule {kind!r} is unknown", "", f"schedules are {', '.join(known)}")
    return known[kind](site, mesh, q_pieces, kv_pieces)
