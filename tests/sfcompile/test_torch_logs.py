"""TORCH_LOGS knows our names, sets our level, and prints the artifacts that it names."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from helpers import captured
from models import build

from sfcompile import torch_logs
from sfcompile.lowering.rank_graph import run_passes
from sfcompile.options import Options
from sfcompile.runtime.program.topology import Topology
from sfcompile.torch_logs import ARTIFACTS, artifacts, follow_torch_logs, register

ROOT = Path(__file__).resolve().parents[2]

SAYS = """
import logging, sys
import torch
from sfcompile import torch_logs
named = {name for name in torch_logs.ARTIFACTS
         if (log := logging.getLogger("torch.streamfusion.__" + name)).isEnabledFor(10) and log.propagate}
log = logging.getLogger("sfcompile")
print(torch_logs.follow_torch_logs(log, 0), log.level, *sorted(named))
log.debug("a sentence of ours")
with torch_logs.artifacts(torch_logs.Options(), 0) as asked:
    if asked.dump:
        (asked.dump / "graph-1" / "kernels").mkdir(parents=True)
        (asked.dump / "graph-1" / "schedules.txt").write_text("a schedule")
        (asked.dump / "graph-1" / "kernels" / "attend.py").write_text("a kernel")
"""


def says(folder: Path, setting: str) -> tuple[str, str]:
    """What a program prints under TORCH_LOGS where we are installed as pyproject.toml says: stdout, stderr."""
    installed = folder / "site" / "sfcompile_logs-1.dist-info"
    installed.mkdir(parents=True)
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch.backends"]
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: sfcompile-logs\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[torch.backends]\nstreamfusion = {target['streamfusion']}\n")
    environment = {"PYTHONPATH": f"{folder / 'site'}:{ROOT}", "TORCH_LOGS": setting, "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", SAYS], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_torch_learns_the_names_while_it_is_imported(tmp_path: Path) -> None:
    out, err = says(tmp_path, "+streamfusion,streamfusion_schedules")
    assert out.split() == ["True", "10", "streamfusion_schedules"]
    assert "V" in err and "] a sentence of ours" in err
    assert err.count("a schedule") == 1 and "[__streamfusion_schedules]" in err and "a kernel" not in err


def test_the_name_of_the_module_needs_nobody_who_registers_it(tmp_path: Path) -> None:
    """As torch 2.11 and 2.12 have it: they read TORCH_LOGS before they call an entry point."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "TORCH_LOGS": "+sfcompile",
        "PATH": "",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    code = SAYS + "print(torch_logs.follow_torch_logs(log, 1), log.level)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "10", "True", "40"]
    assert done.stderr.count("] a sentence of ours") == 1


def test_registering_can_be_repeated_and_never_stops_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    text = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch.backends"]
    entry = EntryPoint("streamfusion", text["streamfusion"], "torch.backends")
    assert entry.load() is register
    register()
    register()
    monkeypatch.setitem(sys.modules, "torch._logging", None)
    with pytest.warns(UserWarning, match="could not register its names for TORCH_LOGS"):
        register()


class Kept(logging.Handler):
    """Keeps what is logged: (logger, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.name.rpartition("__")[2], record.getMessage()))


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Torch's logger of ours, as TORCH_LOGS=streamfusion_schedules,streamfusion_graphs would leave it."""
    handler, parent = Kept(), logging.getLogger("torch.streamfusion")
    loggers = [logging.getLogger(f"torch.streamfusion.__{name}") for name in ARTIFACTS]
    before = [(log, log.level, log.propagate) for log in (parent, *loggers)]
    handlers = list(parent.handlers)
    parent.handlers[:] = [handler]
    for name, log in zip(ARTIFACTS, loggers, strict=True):
        on = name in ("streamfusion_schedules", "streamfusion_graphs")
        log.setLevel(logging.DEBUG if on else logging.NOTSET)
        log.propagate = on
    yield handler
    parent.handlers[:] = handlers
    for log, level, propagate in before:
        log.setLevel(level)
        log.propagate = propagate


def test_artifacts_are_what_a_dump_holds(kept: Kept, tmp_path: Path) -> None:
    model, inputs = build("joint")
    with torch.no_grad():
        got = captured(model, *inputs)
    options = Options.from_dict({"placement": "shard", "schedule": "ring"})
    with artifacts(options, 0) as asked:
        run_passes(got, Topology.grid(1, 4), 0, asked, lambda plan: plan(), split_batch=False, dump=True)
    assert asked.dump is not None and not asked.dump.exists()
    texts = {name: [text for said, text in kept.said if said == name] for name in ARTIFACTS}
    assert len(texts["streamfusion_schedules"]) == 1 and "attend" in texts["streamfusion_schedules"][0]
    assert any(text.startswith("00_captured.txt") for text in texts["streamfusion_graphs"])
    assert not any("<html" in text for text in texts["streamfusion_graphs"])
    assert any("rewrite_local" in text.splitlines()[0] for text in texts["streamfusion_graphs"])
    assert texts["streamfusion_plan"] == texts["streamfusion_kernels"] == []


def test_other_ranks_are_silent_and_a_dump_is_pointed_at(kept: Kept, tmp_path: Path) -> None:
    with artifacts(Options(), 1) as asked:
        assert asked == Options() and asked.dump is None
    assert kept.said == []
    with artifacts(Options(dump=tmp_path), 0) as asked:
        assert asked.dump == tmp_path
    assert {text for _, text in kept.said} == {f"written to {tmp_path}"}


def test_what_was_known_when_a_pass_failed_is_said(kept: Kept) -> None:
    with pytest.raises(ZeroDivisionError), artifacts(Options(), 0) as asked:
        assert asked.dump is not None
        (asked.dump / "graph-1").mkdir()
        (asked.dump / "graph-1" / "00_captured.txt").write_text("a graph")
        raise ZeroDivisionError
    assert kept.said == [("streamfusion_graphs", "00_captured.txt\na graph")]


def test_the_level_is_torchs_on_rank_0_and_errors_elsewhere(kept: Kept) -> None:
    log, parent = logging.Logger("ours"), logging.getLogger("torch.streamfusion")
    assert not follow_torch_logs(log, 0) and not log.handlers  # nobody named the log itself
    parent.setLevel(logging.DEBUG)
    for rank, level in ((0, logging.DEBUG), (1, logging.ERROR)):
        assert follow_torch_logs(log, rank) and log.level == level and kept in log.handlers
    assert torch_logs.LOG == "streamfusion"


@pytest.mark.parametrize(("asked", "level"), [("verbose", "INFO"), ("", "INFO"), ("warning", "WARNING")])
def test_a_level_that_is_none_is_no_error(monkeypatch: pytest.MonkeyPatch, asked: str, level: str) -> None:
    monkeypatch.setenv("SFCOMPILE_LOG", asked)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(torch_logs._log, "handlers", [])
    monkeypatch.setattr(torch_logs._log, "level", torch_logs._log.level)
    torch_logs.speak(0)
    assert logging.getLevelName(torch_logs._log.level) == level
