"""The rules of the repository's layout, checked on the source text: imports, packaging, sizes, names, tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Lowest layer first. A file may import its own layer and those to the left.
LAYERS = ("runtime", "codegen", "passes", "sfcompile")
LEAVES = ("errors", "options", "torch_private")
# Inside passes/ the prefix is the phase; files without one are tools for every phase, except the two that join them.
PHASES = ("analyse", "choose", "place", "rewrite", "schedule")
JOINERS = ("pipeline", "report_graph")
MAX_LINES = 500
# The file that wraps what we need of torch's private modules.
PRIVATE_TORCH = "sfcompile/torch_private.py"
# The worker of the demo runs one particular model of a library, so it has to name it.
NAMES_A_MODEL = ("sfcompile/demo_worker.py",)
MODEL_NAME = re.compile(
    r"(?<![A-Za-z])((?i:flux|pixart|cogvideo|wan2|wan_|hunyuan|qwen|sd3|lumina|mochi|ltx|sana|hidream|latte|cosmos)"
    r"(?![a-z])|Wan[A-Z])"
)
# Source files without a test file of their own, and why.
WITHOUT_TEST = {
    "sfcompile/__init__.py": "tests/packaging checks it",
    "passes/__init__.py": "a docstring",
    "codegen/__init__.py": "a docstring",
    "runtime/__init__.py": "a docstring",
}

SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of all imported modules; `from a.b import c` gives both a.b and a.b.c, as c may be a module."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    """The layer that a module of ours belongs to; None for foreign modules and for the leaves."""
    parts = module.split(".")
    if parts[0] != "sfcompile" or len(parts) == 1 or parts[1] in LEAVES:
        return None
    return parts[1] if parts[1] in LAYERS else "sfcompile"


def phase_of(stem: str) -> int | None:
    prefix = stem.split("_")[0]
    return PHASES.index(prefix) if prefix in PHASES else None


@each(SOURCES)
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    if own == "sfcompile" and path.stem in LEAVES:
        allowed = {*sys.stdlib_module_names, *(f"sfcompile.{leaf}" for leaf in LEAVES)}
        if name_of(path) == PRIVATE_TORCH:
            allowed.add("torch")
        for module in imported_modules(path):
            names = {module, module.split(".")[0], ".".join(module.split(".")[:2])}
            assert names & allowed, f"{name_of(path)} is a leaf and imports {module}"
        return
    for module in imported_modules(path):
        layer = layer_of(module)
        if layer is not None:
            assert LAYERS.index(layer) <= LAYERS.index(own), f"{name_of(path)} imports {module} from a higher layer"


@each([path for path in SOURCES if path.parent.name == "passes"])
def test_phases_are_in_order(path: Path) -> None:
    if path.stem in JOINERS:
        return
    own = phase_of(path.stem)
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[:2] != ["sfcompile", "passes"] or len(parts) < 3:
            continue
        assert parts[2] not in JOINERS, f"{name_of(path)} imports {module}, which comes after every phase"
        phase = phase_of(parts[2])
        if phase is not None:
            assert own is not None, f"{name_of(path)} is a tool for every phase and imports {module}"
            assert phase <= own, f"{name_of(path)} imports {module} from a later phase"


@each(SOURCES)
def test_private_torch_in_one_file(path: Path) -> None:
    if name_of(path) == PRIVATE_TORCH:
        return
    for module in imported_modules(path):
        parts = module.split(".")
        # The last part may be a plain name, so only the module path counts as private.
        assert parts[0] != "torch" or not any(part.startswith("_") for part in parts[1:]), (
            f"{name_of(path)} imports {module}; private torch modules belong in {PRIVATE_TORCH}"
        )
    used = re.search(r"\btorch(\.\w+)*\._(?!_)\w+", re.sub(r"\"\"\".*?\"\"\"", "", path.read_text(), flags=re.DOTALL))
    allowed = used is None or used[0].startswith(("torch.ops.", "torch.library."))
    assert used is None or allowed, f"{name_of(path)} uses {used[0]}; it belongs in {PRIVATE_TORCH}"


@each(SOURCES + TESTS)
def test_style_that_tools_do_not_check(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES, f"{name_of(path)} has more than {MAX_LINES} lines"
    tree = parse(path)
    if len(tree.body) > 1:  # more than a docstring
        assert "from __future__ import annotations" in text, f"{name_of(path)} lacks the annotations import"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} is a relative import"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [entry.arg for entry in arguments if entry.annotation is None and entry.arg not in ("self", "cls")]
            assert not bare, f"{name_of(path)}:{node.lineno} {node.name}: no type for {bare}"
            assert node.returns is not None, f"{name_of(path)}:{node.lineno} {node.name}: no return type"


@each(SOURCES)
def test_no_model_is_named(path: Path) -> None:
    if name_of(path) in NAMES_A_MODEL:
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert not MODEL_NAME.search(line), f"{name_of(path)}:{number} names a model: {line.strip()}"


@each(SOURCES)
def test_each_source_has_its_test(path: Path) -> None:
    folder, *_ = path.relative_to(ROOT).parts
    if name_of(path) in WITHOUT_TEST:
        return
    test = ROOT / "tests" / folder / f"test_{path.stem}.py"
    assert test.is_file(), f"{name_of(path)} has no {name_of(test)}"


def test_exceptions_still_exist() -> None:
    gone = [name for name in (*WITHOUT_TEST, *NAMES_A_MODEL, PRIVATE_TORCH) if not (ROOT / name).is_file()]
    assert not gone, f"lists in this test name files that are gone: {gone}"


def test_each_test_has_its_source() -> None:
    for folder in LAYERS:
        for test in (ROOT / "tests" / folder).rglob("test_*.py"):
            source = ROOT / folder / f"{test.stem.removeprefix('test_')}.py"
            assert source.is_file(), f"{name_of(test)} tests no file"


def test_declared_packages_are_the_folders() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    assert set(tool["package-dir"].values()) == folders == set(LAYERS)
    assert sorted(tool["packages"]) == sorted(tool["package-dir"])


def test_entry_point_works_without_importing_us(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.metadata as m\n"
        "(point,) = m.entry_points(group='torch_dynamo_backends', name='streamfusion')\n"
        "assert 'sfcompile' not in sys.modules\n"
        "assert callable(point.load())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    code = "import sys, sfcompile; assert 'torch' not in sys.modules and sfcompile.__version__"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
