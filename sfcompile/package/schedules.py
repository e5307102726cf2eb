"""Schedules as JSON: what to build, not its instructions. They are built again and proved again where they are loaded.

A schedule follows from its kind, its site, its mesh and its parts, so that is all a package says of it. What runs has
passed the checker in the process that runs it, whatever the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import PackageError, StreamFusionError
from sfcompile.package.graph import dtype_of
from sfcompile.runtime.program.sites import AnySite, AttentionSite, ExchangeSite

_SITES = {kind.__name__: kind for kind in (AttentionSite, ExchangeSite)}


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """What :func:`schedule_from_json` builds the schedule from."""
    site, mesh = schedule.site, schedule.mesh
    facts = {entry.name: getattr(site, entry.name) for entry in fields(site)}
    facts["dtype"] = str(site.dtype).removeprefix("torch.")
    return {
        "kind": schedule.kind,
        "site": {"type": type(site).__name__, **facts},
        "mesh": {"ulysses": mesh.ulysses, "ring": mesh.ring, "order": mesh.order, "lanes": mesh.lanes},
        "parts": [schedule.q_parts, schedule.kv_parts] if isinstance(schedule, AttentionSchedule) else [],
        "groups": schedule.groups,
    }


def schedule_from_json(data: Mapping[str, Any], ranks: int) -> Schedule:
    """Build a schedule and prove it.

    Args:
        ranks: of the job: every group lies within.

    Raises:
        PackageError: it cannot be built, or the checker refuses it.
    """
    try:
        given = dict(data["site"])
        site_type = _SITES[given.pop("type")]
        given["dtype"] = dtype_of(given["dtype"])
        site = site_type(**{key: _tuples(value) for key, value in given.items()})
        mesh = Mesh(**{key: _tuples(value) for key, value in data["mesh"].items()})
        groups = _tuples(data["groups"])
        members = sorted(rank for group in groups for rank in group) or list(mesh.order)
        if sorted(members) != list(range(ranks)) or sorted(mesh.order) != list(range(mesh.ulysses * mesh.ring)):
            raise ValueError(f"mesh {mesh.ulysses} x {mesh.ring} in groups {groups} for {ranks} ranks")
        if any(len(group) != mesh.num_ranks for group in groups):
            raise ValueError(f"groups {groups} for a mesh of {mesh.num_ranks}")
        _check_site(site, mesh.num_ranks)
        schedule = replace(build(data["kind"], site, mesh, *data["parts"]), groups=groups)
        check(schedule)
    except (StreamFusionError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise PackageError(
            f"a schedule of the package cannot be built: {type(error).__name__}: {error}",
            "it is damaged, or of a kind that this process does not know",
            "export the model again; register a schedule of your own before you load a package that uses it",
        ) from error
    return schedule


def _check_site(site: AnySite, ranks: int) -> None:
    lists = [
        getattr(site, name)
        for name in ("q_positions", "kv_positions", "q_sizes", "kv_sizes", "owned", "wanted")
        if getattr(site, name, ())
    ]
    if any(len(entry) != ranks for entry in lists) or not isinstance(site.dtype, torch.dtype):
        raise ValueError(f"site {site.name} is for {[len(entry) for entry in lists]} ranks, its mesh has {ranks}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
