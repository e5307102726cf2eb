"""The facts of an explanation as plain values; what they are is tested in test_explain.py."""

from __future__ import annotations

import json

from models import build

from sfcompile.prediction.explain import explain


def test_the_sums_of_the_parts_are_the_step() -> None:
    model, inputs = build("joint")
    explained = explain(model, *inputs, topology="2x2", placement="shard")
    plain = json.loads(explained.to_json())
    assert plain["step"]["seconds"] == explained.step_s == sum(graph.seconds() for graph in explained.graphs)
    assert explained.limit_s <= explained.step_s
    assert plain["memory"]["heap_bytes"] == explained.heap_bytes > 0
