"""Every builder by name."""

from __future__ import annotations

import pytest
from random_sites import attention_site, gather_site

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.builders import BUILDERS, build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import OptionError
from sfcompile.runtime.program.topology import Topology

MESH = Mesh.of(Topology.grid(2, 2), 2, 2)


@pytest.mark.parametrize("kind", BUILDERS)
def test_each_builds_a_right_schedule_of_its_name(kind: str) -> None:
    schedule = build(kind, attention_site(4), MESH, 2, 2)
    assert schedule.kind == kind
    check(schedule)


def test_an_exchange_has_one_way() -> None:
    assert build("torus", gather_site(4), MESH).kind == "exchange"


def test_unknown_kinds_are_listed() -> None:
    with pytest.raises(OptionError, match="schedule 'donut' is unknown.*torus, tas, usp, ulysses, ring, allgather"):
        build("donut", attention_site(4), MESH)
