"""Sites: geometry and shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_sites import attention_site

from sfcompile.runtime.program.sites import GatherSite, ReshardSite, count, cut, kv_slice, overlap, places, slice_of


def test_equal_geometry_ignores_the_name_only() -> None:
    site = attention_site(2)
    assert site.geometry() == replace(site, name="other").geometry()
    assert site.geometry() != replace(site, causal=True).geometry()
    assert site.geometry() != replace(site, dtype=torch.bfloat16).geometry()


def test_count() -> None:
    assert count(()) == 0
    assert count(((3, 2), (9, 5))) == 7


def test_local_shape_of_a_folded_dim() -> None:
    """A dim that is outer x tokens x inner, the way windows and patches fold them."""
    site = GatherSite("g", (2, 4 * 6 * 3, 5), torch.float32, 1, 4, 3, (((0, 4),), ((4, 2),), ()))
    assert [site.local_shape(rank) for rank in range(3)] == [(2, 48, 5), (2, 24, 5), (2, 0, 5)]


@pytest.mark.parametrize(("total", "parts"), [(8, 4), (7, 3), (2, 5), (0, 2)])
def test_slices_are_even_and_cover(total: int, parts: int) -> None:
    slices = [slice_of(total, parts, index) for index in range(parts)]
    assert slices[0][0] == 0 and slices[-1][1] == total
    assert all(left[1] == right[0] for left, right in zip(slices, slices[1:], strict=False))
    sizes = [stop - start for start, stop in slices]
    assert max(sizes) - min(sizes) <= 1


def test_a_cut_of_positions_keeps_their_order() -> None:
    runs = ((10, 3), (20, 4), (40, 1))
    assert cut(runs, 0, 8) == runs
    assert cut(runs, 2, 5) == ((12, 1), (20, 2))
    assert cut(runs, 7, 7) == ()


def test_grouped_heads_share_key_heads() -> None:
    site = replace(attention_site(4, heads=8), kv_heads=2)
    assert [kv_slice(site, heads) for heads in ((0, 2), (2, 6), (4, 8), (0, 8))] == [(0, 1), (0, 2), (1, 2), (0, 2)]


def test_overlap_and_places() -> None:
    a, b = ((0, 4), (8, 4)), ((2, 8), (11, 3))
    assert overlap(a, b) == ((2, 2), (8, 2), (11, 1))
    assert places(overlap(a, b), a) == ((2, 2), (4, 2), (7, 1))
    assert places(overlap(a, b), b) == ((0, 2), (6, 2), (8, 1))


def test_parts_of_a_reshard() -> None:
    """The same dim: what both have; another dim: the receiver's columns of the sender's rows."""
    owned, wanted = (((0, 3),), ((3, 2),)), (((0, 4),), ((2, 3),))
    halo = ReshardSite("h", (5, 6), torch.float32, 0, owned, 0, wanted)
    assert halo.part(1, 0) == (((0, 1),), ((3, 1),)) and halo.part_shape(1, 0) == (1, 6)
    switch = ReshardSite("s", (5, 6), torch.float32, 0, owned, 1, (((0, 2),), ((2, 4),)))
    assert switch.part(0, 1) == (((2, 4),), ((0, 3),)) and switch.part_shape(0, 1) == (3, 4)
    assert switch.local_shape(1) == (2, 6) and switch.wanted_shape(1) == (5, 4)


def test_parts_of_any_size() -> None:
    site = replace(attention_site(2, tokens=20), parts=3, q_sizes=((4, 4, 2), (0, 8, 2)))
    assert [site.rows(True, 1, 3, part) for part in range(3)] == [(0, 0), (0, 8), (8, 10)]
    assert [site.rows(False, 1, 3, part) for part in range(3)] == [(0, 4), (4, 7), (7, 10)], "keys: as evenly as can be"
    assert site.rows(True, 1, 2, 1) == (5, 10), "pieces that are not its parts"
    assert site.geometry() != replace(site, q_sizes=()).geometry()


@pytest.mark.parametrize("sizes", [((4, 4, 1), (4, 4, 2)), ((5, 5), (5, 5)), ((4, 4, 2),), ((12, -4, 2), (4, 4, 2))])
def test_parts_that_do_not_add_up(sizes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"site site has \[\(10, 3\), \(10, 3\)\] tokens and parts"):
        replace(attention_site(2, tokens=20), parts=3, q_sizes=sizes)
