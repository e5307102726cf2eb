"""Cutting what each rank wants out of a shard, and putting what came where it belongs (exchanges)."""

from __future__ import annotations

import torch

from sfcompile.runtime.program.sites import ExchangeSite


def cut_chunk(site: ExchangeSite, shard: torch.Tensor, src: int, dst: int) -> torch.Tensor:
    """What ``dst`` wants of ``src``'s shard; the shard itself, if that is all of it."""
    runs, _ = site.chunk(src, dst)
    if site.into != site.dim:
        return _cut(shard, site.into, runs)
    held = site.local_shape(src)[site.dim] // (site.outer * site.inner)
    if runs == ((0, held),):
        return shard
    return _cut(_by_rows(site, shard), site.dim + 1, runs).reshape(site.chunk_shape(src, dst))


def place_chunk(site: ExchangeSite, out: torch.Tensor, chunk: torch.Tensor, src: int, dst: int) -> None:
    """Copy what ``dst`` got from ``src`` to its positions in ``out``, which is what ``dst`` wants of the value."""
    target, source = _by_rows(site, out), _by_rows(site, chunk)
    at = 0
    for first, length in site.chunk(src, dst)[1]:
        target.narrow(site.dim + 1, first, length).copy_(source.narrow(site.dim + 1, at, length))
        at += length


def _by_rows(site: ExchangeSite, tensor: torch.Tensor) -> torch.Tensor:
    """A view with ``dim`` as the three dims outer, rows, inner."""
    rows = tensor.shape[site.dim] // (site.outer * site.inner)
    split = (*tensor.shape[: site.dim], site.outer, rows, site.inner, *tensor.shape[site.dim + 1 :])
    return tensor.view(split)


def _cut(tensor: torch.Tensor, dim: int, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    slices = [tensor.narrow(dim, first, length) for first, length in runs]
    if len(slices) == 1:
        return slices[0]
    return torch.cat(slices, dim) if slices else tensor.narrow(dim, 0, 0)
