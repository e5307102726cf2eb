"""One version: the package's, the metadata's and pyproject.toml's."""

from __future__ import annotations

import tomllib
from pathlib import Path

import sfcompile
from sfcompile.version import __version__


def test_the_versions_agree() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert sfcompile.__version__ == __version__ == project["version"]
