"""Names of the installed diffusers' transformer classes, read off its source: importing it takes seconds.

The file that lists them is parsed, not run. What is found is at least what `meta_model.py` will find, so a name that
fits none of them fits no class.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

from sfcompile.errors import OptionError


def check_model_name(name: str) -> None:
    """That a class of diffusers may be meant.

    Raises:
        OptionError: diffusers is missing, or no class has such a name (the message lists close ones).
    """
    known = class_names()
    if known:
        best_match(name, known)


def class_names() -> list[str]:
    """Names of classes that diffusers may export; empty if its source does not look as expected.

    Raises:
        OptionError: diffusers is not installed.
    """
    spec = importlib.util.find_spec("diffusers")
    if spec is None:
        raise missing("It is not installed")
    folders = [Path(place) / "models" / "transformers" for place in spec.submodule_search_locations or ()]
    names: list[str] = []
    for path in (folder / "__init__.py" for folder in folders):
        if path.is_file():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
            names += [alias.asname or alias.name for node in imports for alias in node.names]
    return sorted({name for name in names if name[:1].isupper()})


def best_match(name: str, known: Collection[str]) -> str:
    """The shortest of the known names that starts with ``name``, but for case and punctuation.

    Raises:
        OptionError: none does.
    """
    typed = _plain(name)
    matches = [key for key in known if typed and _plain(key).startswith(typed)]
    if matches:
        return min(matches, key=lambda key: (len(key), key))
    short = {_plain(re.sub(r"(Transformer)?(\dD)?(Model)?$", "", key)): key for key in known}
    close = [short[key] for key in difflib.get_close_matches(typed, short, n=3, cutoff=0.5)]
    raise OptionError(
        f"No transformer class of diffusers has a name that starts with {name!r}",
        f"Did you mean {', '.join(close)}?" if close else "",
        f"Some of the {len(known)} classes: {', '.join(sorted(known)[:: max(1, len(known) // 8)])}",
    )


def missing(problem: str) -> OptionError:
    """The error of a diffusers that cannot be used."""
    return OptionError(
        f"No diffusers: {problem}",
        "A model that is given by name is built from the installed diffusers",
        'Run: pip install "sfcompile[diffusers]"',
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
