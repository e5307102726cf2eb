"""The rules of the house, checked on the source text: rooms, arrows, packaging, sizes, names, tests.

Each case reads every file and lists all offenders.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sfcompile", "passes", "codegen", "runtime")

# The leaves: files of the door that every room may import, and that import the standard library only (or torch, for
# the files that wrap what we need of torch's private modules).
PRIVATE_TORCH = ("sfcompile/torch_private.py", "sfcompile/torch_breaks.py", "sfcompile/torch_start.py",
                 "sfcompile/torch_fsdp.py")  # fmt: skip
# Runs while torch is imported, when torch_private.py cannot be: it knows torch's registry of logs itself.
TORCH_LOGS = "sfcompile/torch_logs.py"
LEAVES = (
    "sfcompile/errors.py", "sfcompile/one_style.py", "sfcompile/options.py", "sfcompile/version.py", *PRIVATE_TORCH,
)  # fmt: skip

# The arrows of the house: which rooms a room may import, beside the leaves. Lowest room first: a room's arrows point
# upwards in this list, so there can be no circle. The heads of the rooms say the same.
ROOMS: dict[str, tuple[str, ...]] = {
    "runtime/program": (),
    "runtime/wires": ("runtime/program",),
    "runtime/rank": ("runtime/program", "runtime/wires"),
    "runtime/gpu": ("runtime/program", "runtime/wires", "runtime/rank"),
    "codegen/schedule": ("runtime/program",),
    "codegen/proof": ("runtime/program", "codegen/schedule"),
    "codegen/plan": ("runtime/program", "codegen/schedule", "codegen/proof"),
    "codegen/rows": (),
    "codegen/kernels": ("runtime/program", "runtime/wires", "codegen/schedule", "codegen/rows"),
    "codegen/toolchain": ("codegen/schedule", "codegen/rows", "codegen/kernels"),
    "codegen/engines": (
        "runtime/program",
        "runtime/wires",
        "runtime/rank",
        "codegen/schedule",
        "codegen/rows",
        "codegen/kernels",
        "codegen/toolchain",
    ),
    "passes/graph": ("runtime/program", "runtime/rank"),
    "passes/rules": ("runtime/program", "runtime/rank", "passes/graph"),
    "passes/report": ("runtime/program",),
    "passes": (
        "runtime/program",
        "runtime/wires",
        "runtime/rank",
        "codegen/schedule",
        "codegen/proof",
        "codegen/plan",
        "codegen/rows",
        "codegen/toolchain",
        "codegen/engines",
        "passes/graph",
        "passes/rules",
        "passes/report",
    ),
    "sfcompile/capture": ("runtime/rank",),
    "sfcompile/lowering": ("runtime/program", "runtime/rank", "passes", "sfcompile/capture"),
    "sfcompile/prediction": (
        "runtime/program",
        "codegen/schedule",
        "codegen/proof",
        "codegen/plan",
        "passes/graph",
        "passes/report",
        "passes",
        "sfcompile/capture",
    ),
    "sfcompile/tracing": ("runtime/program", "runtime/rank", "codegen/plan", "passes/report", "sfcompile/prediction"),
    "sfcompile/measuring": (
        "runtime/program",
        "runtime/wires",
        "runtime/rank",
        "codegen/schedule",
        "codegen/proof",
        "codegen/toolchain",
        "codegen/engines",
    ),
    "sfcompile": (
        "runtime/program",
        "runtime/wires",
        "runtime/rank",
        "runtime/gpu",
        "codegen/schedule",
        "codegen/proof",
        "codegen/plan",
        "codegen/toolchain",
        "codegen/engines",
        "passes/graph",
        "passes/rules",
        "passes/report",
        "passes",
        "sfcompile/capture",
        "sfcompile/lowering",
        "sfcompile/tracing",
        "sfcompile/measuring",
    ),
    "sfcompile/package": (
        "runtime/program",
        "runtime/wires",
        "runtime/rank",
        "codegen/schedule",
        "codegen/proof",
        "passes",
        "sfcompile/capture",
        "sfcompile/lowering",
        "sfcompile",
    ),
    "sfcompile/commands": (
        "runtime/program",
        "runtime/rank",
        "runtime/gpu",
        "codegen/schedule",
        "codegen/plan",
        "codegen/toolchain",
        "codegen/engines",
        "passes/report",
        "sfcompile/measuring",
        "sfcompile/prediction",
        "sfcompile/package",
    ),
}
# It loads the rooms on first use, so it stands above them all; nothing imports a name from it but the version.
TOP = "sfcompile/__init__.py"
# As does what `python -m sfcompile` runs: the command line.
MAIN = "sfcompile/__main__.py"

# Inside passes/ the prefix is the kind; the files without one join the passes, in this order.
KINDS = ("analyse", "choose", "place", "rewrite", "order", "fuse", "build", "report")
JOINERS = ("state", "pipeline", "runner")
MAX_LINES = 500
# They say how a value came here, and not what it is.
EMPTY_NAMES = {"found", "made", "given"}
# The worker of the demo runs one particular model of a library, so it has to name it.
NAMES_A_MODEL = ("sfcompile/commands/demo_worker.py",)
MODEL_NAME = re.compile(
    r"(?<![A-Za-z])((?i:flux|pixart|cogvideo|wan2|wan_|hunyuan|qwen|sd3|lumina|mochi|ltx|sana|hidream|latte|cosmos)"
    r"(?![a-z])|Wan[A-Z])"
)

SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return name_of(path.parent)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its full name."""
    named = {}
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "sfcompile" else ("sfcompile", *parts)
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


@cache
def imported_modules(path: Path) -> tuple[str, ...]:
    """Full names of all imported modules, wherever the import stands (a function, TYPE_CHECKING, import_module).

    ``from a.b import c`` gives a.b.c where c is a module of ours or where a.b is none of ours, else a.b.
    """
    names: list[str] = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.append(full if full in modules() or node.module not in modules() else node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if name_of(path) == TOP:  # loaded by name, on first use
        names += [
            text.value for text in ast.walk(parse(path)) if isinstance(text, ast.Constant) and text.value in modules()
        ]
    return tuple(names)


def own_imports(path: Path) -> Iterator[Path]:
    for module in imported_modules(path):
        if module in modules():
            yield modules()[module]


def offenders(lines: list[str]) -> None:
    assert not lines, "\n" + "\n".join(sorted(set(lines)))


def test_rooms_are_the_folders() -> None:
    folders = {room_of(path) for path in SOURCES} - {"codegen", "runtime"}
    assert folders == set(ROOMS)
    # The two folders that hold rooms only hold nothing else.
    offenders([name_of(p) for p in SOURCES if room_of(p) in ("codegen", "runtime") and p.name != "__init__.py"])


def test_every_room_has_a_head() -> None:
    bad = []
    for room in [*ROOMS, "codegen", "runtime"]:
        head = ast.get_docstring(parse(ROOT / room / "__init__.py")) or ""
        lines = [line for line in head.splitlines() if line.strip()]
        if not 5 <= len(head.splitlines()) <= 15:
            bad.append(f"{room}/__init__.py: a head of {len(lines)} lines; it takes 5 to 15")
        for file in re.findall(r"(?<![\w/])(\w+\.py)\b", head):
            if not (ROOT / room / file).is_file() and room not in ("codegen", "runtime"):
                bad.append(f"{room}/__init__.py names {file}, which is not there")
        if room in ROOMS and room != "sfcompile":  # the door's own head is that of the whole package
            said = re.findall(r"[a-z]+(?:/[a-z]+)?", head.partition("May import: the leaves")[2].partition(".")[0])
            rooms = {word for word in said if word in ROOMS}
            if "May import: the leaves" not in head or rooms != set(ROOMS[room]):
                bad.append(f"{room}/__init__.py: its head says {sorted(rooms)}, ROOMS says {sorted(ROOMS[room])}")
    offenders(bad)


def test_imports_follow_the_arrows() -> None:
    above = list(ROOMS)
    bad = []
    for path in SOURCES:
        room, name = room_of(path), name_of(path)
        if name in LEAVES:
            torch = ("torch",) if name in PRIVATE_TORCH else ()
            allowed = {*sys.stdlib_module_names, *torch, *(f"sfcompile.{Path(leaf).stem}" for leaf in LEAVES)}
            for module in imported_modules(path):
                if not {module, module.split(".")[0], ".".join(module.split(".")[:2])} & allowed:
                    bad.append(f"{name} is a leaf and imports {module}")
            continue
        if name in (TOP, MAIN) or room not in ROOMS:
            continue
        bad += [
            f"{room} -> {other} points down the list"
            for other in ROOMS[room]
            if other not in above[: above.index(room)]
        ]
        for other in own_imports(path):
            target = room_of(other)
            if target != room and target not in ROOMS[room] and name_of(other) not in (*LEAVES, TOP):
                bad.append(f"{room} -> {target}: {name} imports {name_of(other)}")
    offenders(bad)


def test_every_arrow_is_used() -> None:
    sources = [path for path in SOURCES if name_of(path) not in (TOP, MAIN)]
    used = {(room_of(path), room_of(other)) for path in sources for other in own_imports(path)}
    given = {(room, other) for room, others in ROOMS.items() for other in others}
    offenders([f"{room} may import {other}, and does not" for room, other in given - used])


def test_there_is_no_circle() -> None:
    graph = networkx.DiGraph()
    for path in SOURCES:
        graph.add_edges_from((name_of(path), name_of(other)) for other in own_imports(path) if other != path)
    circles = [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]
    offenders([" <-> ".join(circle) for circle in circles])


def test_passes_are_in_order() -> None:
    """A pass imports earlier kinds only, and nothing that joins them but the state that they share."""
    order = {name: i for i, name in enumerate((*KINDS, *JOINERS[1:]))}
    bad = []
    for path in (ROOT / "passes").glob("*.py"):
        prefix = path.stem if path.stem in JOINERS else path.stem.split("_")[0]
        if path.stem in ("__init__", "state"):
            continue
        if prefix not in order:
            bad.append(f"{name_of(path)} begins with no kind: {', '.join(KINDS)}")
            continue
        for other in own_imports(path):
            if room_of(other) != "passes" or other.stem in ("__init__", "state"):
                continue
            theirs = other.stem if other.stem in JOINERS else other.stem.split("_")[0]
            if order.get(theirs, 0) > order[prefix]:
                bad.append(f"{name_of(path)} imports {name_of(other)}, which comes later")
    offenders(bad)


def test_private_torch_in_one_file() -> None:
    bad = []
    for path in SOURCES:
        if name_of(path) in (*PRIVATE_TORCH, TORCH_LOGS):
            continue
        for module in imported_modules(path):
            parts = module.split(".")[:-1]  # the last part may be a plain name
            if parts[:1] == ["torch"] and any(part.startswith("_") for part in parts[1:]):
                bad.append(f"{name_of(path)} imports {module}")
        text = re.sub(r"\"\"\".*?\"\"\"", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for used in re.finditer(r"\btorch(\.\w+)*\._(?!_)\w+", text):
            if not used[0].startswith(("torch.ops.", "torch.library.")):
                bad.append(f"{name_of(path)} uses {used[0]}")
    offenders([f"{line}; it belongs in {PRIVATE_TORCH[0]}" for line in bad])


def test_style_that_tools_do_not_check() -> None:
    bad = []
    for path in SOURCES + TESTS:
        text, tree, name = path.read_text(encoding="utf-8"), parse(path), name_of(path)
        if text.count("\n") > MAX_LINES:
            bad.append(f"{name} has more than {MAX_LINES} lines")
        if len(tree.body) > 1 and "from __future__ import annotations" not in text:  # more than a docstring
            bad.append(f"{name} lacks the annotations import")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                bad.append(f"{name}:{node.lineno} is a relative import")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    bad.append(f"{name}:{node.lineno} {node.name}: no type for {bare or 'what it returns'}")
    offenders(bad)


def test_the_list_of_passes_is_short_and_no_class_takes_anothers_name() -> None:
    lines = (ROOT / "passes" / "pipeline.py").read_text(encoding="utf-8").count("\n")
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name_of(path))
    bad = [f"class {name} stands in {', '.join(files)}" for name, files in places.items() if len(files) > 1]
    offenders(bad + [f"passes/pipeline.py has {lines} lines, 80 or more"] * (lines >= 80))


def test_names_say_what_they_hold() -> None:
    bad = []
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            names = [getattr(node, field, None) for field in ("id", "arg", "attr", "name")]
            if set(names) & EMPTY_NAMES:
                bad.append(f"{name_of(path)}:{node.lineno} {next(name for name in names if name)}: of what?")  # type: ignore[attr-defined]
    offenders(bad)


def test_no_model_is_named() -> None:
    bad = []
    for path in SOURCES:
        if name_of(path) not in NAMES_A_MODEL:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if MODEL_NAME.search(line):
                    bad.append(f"{name_of(path)}:{number} names a model: {line.strip()}")
    offenders(bad)


def test_each_source_has_its_test_and_each_test_its_source() -> None:
    sources = {name_of(path) for path in SOURCES if path.name != "__init__.py"}
    tested = {
        f"{room_of(path).removeprefix('tests/')}/{path.stem.removeprefix('test_')}.py"
        for path in TESTS
        if path.stem.startswith("test_") and path.relative_to(ROOT).parts[1] in FOLDERS
    }
    offenders([f"{name} has no test" for name in sources - tested])
    offenders([f"a test of {name}, which is not there" for name in tested - sources])
    gone = [name for name in (*LEAVES, *NAMES_A_MODEL, TOP, MAIN) if not (ROOT / name).is_file()]
    offenders([f"a list in this test names {name}, which is gone" for name in gone])


def test_declared_packages_are_the_folders() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {room_of(path) for path in SOURCES}
    named = {f if f.startswith("sfcompile") else f"sfcompile/{f}" for f in folders}
    assert set(tool["package-dir"].values()) == set(FOLDERS)
    assert sorted(tool["packages"]) == sorted(name.replace("/", ".") for name in named)


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
