"""What Inductor finds out at a start is taken from the disk where no file that decides it has changed, only there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfcompile.lowering import kept_start
from sfcompile.lowering.kept_plans import VARIABLE, write_kept
from sfcompile.torch_start import StartFacts

FACTS = StartFacts({"avx2": {"_is_fast": True}}, "ab" * 32, None)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StartFacts]]:
    """What Inductor is told; it knows FACTS, and the library is a folder of the test's."""
    (tmp_path / "library" / "inner").mkdir(parents=True)
    (tmp_path / "library" / "inner" / "a.py").write_text("x = 1\n")
    heard: list[StartFacts] = []
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(kept_start, "_LIBRARIES", ("library", "not_installed_anywhere"))
    monkeypatch.setattr(kept_start, "decides_start", lambda: ("g++ 12", ["avx2"]))
    monkeypatch.setattr(kept_start, "known_at_start", lambda: FACTS)
    monkeypatch.setattr(kept_start, "know_at_start", heard.append)
    monkeypatch.setattr(kept_start, "try_first_only", lambda: None)
    kept_start._decided_by.cache_clear()
    yield heard
    kept_start._decided_by.cache_clear()


def taken(folder: Path, told: list[StartFacts]) -> bool:
    """Whether a process that starts now takes anything."""
    told.clear()
    kept_start._decided_by.cache_clear()
    kept_start.take_start(folder)
    return bool(told)


def test_what_one_process_found_out_the_next_one_takes(tmp_path: Path, told: list[StartFacts]) -> None:
    folder = tmp_path / "plans"
    assert not taken(folder, told)
    kept_start.keep_start(folder)
    assert taken(folder, told) and told == [FACTS]
    (file,) = folder.iterdir()
    before = file.stat().st_ino
    kept_start.keep_start(folder)
    assert file.stat().st_ino == before, "it is written once"
    file.write_text("damaged")
    assert not taken(folder, told)
    kept_start.keep_start(folder)
    assert taken(folder, told) and told == [FACTS]


@pytest.mark.parametrize(
    "change", ["text", "text, time set back", "new file", "gone", "copied", "compiler", "variable"]
)
def test_any_change_of_what_decides_it_is_a_miss(
    change: str, tmp_path: Path, told: list[StartFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "plans", tmp_path / "library" / "inner" / "a.py"
    kept_start.keep_start(folder)
    assert taken(folder, told)
    match change:
        case "text":
            file.write_text("x = 2\n")
        case "text, time set back":
            times = file.stat().st_atime_ns, file.stat().st_mtime_ns
            file.write_text("x = 2\n")
            os.utime(file, ns=times)
        case "new file":
            file.with_name("b.py").write_text("")
        case "gone":
            file.unlink()
        case "copied":
            other = file.with_name("c.py")
            other.write_text("x = 1\n")
            os.replace(other, file)
        case "compiler":
            monkeypatch.setattr(kept_start, "decides_start", lambda: ("g++ 13", ["avx2"]))
        case "variable":
            monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    assert not taken(folder, told)


@pytest.mark.parametrize("why", ["a link", "told by hand", "switched off", "nothing known"])
def test_where_it_cannot_be_told_nothing_is_kept(
    why: str, tmp_path: Path, told: list[StartFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plans"
    match why:
        case "a link":
            (tmp_path / "library" / "other").symlink_to(tmp_path, target_is_directory=True)
        case "told by hand":
            monkeypatch.setattr(kept_start, "decides_start", lambda: None)
        case "switched off":
            monkeypatch.setenv(VARIABLE, "off")
        case "nothing known":
            monkeypatch.setattr(kept_start, "known_at_start", lambda: None)
    kept_start.keep_start(folder)
    assert not folder.exists()
    assert not taken(folder, told)


@pytest.mark.parametrize(
    "damage",
    [
        {"vector_isas": {"avx2": {}}, "torch_key": "no digits", "triton_key": None},
        {"vector_isas": {"avx2": {"a": []}}, "torch_key": "ab", "triton_key": None},
        {"vector_isas": {"avx2": {}}, "torch_key": "ab", "triton_key": 3},
        {"vector_isas": {"avx2": {}}, "torch_key": "ab"},
        {"vector_isas": ["avx2"], "torch_key": "ab", "triton_key": None},
        ["avx2"],
    ],
)
def test_a_text_of_another_kind_is_none(damage: object, tmp_path: Path, told: list[StartFacts]) -> None:
    folder = tmp_path / "plans"
    path = kept_start._place(folder)
    assert path is not None
    write_kept(path, lambda: json.dumps(damage))
    assert not taken(folder, told)
