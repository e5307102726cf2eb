"""Whatever is attended together, and in whichever order: every chunk ends with what it found in all keys."""

from __future__ import annotations

import random

import pytest
import torch

from sfcompile.runtime.program.instructions import Chunk
from sfcompile.runtime.rank.attention_aten import attend
from sfcompile.runtime.rank.partials import Partials

LENGTHS = {Chunk(0): 5, Chunk(1): 7, Chunk(1, 1): 4}


def queries(chunks: tuple[Chunk, ...], whole: dict[Chunk, torch.Tensor]) -> torch.Tensor:
    return torch.cat([whole[chunk] for chunk in chunks], 2)


@pytest.mark.parametrize("seed", range(20))
def test_every_chunk_meets_every_key_once(seed: int) -> None:
    """Random sets of chunks, the same ones again and again among them, against one attention of each chunk."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    whole = {chunk: torch.randn(1, 2, n, 16) for chunk, n in LENGTHS.items()}
    keys = [(torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)) for _ in range(6)]
    partials = Partials()
    partials.begin(tuple(LENGTHS))
    assert list(partials) == list(LENGTHS) and all(partials[chunk] is None for chunk in LENGTHS)
    for k, v in keys:
        left = list(LENGTHS)
        if rng.random() < 0.4:
            rng.shuffle(left)
        while left:
            size = rng.choice([len(left), rng.randint(1, len(left))])
            some, left = tuple(left[:size]), left[size:]
            done = attend(queries(some, whole), k, v, None, 0.25)
            assert done is not None
            partials.add(some, [LENGTHS[chunk] for chunk in some], done)
    for chunk in LENGTHS:
        want = attend(whole[chunk], torch.cat([k for k, _ in keys], 2), torch.cat([v for _, v in keys], 2), None, 0.25)
        found = partials[chunk]
        assert want is not None and found is not None
        torch.testing.assert_close(found[0], want[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], want[1], rtol=0, atol=1e-5)


def test_chunks_that_stay_together_are_merged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfcompile.runtime.rank import partials as module

    calls = []
    real = module.merge
    monkeypatch.setattr(module, "merge", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    partials, three = Partials(), tuple(LENGTHS)
    partials.begin(three)
    for _ in range(4):
        partials.add(three, list(LENGTHS.values()), (torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16)))
    assert len(calls) == 3
