"""Generated source -> Python module with Triton kernels, once per process and mode."""

from __future__ import annotations

import hashlib
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

from sfcompile.errors import CodegenError


def cache_folder() -> Path:
    """Where generated source is kept: ``SFCOMPILE_CACHE``, else ``~/.cache/sfcompile``."""
    root = os.environ.get("SFCOMPILE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "sfcompile")
    return Path(root)


_modules: dict[tuple[str, bool], types.ModuleType] = {}


def load_source(
    source: str, interpret: bool = False, calls: Mapping[str, Callable[..., object]] | None = None
) -> types.ModuleType:
    """The module of a generated source.

    Args:
        interpret: make kernels for Triton's interpreter.
        calls: stand-ins for NVSHMEM's functions (interpreter only); the module is not shared then.

    Raises:
        CodegenError: the source cannot be written.
    """
    key = (source, interpret)
    if key in _modules and calls is None:
        return _modules[key]
    from triton import knobs

    name = f"sfcompile_kernel_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = write_source(source, cache_folder() / "source" / f"{name}.py")
    module = types.ModuleType(name)
    module.__file__ = str(path)
    before = knobs.runtime.interpret
    knobs.runtime.interpret = interpret
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    finally:
        knobs.runtime.interpret = before
    if calls is not None:
        module.__dict__.update(calls)
        return module
    sys.modules[name] = module  # Triton looks a kernel's module up by name
    _modules[key] = module
    return module


def write_source(source: str, path: Path) -> Path:
    """Write a file that other processes may be writing too: they see all of it or none.

    Triton reads a kernel's text from its file, so it must exist.

    Raises:
        CodegenError: no room, no permission.
    """
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == source:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(source, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise CodegenError(
            f"generated kernels cannot be written to {path.parent}: {error}",
            "Triton compiles kernels from files",
            "free some space or set SFCOMPILE_CACHE to a folder with room",
        ) from error
    return path
