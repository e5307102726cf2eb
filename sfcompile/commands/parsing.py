"""What the commands' parsers share: a model by its place or by ``--model``, and "did you mean" for slips."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

from sfcompile.errors import OptionError

_CHOICE = re.compile(r"invalid choice: '(?P<typed>[^']*)' \(choose from (?P<known>.*)\)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_TORCHRUNS = {"--nproc-per-node": "--ranks", "--nproc_per_node": "--ranks", "--nnodes": "--machines"}
"""What users of torchrun type, and what it is here."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, which says what may have been meant where it does not know a word."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the message, with close matches, and leave with exit code 2."""
        close = self._close(message)
        super().error(f"{message}. Did you mean {' or '.join(close)}?" if close else message)

    def _close(self, message: str) -> list[str]:
        choice = _CHOICE.search(message)
        if choice is not None:
            return difflib.get_close_matches(choice["typed"], re.findall(r"[\w.:+-]+", choice["known"]), n=1)
        if not message.startswith("unrecognized arguments"):
            return []
        known = _OPTION.findall(self.format_help())
        typed = (_TORCHRUNS.get(word, word) for word in _OPTION.findall(message))
        matches = (difflib.get_close_matches(word, known, n=1) for word in typed)
        return list(dict.fromkeys(match for close in matches for match in close))


def add_model_name(parser: argparse.ArgumentParser, text: str) -> None:
    """The model, as the first word after the command or as ``--model``; :func:`model_name` reads either."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help=text)
    parser.add_argument("--model", metavar="MODEL", help="the same, by name")


def model_name(args: argparse.Namespace) -> str | None:
    """The model that was named, None if none was.

    Raises:
        OptionError: two were.
    """
    if args.name and args.model and args.name != args.model:
        raise OptionError(
            f"Two models are named: {args.name!r} and --model {args.model!r}",
            "The first word after the command and --model say the same thing",
            "Name one",
        )
    name: str | None = args.name or args.model
    return name
