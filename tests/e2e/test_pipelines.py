"""Whole diffusers pipelines on ranks and on emulated machines. (`make test` draws an image by the example.)"""

from __future__ import annotations

import pipelines
import pytest
from processes import preload, run_processes

pytestmark = [pytest.mark.ranks, pytest.mark.thorough]

preload("clients", "model_cases", "pipelines")


@pytest.mark.parametrize("homes", [[0, 0, 0, 0], [0, 0, 1, 1]], ids=["4", "2x2"])
@pytest.mark.parametrize("kind", pipelines.PIPELINES)
def test_a_pipeline_draws_the_same(kind: str, homes: list[int]) -> None:
    run_processes(4, pipelines.draws_the_same, (kind,), homes, timeout_s=600.0)


def test_a_pipeline_that_is_changed_between_images() -> None:
    """Adapters put in, rescaled and fused through .data, tiles on and off, another size and number of images."""
    run_processes(2, pipelines.changed_between_images, (), timeout_s=900.0)
