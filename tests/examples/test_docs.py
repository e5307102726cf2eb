"""Every command printed in docs/ and the pages beside it is run here, on smaller sizes where it is long, or looked at,
for a reason that its function states; and every link leads on.

Commands stand in fenced blocks without a language (or ``sh``) and in inline code. One that is not covered is a failure.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from example_table import EXAMPLES
from torch.nn import Identity

from sfcompile.commands import cli, meta_model
from sfcompile.commands import kernels as kernels_command
from sfcompile.commands.meta_model import MetaModel, find_class
from sfcompile.options import Options
from sfcompile.prediction import explained, predict
from sfcompile.prediction.explain import Explanation
from sfcompile.prediction.explained import Explained, ExplainedGraph
from sfcompile.runtime.program.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PROGRAMS = (
    "make", "sfcompile", "python", "torchrun", "pip", "pytest", "curl", "sbatch", "kubectl", "openssl", "eval",
)  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield found[1], found[2]


def commands() -> dict[str, str]:
    """Command -> the page that prints it."""
    found: dict[str, str] = {}
    for page in WITH_COMMANDS:
        text = page.read_text(encoding="utf-8")
        lines = [line for kind, body in blocks(page) if kind in ("", "sh") for line in joined(body).splitlines()]
        lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
        for line in lines:
            line = line.removeprefix("$ ").split("  #")[0].split("   ")[0].strip()
            words = line.split()
            if len(words) > 1 and words[0] in PROGRAMS and "|" not in line:
                found.setdefault(line, page.name)
    return found


def joined(body: str) -> str:
    return body.replace("\\\n", " ")


COMMANDS = commands()


def test_pages_print_commands() -> None:
    assert len(COMMANDS) >= 15, COMMANDS


def marked(command: str) -> object:
    """A doctor that measures starts ranks: once in ``make test``, with everything that it takes."""
    measures = "--measure" in command
    marks = [pytest.mark.ranks] if measures else []
    marks += [pytest.mark.thorough] if measures and "--out" not in command else []
    return pytest.param(command, marks=marks, id=command[:60])


@pytest.mark.parametrize("command", [marked(command) for command in COMMANDS])
def test_command(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = shlex.split(command)
    check = {
        "make": run_make,
        "sfcompile": run_sfcompile,
        "python": run_python,
        "torchrun": run_torchrun,
        "pip": run_pip,
        "pytest": run_pytest,
        "openssl": run_openssl,
        "eval": run_eval,
        "curl": run_curl,
        "sbatch": run_launch_file,
        "kubectl": run_launch_file,
    }
    monkeypatch.chdir(tmp_path)
    check[program](shlex.split(command)[1:], tmp_path, monkeypatch)


def run_make(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What make would run, without running it; the demo and the tests run elsewhere in this suite."""
    done = subprocess.run(["make", "-n", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(
        tool in done.stdout
        for tool in ("sfcompile", "pytest", "run_tests", "run_torture", "ruff", "rm -rf", "gpu_check", "mkdocs")
    ), done.stdout


def run_sfcompile(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; ranks are not started, but their script must be an example that test_examples.py starts."""
    started: list[tuple[list[str], int, int]] = []
    monkeypatch.setattr(
        cli, "launch", lambda argv, ranks, machines=1, **_: started.append((argv, ranks, machines)) or 0
    )
    monkeypatch.setattr(cli, "run_demo", lambda config: started.append(([], config.ranks, config.machines)) or 0)
    words = [str(ROOT / word) if word.startswith(("examples/", "benchmarks/")) else word for word in words]
    for word in words:
        if word in ("script.py", "count.py", "mine.py"):  # what the reader has saved
            (folder / word).touch()
    if words[0] in ("simulate", "explain") and "--paper" not in words:
        # Traced and planned at full size in tests/sfcompile/commands/test_cli.py.
        monkeypatch.setattr(
            meta_model, "build_meta_model", lambda name, *_: MetaModel(find_class(name).__name__, Identity(), {})
        )
        monkeypatch.setattr(predict, "simulate", lambda model, topology, **_: Planned())
        shown = Explanation("", "", Topology.parse("1x2"), 0, (), 0, 0.0)  # in tests/sfcompile/commands/test_models.py
        monkeypatch.setattr(importlib.import_module("sfcompile.prediction.explain"), "explain", lambda *_, **__: shown)
    if (
        words[0] == "kernels"
    ):  # compiled in tests/codegen/toolchain/test_listing.py and tests/sfcompile/commands/test_kernels.py
        from sfcompile.codegen.toolchain import listing as kernel_listing

        monkeypatch.setattr(kernel_listing, "write_kernels", lambda *args: [])
        monkeypatch.setattr(kernels_command, "sites_of", lambda args, topology: [])
    if "--show" in words:  # of the command before it on the page
        make_package(folder / words[-1])
    assert cli.main(words) == 0
    if words[0] == "run":
        ((argv, ranks, machines),) = started
        known_script(argv[0])
        assert ranks % machines == 0


class Planned:
    def write(self, stem: Path) -> list[Path]:
        return [stem]


def make_package(path: Path) -> None:
    model = str(ROOT / "examples" / "export_and_load.py") + ":make"
    assert cli.main(["export", model, "--topology", "1x2", "--out", str(path)]) == 0


def known_script(text: str) -> None:
    if text in ("count.py", "rule.py", "mine.py"):
        return  # of docs/first-pass.md and docs/getting-started.md, run by test_first_pass.py
    assert text == "script.py" or Path(text).stem in EXAMPLES, f"{text} is run by no test"


def known_module(name: str) -> None:
    module = importlib.import_module(name)
    tests = (ROOT / "tests").joinpath(*name.split(".")[:-1]) / f"test_{name.rsplit('.', 1)[-1]}.py"
    assert callable(module.main) and tests.is_file()


def run_python(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are run by test_examples.py; of benchmarks, the command line: every flag must exist."""
    if words[0] == "-m":  # each of these is run by the test of its own file
        return known_module(words[1] + ".__main__" * (words[1] == "sfcompile"))
    if words[0] == "rule.py":
        return known_script(words[0])
    path = ROOT / words[0]
    assert path.is_file(), path
    if path.parent.name == "examples":
        return known_script(words[0])
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    said: list[str] = []
    monkeypatch.setattr(
        "argparse.ArgumentParser.print_help", lambda parser, file=None: said.append(parser.format_help())
    )
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    inner = next((i for i, word in enumerate(words) if i and word.endswith(".py")), len(words))
    flags = [word for word in words[1:inner] if word.startswith("--")]
    assert all(flag in said[0] for flag in flags), (flags, said[0])
    if words[inner:]:  # a script that runs a script
        run_python(words[inner:], folder, monkeypatch)
    for script in (word for word in words[1:] if word.endswith(".py")):
        assert (ROOT / script).is_file(), script


def run_torchrun(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's own parser; ranks are started by it in tests/e2e/test_emulated_machines.py."""
    from torch.distributed.run import get_args_parser

    known_script(get_args_parser().parse_args(words).training_script)


def run_pip(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry: the Makefile's own installation is what all tests run in."""
    extras = re.findall(r"\[(\w+)\]", " ".join(words))
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in text for extra in extras)


def run_pytest(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are this suite's own tests: here, that they are there."""
    (path,) = (ROOT / word for word in words if word.endswith(".py"))
    assert words[words.index("-k") + 1] in path.read_text(encoding="utf-8")


def run_openssl(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ours, and not on every machine: what it prints is a secret of more than the 16 bytes that are asked for."""
    assert words[:2] == ["rand", "-hex"] and 2 * int(words[2]) >= 16


def run_eval(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated by bash in tests/sfcompile/commands/test_completion.py."""
    assert words == ["$(sfcompile completion)"]


def run_curl(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's answers are looked at in test_server.py; here, that it would understand this one."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    flag, body, address = words
    assert flag == "-d" and address.startswith("localhost:8000")
    assert importlib.import_module("serving.job").Job(json.loads(body)).steps > 0


def run_launch_file(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no cluster here. What the file says is tried in test_launch.py."""
    path = ROOT / words[-1]
    assert path.is_file() and path.parent == ROOT / "examples" / "launch"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_parses_and_links_lead_on(page: Path) -> None:
    for kind, body in blocks(page):
        if kind == "python":
            ast.parse(body)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []


def test_files_that_are_named_are_there() -> None:
    rooms = r"`((?:codegen|passes|runtime|sfcompile|benchmarks|tests|examples)/[\w/]+(?:\.py|/))`"
    named = [(page.name, path) for page in PAGES for path in re.findall(rooms, page.read_text(encoding="utf-8"))]
    assert [entry for entry in named if not (ROOT / entry[1]).exists()] == []


def test_the_page_of_kernels_names_every_file_on_their_way() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    files = [p for room in ("kernels", "toolchain", "engines") for p in (ROOT / "codegen" / room).glob("*.py")]
    assert [path.name for path in files if path.name != "__init__.py" and path.name not in text] == []


def test_the_readme_is_one_screen_and_points_at_nothing_below() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert not re.search(r"\bsee (below|above)\b", text)
    assert "make demo" in text and "make test" in text and "Nothing was run on a GPU" in text


def test_pages_that_begin_with_make_say_how_its_commands_come_on_the_path() -> None:
    for page in ("README.md", "docs/getting-started.md", "docs/first-pass.md"):
        assert "`. .venv/bin/activate`" in (ROOT / page).read_text(encoding="utf-8"), page


def test_pictures_of_pages_are_pictures() -> None:
    shown = [(page, name) for page in PAGES for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text("utf-8"))]
    assert shown
    for page, name in shown:
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG\r\n"), (page.name, name)
    drawn = {path.resolve() for path in (ROOT / "docs" / "pictures").iterdir()}
    assert drawn == {(page.parent / name).resolve() for page, name in shown}


def test_every_variable_of_the_environment_is_in_the_table_and_the_reverse() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    table = text.split("## Environment variables")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(SFCOMPILE_\w+)` \|", table, re.MULTILINE))
    used: set[str] = set()
    for folder in ("sfcompile", "passes", "codegen", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r"SFCOMPILE_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    assert listed == used


def test_every_option_is_in_the_table_and_the_reverse() -> None:
    table = (ROOT / "docs" / "options.md").read_text(encoding="utf-8").split("## Environment variables")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert listed == {entry.name for entry in fields(Options)} - {"mode", "group"}


def test_every_wish_of_users_is_met_or_says_what_is_missing() -> None:
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| (met|in part|not met) \| ([^|]+) \|$", text, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 18))


def test_the_keys_of_an_explanation_are_those_of_its_page() -> None:
    text = (ROOT / "docs" / "looking.md").read_text(encoding="utf-8")
    empty = Explained("", "", Topology.parse("1x2"), 0, (), 0, 0.0).to_dict()
    assert [key for key in empty if key not in ("format", "graphs") and f"`{key}`" not in text] == []
    graph = explained._plain_graph(ExplainedGraph(1, None))
    assert [key for key in graph if key not in ("graph", "groups", "step") and f".{key}" not in text] == []
