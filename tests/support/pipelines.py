"""Whole diffusers pipelines on ranks: every network compiled by one call, what comes out equals one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import clients
import torch
from model_cases import close
from torch import nn

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


class Adapter(nn.Module):
    """A product of two thin matrices beside a linear one, as PEFT puts it there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale, seed = base, 1.0, _seed()
        self.down = nn.Parameter(torch.randn(3, base.in_features, generator=seed) * 0.3, requires_grad=False)
        self.up = nn.Parameter(torch.randn(base.out_features, 3, generator=seed) * 0.3, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T * self.scale


def _with_adapters(pipe: Any) -> None:
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        block.attn.to_q = Adapter(block.attn.to_q)


def _rescaled(pipe: Any) -> None:
    for module in pipe.transformer.modules():
        if isinstance(module, Adapter):
            module.scale = 0.5
            module.base.weight.data += 0.7 * module.up.data @ module.down.data


def _tiled(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()


def _whole_again(pipe: Any) -> None:
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()


CHANGES: tuple[Callable[[Any], None], ...] = (_with_adapters, _rescaled, _tiled, _whole_again)
"""What users do to a pipeline between two images."""


def pair(pipe: Any) -> torch.Tensor:
    """Two images of another size, larger than a tile."""
    out = pipe(
        "a cat", height=56, width=72, num_inference_steps=2, num_images_per_prompt=2, max_sequence_length=24,
        output_type="pt", generator=_seed(),
    )  # fmt: skip
    return torch.as_tensor(out[0])


@torch.no_grad()
def changed_between_images(rank: int) -> None:
    """A compiled pipeline, changed as users do it, draws what a plain one draws that was changed alike."""
    torch._dynamo.reset()
    pipe, plain = clients.image_pipeline(), clients.image_pipeline()
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
    sfcompile.compile_pipeline(pipe, options={"placement": "shard", "inner": "eager", "timeout_s": 120.0})
    close(image(pipe), image(plain))
    for change in CHANGES:
        for each in (pipe, plain):
            change(each)
        print(change.__name__, flush=True)
        close(pair(pipe), pair(plain))
