"""The pages as a site: it builds without a warning, holds every page, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_every_page_is_in_the_menu_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for _, page in re.findall(r"(^|\s|')([\w-]+\.md)", str(site["nav"]))]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md", "SECURITY.md", "CONTRIBUTING.md"}
    assert sorted(listed) == sorted(pages)


@pytest.mark.thorough  # some seconds; every change runs the links of the pages in tests/examples/test_docs.py
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (*(ROOT / "docs").glob("*.md"), Path("SECURITY.md"), Path("CONTRIBUTING.md")):
        assert (tmp_path / "site" / page.stem / "index.html").is_file(), page
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="getting-started/' in index
    assert not re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//[^"]*\.(?:js|css)', index)
    assert (tmp_path / "site" / "search" / "search_index.json").is_file()
