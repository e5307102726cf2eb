"""Video models as authors write them, on ranks: no break, no gather between blocks, exact."""

from __future__ import annotations

import pytest
import video_ranks
from processes import preload, run_processes

pytestmark = pytest.mark.ranks

preload("video_models", "model_cases")


def test_models_as_authors_write_them() -> None:
    run_processes(4, video_ranks.as_authors_write_them, (), timeout_s=240.0)
