"""The command line: `sfcompile demo | run | explain | simulate | kernels | export | doctor | completion`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sfcompile.commands import export as export_command
from sfcompile.commands import kernels as kernels_command
from sfcompile.commands.completion import completion_script
from sfcompile.commands.demo import DemoConfig, run_demo
from sfcompile.commands.doctor import add_doctor, run_doctor
from sfcompile.commands.launch import check_places, launch
from sfcompile.commands.models import (
    EXIT_USAGE,
    add_explain,
    add_model,
    add_simulate,
    positive,
    run_explain,
    run_simulate,
)
from sfcompile.commands.parsing import Parser, model_name
from sfcompile.commands.screen import show_error
from sfcompile.errors import OptionError, StreamFusionError
from sfcompile.options import INNERS
from sfcompile.version import __version__

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of ours are printed without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not words:
        parser.print_help()
        return 0
    args, rest = parser.parse_known_args(words)
    if rest:
        parser.commands[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if "name" in args:
            args.model = model_name(args)
        return _COMMANDS[args.command](args)
    except StreamFusionError as error:
        show_error(str(error))
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


class CommandLine(Parser):
    """The parser of ``sfcompile`` and, in ``commands``, those of its commands by name."""

    commands: dict[str, Parser]


def build_parser() -> CommandLine:
    """The whole command line."""
    parser = CommandLine(
        prog="sfcompile",
        description='Tools around torch.compile(model, backend="streamfusion").',
        epilog="sfcompile COMMAND --help says more. Exit codes: 0, 1 for a problem found, 2 for a bad argument, or the "
        "code of the rank that failed first.",
    )
    parser.add_argument("--version", action="version", version=f"sfcompile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    parser.commands = commands.choices
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
    commands.add_parser("completion", help='completion for bash and zsh: eval "$(sfcompile completion)"')
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
    parser.description = (
        "Start a program once per rank, as torchrun does but faster: the ranks get torchrun's environment. Rank 0 "
        "writes to this terminal and reads from it, so breakpoint() works there; the others wait for it, up to the "
        "backend's timeout_s. Ctrl-C and the first rank that fails end all ranks; the end of that rank's log is shown."
    )
    parser.epilog = (
        "Put our options before the script: what follows it is the script's own. Every rank computes with an equal "
        "share of the cores (OMP_NUM_THREADS, if it is not set). Exit code: 0, or that of the rank that failed first "
        "(128 + the signal's number if a signal ended it). Several machines: torchrun --nnodes."
    )
    parser.add_argument("--ranks", type=positive, required=True, help="processes to start, over all machines")
    parser.add_argument(
        "--machines", type=positive, default=1, help="machines that the ranks believe they sit on (default 1)"
    )
    parser.add_argument(
        "--logs",
        type=Path,
        help="directory for the output of ranks 1 and up, rank1.log and so on (default: temporary, kept on failure)",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, not a script")
    parser.add_argument("argv", nargs=argparse.REMAINDER, help="the script or module and its arguments")


def _demo(args: argparse.Namespace) -> int:
    values = {key: value for key, value in vars(args).items() if key != "command"}
    return run_demo(DemoConfig(**values))


def _run(args: argparse.Namespace) -> int:
    if not args.argv:
        print("sfcompile run: name a script to run, e.g. sfcompile run --ranks 4 script.py", file=sys.stderr)
        return EXIT_USAGE
    check_places(args.ranks, args.machines)
    if not args.module and not Path(args.argv[0]).exists():
        raise OptionError(
            f"The script {args.argv[0]} is not there",
            "No rank was started",
            "Name a file, or a module with -m; options of sfcompile run stand before it",
        )
    argv = ["-m", *args.argv] if args.module else args.argv
    return launch(argv, args.ranks, args.machines, log_dir=args.logs)


def _completion(args: argparse.Namespace) -> int:
    print(completion_script(build_parser().commands), end="")
    return 0


_COMMANDS = {
    "demo": _demo,
    "run": _run,
    "simulate": run_simulate,
    "explain": run_explain,
    "doctor": run_doctor,
    "kernels": kernels_command.run,
    "export": export_command.run,
    "completion": _completion,
}
