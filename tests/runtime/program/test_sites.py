"""Sites: geometry and shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_sites import attention_site

from sfcompile.runtime.program.sites import ExchangeSite, align, kv_slice, nbytes


def test_equal_geometry_ignores_the_name_only() -> None:
    site = attention_site(2)
    assert site.geometry() == replace(site, name="other").geometry()
    assert site.geometry() != replace(site, causal=True).geometry()
    assert site.geometry() != replace(site, dtype=torch.bfloat16).geometry()


def test_local_shape_of_a_folded_dim() -> None:
    """A dim that is outer x tokens x inner, the way windows and patches fold them."""
    site = ExchangeSite.gather("g", (2, 4 * 6 * 3, 5), torch.float32, 1, (((0, 4),), ((4, 2),), ()), 4, 3)
    assert [site.local_shape(rank) for rank in range(3)] == [(2, 48, 5), (2, 24, 5), (2, 0, 5)]


def test_grouped_heads_share_key_heads() -> None:
    site = replace(attention_site(4, heads=8), kv_heads=2)
    assert [kv_slice(site, heads) for heads in ((0, 2), (2, 6), (4, 8), (0, 8))] == [(0, 1), (0, 2), (1, 2), (0, 2)]


def test_what_a_rank_gives_another() -> None:
    """The same dim: what both have; another dim: the receiver's columns of the sender's rows."""
    owned, wanted = (((0, 3),), ((3, 2),)), (((0, 4),), ((2, 3),))
    halo = ExchangeSite("h", (5, 6), torch.float32, 0, 1, 1, owned, 0, wanted)
    assert halo.chunk(1, 0) == (((0, 1),), ((3, 1),)) and halo.chunk_shape(1, 0) == (1, 6)
    switch = ExchangeSite("s", (5, 6), torch.float32, 0, 1, 1, owned, 1, (((0, 2),), ((2, 4),)))
    assert switch.chunk(0, 1) == (((2, 4),), ((0, 3),)) and switch.chunk_shape(0, 1) == (3, 4)
    assert switch.local_shape(1) == (2, 6) and switch.wanted_shape(1) == (5, 4)


def test_parts_of_any_size() -> None:
    site = replace(attention_site(2, tokens=20), parts=3, q_sizes=((4, 4, 2), (0, 8, 2)))
    assert [site.rows(True, 1, 3, part) for part in range(3)] == [(0, 0), (0, 8), (8, 10)]
    assert [site.rows(False, 1, 3, part) for part in range(3)] == [(0, 4), (4, 7), (7, 10)], "keys: as evenly as can be"
    assert site.rows(True, 1, 2, 1) == (5, 10), "other parts than they come in"
    assert site.geometry() != replace(site, q_sizes=()).geometry()


@pytest.mark.parametrize("sizes", [((4, 4, 1), (4, 4, 2)), ((5, 5), (5, 5)), ((4, 4, 2),), ((12, -4, 2), (4, 4, 2))])
def test_parts_that_do_not_add_up(sizes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"site site has \[\(10, 3\), \(10, 3\)\] tokens and parts"):
        replace(attention_site(2, tokens=20), parts=3, q_sizes=sizes)


def test_a_gather_wants_everything_everywhere() -> None:
    """However the shards lie, each goes as it is: one slice a rank."""
    gather = ExchangeSite.gather("g", (2, 4 * 6 * 3, 5), torch.float32, 1, (((4, 2), (0, 1)), ((1, 3),)), 4, 3)
    assert gather.is_gather and gather.rows == 6 and gather.wanted_shape(1) == gather.shape
    assert gather.chunk(0, 1) == (((0, 3),), ((4, 2), (0, 1))) and gather.chunk_shape(0, 1) == gather.local_shape(0)
    assert gather.local_bytes == (2 * 36 * 5 * 4,) * 2
    assert not replace(gather, wanted=(((0, 6),), ((0, 5),))).is_gather


def test_a_halo_of_a_folded_dim() -> None:
    """Owned and wanted are rows of it: of 2 x 6 x 3, the neighbour's row 2 comes with all that is folded in."""
    halo = ExchangeSite("h", (36,), torch.float32, 0, 2, 3, (((0, 3),), ((3, 3),)), 0, (((0, 4),), ((2, 4),)))
    assert halo.chunk(0, 1) == (((2, 1),), ((0, 1),)) and halo.chunk_shape(0, 1) == (6,)
    assert halo.wanted_shape(0) == (24,) and halo.local_shape(0) == (18,)


def test_bytes() -> None:
    assert nbytes((2, 3), torch.bfloat16) == 12
    assert [align(size, 64) for size in (0, 1, 64, 65)] == [0, 64, 64, 128]
