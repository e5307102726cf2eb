"""One version: the package's, the metadata's and pyproject.toml's; and one range of torch."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import sfcompile
from sfcompile.errors import UnsupportedError
from sfcompile.version import __version__, refuse_ascii, refuse_other_torch, torch_range


def test_the_versions_agree() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert sfcompile.__version__ == __version__ == project["version"]
    assert torch_range() in project["dependencies"]


@pytest.mark.parametrize("installed", ["2.11.0", "2.13.1+cpu", "2.12.0a0+git1234567", "2.14.1+cu130", "2.15.0+cu130"])
def test_a_torch_in_the_range_passes(installed: str) -> None:
    refuse_other_torch(installed)


@pytest.mark.parametrize("installed", ["2.10.2", "2.16.0", "3.0.0", "1.13.1", "unknown"])
def test_another_torch_is_refused_with_a_sentence(installed: str) -> None:
    with pytest.raises(UnsupportedError, match=f"torch {re.escape(installed)} is installed.*pip install 'torch>=2.11"):
        refuse_other_torch(installed)


def test_ascii_is_refused_with_a_sentence() -> None:
    refuse_ascii("utf-8")
    with pytest.raises(UnsupportedError, match="text files as ANSI_X3.4-1968 here.*Leave PYTHONUTF8=0 out"):
        refuse_ascii("ANSI_X3.4-1968")
