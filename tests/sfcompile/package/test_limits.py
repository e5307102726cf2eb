"""What a package may claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfcompile.errors import PackageError
from sfcompile.package.limits import DEPTH, check_facts, dtype_of, is_identifier, is_key, parse_json


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 10_000 + "]" * 10_000, "no JSON|nested deeper"),
        ("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "nested deeper"),
        ('{"a":' * (DEPTH + 2) + "0" + "}" * (DEPTH + 2), "nested deeper"),
        ("[1e999, NaN]", "no number"),
        ("9" * 5000, "more than 63 bits"),
        (str(2**63), "more than 63 bits"),
        ("{", "no JSON"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin1"), "no JSON"),
    ],
)
def test_json_is_bounded(text: str, why: str) -> None:
    with pytest.raises(PackageError, match=why):
        parse_json(text.encode(), "it")


def test_json_of_a_package_passes() -> None:
    assert parse_json(b'{"a":[1,-9223372036854775807,{"b":1.5}]}', "it") == {"a": [1, -(2**63) + 1, {"b": 1.5}]}


def facts(shape: Any, stride: Any, dtype: Any = "float32") -> dict[str, Any]:
    return {"shape": shape, "stride": stride, "dtype": dtype}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (facts([2**40, 2**20], [2**20, 1]), "this machine has"),
        (facts([2], [2**62]), "this machine has"),
        (facts([0, 2**62, 2**62], [1, 1, 1]), "has the shape"),
        (facts([2], []), "1 dims and 0 strides"),
        (facts([-1], [1]), "not an integer from 0"),
        (facts([2], [-1]), "not an integer from 0"),
        (facts([True], [1]), "not an integer"),
        (facts(["2"], [1]), "not an integer"),
        (facts([1] * 65, [1] * 65), "at most 64"),
        (facts([1], [1], "quint8"), "no dtype"),
        (facts([1], [1], "load"), "no dtype"),
        (facts([1], [1], None), "no dtype"),
        ([], "not an object"),
    ],
)
def test_tensors_that_cannot_be(value: Any, why: str) -> None:
    with pytest.raises(PackageError, match=why):
        check_facts(value, "x")


def test_tensors_that_can_be() -> None:
    check_facts(facts([2, 3], [0, 1]), "x")
    check_facts(facts([0, 7], [7, 1], "bool"), "x")
    assert dtype_of("bfloat16") is torch.bfloat16


def test_names() -> None:
    assert all(map(is_identifier, ("x", "_sf_constant0", "add_1")))
    assert not any(
        map(is_identifier, ("__class__", "lambda", "match", "a b", "a.b", "1a", "x=0", "é", "", 3, "x" * 5000))
    )
    assert is_key("d23d79304682591d-batch") and not is_key("-a") and not is_key("a'b") and not is_key("a" * 200)
