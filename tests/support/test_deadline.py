"""The poll that ends tests of waits."""

from __future__ import annotations

import pytest
from deadline import Deadline


def test_a_deadline_counts_from_the_last_arrival() -> None:
    deadline = Deadline(1e9)
    deadline()
    deadline.arrived()
    assert deadline._since is None


def test_a_deadline_says_what_did_not_come() -> None:
    deadline = Deadline(-1.0, "the word")
    with pytest.raises(TimeoutError, match="the word did not arrive within -1 s"):
        deadline()
