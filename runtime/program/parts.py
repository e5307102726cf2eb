"""Cutting a shard into what each rank wants of it, and putting what came where it belongs (gathers and reshards)."""

from __future__ import annotations

from typing import Any

import torch


def cut_part(site: Any, shard: torch.Tensor, src: int, dst: int) -> torch.Tensor:
    """What ``dst`` wants of ``src``'s shard: all of it for a gather.

    Args:
        site: GatherSite or ReshardSite (runtime/program/sites.py).
    """
    if not hasattr(site, "wanted"):
        return shard
    pieces = [shard.narrow(site.into, first, length) for first, length in site.part(src, dst)[0]]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, site.into) if pieces else shard.narrow(site.into, 0, 0)


def place_part(site: Any, out: torch.Tensor, piece: torch.Tensor, src: int, dst: int) -> None:
    """Copy what ``dst`` got from ``src`` to its positions in ``out``: the whole value, or what ``dst`` wants of it."""
    if hasattr(site, "wanted"):
        at = 0
        for first, length in site.part(src, dst)[1]:
            out.narrow(site.dim, first, length).copy_(piece.narrow(site.dim, at, length))
            at += length
        return
    runs = site.owners[src]
    before, after = site.shape[: site.dim], site.shape[site.dim + 1 :]
    tokens = site.shape[site.dim] // (site.outer * site.inner)
    mine = sum(length for _, length in runs)
    target = out.view(*before, site.outer, tokens, site.inner, *after)
    source = piece.reshape(*before, site.outer, mine, site.inner, *after)
    at = 0
    for first, length in runs:
        target.narrow(site.dim + 1, first, length).copy_(source.narrow(site.dim + 1, at, length))
        at += length
