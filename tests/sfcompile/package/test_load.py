"""Packages on rank threads: exact, and refused on every rank when anything is wrong. Processes: tests/e2e."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from threads import run_threads
from torch import nn

from sfcompile.errors import InputError, OptionError, PackageError, RankMismatchError
from sfcompile.package.export import export
from sfcompile.package.file import MANIFEST, SEAL, Package, to_json
from sfcompile.package.load import LoadedModel, load

RANKS = 4
Members = dict[str, bytes]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, inputs = build("joint")
    folder = tmp_path_factory.mktemp("package")
    return export(model, inputs, None, folder / "joint.sf", topology="1x4", placement="shard", inner="eager",
                  mesh={"ulysses": 2, "ring": 2})  # fmt: skip


def results(path: Path, *args: Any, ranks: int = RANKS, **options: Any) -> list[Any]:
    def work(rank: int) -> Any:
        model = load(path, **options)
        first = model(*args)
        return first, model(*args), model

    return run_threads(ranks, work)


@pytest.mark.parametrize("name", ["self", "joint", "cross"])
def test_every_rank_has_the_whole_result_twice_the_same(tmp_path: Path, name: str) -> None:
    model, inputs = build(name)
    path = export(model, inputs, None, tmp_path / "p.sf", topology="1x3", placement="shard", inner="eager")
    with torch.no_grad():
        want = model(*inputs)
    for first, second, loaded in results(path, *inputs, ranks=3):
        torch.testing.assert_close(first, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(first, second) and "3 ranks" in repr(loaded) and "heap" in loaded.plan


def test_other_strides_and_names_give_the_same_bits(package: Path) -> None:
    _, (image, text, keep) = build("joint")
    turned = image.transpose(0, 1).contiguous().transpose(0, 1)
    assert turned.stride() != image.stride()

    def work(rank: int) -> Any:
        model = load(package)
        return model(image, text, keep), model(text=text, keep=keep, image=turned)

    for a, b in run_threads(RANKS, work):
        assert torch.equal(a, b)


class Writes(nn.Module):
    """Counts its calls in a buffer, writes to an input, and returns its weights' sum, not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(1))
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)

    def forward(self, x: torch.Tensor, log: torch.Tensor) -> Any:
        self.calls.add_(1)
        log.copy_(x * 2)
        return {"out": x + self.calls, "weights": self.turned.t().contiguous().view(-1) + 0, "same": x}


def test_one_rank_and_written_inputs(tmp_path: Path) -> None:
    x, log = torch.ones(3), torch.zeros(3)
    path = export(Writes(), (x, log), {}, tmp_path / "p.sf", topology="1x1", inner="eager")
    model = load(path)
    for step in (1, 2):
        out = model(x * step, log)
        assert out["out"].tolist() == [step + step] * 3 and log.tolist() == [2.0 * step] * 3
        assert out["weights"].tolist() == [0, 1, 2, 3, 4, 5]
        assert out["same"].tolist() == [step] * 3
    with pytest.raises(InputError, match=r"x must be float32\[3\], got float32\[4\]"):
        model(torch.ones(4), log)


class Tiny(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x) + 1


def test_inductor_runs_a_loaded_graph(tmp_path: Path) -> None:
    x = torch.randn(1, 2, 8, 8)
    model = load(export(Tiny(), (x,), {}, tmp_path / "p.sf", topology="1x1", inner="inductor"))
    torch.testing.assert_close(model(x), Tiny()(x))


@pytest.mark.thorough  # AOTInductor compiles for half a minute
def test_compiled_objects_run_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 8, 8)
    path = export(Tiny(), (x,), {}, tmp_path / "p.sf", topology="1x1", inner="aoti")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(PackageError, match="native code.*If you trust its maker"):
        load(path)
    torch.testing.assert_close(load(path, inner="auto")(x), Tiny()(x))
    model = load(path, inner="aoti")
    torch.testing.assert_close(model(x), Tiny()(x))

    def other_processor(manifest: dict[str, Any], members: Members) -> None:
        manifest["native"] = "vax, DEFAULT"

    with pytest.raises(PackageError, match="compiled for vax, DEFAULT"):
        load(resealed(path, tmp_path / "q.sf", other_processor), inner="aoti")


def test_wrong_inputs_are_an_error_and_the_next_call_works(package: Path) -> None:
    _, (image, text, keep) = build("joint")

    def work(rank: int) -> Any:
        model = load(package)
        with pytest.raises(InputError, match=r"image must be float32\[2, 22, 16\], got float32\[2, 23, 16\]"):
            model(torch.zeros(2, 23, 16), text, keep)
        return model(image, text, keep)

    assert len(run_threads(RANKS, work)) == RANKS


def test_ranks_and_options_that_do_not_fit(package: Path) -> None:
    with pytest.raises(PackageError, match=r"is for 4 ranks, and 1 run.*sfcompile run --ranks 4"):
        load(package)
    with pytest.raises(PackageError, match="is for 4 ranks, and 3 run"):
        run_threads(3, lambda rank: load(package))
    with pytest.raises(OptionError, match="Bad value for inner"):
        load(package, inner="fast")
    with pytest.raises(OptionError, match="Bad value for inner"):
        load(package, options={"inner": "fast"})
    with pytest.raises(OptionError, match="load takes no option 'schedule'"):
        load(package, options={"schedule": "ring"})
    with pytest.raises(PackageError, match="holds no compiled objects"):
        run_threads(RANKS, lambda rank: load(package, inner="aoti"))


def test_ranks_that_load_different_packages_are_told(package: Path, tmp_path: Path) -> None:
    def other_model(manifest: dict[str, Any], members: Members) -> None:
        manifest["model"] = "Other"

    other = resealed(package, tmp_path / "other.sf", other_model)
    with pytest.raises(RankMismatchError, match="something else"):
        run_threads(RANKS, lambda rank: load(other if rank == 2 else package))


def test_weights_that_moved_and_weights_of_another_model(tmp_path: Path) -> None:
    model, inputs = build("cross")
    path = export(model, inputs, {}, tmp_path / "p.sf", topology="1x1", inner="eager", weights=tmp_path / "w")
    moved = (tmp_path / "w").rename(tmp_path / "moved")
    with pytest.raises(PackageError, match="cannot be read"):
        load(path)
    with torch.no_grad():
        torch.testing.assert_close(load(path, weights=moved)(*inputs), model(*inputs))
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    with pytest.raises(PackageError, match="its hash differs"):
        load(path, weights=moved)
    assert isinstance(load(path, weights=moved, verify=False), LoadedModel)


# ---------------------------------------------------------------------- damage


def resealed(path: Path, target: Path, change: Callable[[dict[str, Any], Members], None]) -> Path:
    """A package changed by somebody who also mends every hash."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    manifest = json.loads(members.pop(MANIFEST))
    members.pop(SEAL)
    change(manifest, members)
    for name, data in members.items():
        manifest["members"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    text = to_json(manifest)
    with zipfile.ZipFile(target, "w") as new:
        for name, data in (members | {MANIFEST: text, SEAL: hashlib.sha256(text).hexdigest().encode()}).items():
            new.writestr(name, data)
    return target


def bytes_changed(change: Callable[[bytes, Package], bytes]) -> Callable[[Path, Path], None]:
    return lambda source, target: target.write_bytes(change(source.read_bytes(), Package(source))) and None


def flipped(member: str, at: float) -> Callable[[Path, Path], None]:
    """One bit of a member's stored bytes."""

    def change(data: bytes, package: Package) -> bytes:
        info = zipfile.ZipFile(package.path).getinfo(member)
        skip = 30 + int.from_bytes(data[info.header_offset + 26 :][:2], "little")
        skip += int.from_bytes(data[info.header_offset + 28 :][:2], "little")
        place = info.header_offset + skip + int(at * (info.compress_size - 1))
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    return bytes_changed(change)


def sealed(change: Callable[[dict[str, Any], Members], Any]) -> Callable[[Path, Path], None]:
    def run(source: Path, target: Path) -> None:
        resealed(source, target, lambda manifest, members: change(manifest, members) and None)

    return run


def edited(name: str, old: str, new: str) -> Callable[[dict[str, Any], Members], None]:
    def change(manifest: dict[str, Any], members: Members) -> None:
        assert old.encode() in members[name], members[name][:2000]
        members[name] = members[name].replace(old.encode(), new.encode())

    return change


DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "empty": bytes_changed(lambda data, _: b""),
    "not a zip": bytes_changed(lambda data, _: b"weights" * 999),
    "cut to half": bytes_changed(lambda data, _: data[: len(data) // 2]),
    "last byte gone": bytes_changed(lambda data, _: data[:-1]),
    "first kilobyte gone": bytes_changed(lambda data, _: data[1024:]),
    "a weight flipped": flipped("weights.safetensors", 0.9),
    "weights' header flipped": flipped("weights.safetensors", 0.01),
    "a graph flipped": flipped("graphs/0.json", 0.5),
    "constants flipped": flipped("constants.safetensors", 0.1),
    "schedules flipped": flipped("schedules.json", 0.5),
    "plan flipped": flipped("plan.txt", 0.5),
    "manifest flipped": flipped(MANIFEST, 0.5),
    "seal flipped": flipped(SEAL, 0.5),
    "member added": sealed(lambda manifest, members: manifest["members"].update(evil={"sha256": "", "bytes": 0})),
    "graph missing": sealed(
        lambda manifest, members: [part.pop("graphs/0.json") for part in (members, manifest["members"])]
    ),
    "no weights": sealed(
        lambda manifest, members: [part.pop("weights.safetensors") for part in (members, manifest["members"])]
    ),
    "other format": sealed(lambda manifest, members: manifest.update(format=2)),
    "other version": sealed(lambda manifest, members: manifest["versions"].update(sfcompile="0.0.1")),
    "other torch": sealed(lambda manifest, members: manifest["versions"].update(torch="2.3.0")),
    "other ranks": sealed(lambda manifest, members: manifest.update(ranks=8)),
    "graph of nobody": sealed(lambda manifest, members: manifest.update(graphs=[0, 9, 9, 9])),
    "no signature": sealed(lambda manifest, members: manifest.pop("signature")),
    "unknown program": sealed(lambda manifest, members: manifest.update(programs=[["x"]] * 4)),
    "mesh of other ranks": sealed(edited("schedules.json", '"ring":2', '"ring":4')),
    "site of other heads": sealed(edited("schedules.json", '"heads":4', '"heads":1')),
    "calls another function": sealed(edited("graphs/0.json", "aten.linear.default", "builtins.eval")),
    "graph without a node": sealed(edited("graphs/0.json", '["call","linear_default"', '["call","lineal_default"')),
    "weight renamed": sealed(edited("weights.safetensors", "image.weight", "imagf.weight")),
    "weight of another shape": sealed(edited("weights.safetensors", '"shape":[48,16]', '"shape":[16,48]')),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_package_is_refused_on_every_rank(package: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "broken.sf"
    DAMAGE[name](package, broken)

    def work(rank: int) -> str:
        with pytest.raises(PackageError) as caught:
            load(broken)
        return str(caught.value)

    texts = run_threads(RANKS, work)
    assert len(texts) == RANKS and all("broken.sf" in text or "package" in text for text in texts), texts


def test_damage_on_one_rank_is_an_error_on_every_rank_and_the_session_goes_on(package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.sf"
    DAMAGE["a weight flipped"](package, broken)
    _, inputs = build("joint")

    def work(rank: int) -> Any:
        with pytest.raises(PackageError, match="weights.safetensors is not what was exported"):
            load(broken if rank == 1 else package)
        return load(package)(*inputs)

    first, *others = run_threads(RANKS, work)
    assert all(torch.equal(first, other) for other in others)


def test_loading_opens_no_pickle(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle was opened")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    _, inputs = build("joint")
    assert len(results(package, *inputs)) == RANKS
