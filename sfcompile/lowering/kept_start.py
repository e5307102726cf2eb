"""What Inductor finds out at every start before it can use its cache, kept on disk: it changes with files only.

Before it takes a compiled graph from the disk, Inductor loads test libraries in processes of their own, to see which
vector instructions work here, and reads all sources of torch and Triton, Triton's library too, for its keys: about 1.5
CPU seconds in every rank at every start, more than all that follows. Here the first rank to know writes it down, and
the others, and later starts, take it. At the first start of all, Inductor compiles those libraries for all vector
instructions and takes the first; here it tries until some work.

It is kept under the digest of all that decides it: of every file that is read or loaded for it the path, size, inode
and both times (that of the last change of a file cannot be set by hand, so no file is another one and looks the same),
the versions and our sources, what the processor can do, and the compiler. Where that cannot be told (a folder that is a
link, say), nothing is taken or kept. So who copies an environment, or edits a file of torch, finds nothing, and
Inductor looks for itself. What Inductor knows already in this process stays.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfcompile.lowering.kept_plans import VARIABLE, read_kept, versions, write_kept
from sfcompile.torch_start import StartFacts, decides_start, know_at_start, known_at_start, try_first_only

_LIBRARIES = ("torch", "triton")
_NOT_READ = frozenset({"include", "__pycache__"})
"""Folders of a library in which no source is that a key is made of."""
_SEARCHED = ("LD_LIBRARY_PATH", "LD_PRELOAD", "CXX")


def take_start(folder: Path | None) -> None:
    """Tell Inductor what is kept of an earlier start, if it does not know it yet; if nothing is kept, to try no more
    than it needs."""
    path = _place(folder)
    if path is None:
        return
    facts = read_kept(path, _read)
    if facts is None:
        try_first_only()
    else:
        know_at_start(facts)


def keep_start(folder: Path | None) -> None:
    """Keep what Inductor has found out in this process, if nothing is kept yet."""
    path = _place(folder)
    if path is None or read_kept(path, _read) is not None:
        return
    facts = known_at_start()
    if facts is not None:
        write_kept(path, lambda: json.dumps(facts._asdict()))


def _place(folder: Path | None) -> Path | None:
    """The file; None: nothing is kept."""
    if folder is None or os.environ.get(VARIABLE) == "off":
        return None
    decided_by = _decided_by()
    return None if decided_by is None else folder / f"start-{decided_by[:40]}.json"


@functools.cache
def _decided_by() -> str | None:
    """A digest of all that decides what is kept; None: it cannot be told."""
    tools = decides_start()
    if tools is None:
        return None
    try:
        files = sorted(line for name in _LIBRARIES for line in _files_of(name))
    except OSError:
        return None
    environment = [os.environ.get(name) for name in _SEARCHED]
    facts = versions(), platform.libc_ver(), tools, environment, files
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _files_of(library: str) -> Iterator[str]:
    """A line for each file of a library; none: it is not installed.

    Raises:
        OSError: not all of them can be seen.
    """
    spec = importlib.util.find_spec(library)
    todo = list(spec.submodule_search_locations or ()) if spec is not None else []
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if not entry.is_dir():
                    facts = entry.stat()
                    times = facts.st_mtime_ns, facts.st_ctime_ns
                    yield f"{entry.path} {facts.st_size} {facts.st_dev} {facts.st_ino} {times}"
                elif entry.name not in _NOT_READ:
                    if entry.is_symlink():
                        raise OSError(f"{entry.path} is a link")
                    todo.append(entry.path)


def _read(text: str) -> StartFacts:
    """Raises ValueError, LookupError or TypeError: it is no such text."""
    plain: Mapping[str, Any] = json.loads(text)
    facts = StartFacts(**plain)
    bytes.fromhex(facts.torch_key)
    values = [value for known in facts.vector_isas.values() for value in known.values()]
    if not all(type(value) in (bool, int, str) for value in values) or type(facts.triton_key) not in (str, type(None)):
        raise ValueError("it holds other kinds of values")
    return facts
