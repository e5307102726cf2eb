"""What ranks give one another, cut and placed."""

from __future__ import annotations

import torch
from random_sites import rows

from sfcompile.runtime.program.chunks import cut_chunk, place_chunk
from sfcompile.runtime.program.sites import ExchangeSite

WHOLE = torch.randn(2, 12, 6)
OWNED = (((0, 5), (9, 1)), ((5, 4), (10, 2)))


def test_a_gather_gives_everything_to_everybody() -> None:
    site = ExchangeSite.gather("g", (2, 12, 6), torch.float32, 1, OWNED)
    out = torch.zeros(2, 12, 6)
    for src in (0, 1):
        shard = WHOLE[:, rows(OWNED[src])]
        assert cut_chunk(site, shard, src, 1) is shard
        place_chunk(site, out, shard, src, 1)
    assert torch.equal(out, WHOLE)


def test_an_exchange_gives_each_what_it_wants() -> None:
    wanted = (((0, 2), (4, 1)), ((2, 2), (5, 1)))
    site = ExchangeSite("r", (2, 12, 6), torch.float32, 1, 1, 1, OWNED, 2, wanted)
    for dst in (0, 1):
        out = torch.zeros(2, 12, 3)
        for src in (0, 1):
            place_chunk(site, out, cut_chunk(site, WHOLE[:, rows(OWNED[src])], src, dst), src, dst)
        assert torch.equal(out, WHOLE[:, :, rows(wanted[dst])])


def test_a_halo_is_the_overlap() -> None:
    wanted = (((0, 7),), ((4, 8),))
    owned = (((0, 6),), ((6, 6),))
    site = ExchangeSite("h", (2, 12, 6), torch.float32, 1, 1, 1, owned, 1, wanted)
    out = torch.zeros(2, 7, 6)
    for src in (0, 1):
        place_chunk(site, out, cut_chunk(site, WHOLE[:, rows(owned[src])], src, 0), src, 0)
    assert torch.equal(out, WHOLE[:, :7])


def test_a_halo_of_a_folded_dim() -> None:
    """Dim 1 is 2 x 3 rows x 2, as windows and patches fold them."""
    owned, wanted = (((0, 2),), ((2, 1),)), (((0, 3),), ((1, 2),))
    site = ExchangeSite("h", (2, 12, 6), torch.float32, 1, 2, 2, owned, 1, wanted)
    rows_of = WHOLE.view(2, 2, 3, 2, 6)
    out = torch.zeros(site.wanted_shape(1))
    for src in (0, 1):
        shard = rows_of[:, :, rows(owned[src])].reshape(site.local_shape(src))
        place_chunk(site, out, cut_chunk(site, shard, src, 1), src, 1)
    assert torch.equal(out, rows_of[:, :, rows(wanted[1])].reshape(2, 8, 6))
