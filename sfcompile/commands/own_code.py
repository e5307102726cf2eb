"""Around code of a user's that a command runs: what it raises becomes a sentence that names its line."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sfcompile.errors import OptionError, StreamFusionError, source_line

_HERE = Path(__file__).resolve().parents[1]
# In a checkout the other folders lie beside this package, in a wheel inside it.
_OURS = tuple(f"{folder}{os.sep}" for folder in (_HERE, *(_HERE.parent / f for f in ("passes", "codegen", "runtime"))))
_INNER = re.compile(r"\bgot \w+\((?=['\"]).+\)")
"""What Dynamo was told by torch, where it stands behind an explanation."""
_NOBODYS = (sysconfig.get_path("stdlib"), "site-packages", "dist-packages", "<frozen")


@contextmanager
def own_code(what: str, alone: bool = True) -> Iterator[None]:
    """What is run here is a user's.

    Args:
        what: is done with it, in words that go on with "that raises ...".
        alone: nothing else of ours runs. If not, what is raised in our own files is a mistake of ours, and is let go.

    Raises:
        OptionError: it raised something, or left the process.
    """
    try:
        if alone:
            yield
        else:
            from sfcompile.torch_private import no_logged_traces  # what is traced has imported torch

            with no_logged_traces():
                yield
    except StreamFusionError:
        raise
    except (Exception, SystemExit) as error:
        line = source_line(str(error)) or _line_of(error)  # Dynamo writes the user's line into its errors
        if line is None and not alone:
            raise
        if isinstance(error, SystemExit):
            told = f"it left the process with exit code {error.code}"
            fix = 'Put what a script does under if __name__ == "__main__":'
        else:
            first = next(iter(str(error).strip().splitlines()), "")
            inner = _INNER.search(str(error))
            told, fix = f"that raises {type(error).__name__}: {first}{f', {inner[0]}' if inner else ''}", "Mend that"
        raise OptionError(f"{what} {told}", "", fix, source=line) from error


def _line_of(error: BaseException) -> str | None:
    """Where it was raised, as "file:line: text", libraries aside; None: in our own files."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not any(part in frame.filename for part in _NOBODYS)
    ]
    if not frames or frames[-1].filename.startswith(_OURS):
        return None
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
