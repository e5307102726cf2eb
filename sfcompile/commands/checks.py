"""What can be known to be wrong before torch is imported: seconds are too long to wait for news of a slip."""

from __future__ import annotations

import os
from pathlib import Path

from sfcompile.errors import OptionError


def check_readable(path: Path, argument: str) -> None:
    """A file that will be read.

    Raises:
        OptionError: it is not there, or is a folder.
    """
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is not there"
        raise OptionError(f"{argument} {path} {state}", "It names a file that will be read", f"Look at {path.parent}")


def check_writable(path: Path, argument: str) -> None:
    """A file that will be written; it may exist.

    Raises:
        OptionError: its folder is not there or is closed to us, or the path is a folder itself.
    """
    if path.is_dir():
        raise OptionError(f"{argument} {path} is a folder", "It names a file that will be written", "Add a file's name")
    check_folder(path.parent, argument)


def check_folder(folder: Path, argument: str, create: bool = False) -> None:
    """A folder that files will be written into. ``create``: it will be made if it is not there.

    Raises:
        OptionError: it is not there, is a file, or may not be written to.
    """
    while create and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "is not there"
        raise OptionError(
            f"{argument}: the folder {folder} {state}", "Results would have no place", f"Say mkdir -p {folder}"
            if state == "is not there" else "Name a folder",
        )  # fmt: skip
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(
            f"{argument}: the folder {folder} may not be written to",
            "Results would be lost after all the work",
            "Name another one",
        )
