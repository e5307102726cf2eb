"""Results of gpu-check as files: what is read back, what counts as none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfcompile.codegen.toolchain import gpu_results
from sfcompile.codegen.toolchain.gpu_results import GpuResult, result_of, write_result

GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpu-check"


def test_the_newest_of_a_gpu_counts(folder: Path) -> None:
    assert result_of(GPU) is None
    for day, rate in (("2026-12-02", 2.0), ("2026-12-01", 1.0)):
        result = GpuResult(GPU, day, {64: {"fused": rate, "library": 3.0}}, {64: {"block_m": 128, "tails": "apart"}})
        assert write_result(result, folder).name == f"{day}-gpu-check-nvidia-h100-80gb-hbm3.json"
    found = result_of(GPU)
    assert found is not None and found.measured == "2026-12-02" and found.rates[64]["fused"] == 2.0
    assert found.tiles == {64: {"block_m": 128, "tails": "apart"}}
    assert result_of("NVIDIA A100") is None


DAMAGED = ["", "[]", '{"format": 0}', '{"format": 1, "gpu": "x", "measured": "y"}', '{"format"', "[" * 100_000]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_counts_as_none(folder: Path, text: str) -> None:
    write_result(GpuResult(GPU, "2026-12-01"), folder).write_text(text, encoding="utf-8")
    assert result_of(GPU) is None


def whole(**changes: Any) -> str:
    """The text of a file, with some entries changed."""
    tile = {"block_m": 128, "block_n": 64, "warps": 8, "stages": 3, "tails": "apart"}
    raw = {"format": 1, "gpu": GPU, "measured": "2026-12-01", "rates": {"64": {"fused": 2.0}}, "tiles": {"64": tile}}
    return json.dumps(raw | changes)


FOREIGN: dict[str, dict[str, Any]] = {
    "a rate of 0": {"rates": {"64": {"fused": 0.0, "library": 1.0}}},
    "a rate that is no number": {"rates": {"64": {"fused": float("nan")}}},
    "a rate without end": {"rates": {"64": {"fused": float("inf")}}},
    "a way that nobody times": {"rates": {"64": {"unknown": 1.0}}},
    "a day that never was": {"measured": "yesterday"},
    "a tile of half a block": {"tiles": {"64": {"block_m": 100}}},
    "a tile without end": {"tiles": {"64": {"block_n": 1 << 20}}},
    "a tile of words": {"tiles": {"64": {"warps": "8"}}},
    "an entry that no kernel has": {"tiles": {"64": {"clusters": 2}}},
    "another last block": {"tiles": {"64": {"tails": "somewhere"}}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_gpu_check_never_wrote_counts_as_none(folder: Path, name: str) -> None:
    """A compile would end at it, or divide by it."""
    path = write_result(GpuResult(GPU, "2026-12-01"), folder)
    path.write_text(whole(), encoding="utf-8")
    assert result_of(GPU) is not None
    path.write_text(whole(**FOREIGN[name]), encoding="utf-8")
    assert result_of(GPU) is None


def test_committed_results_are_looked_for_in_a_checkout(folder: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    assert gpu_results.folders() == [folder, root / "benchmarks" / "results"]
