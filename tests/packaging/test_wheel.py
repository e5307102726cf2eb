"""The wheel: built, installed without the checkout, and used by ranks that see nothing else of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sfcompile", "passes", "codegen", "runtime")


def done(command: list[str], folder: Path, **env: str) -> str:
    """What a command prints that must succeed, run in a folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.thorough  # a wheel, an installation and Inductor: half a minute
@pytest.mark.ranks
def test_ranks_run_an_example_from_the_installed_wheel(tmp_path: Path) -> None:
    checkout, wheels, target = (tmp_path / name for name in ("checkout", "wheels", "target"))
    checkout.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    done([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(checkout)], tmp_path)
    (wheel,) = wheels.glob("*.whl")
    done([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], tmp_path)
    shutil.rmtree(checkout)
    metadata = next(target.glob("sfcompile-*.dist-info")).joinpath("METADATA").read_text(encoding="utf-8")
    for line in ("License-Expression: Apache-2.0", "License-File: LICENSE", "Requires-Dist: networkx", "Keywords: "):
        assert f"\n{line}" in metadata, metadata[:3000]

    names = ("sfcompile", *(f"sfcompile.{folder}" for folder in FOLDERS[1:]))
    code = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {names}))"
    places = done([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(target)).split()
    assert len(places) == 4 and all(Path(place).is_relative_to(target) for place in places), places
    installed = {path.relative_to(target / "sfcompile") for path in (target / "sfcompile").rglob("*.*")}
    installed = {path for path in installed if path.suffix != ".pyc"}
    ours = {path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    ours = {path for path in ours if path.suffix != ".pyc"}
    assert installed == {Path(*path.parts[1:]) if path.parts[0] == "sfcompile" else path for path in ours}

    shutil.copy(ROOT / "examples" / "hello.py", tmp_path)
    command = [sys.executable, str(target / "bin" / "sfcompile"), "run", "--ranks", "2", "hello.py"]
    said = done(command, tmp_path, PYTHONPATH=str(target))
    assert float(said.split("difference from one process: ")[1].split()[0]) <= 1e-5


def test_the_source_distribution_holds_tests_and_docs(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in (*FOLDERS, "tests", "docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in (
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
        "Makefile",
        "mkdocs.yml",
    ):
        shutil.copy(ROOT / name, checkout)
    wanted = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done([sys.executable, "-c", code], checkout)
    (archive,) = tmp_path.glob("sfcompile-*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert wanted <= held, sorted(wanted - held)[:20]
