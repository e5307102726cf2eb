"""What the host learns of chunks of other calls, and when."""

from __future__ import annotations

import pytest
import torch

from sfcompile.errors import RankMismatchError
from sfcompile.runtime.gpu.tags import TagStatus
from sfcompile.runtime.wires.transport import word_of


def test_a_noted_chunk_is_an_error_at_the_end_of_the_call_and_stays_one() -> None:
    status = TagStatus(1, torch.device("cpu"))
    status.end_call()
    assert status.error() is None
    status.word.fill_(word_of(7, 5))
    assert status.error() is None  # the host looks at its copy only
    for _ in range(2):
        with pytest.raises(
            RankMismatchError, match="not in the same call: rank 1 got a chunk of another call"
        ) as caught:
            status.end_call()
        assert caught.value.epoch == 7
