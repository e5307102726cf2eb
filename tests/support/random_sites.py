"""Random attention and gather sites, their whole tensors, and what one process computes for them.

B batch, H heads, K key heads, D head dim, E value head dim, L tokens (Lq queries, Lk keys).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import ACROSS, Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.intervals import Runs, count
from sfcompile.runtime.program.sites import AttentionSite, ExchangeSite
from sfcompile.runtime.program.topology import Topology


def cut(tokens: int, ranks: int, rng: random.Random) -> tuple[Runs, ...]:
    """One or two segments of ``tokens`` cut at random places: uneven, several runs, some ranks with nothing."""
    segments = [tokens] if rng.random() < 0.5 else [tokens // 3, tokens - tokens // 3]
    owned: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    at = 0
    for length in segments:
        ends = [0, *sorted(rng.randint(0, length) for _ in range(ranks - 1)), length]
        for rank in range(ranks):
            if ends[rank + 1] > ends[rank]:
                owned[rank].append((at + ends[rank], ends[rank + 1] - ends[rank]))
        at += length
    return tuple(tuple(runs) for runs in owned)


def even(tokens: int, ranks: int) -> tuple[Runs, ...]:
    """``tokens`` in contiguous parts, sizes within one of each other."""
    ends = [rank * tokens // ranks for rank in range(ranks + 1)]
    return tuple(((ends[rank], ends[rank + 1] - ends[rank]),) for rank in range(ranks))


def rows(positions: Runs) -> torch.Tensor:
    """The token indices of some positions."""
    return torch.tensor([i for first, length in positions for i in range(first, first + length)], dtype=torch.int64)


def attention_site(ranks: int, heads: int = 4, tokens: int = 24, head_dim: int = 8) -> AttentionSite:
    """A plain even site."""
    places = even(tokens, ranks)
    return AttentionSite("site", 1, heads, heads, head_dim, head_dim, torch.float32, places, places, head_dim**-0.5)


def gather_site(ranks: int, tokens: int = 10) -> ExchangeSite:
    """A gather along the middle dim."""
    return ExchangeSite.gather("gather", (2, tokens, 3), torch.float32, 1, even(tokens, ranks))


@dataclass
class Case:
    """One attention, whole: inputs, mask, the fp64 result, how it is split and scheduled."""

    site: AttentionSite
    mesh: Mesh
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    expected: torch.Tensor
    kind: str = "torus"
    parts: tuple[int, int] = (1, 1)

    def schedule(self) -> Schedule:
        """The attention's schedule."""
        return build(self.kind, self.site, self.mesh, *self.parts)

    def shard(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's q, k, v; as transposed views, the way projections leave them."""
        own, keys = rows(self.site.q_positions[rank]), rows(self.site.kv_positions[rank])
        return tuple(
            whole[:, :, index].transpose(1, 2).contiguous().transpose(1, 2)
            for whole, index in ((self.q, own), (self.k, keys), (self.v, keys))
        )  # type: ignore[return-value]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """One-process attention in fp64; rows that may attend nothing are 0."""
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    out = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), wide, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out.nan_to_num(0.0)


def every_case(ranks: int) -> list[Case]:
    """Every builder on every mesh of so many ranks: 6 heads over 3 key heads, 23 tokens: little divides."""
    cases = []
    base = random_case(2, ranks=ranks)
    generator = torch.Generator().manual_seed(ranks)
    q, k, v = (torch.randn(2, heads, 23, 8, generator=generator) for heads in (6, 3, 3))
    places = even(23, ranks)
    site = AttentionSite("every", 2, 6, 3, 8, 8, torch.float32, places, places, 8**-0.5)
    topology = Topology(tuple(rank * 2 // ranks for rank in range(ranks)))
    for ulysses in (u for u in range(1, min(ranks, 6) + 1) if ranks % u == 0):
        for kind in ("torus", "usp", "allgather"):
            for lanes in {1, max(n for n in (1, 2, 3) if ulysses % n == 0)}:
                parts = (1, 1) if lanes == 1 else (2, 3)
                mesh = Mesh.of(topology, ulysses, ranks // ulysses, ACROSS[len(cases) % 2], lanes)
                mask = torch.rand(2, 1, 1, 23, generator=generator) < 0.7 if kind == "usp" else None
                expected = reference(q, k, v, mask, False, site.scale)
                this = replace(site, mask=None if mask is None else "full")
                cases.append(replace(base, site=this, mesh=mesh, q=q, k=k, v=v, mask=mask, expected=expected,
                                     kind=kind, parts=parts))  # fmt: skip
    return cases


def random_case(seed: int, dtype: torch.dtype = torch.float32, ranks: int | None = None) -> Case:
    """Ranks, mesh, machines, heads, lengths, cuts, mask or causal, kind and parts (or parts), all drawn from
    ``seed``."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = rng.choice([1, 2, 3, 4, 6])
    ranks = drawn if ranks is None else ranks
    ulysses = rng.choice([u for u in range(1, ranks + 1) if ranks % u == 0])
    kv_heads, group = rng.choice([1, 2, 3, 4]), rng.choice([1, 1, 2, 3])
    if kv_heads * group < ulysses:
        kv_heads, group = ulysses, 1
    heads, batch, head_dim = kv_heads * group, rng.choice([1, 2]), rng.choice([4, 8, 40])
    v_head_dim = rng.choice([head_dim, head_dim, 6])
    q_len, kv_len = rng.randint(1, 40), rng.randint(1, 40)
    causal = rng.random() < 0.25

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = draw(batch, heads, q_len, head_dim)
    k, v = draw(batch, kv_heads, kv_len, head_dim), draw(batch, kv_heads, kv_len, v_head_dim)
    masks = {
        "none": None,
        "keys": torch.rand(batch, 1, 1, kv_len, generator=generator) < 0.6,
        "pairs": torch.rand(1, heads, q_len, kv_len, generator=generator) < 0.5,
        "additive": draw(q_len, kv_len).masked_fill(torch.rand(q_len, kv_len, generator=generator) < 0.3, -torch.inf),
    }
    mask = masks["none" if causal else rng.choice(list(masks))]
    site = AttentionSite(
        f"case{seed}", batch, heads, kv_heads, head_dim, v_head_dim, dtype, cut(q_len, ranks, rng),
        cut(kv_len, ranks, rng), head_dim**-0.5, causal, None if mask is None else "full",
    )  # fmt: skip
    machines = tuple(sorted(rng.randint(0, 2) for _ in range(ranks)))
    lanes = rng.choice([n for n in range(1, ulysses + 1) if ulysses % n == 0])
    mesh = Mesh.of(Topology(machines), ulysses, ranks // ulysses, rng.choice(ACROSS), lanes)
    expected = reference(q, k, v, mask, causal, site.scale)
    kind, parts = rng.choice(["torus", "torus", "usp", "allgather"]), (rng.randint(1, 3), rng.randint(1, 3))
    if parts[0] == parts[1] > 1 and kind == "torus":
        site = replace(
            site, parts=parts[0], q_sizes=_sizes(site.q_positions, parts[0], rng),
            kv_sizes=_sizes(site.kv_positions, parts[0], rng),
        )  # fmt: skip
    return Case(site, mesh, q, k, v, mask, expected, kind, parts)


def _sizes(places: tuple[Runs, ...], parts: int, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Every rank's tokens in so many parts of any size."""
    found = []
    for runs in places:
        ends = [0, *sorted(rng.randint(0, count(runs)) for _ in range(parts - 1)), count(runs)]
        found.append(tuple(stop - start for start, stop in pairwise(ends)))
    return tuple(found)
