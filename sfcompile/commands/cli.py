"""The command line: `sfcompile demo | run | explain | simulate | kernels | export | doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sfcompile.commands import export as export_command
from sfcompile.commands import kernels as kernels_command
from sfcompile.commands.demo import DemoConfig, run_demo
from sfcompile.commands.doctor import add_doctor, run_doctor
from sfcompile.commands.launch import launch
from sfcompile.commands.models import (
    EXIT_USAGE,
    add_explain,
    add_model,
    add_simulate,
    positive,
    run_explain,
    run_simulate,
)
from sfcompile.errors import StreamFusionError
from sfcompile.options import INNERS
from sfcompile.version import __version__

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of ours are printed without a traceback."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _COMMANDS[args.command](args)
    except StreamFusionError as error:
        print(f"sfcompile: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="sfcompile", description='Tools around torch.compile(model, backend="streamfusion").'
    )
    parser.add_argument("--version", action="version", version=f"sfcompile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="a diffusion transformer on several ranks, checked against one process"))
    _add_run(commands.add_parser("run", help="start the ranks of a script on this machine"))
    add_simulate(
        commands.add_parser("simulate", help="plan a model for a topology and predict its step, no GPU needed")
    )
    add_explain(
        commands.add_parser("explain", help="what the compiler does with a model on a topology, and why, no GPU needed")
    )
    kernels = commands.add_parser("kernels", help="the generated kernels of a model or a shape, compiled without a GPU")
    kernels_command.add_arguments(kernels)
    add_model(kernels, named=False)
    add_doctor(commands.add_parser("doctor", help="what this machine has and ranks will use, problems and their cures"))
    export_command.add_arguments(
        commands.add_parser("export", help="write a model's program for all ranks to one file")
    )
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    default = DemoConfig()
    for name, text in (
        ("ranks", "processes"),
        ("machines", "machines that the ranks believe they sit on"),
        ("tokens", "image tokens"),
        ("text", "text tokens"),
        ("layers", "blocks with separate weights for text and image"),
        ("single-layers", "blocks with joint weights"),
        ("heads", "attention heads"),
        ("head-dim", "size of a head, a multiple of 8"),
        ("steps", "timed steps"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=positive, default=value, help=f"{text} (default {value})")
    parser.add_argument(
        "--inner", choices=INNERS, default=default.inner, help=f"what runs the local graph (default {default.inner})"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sfcompile run --ranks N [--machines M] [--logs DIR] (script.py | -m module) [args ...]"
    parser.add_argument("--ranks", type=positive, required=True, help="processes to start, over all machines")
    parser.add_argument(
        "--machines", type=positive, default=1, help="machines that the ranks believe they sit on (default 1)"
    )
    parser.add_argument("--logs", type=Path, help="directory for the output of ranks 1 and up")
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, not a script")
    parser.add_argument("argv", nargs=argparse.REMAINDER, help="the script or module and its arguments")


def _demo(args: argparse.Namespace) -> int:
    values = {key: value for key, value in vars(args).items() if key != "command"}
    return run_demo(DemoConfig(**values))


def _run(args: argparse.Namespace) -> int:
    if not args.argv:
        print("sfcompile run: name a script to run, e.g. sfcompile run --ranks 4 script.py", file=sys.stderr)
        return EXIT_USAGE
    argv = ["-m", *args.argv] if args.module else args.argv
    return launch(argv, args.ranks, args.machines, log_dir=args.logs)


_COMMANDS = {
    "demo": _demo,
    "run": _run,
    "simulate": run_simulate,
    "explain": run_explain,
    "doctor": run_doctor,
    "kernels": kernels_command.run,
    "export": export_command.run,
}
