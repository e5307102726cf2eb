"""Graphs against their schedules: what does not fit is refused before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from structures import STRUCTURES
from torch import nn

from sfcompile.errors import PackageError
from sfcompile.package.calls import CallList, OperatorCall, Ref
from sfcompile.package.export import export
from sfcompile.package.file import Package
from sfcompile.package.fit import check_fit
from sfcompile.package.graph import graph_from_json
from sfcompile.package.schedules import schedule_from_json
from sfcompile.package.tensors import read_tensors

X = {"shape": [2, 3], "stride": [3, 1], "dtype": "float32"}
ATEN = torch.ops.aten


def parts(path: Path, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """A rank's graph as JSON, its constants and its programs."""
    package = Package(path)
    number, data = package.manifest["graphs"][rank], package.json("schedules.json")
    held = read_tensors(package.memory, *package.place("constants.safetensors"), "constants")
    constants = {name.split("/", 1)[1]: value for name, value in held.items() if name.startswith(f"{number}/")}
    programs = {
        name: [
            schedule_from_json(data["schedules"][site], package.manifest["ranks"]) for site in data["programs"][name]
        ]
        for name in package.manifest["programs"][rank]
    }
    return package.json(f"graphs/{number}.json"), constants, programs


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, inputs = build("joint")
    return export(model, inputs, None, tmp_path_factory.mktemp("fit") / "p.sf", topology="1x3", placement="shard")


def fit(data: dict[str, Any], constants: dict[str, torch.Tensor], programs: dict[str, Any], rank: int = 0) -> list[str]:
    return check_fit(graph_from_json(data, constants), data["inputs"], programs, rank)[1]


def test_all_ranks_fit_in_one_order(joint: Path) -> None:
    first, *others = (fit(*parts(joint, rank), rank) for rank in range(3))
    assert others == [first, first] and {line.split()[0] for line in first} == {
        "put_q", "put_k", "put_v", "attend", "collect", "exchange_start", "exchange_finish"
    }  # fmt: skip


class Named(nn.Module):
    """A package names its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, a: Any, b: Any = None, c: Any = None) -> Any:
        return self.model(*(x for x in (a, b, c) if x is not None))


@pytest.mark.parametrize("name", sorted(STRUCTURES)[::7])
def test_structures_fit(tmp_path: Path, name: str) -> None:
    model, inputs = STRUCTURES[name]()
    path = export(Named(model), tuple(inputs), {}, tmp_path / "p.sf", topology="1x2", placement="shard")
    assert fit(*parts(path, 0)) == fit(*parts(path, 1), 1)


def calls_to(data: dict[str, Any], op: str) -> list[Any]:
    return [node for node in data["nodes"] if node[0] == "call" and node[2] == f"streamfusion.{op}.default"]


def dropped(op: str) -> Callable[[dict[str, Any]], None]:
    """Without a call: what took its ticket takes the one before."""

    def change(data: dict[str, Any]) -> None:
        node = calls_to(data, op)[0]
        data["nodes"].remove(node)
        ticket = (
            next(value for value in node[3] if isinstance(value, dict) and value != node[3][0])
            if op != "attend"
            else node[3][0]
        )
        for other in data["nodes"]:
            if other[0] == "call":
                other[3] = [ticket if value == {"node": node[1]} else value for value in other[3]]

    return change


def at(op: str, place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        calls_to(data, op)[0][3][place] = value

    return change


def copied(op: str, source: int, target: int) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        args = calls_to(data, op)[0][3]
        args[target] = args[source]

    return change


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another program": (at("put_q", 2, "nobody"), "site . of program 'nobody', which is not there"),
    "a site that is not there": (at("put_q", 3, 99), "site 99 of program"),
    "a negative site": (at("put_q", 3, -1), "site -1 of program"),
    "the other kind of site": (at("put_q", 3, 0), "does not come in the order|sends"),
    "a part where there is none": (lambda data: calls_to(data, "put_k")[0][3].append(1), "in the order of its site"),
    "a mask that is not planned": (at("attend", 1, None), "has no mask"),
    "another shape": (lambda data: calls_to(data, "collect")[0][3][3].__setitem__(0, 1), "is given as"),
    "a huge shape": (lambda data: calls_to(data, "collect")[0][3][3].__setitem__(0, 2**40), "is given as"),
    "another dtype": (at("collect", 4, {"dtype": "float64"}), "is given as"),
    "no put of q": (dropped("put_q"), "in the order of its site"),
    "no attend": (dropped("attend"), "in the order of its site"),
    "a tensor as the ticket": (copied("put_k", 0, 1), "does not take the ticket"),
    "a put of the ticket": (copied("put_k", 1, 0), "sends"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_communication_that_does_not_fit_is_refused(joint: Path, name: str) -> None:
    change, text = CHANGES[name]
    data, constants, programs = parts(joint, 0)
    data = copy.deepcopy(data)
    change(data)
    with pytest.raises(PackageError, match=text):
        fit(data, constants, programs)


def test_communication_that_no_output_needs_is_refused(joint: Path) -> None:
    data, constants, programs = parts(joint, 0)
    calls = graph_from_json(data, constants)
    calls.outputs = [Ref(0)]
    with pytest.raises(PackageError, match="no output needs it"):
        check_fit(calls, data["inputs"], programs, 0)


def one(target: Any, *args: Any, outputs: Any = None) -> CallList:
    return CallList(["x", "call"], 1, {}, [OperatorCall(1, "call", target, args, {})], outputs or [Ref(1)])


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        (one(ATEN.mm.default, Ref(0), Ref(0)), r"does not fit its operands(.|\n)*at node `call`"),
        (one(ATEN.zeros.default, [2**40, 2**10]), "this machine has"),
        (one(ATEN.repeat.default, Ref(0), [2**30, 2**30]), "this machine has|does not fit"),
        (one(ATEN.nonzero.default, Ref(0)), "does not fit its operands"),
        (one(ATEN.split.Tensor, Ref(0), 1), "no tensor"),
        (one(ATEN.relu.default, Ref(0), outputs=[3]), "no tensor"),
    ],
)
def test_calls_that_cannot_run_are_refused(calls: CallList, text: str) -> None:
    with pytest.raises(PackageError, match=text):
        check_fit(calls, [X], {}, 0)


def test_views_of_much_are_not_much() -> None:
    calls = one(ATEN.expand.default, Ref(0), [2**40, 2, 3])
    assert check_fit(calls, [X], {}, 0)[0] == [((2**40, 2, 3), torch.float32)]
