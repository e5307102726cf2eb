"""Choose the mesh: Ulysses x ring = ranks, Ulysses over machines first.

The rule is StreamFusion's: the largest Ulysses degree that divides the heads, ``P_u = gcd(P, H)``, the rest is ring.
It is a legality rule and not a cost model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sfcompile.codegen.mesh import Mesh
from sfcompile.errors import MeshError
from sfcompile.passes.analyse_attention import Site
from sfcompile.passes.op_view import shape_of
from sfcompile.runtime.topology import Topology


def choose_mesh(sites: Sequence[Site], topology: Topology, asked: Mapping[str, int] | None) -> Mesh:
    """The mesh of a graph.

    Raises:
        MeshError: the mesh asked for has more Ulysses ranks than some attention has heads.
    """
    ranks = topology.num_ranks
    heads = {site.node.name: shape_of(site.q)[1] for site in sites if len(shape_of(site.q)) == 4}
    if asked is None:
        ulysses = math.gcd(ranks, *heads.values()) if heads else 1
        return Mesh.of(topology, ulysses, ranks // ulysses)
    ulysses = asked["ulysses"]
    for name, count in heads.items():
        if ulysses > count:
            raise MeshError(
                f"mesh={dict(asked)} gives ulysses {ulysses}, but attention {name} has {count} heads",
                "every Ulysses rank needs at least one head",
                f"use ulysses <= {min(heads.values())} and a longer ring, or leave mesh out",
            )
    return Mesh.of(topology, ulysses, asked["ring"])
