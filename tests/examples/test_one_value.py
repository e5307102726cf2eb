"""The page docs/one-value.md shows what examples/one_value.py prints, to the letter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_what_the_example_prints() -> None:
    page = (ROOT / "docs" / "one-value.md").read_text(encoding="utf-8")
    example = [sys.executable, str(ROOT / "examples" / "one_value.py")]
    printed = subprocess.run(example, capture_output=True, text=True, check=True, timeout=120).stdout
    stages = [stage.strip("\n") for stage in re.split(r"^# \d\. .*$", printed, flags=re.MULTILINE)[1:]]
    assert re.findall(r"```text\n(.*?)\n```", page, flags=re.DOTALL) == stages
    for file in re.findall(r"`((?:sfcompile|passes|codegen|runtime)/[\w/]+\.py)`", page):
        assert (ROOT / file).is_file(), f"the page names {file}, which is not there"
