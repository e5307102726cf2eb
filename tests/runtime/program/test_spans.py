"""Spans: plain values."""

from __future__ import annotations

import pickle

from sfcompile.runtime.program.spans import Span


def test_a_span_is_data() -> None:
    span = Span(1, "network", "put k -> rank 2 slot 3", 0.5, 0.75, 1024, 2)
    assert pickle.loads(pickle.dumps(span)) == span and Span(0, "compute", "attend", 0.0, 1.0).peer is None
