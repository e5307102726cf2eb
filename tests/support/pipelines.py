"""Whole diffusers pipelines on ranks: every network compiled by one call, what comes out equals one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import clients
import torch
from model_cases import close

import sfcompile
from sfcompile.backend import reports
from sfcompile.runtime.rank.session import sessions

Draw = Callable[[Any], torch.Tensor]


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def image(pipe: Any) -> torch.Tensor:
    out = pipe(
        "a photo of a cat in the rain", height=32, width=40, num_inference_steps=3, max_sequence_length=24,
        output_type="pt", generator=_seed(),
    )  # fmt: skip
    return torch.as_tensor(out[0])


def video(pipe: Any) -> torch.Tensor:
    out = pipe(
        "a photo of a cat in the rain", height=32, width=48, num_frames=9, guidance_scale=3.0, num_inference_steps=4,
        max_sequence_length=24, output_type="pt", generator=_seed(),
    )  # fmt: skip
    return torch.as_tensor(out[0])


def audio(pipe: Any) -> torch.Tensor:
    out = pipe("a cat in the rain", num_inference_steps=3, guidance_scale=3.0, generator=_seed(), output_type="pt")
    return torch.as_tensor(out[0])


PIPELINES: dict[str, tuple[Callable[[], Any], Draw, int]] = {
    "image": (clients.image_pipeline, image, 4),
    "video": (clients.two_experts, video, 3),
    "audio": (clients.audio_pipeline, audio, 3),
}
"""Name -> the pipeline, how it is called, and how many plans its networks need: experts of one class share theirs."""


@torch.no_grad()
def draws_the_same(rank: int, kind: str) -> None:
    """What a pipeline draws is what one process draws; its parts have their plans, and share a heap."""
    torch._dynamo.reset()
    make, draw, needed = PIPELINES[kind]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    want = draw(pipe)
    sfcompile.compile_pipeline(pipe, options={"placement": "shard", "inner": "eager", "timeout_s": 60.0})
    close(draw(pipe), want)
    close(draw(pipe), want)
    plans = reports()
    assert len(plans) >= needed, [plan.headline for plan in plans]
    assert any(plan.sharded_sites for plan in plans), [plan.headline for plan in plans]
    assert len(sessions()) == 1, "one session, one heap"
