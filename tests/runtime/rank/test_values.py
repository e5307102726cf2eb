"""Values as text: what ranks tell each other comes back equal; nothing else can be made of a text."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import InternalError
from sfcompile.runtime.program.instructions import Chunk
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.values import decode, encode

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers() | st.tuples(st.text(), st.integers()), inner)
    ),
    max_leaves=20,
)


@given(plain)
def test_values_come_back(value: Any) -> None:
    back = decode(encode(value))
    assert back == value and repr(back) == repr(value)


def test_floats_that_json_lacks() -> None:
    assert math.isnan(decode(encode(math.nan))) and decode(encode([math.inf, -math.inf])) == [math.inf, -math.inf]


def test_numbers_of_numpy_are_numbers() -> None:
    back = decode(encode([np.float64(0.5), np.int64(3), np.float64("inf")]))
    assert back == [0.5, 3, math.inf] and [type(entry) for entry in back] == [float, int, float]


def test_dtypes_come_back() -> None:
    assert decode(encode([torch.bfloat16, torch.float8_e4m3fn])) == [torch.bfloat16, torch.float8_e4m3fn]


def test_our_own_classes_come_back() -> None:
    topology = Topology.grid(2, 2)
    value = [topology, Mesh.of(topology, 2, 2), {"chunk": Chunk(3)}]
    assert decode(encode(value)) == value


def test_other_objects_are_not_sent() -> None:
    for value in (object(), {1, 2}, print, json.JSONDecoder()):
        with pytest.raises(InternalError, match="cannot be sent to other ranks"):
            encode(value)


CRAFTED = [
    {"$class": ["os:system", {"command": "true"}]},
    {"$class": ["subprocess:Popen", {"args": "true"}]},
    {"$class": ["sfcompile.runtime.rank.values:decode", {"text": "1"}]},
    {"$class": ["sfcompile.runtime.rank.values:sys.modules", {}]},
    {"$class": ["sfcompile.codegen.schedule.mesh:Mesh", {"ulysses": 1}]},
    {"$class": ["sfcompile.runtime.rank.session:Session", {"world": None}]},
    {"$class": ["sfcompile.errors:InternalError", {"what": "x"}]},
    {"$class": 3},
    {"$enum": ["sfcompile.codegen.schedule.mesh:Mesh", "of"]},
    {"$bytes": "%%%"},
    {"$bytes": 5},
    {"$dtype": "load"},
    {"$dtype": 5},
    {"$dict": [[1]]},
    {"$dict": [[[], 1]]},
    {"$tuple": 1},
    {"$float": "one"},
    {"$pickle": "gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAV0cnVllIWUUpQu"},
]


@pytest.mark.parametrize("crafted", CRAFTED, ids=str)
def test_crafted_texts_make_nothing(crafted: Any) -> None:
    with pytest.raises(ValueError):
        decode(json.dumps(crafted))


@pytest.mark.parametrize("text", ["", "{", "gASVIAAA", "[" * 100_000, '{"$tuple":[', "NaN,"])
def test_garbage_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        decode(text)
