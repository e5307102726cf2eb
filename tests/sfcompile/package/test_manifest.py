"""What a package says of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sfcompile.errors import PackageError
from sfcompile.package.manifest import check_manifest, check_tree, named

FACTS = {"shape": [2], "stride": [1], "dtype": "float32"}
GOOD: dict[str, Any] = {
    "model": "M", "plan": "p", "topology": "t", "inner": "eager", "attention": "auto", "inputs": "checked",
    "native": None,
    "versions": {"sfcompile": "0", "torch": "2"}, "ranks": 2, "machine_of": [0, 0], "graphs": [0, 0],
    "programs": [["a-batch"], ["b"]], "mesh": {}, "placeholders": [["input", 0], ["weight", "w"]], "written": [1],
    "signature": {"positional": ["x"], "arguments": {"x": {"tensor": 0}, "y": {"value": 3}}, "tensors": [FACTS]},
    "weights": {"file": None, "tensors": {"w": FACTS}}, "result": {"tensor": 0},
}  # fmt: skip


def test_a_good_one_passes() -> None:
    check_manifest(copy.deepcopy(GOOD))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("model"),
        lambda m: m.update(inner="exec"),
        lambda m: m.update(attention="mine"),
        lambda m: m.update(inputs="rank1"),
        lambda m: m.pop("inputs"),
        lambda m: m.update(ranks=2**40),
        lambda m: m.update(ranks="2"),
        lambda m: m.update(graphs=[0]),
        lambda m: m.update(machine_of=[0, -1]),
        lambda m: m.update(programs=[["a'b"], []]),
        lambda m: m.update(programs=[["a", "a"], []]),
        lambda m: m.update(placeholders=[["input", 1]]),
        lambda m: m.update(placeholders=[["weight", "v"]]),
        lambda m: m.update(placeholders=[["weight", ["w"]]]),
        lambda m: m.update(placeholders=["input"]),
        lambda m: m.update(written=[2]),
        lambda m: m["signature"].update(positional=["z"]),
        lambda m: m["signature"].update(positional=["x", "x"]),
        lambda m: m["signature"]["arguments"].update(z={"tensor": 0}),
        lambda m: m["signature"]["arguments"].update(x={"value": 1}),
        lambda m: m["signature"]["tensors"][0].update(shape=[2**50]),
        lambda m: m["weights"]["tensors"]["w"].update(dtype="x"),
        lambda m: m["weights"].update(tensors=[]),
    ],
)
def test_others_do_not(change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = copy.deepcopy(GOOD)
    change(manifest)
    with pytest.raises(PackageError, match="damaged|this machine has"):
        check_manifest(manifest)


def test_structures() -> None:
    seen: list[int] = []
    tree = {"dict": {"a": {"list": [{"tensor": 1}, {"name": "torch.float16"}]}, "b": {"tuple": [{"tensor": 0}]}}}
    check_tree(tree, 2, "it", seen)
    assert sorted(seen) == [0, 1] and named("cpu") == torch.device("cpu") and named("float16") is torch.float16
    for bad in ({"tensor": 2}, {"tensor": -1}, {"exec": 1}, {}, {"list": {}}, {"value": [1]}, {"name": "load"}, 3):
        with pytest.raises(PackageError):
            check_tree(bad, 2, "it")
