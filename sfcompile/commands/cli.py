"""The command line: `sfcompile demo | run | explain | simulate | kernels | export | doctor | completion`."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sfcompile.commands import export as export_command
from sfcompile.commands import kernels as kernels_command
from sfcompile.commands.checks import check_folder
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

EXIT_INTERRUPTED, EXIT_NO_READER = 130, 141
"""128 and the number of the signal that would have ended a program which knows no better: Ctrl-C, a closed pipe."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of ours are printed without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if words[:1] == ["help"]:  # as git and docker have it
        words = [*words[1:2], "--help"]
    if not words:
        parser.print_help()
        return 0
    args, rest = parser.parse_known_args(words)
    if rest or args.command is None:
        (parser.commands[args.command] if args.command else parser).error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if "name" in args:
            args.model = model_name(args)
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except StreamFusionError as error:
        show_error(str(error))
        return EXIT_USAGE
    except OSError as error:
        return _nobody_reads(error)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # a bar that is being drawn, and ^C, stand on this line
        show_error("Interrupted." + " All ranks were ended." * (args.command in ("run", "demo")))
        return EXIT_INTERRUPTED


def _nobody_reads(error: OSError) -> int:
    """The exit code where nothing more can be written: the reader of a pipe has had enough, or a disk is full.

    Raises:
        OSError: something else.
    """
    if error.errno not in (errno.EPIPE, errno.ENOSPC):
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's end would say it once more
    if error.errno == errno.EPIPE:
        return EXIT_NO_READER
    show_error(
        f"The disk has no room left for {error.filename or 'what there is to say'}. Make some, or write elsewhere."
    )
    return 1


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
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
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
    completion = commands.add_parser("completion", help='completion for bash and zsh: eval "$(sfcompile completion)"')
    completion.add_argument("shell", nargs="?", choices=("bash", "zsh"), help="one script serves both")
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
    parser.usage = (
        "sfcompile run --ranks N [--machines M] [--logs DIR]\n                     (script.py | -m module) [args ...]"
    )
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
    # Not required for argparse, whose sentence would not say where it belongs.
    parser.add_argument("--ranks", type=positive, help="processes to start, over all machines")
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
    words = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if args.ranks is None:
        behind = any(word.partition("=")[0] == "--ranks" for word in words)
        raise OptionError(
            "--ranks stands behind the script" if behind else "--ranks is not said",
            "what follows the script is the script's own" if behind else "it is the number of processes to start",
            "Write sfcompile run --ranks 4 script.py",
        )
    if not words:
        raise OptionError("No script is named", "It runs once on every rank", "Write sfcompile run --ranks 4 script.py")
    check_places(args.ranks, args.machines)
    if not args.module:
        _check_script(Path(words[0]))
    if args.logs is not None:
        check_folder(args.logs, "--logs", create=True)
    return launch(["-m", *words] if args.module else words, args.ranks, args.machines, log_dir=args.logs)


def _check_script(script: Path) -> None:
    """That Python can run it: a file, or what holds a ``__main__.py``.

    Raises:
        OptionError: it cannot.
    """
    if (script.exists() and not script.is_dir()) or (script / "__main__.py").is_file():
        return
    python = re.fullmatch(r"python[\d.]*", script.name)
    raise OptionError(
        f"The script {script} is {'a folder without __main__.py' if script.is_dir() else 'not there'}",
        "No rank was started",
        "Leave python out: it runs the script on every rank"
        if python
        else "Name a file, or a module with -m; options of sfcompile run stand before it",
    )


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
