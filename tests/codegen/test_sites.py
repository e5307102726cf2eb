"""Sites: geometry and shapes."""

from __future__ import annotations

from dataclasses import replace

import torch
from random_sites import attention_site

from sfcompile.codegen.sites import GatherSite, count


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
