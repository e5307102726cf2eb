"""A hook of mkdocs: the pages that lie beside docs/ become pages of the site, and links to them lead there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {"README.md": "index.md", "SECURITY.md": "SECURITY.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""Pages of the repository's root: their names there and on the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root. They name those of docs/ from there."""
    for name, place in BESIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pages of docs/ name those of the root from there."""
    for name, place in BESIDE.items():
        markdown = markdown.replace(f"](../{name}", f"]({place}")
    return markdown
