"""Tests plan on assumed constants: no plan depends on what else the machine does. Tests that measure say so.

And every test plans for itself, whatever another one left on disk. Tests of what is kept there say so.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("SFCOMPILE_LINKS", "assumed")
os.environ.setdefault("SFCOMPILE_PLANS", "off")
MARK = "pytest.mark.ranks"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave files without a test of ranks out of the run of those: each worker would import all of them for nothing.

    Set by run_tests.py where no file was asked for; pytest takes an ignored one that was for a mistake.
    """
    if os.environ.get("SFCOMPILE_TEST_FILES") != "ranks" or collection_path.suffix != ".py":
        return None
    return True if MARK not in collection_path.read_text() else None
