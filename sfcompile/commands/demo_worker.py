"""One process of the demo: `python -m sfcompile.commands.demo_worker reference|rank FOLDER`.

The model is FluxTransformer2DModel of diffusers with random weights, run as a denoising loop. Model, weights, inputs
and loop are the same for the reference and for every rank; the ranks only add torch.compile.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from sfcompile.commands.demo import DemoConfig, Progress, Result, read_config, write_result
from sfcompile.passes.report.history import reports

SEED = 0
CHANNELS = 64
TEXT_CHANNELS = 256
POOLED_CHANNELS = 64
REFERENCE = "reference.pt"


def build_model(config: DemoConfig) -> torch.nn.Module:
    """The model of diffusers with seeded random weights, in fp32."""
    torch.manual_seed(SEED)
    # The rotary embedding splits head_dim over (text, row, column); each part must be even.
    text_dim = config.head_dim // 4 // 2 * 2
    row_dim = (config.head_dim - text_dim) // 4 * 2
    model: torch.nn.Module = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=config.layers,
        num_single_layers=config.single_layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=TEXT_CHANNELS,
        pooled_projection_dim=POOLED_CHANNELS,
        guidance_embeds=False,
        axes_dims_rope=(text_dim, row_dim, config.head_dim - text_dim - row_dim),
    )
    return model.eval()


def build_inputs(config: DemoConfig) -> dict[str, torch.Tensor]:
    """Seeded inputs: noise, text, and the positions of the image tokens on a grid as square as their number allows."""
    generator = torch.Generator().manual_seed(SEED + 1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = next(r for r in range(math.isqrt(config.tokens), 0, -1) if config.tokens % r == 0)
    positions = torch.zeros(rows, config.tokens // rows, 3)
    positions[..., 1] = torch.arange(rows)[:, None]
    positions[..., 2] = torch.arange(config.tokens // rows)[None, :]
    return {
        "hidden_states": noise(1, config.tokens, CHANNELS),
        "encoder_hidden_states": noise(1, config.text, TEXT_CHANNELS),
        "pooled_projections": noise(1, POOLED_CHANNELS),
        "img_ids": positions.reshape(config.tokens, 3),
        "txt_ids": torch.zeros(config.text, 3),
    }


@dataclass(frozen=True)
class Run:
    """The model's output at every step, and the times that `Result` describes."""

    outputs: list[torch.Tensor]
    first_s: float
    step_s: list[float]
    cpu_s: float

    def result(self, expected: list[torch.Tensor]) -> Result:
        """The times, and the distance from the outputs that were expected."""
        differences = [(got - want).abs().max() for got, want in zip(self.outputs, expected, strict=True)]
        # torch's max keeps a NaN, Python's does not.
        difference = float(torch.stack(differences).max())
        scale = max(float(want.abs().max()) for want in expected)
        return Result(torch.get_num_threads(), self.first_s, self.step_s, self.cpu_s, difference, scale)


def denoise(model: Callable[..., Any], config: DemoConfig, progress: Progress) -> Run:
    """Euler steps from noise, after one call that is not a step and takes the compilation."""
    inputs = build_inputs(config)
    latents = inputs.pop("hidden_states")

    def predict(now: torch.Tensor, sigma: float) -> torch.Tensor:
        output: torch.Tensor = model(hidden_states=now, timestep=torch.tensor([sigma]), return_dict=False, **inputs)[0]
        return output

    start = time.perf_counter()
    predict(latents, 1.0)
    first_s = time.perf_counter() - start
    progress.update(0, f"first call {first_s:.1f} s")
    outputs, step_s = [], []
    cpu_start = time.process_time()
    for step in range(config.steps):
        start = time.perf_counter()
        outputs.append(predict(latents, 1.0 - step / config.steps))
        step_s.append(time.perf_counter() - start)
        latents = latents - outputs[-1] / config.steps
        progress.update(step + 1, f"{step_s[-1]:.3f} s/step")
    return Run(outputs, first_s, step_s, time.process_time() - cpu_start)


def run_reference(folder: Path, config: DemoConfig) -> None:
    """The model in this one process, eagerly; leaves its outputs and its times."""
    model = build_model(config)
    print(_description(model, config), flush=True)
    run = denoise(model, config, Progress("one process", config.steps, shown=True))
    torch.save(run.outputs, folder / REFERENCE)
    write_result(folder, "reference", run.result(run.outputs))


def run_rank(folder: Path, config: DemoConfig) -> None:
    """The model on this rank; leaves its times and its distance from the reference, rank 0 prints the plan."""
    rank = int(os.environ["RANK"])
    model = torch.compile(build_model(config), backend="streamfusion", options={"inner": config.inner})
    if rank == 0:
        print("  compiling ...", flush=True)
    run = denoise(model, config, Progress(f"{config.ranks} ranks    ", config.steps, shown=rank == 0))
    write_result(folder, f"rank{rank}", run.result(torch.load(folder / REFERENCE)))
    if rank == 0:
        print(_plans())


def _description(model: torch.nn.Module, config: DemoConfig) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"  {type(model).__name__} of diffusers, random weights, fp32, {millions:.1f} M parameters\n"
        f"  {config.layers} + {config.single_layers} blocks, {config.heads} heads x {config.head_dim}\n"
        f"  {config.tokens} image + {config.text} text tokens, {config.steps} steps"
    )


def _plans() -> str:
    # Loaded by torch through its entry point, not by us: that the demo works without importing it is the point.
    compiled = reports()
    if not compiled:
        return "\nNo plan: with one rank there is nothing to shard, the model runs as under Inductor"
    return "\n".join(
        f"\nPlan of graph {number} of {len(compiled)}\n{report}" for number, report in enumerate(compiled, 1)
    )


def main(argv: list[str]) -> None:
    """Run the role named on the command line."""
    role, folder = argv
    config = read_config(Path(folder))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.no_grad():
        (run_reference if role == "reference" else run_rank)(Path(folder), config)


if __name__ == "__main__":
    main(sys.argv[1:])
