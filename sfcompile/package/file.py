"""The package: one zip file whose manifest holds a hash of every member, and a hash of its own.

Members are stored as they are (large ones on a boundary that tensors may be mapped from) or deflated (JSON). The hashes
find damage and changes by hand; they are no signature: who can write the file can write its hashes too. Packages
with compiled objects (``inner="aoti"``) run native code: load those from people you trust. All others hold data only.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from sfcompile.errors import PackageError
from sfcompile.package.tensors import ALIGN, map_file

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
_LOCAL_HEADER = 30
_PADDING = 0xD935  # an id for an extra field that only fills space


class PackageWriter:
    """Writes members one by one and the manifest at the end. The file appears under its name only when it is whole.

    Raises:
        PackageError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._hashes: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._zip = zipfile.ZipFile(self._part, "w", zipfile.ZIP_STORED)
        except OSError as error:
            raise PackageError(f"{path} cannot be written: {error}", "", "name another path") from error

    def __enter__(self) -> PackageWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._zip.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)

    def add(self, name: str, data: bytes, deflate: bool = False) -> None:
        """A member from memory."""
        self.add_file(name, io.BytesIO(data), deflate)

    def add_json(self, name: str, data: Any) -> None:
        """A member of deflated JSON."""
        self.add(name, to_json(data), deflate=True)

    def add_file(self, name: str, source: IO[bytes], deflate: bool = False) -> None:
        """A member from a file, read from its present position."""
        info = zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0))  # equal inputs give equal files
        info.compress_type = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
        if not deflate:
            assert self._zip.fp is not None
            # zip64 sizes take 20 bytes of the extra field, ours 4 and the padding.
            begin = self._zip.fp.tell() + _LOCAL_HEADER + len(name.encode()) + 24
            pad = -begin % ALIGN
            info.extra = _PADDING.to_bytes(2, "little") + pad.to_bytes(2, "little") + bytes(pad)
        digest, size = hashlib.sha256(), 0
        with self._zip.open(info, "w", force_zip64=not deflate) as out:
            while block := source.read(1 << 22):
                digest.update(block)
                size += len(block)
                out.write(block)
        self._hashes[name] = {"sha256": digest.hexdigest(), "bytes": size}

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """The manifest, with the hashes of all members before it; the last thing to write."""
        text = to_json({"format": FORMAT, **manifest, "members": self._hashes})
        self.add(MANIFEST, text, deflate=True)
        self.add(SEAL, hashlib.sha256(text).hexdigest().encode(), deflate=True)


def to_json(data: Any) -> bytes:
    """JSON in one form: the same data give the same bytes."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


class Package:
    """An opened package: its manifest, and its members once their hashes are checked.

    Args:
        verify: check each member's hash when it is read. Without it only damage that breaks the format is found.

    Raises:
        PackageError: not a package, damaged, or of another format.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path = path
        self._verify = verify
        self._memory: mmap.mmap | None = None
        self.memory = map_file(path)
        try:
            self._zip = zipfile.ZipFile(path)
            text, seal = self._zip.read(MANIFEST), self._zip.read(SEAL).decode()
            self._infos = {info.filename: info for info in self._zip.infolist()}
        except (OSError, KeyError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # zlib.error and what else a damaged stream may raise
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        self.digest = hashlib.sha256(text).hexdigest()
        if self.digest != seal:
            raise self._damaged(f"the manifest has hash {self.digest[:12]}, its seal says {seal[:12]}")
        try:
            self.manifest: dict[str, Any] = json.loads(text)
            written = self.manifest["format"]
            self._members: dict[str, dict[str, Any]] = self.manifest["members"]
            extra = set(self._infos) ^ {*self._members, MANIFEST, SEAL}
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        if written != FORMAT:
            raise PackageError(
                f"{path} is of package format {written}, and this version reads format {FORMAT}",
                f"sfcompile {self.manifest.get('versions', {}).get('sfcompile')} wrote it",
                "load it with that version, or export the model again",
            )
        if extra or len(self._infos) != len(self._zip.infolist()):
            raise self._damaged(f"its members are not those that the manifest lists: {', '.join(sorted(extra))}")

    def _damaged(self, how: str) -> PackageError:
        return PackageError(
            f"{self.path} is damaged or no package ({how})",
            "it was cut short, changed after the export, or is another kind of file",
            "copy it again, or export the model again",
        )

    @property
    def names(self) -> list[str]:
        """Names of the members, without manifest and seal."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """A member's bytes.

        Raises:
            PackageError: it is missing, or its hash is not the manifest's.
        """
        if name not in self._members:
            raise self._damaged(f"it has no member {name}")
        try:
            data = self._zip.read(name)
        except Exception as error:
            raise self._damaged(f"member {name}: {type(error).__name__}: {error}") from error
        self._check(name, hashlib.sha256(data).hexdigest() if self._verify else "", len(data))
        return data

    def json(self, name: str) -> Any:
        """A member of JSON."""
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise self._damaged(f"member {name}: {error}") from error

    def place(self, name: str) -> tuple[int, int]:
        """Where a stored member lies in ``memory``: start and size. Its hash is checked.

        Raises:
            PackageError: as :meth:`read`.
        """
        if name not in self._members:
            raise self._damaged(f"it has no member {name}")
        info = self._infos[name]
        head = self.memory[info.header_offset : info.header_offset + _LOCAL_HEADER]
        if info.compress_type != zipfile.ZIP_STORED or head[:4] != b"PK\x03\x04":
            raise self._damaged(f"member {name} is not stored as it should be")
        skip = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER + skip
        if start + info.file_size > len(self.memory):
            raise self._damaged(f"member {name} ends after the file")
        view = memoryview(self.memory)[start : start + info.file_size]
        self._check(name, hashlib.sha256(view).hexdigest() if self._verify else "", info.file_size)
        return start, info.file_size

    def _check(self, name: str, digest: str, size: int) -> None:
        entry = self._members[name]
        if size != entry["bytes"] or (self._verify and digest != entry["sha256"]):
            raise self._damaged(f"member {name} is not what was exported: its hash or size differs")


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        PackageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error}", "", "check the path") from error


def processor() -> str:
    """What native code is compiled for here: the machine and its vector instructions."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
