"""Files of what was measured: found by the same machines only, never trusted when old, strange or half written."""

from __future__ import annotations

import datetime
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sfcompile.measuring import cache
from sfcompile.measuring.quick import Quick
from sfcompile.runtime.program.topology import Topology

FOUND = Quick({"flops_per_s": 1.0 / 3.0 * 1e11, "network_bytes_per_s": 1.23456789e7}, 0.04, 0.41)
NOW = datetime.datetime(2026, 11, 28, 12, tzinfo=datetime.UTC)
IDENTITY = {"host": "a", "processor": "x", "device": "cpu", "cores": 2, "threads": 1, "interface": "", "job_ranks": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path))
    return tmp_path


def setting(
    ranks: int = 2, transport: str = "auto", dtype: torch.dtype = torch.float32, **changed: Any
) -> dict[str, Any]:
    topology = Topology.grid(2, ranks // 2)
    return cache.setting_of(topology, [IDENTITY, *[IDENTITY | changed] * (ranks - 1)], transport, dtype)


def test_what_was_written_is_read_to_the_last_bit() -> None:
    assert cache.read(setting()) is None
    assert cache.write(setting(), FOUND, NOW) == ""
    kept = cache.read(setting(), NOW + datetime.timedelta(days=29))
    assert kept == cache.Kept(FOUND, "2026-11-28")


@pytest.mark.parametrize(
    "other",
    [
        setting(4), setting(transport="c10d"), setting(dtype=torch.bfloat16), setting(host="b"),
        setting(processor="y"), setting(cores=4), setting(threads=2), setting(interface="eth1"), setting(job_ranks=4),
    ],
)  # fmt: skip
def test_other_machines_measure_for_themselves(other: dict[str, Any]) -> None:
    cache.write(setting(), FOUND)
    assert cache.read(setting()) is not None and cache.read(other) is None


@pytest.mark.parametrize("days", [-2, 31, 400])
def test_old_files_and_those_from_the_future_do_not_count(days: int) -> None:
    cache.write(setting(), FOUND, NOW)
    assert cache.read(setting(), NOW + datetime.timedelta(days=days)) is None


def test_what_an_earlier_version_measured_is_measured_anew() -> None:
    """Its compute rate was the slowest rank's, not the median's: the same names, other numbers."""
    cache.write(setting(), FOUND)
    path = cache.place(setting())
    raw = json.loads(path.read_text())
    assert raw["format"] == 2
    path.write_text(json.dumps(raw | {"format": 1}))
    assert cache.read(setting()) is None
    assert cache.write(setting(), FOUND) == "" and cache.read(setting()) is not None


DAMAGE: dict[str, Any] = {
    "format": 3,
    "measured": "yesterday",
    "setting": {},
    "constants": {"flops_per_s": -1.0},
    "spread": "much",
    "seconds": None,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_strange_values_do_not_count(name: str) -> None:
    cache.write(setting(), FOUND)
    path = cache.place(setting())
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {name: DAMAGE[name]}))
    assert cache.read(setting()) is None
    del raw[name]
    path.write_text(json.dumps(raw))
    assert cache.read(setting()) is None


@pytest.mark.parametrize(
    "constants", [{}, {"speed": 1.0}, {"flops_per_s": float("inf")}, {"flops_per_s": "fast"}, [1.0]]
)
def test_strange_constants_do_not_count(constants: Any) -> None:
    cache.write(setting(), FOUND)
    path = cache.place(setting())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"constants": constants}))
    assert cache.read(setting()) is None


def test_half_a_file_does_not_count() -> None:
    cache.write(setting(), FOUND)
    path = cache.place(setting())
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert cache.read(setting()) is None
    path.write_bytes(b"\xff\xfe\x00" + whole)
    assert cache.read(setting()) is None


def test_jobs_that_write_at_once_leave_one_whole_file() -> None:
    failed: list[str] = []

    def job(number: int) -> None:
        for _ in range(50):
            failed.append(cache.write(setting(), Quick({"flops_per_s": float(number)}, None, 0.1)))
            kept = cache.read(setting())
            if kept is None or kept.quick.constants["flops_per_s"] not in (1.0, 2.0):
                failed.append(f"read {kept}")

    jobs = [threading.Thread(target=job, args=(number,)) for number in (1, 2)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    assert not any(failed)
    assert [path.name for path in cache.place(setting()).parent.iterdir()] == [cache.place(setting()).name]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path / "file"))
    assert "file" in cache.write(setting(), FOUND)
    assert cache.read(setting()) is None


def test_a_place_that_is_a_folder_is_no_error() -> None:
    cache.place(setting()).mkdir(parents=True)
    assert cache.write(setting(), FOUND) != "" and cache.read(setting()) is None
    assert [path.name for path in cache.place(setting()).parent.iterdir()] == [cache.place(setting()).name]


def test_identities_say_what_changes_the_numbers() -> None:
    identity = cache.own_identity(torch.device("cpu"))
    assert set(identity) == set(IDENTITY) and identity["device"] == "cpu" and identity["processor"]
    assert json.loads(json.dumps(identity)) == identity
