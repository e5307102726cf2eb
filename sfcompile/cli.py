"""The command line: `sfcompile demo | run | simulate | doctor | export`, and the commands that later versions bring."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfcompile import __version__, export_command
from sfcompile.demo import DemoConfig, run_demo
from sfcompile.errors import StreamFusionError
from sfcompile.launch import launch
from sfcompile.options import INNERS, SCHEDULES

LATER = {
    "explain": "the plan of a model for a topology, in one process without GPUs",
    "kernels": "the generated attention kernels",
}
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of ours are printed without a traceback."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command in LATER:
        print(f"sfcompile: '{args.command}' is not in version {__version__}; it arrives later.", file=sys.stderr)
        return EXIT_USAGE
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return {"demo": _demo, "run": _run, "simulate": _simulate, "doctor": _doctor, "export": export_command.run}[
            args.command
        ](args)
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
    _add_simulate(
        commands.add_parser("simulate", help="plan a model for a topology and predict its step, no GPU needed")
    )
    _add_doctor(commands.add_parser("doctor", help="measure what ranks of this machine can compute and move"))
    export_command.add_arguments(
        commands.add_parser("export", help="write a model's program for all ranks to one file")
    )
    for name, text in LATER.items():
        commands.add_parser(name, help=f"(arrives later) {text}", add_help=False)
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
        parser.add_argument(f"--{name}", type=_positive, default=value, help=f"{text} (default {value})")
    parser.add_argument(
        "--inner", choices=INNERS, default=default.inner, help=f"what runs the local graph (default {default.inner})"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sfcompile run --ranks N [--machines M] [--logs DIR] (script.py | -m module) [args ...]"
    parser.add_argument("--ranks", type=_positive, required=True, help="processes to start")
    parser.add_argument(
        "--machines", type=_positive, default=1, help="machines that the ranks believe they sit on (default 1)"
    )
    parser.add_argument("--logs", type=Path, help="directory for the output of ranks 1 and up")
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, not a script")
    parser.add_argument("argv", nargs=argparse.REMAINDER, help="the script or module and its arguments")


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paper", action="store_true", help="the StreamFusion paper's table, predicted and published")
    parser.add_argument(
        "--model", help="a transformer class of diffusers, by the start of its name; full size, no weights"
    )
    parser.add_argument("--tokens", type=_positive, default=4096, help="tokens of the noisy input (default 4096)")
    parser.add_argument("--text", type=_positive, default=512, help="text tokens (default 512)")
    parser.add_argument("--batch", type=_positive, default=1, help="samples at a time (default 1)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--topology", default="4x8:a100-efa", help='"NxM", "NxM:preset" or a file (default 4x8:a100-efa)'
    )
    parser.add_argument("--schedule", choices=SCHEDULES, default="auto", help="only plans of this kind")
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="folder for the picture and the trace (default: here)"
    )


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure", action="store_true", help="run short transfers and matmuls on all ranks and write a topology file"
    )
    parser.add_argument("--ranks", type=_positive, default=2, help="processes to start (default 2)")
    parser.add_argument(
        "--machines", type=_positive, default=1, help="machines that the ranks believe they sit on (default 1)"
    )
    parser.add_argument("--out", type=Path, default=Path("cluster.toml"), help="the file (default cluster.toml)")


def _doctor(args: argparse.Namespace) -> int:
    if not args.measure:
        print("sfcompile doctor: say --measure; checks of the installation arrive later", file=sys.stderr)
        return EXIT_USAGE
    where = f"{args.ranks} ranks of this machine"
    if args.machines > 1:
        where += f", which believe they sit on {args.machines} machines"
    print(f"measuring {where}; on a cluster run torchrun ... -m sfcompile.measure instead", flush=True)
    return launch(["-m", "sfcompile.measure", "--out", str(args.out.absolute())], args.ranks, args.machines)


def _simulate(args: argparse.Namespace) -> int:
    # Imported here: the other commands must start without torch.
    if args.paper:
        from sfcompile.paper import format_table, predict_table

        print(format_table(predict_table()))
        return 0
    if not args.model:
        print("sfcompile simulate: say --paper, or name a model with --model", file=sys.stderr)
        return EXIT_USAGE
    import torch

    from sfcompile.meta_model import build_meta_model
    from sfcompile.predict import simulate
    from sfcompile.runtime.topology import Topology

    topology = Topology.parse(args.topology)
    built = build_meta_model(args.model, args.tokens, args.batch, args.text)
    dtype = getattr(torch, args.dtype)
    kwargs = {key: _cast(value, dtype) for key, value in built.kwargs.items()}
    prediction = simulate(
        # nn.Module's own: diffusers' warns of modules that it would keep in fp32, and nothing is computed here.
        torch.nn.Module.to(built.model, dtype),
        topology=topology,
        schedule=args.schedule,
        name=built.class_name,
        **kwargs,
    )
    print(prediction)
    shape = re.sub(r"[^\w]+", "-", args.topology)
    for path in prediction.write(args.out / f"{args.model}-{args.tokens}-{shape}"):
        print(f"wrote {path}")
    return 0


def _cast(value: Any, dtype: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(entry, dtype) for entry in value)
    is_float = getattr(value, "is_floating_point", None)
    return value.to(dtype) if is_float is not None and is_float() else value


def _demo(args: argparse.Namespace) -> int:
    values = {key: value for key, value in vars(args).items() if key != "command"}
    return run_demo(DemoConfig(**values))


def _run(args: argparse.Namespace) -> int:
    if not args.argv:
        print("sfcompile run: name a script to run, e.g. sfcompile run --ranks 4 script.py", file=sys.stderr)
        return EXIT_USAGE
    argv = ["-m", *args.argv] if args.module else args.argv
    return launch(argv, args.ranks, args.machines, log_dir=args.logs)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
