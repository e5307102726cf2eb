"""What capture and passes made, kept on disk: who starts again with the same graph neither captures nor plans.

Two kinds of file, each under the digest of all that decides what is in it. Of a capture: the text of Dynamo's graph and
of the state that capture reads (capture/graph_key.py), and the versions: of this package's sources byte by byte, of
torch, Python and numpy. Of a rank's graph, its schedules and its report: that, and the rank, the machines, the links
that it was planned for, the options and the shares of weights. Where anything of it is not known, nothing is kept.

Ranks must all take their graphs from the disk, or none: planning is collective, and graphs of two plans would wait for
one another for ever. So each file holds a mark that rank 0 drew for all ranks when they planned together. On a start
every rank says which mark it has; they all see all answers, and take what they have only if it is one mark. So they
agree by construction, whatever is on their disks.

A file begins with the digest of its name and of the rest. One that is damaged, that is another graph's under this
name, or whose text is not of the right kind, counts as none, with a line in the log; one that cannot be written is no
error either. Files are written whole under another name and then renamed. What is read is looked up among our classes
and torch's operators: it runs no code. Schedules are proved again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import fx

from sfcompile.capture.graph import CaptureFacts
from sfcompile.capture.graph_key import NoText, text_of_capture
from sfcompile.errors import InternalError, ScheduleError, UnsupportedError
from sfcompile.lowering.graph_text import graph_from_plain, graph_to_plain
from sfcompile.options import Options
from sfcompile.passes.build_schedules import prove
from sfcompile.passes.runner import Compiled
from sfcompile.runtime.rank import values
from sfcompile.torch_private import FakeTensorMode, static_mode
from sfcompile.version import __version__

log = logging.getLogger("sfcompile")
T = TypeVar("T")

VARIABLE = "SFCOMPILE_PLANS"
"""Set to "off", nothing is kept and nothing is read."""
MOST_FILES, MOST_BYTES = 512, 1 << 30
"""So many files are kept, of so many bytes in all; of more, those not used for longest go."""
_LEFT_S = 3600.0
"""A file that is not whole after so long never will be: the process that wrote it was killed."""
_ROOMS = ("sfcompile", "passes", "codegen", "runtime")
_DAMAGES = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ScheduleError)
"""What reading a text of another kind than ours can raise."""


class KeptGraph(NamedTuple):
    """A rank's graph as it was kept.

    Attributes:
        mode: of its fake values.
        mark: drawn for all ranks that planned together.
    """

    compiled: Compiled
    mode: FakeTensorMode
    mark: str


class KeptPlans:
    """What is kept of one graph of Dynamo's.

    Args:
        folder: of the files.
        text: all that decides what is captured.
    """

    def __init__(self, folder: Path, text: str) -> None:
        self._folder = folder
        self._text = hashlib.sha256(f"{versions()}\n{text}".encode()).hexdigest()

    @staticmethod
    def of(
        gm: fx.GraphModule, inputs: Sequence[Any], asked: Options, folder: Path, registered: str
    ) -> KeptPlans | None:
        """What is kept of a graph; None, with a line at level DEBUG: nothing can be.

        Args:
            registered: what was registered from outside (sfcompile/extend.py), or "".
        """
        try:
            if os.environ.get(VARIABLE) == "off":
                raise NoText(f"{VARIABLE}=off")
            if registered or asked.passes:
                raise NoText(f"passes or rules from outside take part: {registered or asked.passes}")
            if asked.dump is not None or asked.verify:
                raise NoText("a dump or a comparison with one process is wanted")
            return KeptPlans(folder, f"{text_of_capture(gm, inputs)}\n{asked.as_dict()}")
        except (NoText, UnsupportedError) as why:
            log.debug("what is planned of this graph is not kept on disk: %s", why)
            return None

    def facts(self) -> CaptureFacts | None:
        """What the graph's capture found; None: it is not there."""
        facts = self._load("capture", "", lambda text: values.decode(text))
        return facts if isinstance(facts, CaptureFacts) else None

    def keep_facts(self, facts: CaptureFacts) -> None:
        """Keep what a capture found."""
        self._save("capture", "", lambda: values.encode(facts))

    def graph(self, decided_by: str) -> KeptGraph | None:
        """A rank's graph.

        Args:
            decided_by: all that decides it beside what is captured.
        """
        return self._load("graph", decided_by, _read)

    def keep_graph(self, decided_by: str, compiled: Compiled, mark: str) -> None:
        """Keep a rank's graph; its report as the passes left it."""
        self._save("graph", decided_by, lambda: _written(compiled, mark))

    def _place(self, kind: str, decided_by: str) -> Path:
        return self._folder / f"{kind}-{hashlib.sha256(f'{self._text}|{decided_by}'.encode()).hexdigest()[:40]}.json"

    def _load(self, kind: str, decided_by: str, read: Callable[[str], T]) -> T | None:
        return read_kept(self._place(kind, decided_by), read)

    def _save(self, kind: str, decided_by: str, write: Callable[[], str]) -> None:
        write_kept(self._place(kind, decided_by), write)


def read_kept(path: Path, read: Callable[[str], T]) -> T | None:
    """What ``read`` makes of the text of a file that :func:`write_kept` wrote; None: it is not there, or damaged."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        if digest != _digest(path, text):
            raise ValueError("its digest is another one")
        value = read(text)
    except OSError:
        return None
    except _DAMAGES as error:
        log.info("%s is damaged, or not ours, and is made anew: %s: %s", path, type(error).__name__, error)
        return None
    with suppress(OSError):
        os.utime(path)  # it was used
    return value


def write_kept(path: Path, write: Callable[[], str]) -> None:
    """Keep a text; what cannot be written is not kept."""
    new = ""
    try:
        text = write()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".new")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{_digest(path, text)}\n{text}")
        os.replace(new, path)
        _drop_oldest(path.parent)
    except (NoText, InternalError) as why:
        log.debug("what is planned of this graph is not kept on disk: %s", why)
    except OSError as error:
        log.info("what was planned is not kept for the next start: %s", error)
        if new:
            with suppress(OSError):
                os.unlink(new)


def new_mark() -> str:
    """A mark that no other compile has."""
    return uuid.uuid4().hex


def agreed(everyone: Sequence[Sequence[str]]) -> tuple[bool, str]:
    """Whether all ranks take what they have, and the mark of what they make if they do not.

    Args:
        everyone: by rank, the mark of what it has on disk ("": nothing), and a new one.
    """
    return bool(everyone[0][0]) and len({had for had, _ in everyone}) == 1, everyone[0][1]


@functools.cache
def versions() -> str:
    """Everything that could make other plans of one graph: versions, and this package's sources byte by byte."""
    digest = hashlib.sha256()
    for path in sorted({path for folder in _folders() for path in folder.rglob("*.py")}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    ours = f"sfcompile {__version__} {digest.hexdigest()}, numpy {np.__version__}"
    return f"{ours}, torch {torch.__version__} {torch.version.git_version}, Python {platform.python_version()}"


def _folders() -> list[Path]:
    """Of our sources, in a checkout or in a wheel."""
    package = __name__.split(".", 1)[0]
    files = [sys.modules[name].__file__ for name in (package, *(f"{package}.{room}" for room in _ROOMS[1:]))
             if name in sys.modules]  # fmt: skip
    return [Path(file).parent for file in files if file]


def _digest(path: Path, text: str) -> str:
    return hashlib.sha256(f"{path.stem}\n{text}".encode()).hexdigest()


def _drop_oldest(folder: Path) -> None:
    files: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.json"):
        with suppress(OSError):  # another job has just removed it
            facts = path.stat()
            files.append((facts.st_mtime, facts.st_size, path))
    count, size = len(files), sum(nbytes for _, nbytes, _ in files)
    for left in folder.glob("*.new"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_S:
                left.unlink()
    for _, nbytes, path in sorted(files):
        if count <= MOST_FILES and size <= MOST_BYTES:
            break
        with suppress(OSError):
            path.unlink()
        count, size = count - 1, size - nbytes


def _written(compiled: Compiled, mark: str) -> str:
    distinct = {id(each): each for schedules in compiled.programs.values() for each in schedules}
    number = {key: i for i, key in enumerate(distinct)}
    return json.dumps(
        {
            "mark": mark,
            "graph": graph_to_plain(compiled.gm),
            # Without what a schedule has looked up so far: it is looked up again.
            "schedules": [values.encode(replace(schedule)) for schedule in distinct.values()],
            "programs": {name: [number[id(each)] for each in each_of] for name, each_of in compiled.programs.items()},
            "report": values.encode(compiled.report),
            "kernel_attention": compiled.kernel_attention,
            "crossing": values.encode(dict(compiled.crossing)),
        },
        separators=(",", ":"),
    )


def _read(text: str) -> KeptGraph:
    plain: Mapping[str, Any] = json.loads(text)
    schedules = [values.decode(each) for each in plain["schedules"]]
    programs = {name: [schedules[i] for i in numbers] for name, numbers in plain["programs"].items()}
    prove(programs)
    mode = static_mode()
    gm = graph_from_plain(plain["graph"], mode)
    report, crossing = values.decode(plain["report"]), values.decode(plain["crossing"])
    compiled = Compiled(gm, programs, report, bool(plain["kernel_attention"]), crossing)
    return KeptGraph(compiled, mode, str(plain["mark"]))
