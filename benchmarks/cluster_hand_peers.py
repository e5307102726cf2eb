"""Two sequence-parallel attentions as engineers write them by hand today, in plain torch.distributed.

They stand for code that cannot run here (JAX, CUDA): Ulysses whose heads go in chunks, so that one chunk's all-to-all
is under way while another's attention is computed (MaxDiffusion, flashinfer), and Ulysses inside machines with keys and
values all-gathered across them (vLLM-omni's request for comments 7589). Both run under diffusers' plans, like
yunchang's USP: they are given this rank's q, k, v [B, S, H, D] and return its output, of the same shape.

Every rank holds equally many tokens. Calls return when their result is whole; buffers belong to the call, so nothing
that is still being sent is written to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Exchange:
    """All-to-all of one chunk of heads in a group of P ranks: tokens of a rank to heads of a rank, or back."""

    def __init__(self, chunk: torch.Tensor, group: dist.ProcessGroup | None, to_heads: bool) -> None:
        """Start it.

        Args:
            chunk: [B, S, H, D] of this rank's tokens, or (back) [B, P * S, H / P, D] of this rank's heads.
        """
        size = dist.get_world_size(group)
        dim = 2 if to_heads else 1
        # [P, B, ...]: what goes to each rank lies in one piece
        self._sent = torch.stack(chunk.tensor_split(size, dim=dim))
        self._arrived = torch.empty_like(self._sent)
        self._dim = 1 if to_heads else 2
        self._work = dist.all_to_all_single(self._arrived, self._sent, group=group, async_op=True)

    def result(self) -> torch.Tensor:
        """Wait; the chunk as the other side cuts it."""
        self._work.wait()
        return torch.cat(list(self._arrived), dim=self._dim)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of tensors [B, S, H, D]."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def chunked_ulysses(group: dist.ProcessGroup | None, heads: int, at_most: int = 4) -> Attention | None:
    """Ulysses over all ranks, the heads in up to ``at_most`` chunks; None if the heads do not divide by the ranks.

    Chunk n + 1's q, k, v travel while chunk n is computed, and chunk n's output while chunk n + 1 is.
    """
    size = dist.get_world_size(group)
    if heads % size:
        return None
    chunks = max(n for n in range(1, at_most + 1) if heads // size % n == 0)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = list(zip(*(x.chunk(chunks, dim=2) for x in (query, key, value)), strict=True))
        coming = [Exchange(x, group, True) for x in parts[0]]
        leaving = []
        for n in range(chunks):
            here = [exchange.result() for exchange in coming]
            coming = [Exchange(x, group, True) for x in parts[n + 1]] if n + 1 < chunks else []
            leaving.append(Exchange(attend(*here), group, False))
        return torch.cat([exchange.result() for exchange in leaving], dim=2)

    return attention


def gathered_kv(inside: dist.ProcessGroup | None, across: dist.ProcessGroup | None, heads: int) -> Attention | None:
    """Ulysses in ``inside``, then keys and values of its heads all-gathered in ``across``; None: heads do not divide.

    Keys and values leave for the other machines before the queries' all-to-all, which they hide.
    """
    ranks, machines = dist.get_world_size(inside), dist.get_world_size(across)
    if heads % ranks:
        return None

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        both = Exchange(torch.cat([key, value], dim=-1), inside, True).result()
        everyone = [torch.empty_like(both) for _ in range(machines)]
        gather: Any = dist.all_gather(everyone, both, group=across, async_op=True)
        here = Exchange(query, inside, True).result()
        gather.wait()
        keys, values = torch.cat(everyone, dim=1).split([key.shape[-1], value.shape[-1]], dim=-1)
        return Exchange(attend(here, keys, values), inside, False).result()

    return attention


def groups(machines: int, ranks: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Collective: this rank's group inside its machine, and that of its equals across machines; ranks in order."""
    inside = [list(range(m * ranks, (m + 1) * ranks)) for m in range(machines)]
    own: list[Any] = []
    for members in (inside, [list(row) for row in zip(*inside, strict=True)]):
        made = {tuple(each): dist.new_group(each) for each in members}
        own.append(next(group for each, group in made.items() if dist.get_rank() in each))
    return own[0], own[1]
