"""``python -m sfcompile`` is the command line."""

from __future__ import annotations

import subprocess
import sys


def test_it_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sfcompile", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("sfcompile ")
