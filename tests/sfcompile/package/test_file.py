"""The package file: members, hashes, places."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from sfcompile.errors import PackageError
from sfcompile.package.disk import file_hash
from sfcompile.package.file import MANIFEST, Package, PackageWriter
from sfcompile.package.tensors import ALIGN


def write(path: Path) -> Path:
    with PackageWriter(path) as out:
        out.add("a.bin", b"stored" * 100)
        out.add_json("b.json", {"x": [1, 2]})
        out.add("long/name/of/a.bin", bytes(range(256)))
        out.finish({"about": "nothing"})
    return path


def test_members_come_back_on_boundaries(tmp_path: Path) -> None:
    package = Package(write(tmp_path / "sub" / "p.sf"))
    assert package.manifest["about"] == "nothing" and package.names == ["a.bin", "b.json", "long/name/of/a.bin"]
    assert package.read("a.bin") == b"stored" * 100 and package.json("b.json") == {"x": [1, 2]}
    for name in ("a.bin", "long/name/of/a.bin"):
        start, size = package.place(name)
        assert start % ALIGN == 0 and package.memory[start : start + size] == package.read(name)


def test_equal_content_gives_equal_files(tmp_path: Path) -> None:
    assert file_hash(write(tmp_path / "a.sf").open("rb")) == file_hash(write(tmp_path / "b.sf").open("rb"))


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), PackageWriter(tmp_path / "p.sf") as out:
        out.add("a", b"x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PackageError, match="cannot be written"):
        PackageWriter(tmp_path / "file" / "p.sf")


def rewritten(path: Path, change: dict[str, bytes]) -> Path:
    """The package with some members replaced, added or (None) dropped, as an unzip and a zip would leave it."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()} | change
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            if data is not None:
                new.writestr(name, data)
    return path


def test_a_changed_member_is_found_when_it_is_read(tmp_path: Path) -> None:
    package = Package(rewritten(write(tmp_path / "p.sf"), {"a.bin": b"Stored" * 100}))
    assert package.json("b.json") == {"x": [1, 2]}
    for read in (package.read, package.place):
        with pytest.raises(PackageError, match="a.bin is not what was exported"):
            read("a.bin")
    with pytest.raises(PackageError, match="no member c"):
        package.read("c")


def test_added_members_and_other_manifests_are_found(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not those that the manifest lists: evil"):
        Package(rewritten(write(tmp_path / "p.sf"), {"evil": b""}))
    with pytest.raises(PackageError, match="its seal says"):
        Package(rewritten(write(tmp_path / "q.sf"), {MANIFEST: b"{}"}))
    with pytest.raises(PackageError, match="cannot be read"):
        Package(tmp_path / "nothing.sf")
