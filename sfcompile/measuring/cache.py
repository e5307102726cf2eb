"""What was measured of a set of machines, kept in a file between jobs.

A file holds what it was measured of beside the constants: it counts for a job only if all of that is the same. Files
are written whole, under another name, and then renamed: two jobs that write at once leave the file of one of them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sfcompile.codegen.toolchain.loader import cache_folder
from sfcompile.errors import TopologyError
from sfcompile.measuring.quick import Quick
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.wires.tcp_links import own_interface
from sfcompile.version import __version__

MAX_AGE = datetime.timedelta(days=30)
_FORMAT = 2
"""Of files, and of what their numbers mean: raise it when either changes, so that what was measured before is measured
anew. 1: the compute rate was the slowest rank's; since 2 it is the median rank's."""


@dataclass(frozen=True)
class Kept:
    """Something measured, and when: a date for people, in UTC."""

    quick: Quick
    date: str


def own_identity(device: torch.device) -> dict[str, Any]:
    """What this rank runs on, as far as it changes what is measured: the network by which other machines reach it, too,
    and how large the job is, of which other groups of ranks may measure beside this one."""
    return {
        "host": socket.gethostname(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "interface": own_interface(),
        "job_ranks": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def setting_of(
    topology: Topology, identities: Sequence[dict[str, Any]], transport: str, dtype: torch.dtype
) -> dict[str, Any]:
    """All that two jobs must have in common to share what was measured: plain values, as JSON gives them back."""
    return {
        "machine_of": list(topology.machine_of),
        "ranks": [dict(identity) for identity in identities],
        "transport": transport,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"sfcompile": __version__, "torch": str(torch.__version__)},
    }


def place(setting: dict[str, Any]) -> Path:
    """The file of a setting."""
    digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "links" / f"{digest[:24]}.json"


def read(setting: dict[str, Any], now: datetime.datetime | None = None) -> Kept | None:
    """What was measured of a setting; None if there is no file, or one that is damaged, older than MAX_AGE or from the
    future."""
    now = now or datetime.datetime.now(datetime.UTC)
    try:
        raw = json.loads(place(setting).read_text(encoding="utf-8"))
        if raw["format"] != _FORMAT or raw["setting"] != setting:
            return None
        measured = datetime.datetime.fromisoformat(raw["measured"])
        if not -datetime.timedelta(days=1) < now - measured < MAX_AGE:
            return None
        constants = Topology.constants(raw["constants"], str(place(setting)))
        if not constants or not all(value is not None and value < float("inf") for value in constants.values()):
            return None
        spread = None if raw["spread"] is None else float(raw["spread"])
        return Kept(Quick(constants, spread, float(raw["seconds"])), measured.date().isoformat())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, TopologyError):
        return None


def today() -> str:
    """The date of what is measured now."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def write(setting: dict[str, Any], quick: Quick, now: datetime.datetime | None = None) -> str:
    """Keep what was measured: why it could not be written, or ""."""
    now = now or datetime.datetime.now(datetime.UTC)
    raw = {
        "format": _FORMAT, "measured": now.isoformat(), "setting": setting, "constants": quick.constants,
        "spread": quick.spread, "seconds": quick.seconds,
    }  # fmt: skip
    path, new = place(setting), ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".new")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(raw, file, indent=1)
        os.replace(new, path)
    except OSError as error:
        if new:
            with suppress(OSError):
                os.unlink(new)
        return str(error)
    return ""
