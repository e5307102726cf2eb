"""Results of gpu-check as files: what is read back, what counts as none."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}', '{"format": 1, "gpu": "x", "measured": "y"}', '{"format"'])
def test_a_damaged_file_counts_as_none(folder: Path, text: str) -> None:
    write_result(GpuResult(GPU, "2026-12-01"), folder).write_text(text, encoding="utf-8")
    assert result_of(GPU) is None


def test_committed_results_are_looked_for_in_a_checkout(folder: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    assert gpu_results.folders() == [folder, root / "benchmarks" / "results"]
