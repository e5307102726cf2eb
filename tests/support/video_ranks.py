"""What one rank does with the models of video_models.py."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import video_models
from model_cases import close, compiled

from sfcompile.backend import reports


@torch.no_grad()
def as_authors_write_them(rank: int, names: Sequence[str]) -> None:
    """Each is one graph with a site for each attention to its own tokens, equals one process, and gathers little.

    That is: its outputs, keys and values of what is attended to whole (the text), and what patches become tokens of, or
    are made of.
    """
    warnings.filterwarnings("ignore", message="Padding mask")
    for name in names:
        attentions = video_models.VIDEO_MODELS[name][2]
        torch._dynamo.reset()
        before = len(reports())
        model, inputs = video_models.build(name)
        want = model(**inputs)
        model, inputs = video_models.build(name)
        got = compiled(model, placement="shard")(**inputs)
        for a, b in zip(got, want, strict=True):
            close(a, b)
        (plan,) = reports()[before:]
        assert plan.sharded_sites == attentions, f"{name}: {plan}"
        assert plan.share <= 1.10, f"{name}: {plan}"
        assert len(plan.gathered) <= len(got) + 2 * plan.local_sites + 2, f"{name}: {plan}"
