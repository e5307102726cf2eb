"""Parts of shards, cut and placed."""

from __future__ import annotations

import torch
from random_sites import rows

from sfcompile.runtime.program.parts import cut_part, place_part
from sfcompile.runtime.program.sites import GatherSite, ReshardSite

WHOLE = torch.randn(2, 12, 6)
OWNED = (((0, 5), (9, 1)), ((5, 4), (10, 2)))


def test_a_gather_gives_everything_to_everybody() -> None:
    site = GatherSite("g", (2, 12, 6), torch.float32, 1, 1, 1, OWNED)
    out = torch.zeros(2, 12, 6)
    for src in (0, 1):
        shard = WHOLE[:, rows(OWNED[src])]
        assert cut_part(site, shard, src, 1) is shard
        place_part(site, out, shard, src, 1)
    assert torch.equal(out, WHOLE)


def test_a_reshard_gives_each_what_it_wants() -> None:
    wanted = (((0, 2), (4, 1)), ((2, 2), (5, 1)))
    site = ReshardSite("r", (2, 12, 6), torch.float32, 1, OWNED, 2, wanted)
    for dst in (0, 1):
        out = torch.zeros(2, 12, 3)
        for src in (0, 1):
            place_part(site, out, cut_part(site, WHOLE[:, rows(OWNED[src])], src, dst), src, dst)
        assert torch.equal(out, WHOLE[:, :, rows(wanted[dst])])


def test_a_halo_is_the_overlap() -> None:
    wanted = (((0, 7),), ((4, 8),))
    owned = (((0, 6),), ((6, 6),))
    site = ReshardSite("h", (2, 12, 6), torch.float32, 1, owned, 1, wanted)
    out = torch.zeros(2, 7, 6)
    for src in (0, 1):
        place_part(site, out, cut_part(site, WHOLE[:, rows(owned[src])], src, 0), src, 0)
    assert torch.equal(out, WHOLE[:, :7])
