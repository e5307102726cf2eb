"""Schedules are built again from a few facts, and proved again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from random_sites import attention_site, gather_site

from sfcompile.codegen.schedule.builders import BUILDERS, build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import PackageError
from sfcompile.options import Wire
from sfcompile.package.schedules import schedule_from_json, schedule_to_json
from sfcompile.runtime.program.topology import Topology

MESH = Mesh.of(Topology.grid(2, 2), 2, 2)


@pytest.mark.parametrize("kind", [*BUILDERS, "gather"])
def test_the_same_schedule_comes_back(kind: str) -> None:
    site = gather_site(4) if kind == "gather" else attention_site(4)
    schedule = replace(build(kind, site, MESH, 2, 1), groups=((0, 1, 4, 5), (2, 3, 6, 7)))
    data = json.loads(json.dumps(schedule_to_json(schedule)))
    assert schedule_from_json(data, 8) == schedule


def test_how_chunks_travel_comes_back() -> None:
    site = replace(attention_site(4), wire=Wire(k="fp8", v="fp8", q="bf16"))
    schedule = build("torus", site, MESH)
    data = json.loads(json.dumps(schedule_to_json(schedule)))
    assert schedule_from_json(data, 4) == schedule
    del data["site"]["wire"]  # of a package that was made before there were wires
    assert schedule_from_json(data, 4) == build("torus", attention_site(4), MESH)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("kind",), "donut"),
        (("site", "heads"), 1),
        (("site", "wire"), ["same", "fp8", "fp4", "same"]),
        (("site", "wire"), ["fp8"]),
        (("site", "dtype"), "load"),
        (("site", "type"), "Schedule"),
        (("site", "q_positions"), [[[0, 8]]]),
        (("mesh", "order"), [0, 1, 2, 2]),
        (("mesh", "ring"), 3),
        (("parts",), [0, 1]),
        (("groups",), [[0, 1]]),
        (("groups",), [[0, 1, 2, 9]]),
    ],
)
def test_changed_facts_are_refused(where: tuple[str, ...], value: object) -> None:
    data = json.loads(json.dumps(schedule_to_json(build("torus", attention_site(4), MESH))))
    inner = data
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(PackageError, match="a schedule of the package cannot be built"):
        schedule_from_json(data, 4)
