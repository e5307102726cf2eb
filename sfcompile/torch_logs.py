"""``TORCH_LOGS="+streamfusion"``: what a compile says, asked for as users of torch ask, and in torch's format.

torch calls :func:`register` while it is imported (the entry point in pyproject.toml), just before it reads TORCH_LOGS:
a name that nobody registered by then is an error of torch's. (torch 2.11 and 2.12 read it before they call anybody:
there ``+sfcompile`` does what ``+streamfusion`` does, as names of modules need nobody.) So this file is loaded by every
program that imports torch where we are installed: it imports the standard library and our options only, and never
raises.

``+streamfusion`` and ``streamfusion`` set the level of what rank 0 says; the artifacts are texts of their own, each on
only when it is named.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sfcompile.options import Options

LOG = "streamfusion"
_log = logging.getLogger("sfcompile")
ARTIFACTS = {
    "streamfusion_plan": "The plan of every graph, with every candidate of the planner",
    "streamfusion_schedules": "Every schedule as text: puts, waits and attention calls of a rank",
    "streamfusion_graphs": "The graph after every pass, what the pass found, and how op counts changed",
    "streamfusion_kernels": "Sources of generated kernels",
}
# Below torch's own logger, which keeps what a program's logging.basicConfig() switches on away from it.
_QUALIFIED = f"torch.{LOG}"


def register() -> None:
    """Make our names known to TORCH_LOGS."""
    try:
        from torch._logging import _internal

        _internal.register_log(LOG, _QUALIFIED)
        for name, description in ARTIFACTS.items():
            _internal.register_artifact(name, description, visible=True, off_by_default=True)
            _internal.getArtifactLogger(_QUALIFIED, name)
    except Exception as error:  # it would make `import torch` fail, also for programs that want nothing of us
        warnings.warn(f"sfcompile could not register its names for TORCH_LOGS: {error}", stacklevel=2)


def follow_torch_logs(log: logging.Logger, rank: int) -> bool:
    """Give our logger the level and the handlers that TORCH_LOGS asks for; whether it asks. Only rank 0 speaks.

    Args:
        log: the logger of this package.
    """
    asked = logging.getLogger(_QUALIFIED)
    if asked.level == logging.NOTSET or not asked.handlers:
        asked = log  # TORCH_LOGS="+sfcompile", by the name of the module: every torch knows those
        if not any(type(handler.formatter).__name__ == "TorchLogsFormatter" for handler in log.handlers):
            return False
    log.handlers[:] = asked.handlers
    log.propagate = False
    log.setLevel(asked.level if rank == 0 else logging.ERROR)
    return True


def speak(rank: int) -> None:
    """Give our logger a voice: TORCH_LOGS', else the program's own, else rank 0's by SFCOMPILE_LOG (default info)."""
    if follow_torch_logs(_log, rank) or _log.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[streamfusion, rank {rank}] %(message)s"))
    _log.addHandler(handler)
    asked = os.environ.get("SFCOMPILE_LOG") or "info"
    level = logging.getLevelNamesMapping().get(asked.upper())
    _log.setLevel((level or logging.INFO) if rank == 0 else logging.ERROR)
    if level is None:
        _log.warning("SFCOMPILE_LOG=%s is no level of Python's logging; info is taken", asked)


@contextmanager
def artifacts(asked: Options, rank: int) -> Iterator[Options]:
    """Around the passes of a compile: the options to run them with. At the end rank 0 logs the artifacts asked for.

    They are what a dump holds. With ``dump`` set they stand there, and the log says where.
    """
    loggers = {name: logging.getLogger(f"{_QUALIFIED}.__{name}") for name in ARTIFACTS}
    wanted = {name: log for name, log in loggers.items() if log.isEnabledFor(logging.DEBUG) and log.propagate}
    if rank != 0 or not wanted:
        yield asked
        return
    if asked.dump is not None:
        yield asked
        for log in wanted.values():
            log.debug("written to %s", asked.dump)
        return
    with tempfile.TemporaryDirectory(prefix="sfcompile-logs-") as folder:
        try:
            yield replace(asked, dump=Path(folder))
        finally:  # what was known when a pass failed is wanted most
            for path in sorted(Path(folder).rglob("*")):
                log_of = wanted.get(_artifact_of(path.relative_to(folder)))
                if log_of is not None and path.is_file():
                    log_of.debug("%s\n%s", path.name, path.read_text(encoding="utf-8"))


def _artifact_of(path: Path) -> str:
    """The artifact of a file of a dump, below ``graph-xxxxxxxx/``; "" for the page that links to the others."""
    name = "/".join(path.parts[1:])
    if name.startswith("kernels/"):
        return "streamfusion_kernels"
    others = {"plan.txt": "streamfusion_plan", "schedules.txt": "streamfusion_schedules", "index.html": ""}
    return others.get(name, "streamfusion_graphs")
