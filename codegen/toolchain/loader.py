"""Generated source -> Python module with Triton kernels, once per process and mode."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import stat
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sfcompile.errors import CodegenError


def cache_folder() -> Path:
    """Where files are kept between runs: ``SFCOMPILE_CACHE``, else ``~/.cache/sfcompile``."""
    root = os.environ.get("SFCOMPILE_CACHE")
    if root:
        return Path(os.path.expanduser(root))
    home = os.path.expanduser("~")
    return Path(home if os.path.isabs(home) else _temporary_home()) / ".cache" / "sfcompile"


@functools.cache
def _temporary_home() -> str:
    """A folder in place of the home of a user whom nobody has entered and who has no ``HOME``, as in containers: ``~``
    would be a folder of that name wherever the program started."""
    folder = os.path.join(tempfile.gettempdir(), f"home-of-{os.getuid()}")
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    facts = os.lstat(folder)
    if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o22:
        return folder
    return tempfile.mkdtemp(prefix="home-")  # somebody else has made that one


NVSHMEM_KERNELS: set[str] = set()
"""Names of loaded kernels whose modules hold NVSHMEM's device state (device_state.py fills it in)."""
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
    NVSHMEM_KERNELS.update(entry for entry in vars(module) if entry.endswith("_nvshmem"))
    if interpret and "globaltimer" in vars(module):
        module.__dict__["globaltimer"] = time.monotonic_ns
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
        if path.is_file() and path.read_bytes() == source.encode():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(source.encode())
        os.replace(temporary, path)
    except OSError as error:
        raise CodegenError(
            f"generated kernels cannot be written to {path.parent}: {error}",
            "Triton compiles kernels from files",
            "free some space or set SFCOMPILE_CACHE to a folder with room",
        ) from error
    return path


def link_options(library: Path | None, reach: str) -> dict[str, Any]:
    """Triton's options that link NVSHMEM's device code where a kernel calls it."""
    return {} if library is None or reach == "peer" else {"extern_libs": {"libnvshmem_device": str(library)}}


def resident_programs(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any], device: torch.device) -> int:
    """Programs of a kernel that a GPU holds at a time: the largest grid of a cooperative launch.

    Asked of the driver for the compiled function with its registers and shared memory.

    Raises:
        CodegenError: the driver refuses, or not one program fits.
    """
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    compiled._init_handles()
    properties = torch.cuda.get_device_properties(device)
    driver = ctypes.CDLL("libcuda.so.1")
    per_processor = ctypes.c_int()
    status = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(per_processor),
        ctypes.c_void_p(compiled.function),
        ctypes.c_int(32 * compiled.metadata.num_warps),
        ctypes.c_size_t(compiled.metadata.shared),
    )
    if status != 0 or per_processor.value < 1:
        raise CodegenError(
            f"kernel {compiled.name} does not fit on {properties.name} (driver status {status}, "
            f"{per_processor.value} programs on a multiprocessor)",
            f"it needs {compiled.metadata.shared} bytes of shared memory and {compiled.metadata.num_warps} warps",
            "use attention='aten', and report the head size and dtype",
        )
    return int(per_processor.value * properties.multi_processor_count)
