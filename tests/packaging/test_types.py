"""The public API under mypy --strict, as a user's script sees it; names for completion; errors alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sfcompile

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("passes", "codegen", "runtime")

USER = """
import torch

import sfcompile
from sfcompile import errors, extend


def main(model: torch.nn.Module, x: torch.Tensor) -> None:
    explanation = sfcompile.explain(model, x, topology="1x2")
    reveal_type(explanation.to_html())
    reveal_type(sfcompile.simulate(model, x, topology="1x2").step_s)
    reveal_type(sfcompile.export(model, (x,), None, "p.sf", topology="1x2"))
    reveal_type(sfcompile.load("p.sf"))
    for step in sfcompile.progress([1, 2]):
        reveal_type(step)
    with sfcompile.trace("traces") as trace:
        reveal_type(trace.report)
    reveal_type(sfcompile.backend.last_report())
    reveal_type(sfcompile.__version__)
    try:
        extend.register_topology("lab", nics_per_machine=2)
    except errors.OptionError as error:
        reveal_type(error.fix)
    sfcompile.compile_repeated_blocks(model, options={"placement": "shard"}, dynamic=True)
    sfcompile.compile_pipeline(object(), components={"vae": None})
    sfcompile.load_sharded(sfcompile.shard_weights(model), ["model.safetensors"])
    extend.register_attention("lib::attend", lambda args: extend.AttentionCall(args["q"], args["k"], args["v"]))
    extend.register_per_head_attention("lib::sparse", lambda args: extend.Dims({"q": "BHLD"}, out="BHLD"))
    extend.register_pass(lambda state: None, "count", needs=["local"])
    sfcompile.explane(model)
    sfcompile.load(path=3)
"""
# Line by line, without torch's own types (it is left out, as reading it takes a minute).
REVEALED = [
    "str",
    "float",
    "pathlib.Path",
    "sfcompile.package.model.LoadedModel",
    "int",
    "sfcompile.tracing.report.TraceReport | None",
    "sfcompile.passes.report.report.GraphReport | None",
    "str",
    "str",
]
CONFIG = """
[mypy]
strict = true
[mypy-sfcompile.*]
follow_imports = silent
[mypy-torch.*,networkx.*,sympy.*,numpy.*,triton.*,matplotlib.*,safetensors.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_a_users_script_is_checked_strictly(tmp_path: Path) -> None:
    """The tree that a wheel would have, of links, as type checkers know no ``__path__``."""
    package = tmp_path / "tree" / "sfcompile"
    package.mkdir(parents=True)
    for path in [*(ROOT / "sfcompile").iterdir(), *(ROOT / folder for folder in FOLDERS)]:
        (package / path.name).symlink_to(path)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"]
    environment = {"MYPYPATH": str(tmp_path / "tree"), "PATH": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    lines = done.stdout.splitlines()
    revealed = [line.split('"')[1].removeprefix("builtins.") for line in lines if "Revealed type is" in line]
    assert revealed == REVEALED, done.stdout + done.stderr
    wrong = [line.partition("error: ")[2] for line in lines if " error: " in line]
    assert len(wrong) == 2, done.stdout
    assert 'has no attribute "explane"' in wrong[0] and '"path" to "load"' in wrong[1], wrong


def test_public_names_complete_and_load_what_they_say(tmp_path: Path) -> None:
    names = set(sfcompile.__all__)
    assert {name for name in dir(sfcompile) if not name.startswith("__")} | {"__version__"} == names
    assert names >= {"explain", "export", "load", "progress", "simulate", "trace", "errors", "extend"}
    for name in sfcompile.__all__:
        assert getattr(sfcompile, name) is not None
    code = "from sfcompile import *; assert callable(explain) and callable(trace) and extend.register_pass"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_errors_and_names_come_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, sfcompile\n"
        "assert issubclass(sfcompile.errors.OptionError, sfcompile.errors.StreamFusionError)\n"
        "assert 'explain' in dir(sfcompile) and not hasattr(sfcompile, 'explane')\n"
        "from sfcompile.errors import PeerDiedError\n"
        "assert not {'torch', 'numpy', 'sympy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
