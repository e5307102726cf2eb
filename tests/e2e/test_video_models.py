"""Video models as authors write them, on ranks: no break, no gather between blocks, exact."""

from __future__ import annotations

import pytest
import video_ranks
from processes import preload, run_processes
from video_models import VIDEO_MODELS

pytestmark = pytest.mark.ranks

preload("video_models", "model_cases")


@pytest.mark.parametrize(
    ("ranks", "names"), [(2, ("grid",)), pytest.param(4, tuple(VIDEO_MODELS), marks=pytest.mark.thorough)]
)
def test_models_as_authors_write_them(ranks: int, names: tuple[str, ...]) -> None:
    run_processes(ranks, video_ranks.as_authors_write_them, (names,), timeout_s=240.0)
