"""The package: one zip file whose manifest holds a hash of every member, and a hash of its own.

Members are stored as they are (large ones on a boundary that tensors may be mapped from) or deflated (JSON). The hashes
find damage and changes by hand; they are no signature: who can write the file can write its hashes too. So nothing that
a member says is believed: sizes are bounded here, what they mean is checked by those who read them (limits.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from sfcompile.errors import PackageError
from sfcompile.package.disk import open_regular, refusing, writing
from sfcompile.package.limits import INFLATED_BYTES, JSON_BYTES, MEMBERS, NAME, parse_json, refused
from sfcompile.package.tensors import ALIGN, map_open, write_tensors

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
_LOCAL_HEADER = 30
_PADDING = 0xD935  # an id for an extra field that only fills space


class PackageWriter:
    """Writes members one by one and the manifest at the end. The file appears under its name only when it is whole.

    Raises:
        PackageError: the folder or the disk refuses; nothing is left then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hashes: dict[str, dict[str, Any]] = {}
        self._stack = ExitStack()
        self._file = self._stack.enter_context(writing(path))
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)

    def __enter__(self) -> PackageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                with refusing(self._path, self._file):
                    self._zip.close()
            except BaseException as error:
                self._abandon(error)
                raise
            self._stack.close()
        else:
            assert value is not None
            self._abandon(value)

    def _abandon(self, error: BaseException) -> None:
        self._zip.fp = None  # else it would write its directory to a file that goes
        with suppress(BaseException):
            self._stack.__exit__(type(error), error, error.__traceback__)

    def add(self, name: str, data: bytes, deflate: bool = False) -> None:
        """A member from memory."""
        self.add_file(name, io.BytesIO(data), deflate)

    def add_json(self, name: str, data: Any) -> None:
        """A member of deflated JSON."""
        self.add(name, to_json(data), deflate=True)

    def add_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """A member in safetensors' format, made on the disk of temporary files."""
        with refusing(Path(tempfile.gettempdir()) / name), tempfile.TemporaryFile() as file:
            write_tensors(file, tensors)
            file.seek(0)
            self.add_file(name, file)

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
        with refusing(self._path, self._file), self._zip.open(info, "w", force_zip64=not deflate) as out:
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
        self._inflated = 0
        # One file, opened once: its name may come to mean another.
        file = open_regular(path)
        self.memory = map_open(file, path)
        try:
            self._zip = zipfile.ZipFile(file)
            entries = self._zip.infolist()
            self._infos = {info.filename: info for info in entries}
            text, seal = self._inflate(MANIFEST), self._inflate(SEAL).decode()
        except PackageError:
            raise
        except Exception as error:  # zlib.error and what else a damaged stream may raise
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        self.digest = hashlib.sha256(text).hexdigest()
        if self.digest != seal:
            raise self._damaged(f"the manifest has hash {self.digest[:12]}, its seal says {seal[:12]}")
        self.manifest: dict[str, Any] = parse_json(text, f"the manifest of {path}")
        try:
            written = self.manifest["format"]
            self._members: dict[str, dict[str, Any]] = self.manifest["members"]
            extra = set(self._infos) ^ {*self._members, MANIFEST, SEAL}
            known = all(
                type(entry["bytes"]) is int and isinstance(entry["sha256"], str) for entry in self._members.values()
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        if written != FORMAT:
            raise PackageError(
                f"{path} is of package format {str(written)[:40]}, and this version reads format {FORMAT}",
                "another version of sfcompile wrote it",
                "load it with that version, or export the model again",
            )
        if extra or len(self._infos) != len(entries) or not known or len(entries) > MEMBERS:
            raise self._damaged(f"its members are not those that the manifest lists: {', '.join(sorted(extra))[:NAME]}")

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
            data = self._inflate(name)
        except PackageError:
            raise
        except Exception as error:
            raise self._damaged(f"member {name}: {type(error).__name__}: {error}") from error
        self._check(name, hashlib.sha256(data).hexdigest() if self._verify else "", len(data))
        return data

    def _inflate(self, name: str) -> bytes:
        """A member's bytes: no more than it says, and no more than all may have together if they were deflated."""
        info = self._infos[name]
        room = JSON_BYTES
        if info.compress_type == zipfile.ZIP_STORED:
            room = len(self.memory)
        else:
            self._inflated += info.file_size
        if info.file_size > room or self._inflated > INFLATED_BYTES:
            raise refused(f"member {name} of {self.path} has {info.file_size:,} bytes")
        with self._zip.open(info) as file:
            data = file.read(info.file_size + 1)
        if len(data) != info.file_size:
            raise refused(f"member {name} of {self.path} has other {len(data):,} bytes than it says")
        return data

    def json(self, name: str) -> Any:
        """A member of JSON, bounded as limits.py says."""
        return parse_json(self.read(name), f"member {name} of {self.path}")

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


def processor() -> str:
    """What native code is compiled for here: the machine and its vector instructions."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
