"""Schedules as JSON: what to build, not its instructions. They are built again and proved again where they are loaded.

A schedule follows from its kind, its site, its mesh and its parts, so that is all a package says of it. What runs has
passed the checker in the process that runs it, whatever the file holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import PackageError, StreamFusionError
from sfcompile.options import WIRES, Wire
from sfcompile.package.limits import (
    CHUNKS,
    DIMS,
    INT,
    PARTS,
    dtype_of,
    entries,
    fits_memory,
    integer,
    refused,
    shown,
    table,
    text,
)
from sfcompile.runtime.program.sites import AnySite, AttentionSite, ExchangeSite, nbytes
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS

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


def schedule_from_json(data: Any, ranks: int) -> Schedule:
    """Build a schedule and prove it. Its facts are looked at before anything is built from them.

    Args:
        ranks: of the job: every group lies within.

    Raises:
        PackageError: it cannot be built, is too large for this machine, or the checker refuses it.
    """
    try:
        mesh, groups = _mesh(data, ranks)
        site = _site(data["site"], mesh.num_ranks)
        parts = [integer(n, "a number of parts", 1, PARTS) for n in entries(data["parts"], "a schedule's parts", 2)]
        if math.prod(parts) * mesh.num_ranks > CHUNKS:
            raise refused(f"a schedule cuts {mesh.num_ranks} ranks' tokens into {parts} parts")
        if isinstance(site, AttentionSite) and site.parts > 1 and set(parts) != {site.parts}:
            raise refused(f"a site's tokens come in {site.parts} parts, and its schedule has {parts}")
        schedule = replace(build(text(data["kind"], "a schedule's kind"), site, mesh, *parts), groups=groups)
        fits_memory(NUM_BANKS * schedule.heap_bytes, f"the heap of site {site.name}")
        check(schedule)
    except (StreamFusionError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError,
            MemoryError, RecursionError) as error:  # fmt: skip
        raise PackageError(
            f"a schedule of the package cannot be built: {type(error).__name__}: {error}",
            "it is damaged, or of a kind that this process does not know",
            "export the model again; register a schedule of your own before you load a package that uses it",
        ) from error
    return schedule


def _mesh(data: Any, ranks: int) -> tuple[Mesh, tuple[tuple[int, ...], ...]]:
    """The mesh of a schedule and its groups: every rank of the job has one place."""
    facts = table(table(data, "a schedule")["mesh"], "a mesh")
    order = _numbers(facts["order"], "the order of a mesh", ranks)
    ulysses, ring, lanes = (integer(facts[name], f"a mesh's {name}", 1, ranks) for name in ("ulysses", "ring", "lanes"))
    groups = tuple(_numbers(group, "a group", ranks) for group in entries(data["groups"], "groups of ranks", ranks))
    members = [rank for group in groups for rank in group] if groups else list(order)
    if sorted(members) != list(range(ranks)) or sorted(order) != list(range(ulysses * ring)):
        raise refused(f"a mesh {ulysses} x {ring} in groups {groups} for {ranks} ranks")
    if ulysses % lanes or any(len(group) != len(order) for group in groups):
        raise refused(f"a mesh of {len(order)} ranks in bundles of {lanes} and groups {groups}")
    return Mesh(ulysses, ring, order, lanes), groups


def _site(data: Any, ranks: int) -> AnySite:
    """A site whose facts are of the kinds that its class says, and not larger than this machine."""
    facts = dict(table(data, "a site"))
    site_type = _SITES[text(facts.pop("type"), "a site's type")]
    kinds = {entry.name: str(entry.type) for entry in fields(site_type)}
    if unknown := set(facts) - set(kinds):
        raise refused(f"a site has a {shown(min(unknown))}")
    values = {name: _fact(value, name, kinds[name], ranks) for name, value in facts.items()}
    shapes: tuple[Sequence[int], ...]
    if site_type is AttentionSite:
        for name in ("batch", "heads", "kv_heads", "head_dim", "v_head_dim", "parts"):
            integer(values.get(name, 1), f"a site's {name}", 1, PARTS if name == "parts" else INT)
        if values["heads"] % values["kv_heads"] or values.get("mask") not in (None, "full"):
            raise refused(
                f"a site has {values['heads']} heads, {values['kv_heads']} key heads, mask {values.get('mask')}"
            )
        tokens = [_total(values[name]) for name in ("q_positions", "kv_positions")]
        width = max(values["head_dim"], values["v_head_dim"])
        shapes = (
            (values["batch"], values["heads"], tokens[0], width),
            (values["batch"], values["kv_heads"], tokens[1], width),
        )
    else:
        dims = len(values["shape"])
        for name in ("dim", "into"):
            integer(values[name], f"a site's {name}", 0, dims - 1)
        outer, inner = (integer(values[name], f"a site's {name}", 1) for name in ("outer", "inner"))
        if values["shape"][values["dim"]] % (outer * inner):
            raise refused(f"dim {values['dim']} of {values['shape']} is not {outer} x rows x {inner}")
        rows = values["shape"][values["dim"]] // (outer * inner)
        _within(values["owned"], rows)
        _within(values["wanted"], rows if values["into"] == values["dim"] else values["shape"][values["into"]])
        shapes = (values["shape"],)
    for shape in shapes:
        fits_memory(nbytes(shape, values["dtype"]), f"a value of site {values['name']}")
    return site_type(**values)


def _fact(value: Any, name: str, kind: str, ranks: int) -> Any:
    """One field of a site, by the annotation of its class."""
    what = f"a site's {name}"
    if name in ("q_positions", "kv_positions", "owned", "wanted"):
        return _of_ranks(
            [_runs(each, what, name in ("owned", "wanted")) for each in entries(value, what, ranks)], what, ranks
        )
    if name in ("q_sizes", "kv_sizes"):
        return _of_ranks([_numbers(each, what, PARTS) for each in entries(value, what, ranks)], what, ranks, empty=True)
    match kind:
        case "int":
            return integer(value, what)
        case "str":
            return text(value, what)
        case "str | None":
            return None if value is None else text(value, what)
        case "torch.dtype":
            return dtype_of(value)
        case "bool" if isinstance(value, bool):
            return value
        case "float" if type(value) in (int, float):
            return float(value)
        case "Wire":
            return _wire(value, what)
        case "Shape" | "tuple[int, ...]":
            return _numbers(value, what, DIMS)
    raise refused(f"{what} is {shown(value)}")


def _wire(value: Any, what: str) -> Wire:
    kinds = entries(value, what, len(Wire._fields))
    if len(kinds) != len(Wire._fields) or any(kind not in WIRES for kind in kinds):
        raise refused(f"{what} is {shown(value)}")
    return Wire(*kinds)


def _of_ranks(lists: list[Any], what: str, ranks: int, empty: bool = False) -> tuple[Any, ...]:
    if len(lists) != ranks and not (empty and not lists):
        raise refused(f"{what} is for {len(lists)} ranks, its mesh has {ranks}")
    return tuple(lists)


def _numbers(value: Any, what: str, most: int) -> tuple[int, ...]:
    return tuple(integer(number, what) for number in entries(value, what, most))


def _runs(value: Any, what: str, ascending: bool) -> tuple[tuple[int, int], ...]:
    """Runs ``(first, length)``: those of an exchange ascend, those of an attention come in the order of its tokens."""
    runs: list[tuple[int, int]] = []
    stop = 0
    for run in entries(value, what):
        first, length = _numbers(run, what, 2)
        if ascending and first < stop:
            raise refused(f"{what} has the run {first}, {length} behind {stop}")
        stop = first + length
        runs.append((first, length))
    return tuple(runs)


def _total(ranks: Sequence[Sequence[tuple[int, int]]]) -> int:
    return sum(length for runs in ranks for _, length in runs)


def _within(ranks: Sequence[Sequence[tuple[int, int]]], rows: int) -> None:
    for runs in ranks:
        if runs and sum(runs[-1]) > rows:
            raise refused(f"a site of {rows} rows has one at {sum(runs[-1]) - 1}")
