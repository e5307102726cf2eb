"""What runs in each process of the demo: the same model, inputs and loop everywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sfcompile.commands.demo import DemoConfig, Progress, read_result
from sfcompile.commands.demo_worker import REFERENCE, Run, build_inputs, build_model, denoise, run_reference

TINY = DemoConfig(tokens=12, text=4, layers=1, single_layers=1, heads=2, head_dim=16, steps=3)


def test_model_and_inputs_are_functions_of_the_sizes() -> None:
    first, second = build_model(TINY).state_dict(), build_model(TINY).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, other = build_inputs(TINY), build_inputs(TINY)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(16, 4, 4), (12, 3, 4), (7, 1, 7)])
def test_image_tokens_lie_on_a_grid(tokens: int, rows: int, columns: int) -> None:
    positions = build_inputs(DemoConfig(tokens=tokens))["img_ids"]
    assert positions.shape == (tokens, 3)
    assert positions[:, 1].unique().numel() == rows
    assert positions[:, 2].unique().numel() == columns
    assert positions.unique(dim=0).shape[0] == tokens


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
def test_rotary_parts_are_even_and_fill_the_head(head_dim: int) -> None:
    parts = build_model(DemoConfig(layers=1, single_layers=1, heads=1, head_dim=head_dim)).config.axes_dims_rope
    assert sum(parts) == head_dim
    assert all(part % 2 == 0 and part > 0 for part in parts)


def test_the_loop_integrates_from_noise_to_image() -> None:
    seen: list[tuple[torch.Tensor, float]] = []

    def model(*, hidden_states: torch.Tensor, timestep: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        seen.append((hidden_states, float(timestep)))
        return (torch.ones_like(hidden_states),)

    run = denoise(model, TINY, Progress("", TINY.steps, shown=False))
    assert len(run.outputs) == len(run.step_s) == TINY.steps
    # The first call is the untimed one; both it and the first step start from the noise.
    assert [round(sigma, 3) for _, sigma in seen] == [1.0, 1.0, 0.667, 0.333]
    assert torch.equal(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[3][0], seen[1][0] - 2 / 3)


def test_a_nan_in_any_step_is_kept() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for outputs in ([good, bad], [bad, good]):
        assert math.isnan(Run(outputs, 0.0, [0.0, 0.0], 0.0).result([good, good]).difference)
    result = Run([good, good * 3], 0.0, [0.0, 0.0], 0.0).result([good, good * 2])
    assert (result.difference, result.scale) == (1.0, 2.0)


def test_the_reference_leaves_outputs_and_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        run_reference(tmp_path, TINY)
    result = read_result(tmp_path, "reference")
    outputs = torch.load(tmp_path / REFERENCE)
    assert len(outputs) == len(result.step_s) == TINY.steps
    assert result.scale == max(float(output.abs().max()) for output in outputs) > 0
    assert "12 image + 4 text tokens" in capsys.readouterr().out
