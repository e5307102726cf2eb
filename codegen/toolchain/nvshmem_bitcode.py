"""NVSHMEM's device code for Triton: found, checked against Triton's version, cut to what the kernels call, cached.

NVIDIA's library is 30 to 50 MB of LLVM bitcode, and Triton would parse and hash all of it for every kernel. The cut
keeps the functions that :data:`SYMBOLS` reaches and is made with nothing but the LLVM inside Triton: a module that
takes the address of every wanted symbol is linked against the library (LLVM links only what is needed), then the module
itself is dropped again. The globals that hold NVSHMEM's device state stay: they are filled in when a kernel is loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from sfcompile.codegen.toolchain.loader import cache_folder
from sfcompile.errors import CodegenError

_WHEELS = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_KEEPER = "sfcompile_keeps"
_TRIPLE = "nvptx64-nvidia-cuda"
_PTX = 86
_NEWEST_OLD_READABLE = (3, 7)
"""NVSHMEM releases above this are bitcode of an LLVM that Triton before 3.9 cannot read (3.4.5 is read by all)."""


def wheel() -> tuple[str, str, Path] | None:
    """``(name, version, folder)`` of the installed NVSHMEM wheel, or None."""
    for name in _WHEELS:
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        folder = Path(str(installed.locate_file("nvidia/nvshmem")))
        if folder.is_dir():
            return name, installed.version, folder
    return None


def require_library() -> tuple[str, str, Path]:
    """What :func:`wheel` says, if the installed Triton can read it.

    Raises:
        CodegenError: it is not installed, or a version that the installed Triton cannot read.
    """
    installed = wheel()
    if installed is None:
        raise CodegenError(
            f"NVSHMEM's device library is not installed (looked for {' and '.join(_WHEELS)})",
            "kernels that put between machines are linked with it",
            "pip install nvidia-nvshmem-cu13==3.4.5",
        )
    import triton

    refuse_pair(triton.__version__, installed[1])
    return installed


def refuse_other_host(host: str) -> None:
    """Kernels are linked with the wheel's device code and filled with the state of the host library that is loaded.

    Args:
        host: the host library's release.

    Raises:
        CodegenError: it is of another release than the wheel.
    """
    name, version, folder = require_library()
    if host != version:
        raise CodegenError(
            f"the host library of NVSHMEM that is loaded is {host}, and the device library in {folder} is {version}",
            "kernels would read the state that the host fills in by another layout",
            f"take other NVSHMEM libraries from LD_LIBRARY_PATH, or pip install {name}=={host}",
        )


def device_library(arch: int) -> Path:
    """NVSHMEM's whole device bitcode for an architecture (80, 90, ...): one file for all, or one each.

    Raises:
        CodegenError: it is not installed, or a version that the installed Triton cannot read.
    """
    name, version, folder = require_library()
    files = [
        folder / "lib" / "libnvshmem_device.bc",
        *sorted((folder / "lib").glob(f"libnvshmem_device*sm_{arch}*.bc")),
    ]
    for path in files:
        if path.is_file():
            return path
    raise CodegenError(
        f"{name} {version} brings no device bitcode for sm_{arch} in {folder / 'lib'}",
        "kernels that put between machines are linked with it",
        "pip install nvidia-nvshmem-cu13==3.4.5, which serves every architecture",
    )


def refuse_pair(triton_version: str, nvshmem_version: str) -> None:
    """Raise for versions of Triton and NVSHMEM that cannot work together.

    Raises:
        CodegenError: says what to install.
    """
    if release_of(nvshmem_version) > _NEWEST_OLD_READABLE and release_of(triton_version) < (3, 9):
        raise CodegenError(
            f"Triton {triton_version} cannot read the device code of NVSHMEM {nvshmem_version}",
            "it was written by a newer LLVM than the one inside Triton",
            "pip install nvidia-nvshmem-cu13==3.4.5, or a Triton of 3.9 or later",
        )
    if release_of(nvshmem_version) < (3, 4):
        raise CodegenError(
            f"NVSHMEM {nvshmem_version} is older than 3.4",
            "its device library lacks functions that generated kernels call",
            "pip install nvidia-nvshmem-cu13==3.4.5",
        )


def slim_library(arch: int, symbols: Sequence[str] | None = None) -> Path:
    """The part of NVSHMEM's device code that kernels call, as a file for Triton's ``extern_libs``; made once.

    Args:
        symbols: entry points; None: those of nvshmem_calls.py.

    Raises:
        CodegenError: no library, an unreadable one, a missing symbol, or no room for the file.
    """
    import triton

    if symbols is None:
        from sfcompile.codegen.toolchain.nvshmem_calls import SYMBOLS

        symbols = [symbol for symbol, _, _ in SYMBOLS.values()]
    library = device_library(arch)
    made_of = f"{_digest(library)}|{triton.__version__}|{arch}|{sorted(symbols)}|inlined"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    folder = cache_folder() / "bitcode"
    for old in sorted(folder.glob(f"nvshmem_{key}-*[cl]")):
        if _is_whole(old):
            return old
    text = _cut(library, symbols, arch)
    from triton._C.libtriton import llvm

    # Triton 3.9 writes bitcode; before it only text, which it reads as well.
    binary = getattr(llvm, "to_bitcode", None)
    content = binary(text) if binary else text.encode()
    path = folder / f"nvshmem_{key}-{_mark(content)}.{'bc' if binary else 'll'}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)  # ranks may race: each sees a whole file
    except OSError as error:
        raise CodegenError(
            f"the cut device library cannot be written to {folder}: {error}",
            "Triton links it from a file",
            "free some space or set SFCOMPILE_CACHE to a folder with room",
        ) from error
    return path


def _mark(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    """Whether a file is what its name says: a damaged one would end the process inside LLVM."""
    try:
        return path.stem.endswith(f"-{_mark(path.read_bytes())}")
    except OSError:
        return False


def _cut(library: Path, symbols: Sequence[str], arch: int) -> str:
    """LLVM IR of everything that some symbols of a library reach."""
    from triton._C.libtriton import ir, llvm, nvidia

    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keeper.mlir"
        path.write_text("".join(f"{line}\n" for line in _keeper(symbols)), encoding="utf-8")
        stub = ir.parse_mlir_module(str(path), context)
    stub.context = context
    llvm.init_targets()
    module = llvm.to_module(stub, llvm.context())
    llvm.attach_datalayout(module, _TRIPLE, f"sm_{arch}{'a' if arch >= 90 else ''}", f"+ptx{_PTX}")
    try:
        llvm.link_extern_libs(module, [str(library)])
    except ValueError as error:
        raise CodegenError(
            f"Triton cannot read {library}: {error}",
            "the bitcode was written by a newer LLVM than the one inside Triton",
            "pip install nvidia-nvshmem-cu13==3.4.5, or a newer Triton",
        ) from error
    missing = [entry.name for entry in module.get_functions() if entry.is_declaration() and entry.name in symbols]
    if missing:
        raise CodegenError(
            f"{library} lacks {', '.join(sorted(missing))}",
            "generated kernels call it",
            "pip install nvidia-nvshmem-cu13==3.4.5",
        )
    text = re.sub(rf"(?ms)^define [^\n]*@{_KEEPER}\(.*?^}}\n", "", str(module))
    # Calls become code of the kernel. With a call in it ptxas leaves setmaxnreg out: warps that attend by tensor copies
    # would have too few registers, and spill in every block.
    text = re.sub(r"(?m)^(attributes #\d+ = {.*)\bnoinline\b", r"\1alwaysinline", text)
    for symbol in symbols:  # linking made them internal: kernels must find them
        text = re.sub(rf"(?m)^define internal ([^\n]*@{symbol}\()", r"define \1", text)
    return text


def _keeper(symbols: Sequence[str]) -> Iterator[str]:
    yield "module {"
    for symbol in symbols:
        yield f"  llvm.func @{symbol}()"
    yield f"  llvm.func @{_KEEPER}(%place: !llvm.ptr) {{"
    for i, symbol in enumerate(symbols):
        yield f"    %{i} = llvm.mlir.addressof @{symbol} : !llvm.ptr"
        yield f"    llvm.store volatile %{i}, %place : !llvm.ptr, !llvm.ptr"
    yield "    llvm.return"
    yield "  }"
    yield "}"


@cache
def _digest(library: Path) -> str:
    with library.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version, as (3, 9) of "3.9.0+git"; (0, 0) if it has none."""
    first_two = re.match(r"(\d+)\.(\d+)", version)
    return (int(first_two[1]), int(first_two[2])) if first_two else (0, 0)
