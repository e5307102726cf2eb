"""What gpu-check (benchmarks/gpu_check.py) found on a GPU, as a file that defaults are read from.

Files lie in the cache folder of the machine that was checked and, where this is a checkout, among the results that were
committed; of several for one GPU the newest counts. A file that cannot be read, or that holds what gpu-check never
wrote, counts as none.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfcompile.codegen.toolchain.loader import cache_folder

_FORMAT = 1
_WAYS = ("fused", "library")
_TAILS = ("apart", "inside", "none")
_FETCHES = ("threads", "tma")
_SIZES = {"block_m": (16, 256), "block_n": (16, 256), "warps": (1, 16), "stages": (1, 8)}
"""Entries of a tile that are numbers, and between which. All but stages are powers of two."""


@dataclass(frozen=True)
class GpuResult:
    """Figures of one GPU.

    Attributes:
        gpu: its name, as the driver says it.
        measured: the day, as YYYY-MM-DD.
        rates: FLOP/s of attention in bf16, by head size and by what computed it: "fused" (the generated kernel) or
            "library".
        tiles: the fastest tile that was tried, by head size: entries of KernelSpec.
    """

    gpu: str
    measured: str
    rates: Mapping[int, Mapping[str, float]] = field(default_factory=lambda: MappingProxyType({}))
    tiles: Mapping[int, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))


def folders() -> list[Path]:
    """Where results are looked for."""
    root = Path(__file__).resolve().parents[2]
    committed = root / "benchmarks" / "results"
    return [cache_folder() / "gpu-check", *([committed] if committed.is_dir() else [])]


def result_of(gpu: str) -> GpuResult | None:
    """The newest result for a GPU; None: it was never checked."""
    return max(_results(gpu), key=lambda result: result.measured, default=None)


def _results(gpu: str) -> Iterator[GpuResult]:
    for folder in folders():
        for path in sorted(folder.glob(f"*gpu-check-{slug(gpu)}.json")):
            result = _read(path)
            if result is not None and result.gpu == gpu:
                yield result


def _read(path: Path) -> GpuResult | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != _FORMAT:
            return None
        datetime.date.fromisoformat(raw["measured"])
        rates = {int(size): {str(k): float(v) for k, v in of.items()} for size, of in raw["rates"].items()}
        tiles = {int(size): dict(tile) for size, tile in raw["tiles"].items()}
        sound = all(name in _WAYS and 0.0 < rate < math.inf for of in rates.values() for name, rate in of.items())
        sound &= all(map(_is_tile, tiles.values()))
        return GpuResult(str(raw["gpu"]), raw["measured"], rates, tiles) if sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _is_tile(tile: Mapping[str, Any]) -> bool:
    """Whether a kernel may have such entries: what a compile would end at, or spill by, is no tile of gpu-check's."""
    for name, value in tile.items():
        if name in _SIZES:
            least, most = _SIZES[name]
            whole = type(value) is int and least <= value <= most
            if not whole or (name != "stages" and value & (value - 1)):
                return False
        elif value not in {"tails": _TAILS, "fetch": _FETCHES}.get(name, ()):
            return False
    return True


def write_result(result: GpuResult, folder: Path) -> Path:
    """Keep a result in a folder, whole or not at all; its path.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.measured}-gpu-check-{slug(result.gpu)}.json"
    raw = {
        "format": _FORMAT, "gpu": result.gpu, "measured": result.measured,
        "rates": {str(size): dict(of) for size, of in result.rates.items()},
        "tiles": {str(size): dict(tile) for size, tile in result.tiles.items()},
    }  # fmt: skip
    handle, new = tempfile.mkstemp(dir=folder, suffix=".new")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(raw, file, indent=1)
    os.replace(new, path)
    return path


def slug(gpu: str) -> str:
    """A GPU's name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
