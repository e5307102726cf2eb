"""Exports: what is refused, weights inside and beside. The trace is in test_traced.py, loading in test_load.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from safetensors.torch import load_file, save_file
from small_attention import Small
from torch.nn import functional as F

from sfcompile.errors import InputError, OptionError, PackageError, UnsupportedError
from sfcompile.package.export import export
from sfcompile.package.file import Package
from sfcompile.runtime.program.topology import Topology

X = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))


def test_every_rank_is_in_the_package(tmp_path: Path) -> None:
    model, inputs = build("joint")
    path = export(model, inputs, None, tmp_path / "p.sf", topology="2x2:a100-efa", placement="shard")
    package = Package(path)
    manifest = package.manifest
    assert (manifest["ranks"], manifest["machine_of"]) == (4, [0, 0, 1, 1])
    assert len(manifest["graphs"]) == 4 and set(manifest["graphs"]) == set(range(len(set(manifest["graphs"]))))
    assert manifest["mesh"]["batch"] * manifest["mesh"]["ulysses"] * manifest["mesh"]["ring"] == 4
    assert Topology.parse(str(_written(tmp_path, manifest["topology"]))) == Topology.parse("2x2:a100-efa")
    assert set(manifest["weights"]["tensors"]) == set(dict(model.named_parameters()))
    assert "heap" in package.read("plan.txt").decode() and manifest["plan"]
    nodes = package.json("graphs/0.json")["nodes"]
    assert any(node[0] == "call" and node[2].startswith("streamfusion.") for node in nodes)


def test_options_are_a_dict_or_keywords(tmp_path: Path) -> None:
    first = export(Small(), (X,), {}, tmp_path / "a.sf", topology="1x2", placement="shard")
    second = export(Small(), args=(X,), path=tmp_path / "b.sf", topology="1x2", options={"placement": "shard"})
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(OptionError, match="placement is given twice"):
        export(Small(), (X,), {}, tmp_path / "c.sf", topology="1x2", placement="auto", options={"placement": "shard"})
    with pytest.raises(OptionError, match="not told where to write"):
        export(Small(), (X,), topology="1x2")


def _written(folder: Path, text: str) -> Path:
    path = folder / "topology.toml"
    path.write_text(text)
    return path


def test_an_export_is_repeatable(tmp_path: Path) -> None:
    model, inputs = build("cross")
    first, second = (export(model, inputs, {}, tmp_path / name, topology="1x3") for name in ("a.sf", "b.sf"))
    assert first.read_bytes() == second.read_bytes()


class Broken(Small):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.attend(x)
        torch._dynamo.graph_break()
        return y


class Stateful(Small):
    def forward(self, x: torch.Tensor) -> Any:
        self.last = self.attend(x)
        return x + 1


class ReturnsWeight(Small):
    def forward(self, x: torch.Tensor) -> Any:
        return self.attend(x), self.table


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Broken, "Broken does not trace as one graph"),
        (Stateful, "computes 1 tensors that are no part of its result"),
        (ReturnsWeight, "returns a tensor that its graph does not make"),
    ],
)
def test_what_a_package_cannot_hold_is_refused(tmp_path: Path, model: type[Small], text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        export(model(), (X,), {}, tmp_path / "p.sf", topology="1x2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((X, X), {}, InputError, "do not fit Small.forward"),
        (X, {}, OptionError, "args is a tensor"),
        ((X,), {"inner": "fast"}, OptionError, "got 'fast'"),
        ((X,), {"weights": "sharded"}, OptionError, "it names a safetensors file"),
        ((X,), {"topology": "auto"}, OptionError, "not 'auto'"),
        ((X,), {"meshh": 1}, OptionError, "Did you mean 'mesh'"),
        ((X,), {"mesh": {"ulysses": 3}}, Exception, "2 ranks run"),
    ],
)
def test_bad_arguments(tmp_path: Path, args: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        export(Small(), args, {}, tmp_path / "p.sf", **{"topology": "1x2", **options})


def test_a_model_on_another_device_is_refused(tmp_path: Path) -> None:
    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda", 0)

    with pytest.raises(UnsupportedError, match="its inputs are on cuda"):
        export(Small(), (X.as_subclass(Elsewhere),), {}, tmp_path / "p.sf", topology="1x2")


def test_weights_beside_are_written_once_and_compared_later(tmp_path: Path) -> None:
    model, beside = Small(), tmp_path / "weights" / "small.safetensors"
    path = export(model, (X,), {}, tmp_path / "p.sf", topology="1x2", weights=beside)
    assert Package(path).manifest["weights"]["file"] == "small.safetensors"  # never a folder: see load
    held = load_file(beside)
    assert torch.equal(held["table"], model.table) and "weights.safetensors" not in Package(path).names
    before = beside.read_bytes()
    export(model, (X,), {}, tmp_path / "q.sf", topology="1x4", weights=beside)
    assert beside.read_bytes() == before
    with torch.no_grad():
        model.table += 1
    with pytest.raises(PackageError, match=r"does not hold weight table.*other values"):
        export(model, (X,), {}, tmp_path / "r.sf", topology="1x4", weights=beside)


def test_a_model_on_meta_is_exported_with_a_checkpoint(tmp_path: Path) -> None:
    class Plain(Small):
        def forward(self, x: torch.Tensor) -> Any:
            return self.attend(x)

    checkpoint = tmp_path / "model.safetensors"
    save_file(Plain().state_dict(), checkpoint)
    with torch.device("meta"):
        model, x = Plain(), torch.empty(1, 8, 16)
    path = export(model, (x,), {}, tmp_path / "p.sf", topology="1x2", weights=checkpoint)
    assert Package(path).manifest["weights"]["file"] == "model.safetensors"
    for weights, text in (
        ("inside", "on the meta device"),
        (tmp_path / "no", "does not exist and 2 weights are on the"),
    ):
        with pytest.raises(PackageError, match=text):
            export(model, (x,), {}, tmp_path / "q.sf", topology="1x2", weights=weights)
    save_file({"qkv.weight": torch.zeros(48, 16)}, checkpoint)
    with pytest.raises(PackageError, match=r"weight qkv.bias.*nothing of that name"):
        export(model, (x,), {}, tmp_path / "q.sf", topology="1x2", weights=checkpoint)


def test_kernels_are_inside_when_attention_runs_as_kernels(tmp_path: Path) -> None:
    class Wide(Small):
        def forward(self, x: torch.Tensor) -> Any:
            q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v)

    path = export(Wide(), (torch.randn(1, 8, 96),), {}, tmp_path / "p.sf", topology="1x2", placement="shard",
                  attention="triton")  # fmt: skip
    package = Package(path)
    kernels = [name for name in package.names if name.startswith("kernels/")]
    assert {name.rsplit("-", 1)[1] for name in kernels if name.endswith(".py")} == {"sm80.py", "sm90.py", "sm100.py"}
    assert all(b"def attend(" in package.read(name) for name in kernels if name.endswith(".py"))
    for name in kernels:
        if name.endswith(".cubin"):
            assert package.read(name)[:4] == b"\x7fELF"
    assert json.dumps(package.manifest["attention"]) == '"triton"'
