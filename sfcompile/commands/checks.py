"""What can be known to be wrong before torch is imported: seconds are too long to wait for news of a slip."""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from sfcompile.errors import OptionError


def check_readable(path: Path, argument: str) -> None:
    """A file that will be read.

    Raises:
        OptionError: it is not there, or is a folder.
    """
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is no file" if path.exists() else "is not there"
        raise OptionError(
            f"{argument} {path} {state}", "It names a file that will be read", f"Look at {path.absolute().parent}"
        )


def check_writable(path: Path, argument: str) -> None:
    """A file that will be written; it may exist.

    Raises:
        OptionError: its folder is not there or is closed to us, or the path is a folder itself.
    """
    if path.is_dir():
        raise OptionError(f"{argument} {path} is a folder", "It names a file that will be written", "Add a file's name")
    if not path.exists() or path.is_file():  # not a device, which is there and stays
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


def check_function(text: str) -> None:
    """A function that makes a model, as ``file.py:function``; names of modules are looked up when they are imported.

    Raises:
        OptionError: no function is named, or the file is not there, is no Python, or has no such name.
    """
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name.isidentifier():
        file = Path(text.removesuffix(":"))
        functions = _names_of(file)[0] if file.suffix == ".py" and file.is_file() else []
        makers = [name for name in functions if name != "main"]  # which starts something, and returns nothing
        raise OptionError(
            f"MODEL {text!r} names no function" + (f"; {file} has {', '.join(functions)}" if functions else ""),
            "A function makes the model and says how it is called: it returns (model, args) or (model, args, kwargs)",
            f"Write for example {file if file.suffix == '.py' else 'file.py'}:{makers[0] if makers else 'make'}",
        )
    if not source.endswith(".py"):
        return
    check_readable(Path(source), "MODEL")
    functions, names = _names_of(Path(source))
    if name in names or "*" in names:
        return
    close = difflib.get_close_matches(name, sorted(names), n=1)
    raise OptionError(
        f"{source} has no {name!r}",
        f"Did you mean {close[0]!r}?" if close else f"Its functions: {', '.join(functions) or 'none'}",
        "Name a function that returns (model, args) or (model, args, kwargs)",
    )


def _names_of(file: Path) -> tuple[list[str], set[str]]:
    """The functions that stand at a Python file's top, and every name there; "*" among them where it cannot be known.

    Raises:
        OptionError: Python cannot read it.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise OptionError(
            f"MODEL {file} is no Python: {where}{said}", "It is run to make the model", "Mend it"
        ) from error
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return functions, {name for node in tree.body for name in _bound(node)}


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    else:  # assignments, also under an ``if``
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id
            elif isinstance(inner, ast.stmt) and inner is not node:
                yield from _bound(inner)
