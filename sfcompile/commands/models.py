"""The commands about a model by its name, ``sfcompile simulate`` and ``sfcompile explain``: arguments and what they do.

Torch is imported when a command runs: the command line itself must stay quick.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfcompile.commands.checks import check_folder, check_function, check_writable
from sfcompile.commands.export import made_by
from sfcompile.commands.model_names import check_model_name
from sfcompile.commands.own_code import own_code
from sfcompile.commands.parsing import add_model_name
from sfcompile.commands.screen import show
from sfcompile.errors import OptionError
from sfcompile.options import PLACEMENTS, SCHEDULES, WEIGHTS, WIRES

if TYPE_CHECKING:
    import torch

    from sfcompile.prediction.predict import Prediction

EXIT_USAGE = 2


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_model(parser: argparse.ArgumentParser, named: bool = True) -> None:
    """Arguments that choose a model, its inputs, a topology and a schedule; ``named``: with the model itself."""
    if named:
        add_model_name(
            parser,
            "a transformer class of diffusers, by the start of its name: full size, no weights; or file.py:function of "
            "yours, which returns (model, args) or (model, args, kwargs)",
        )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of the model's config other than its default, e.g. num_layers=4; may be repeated",
    )
    parser.add_argument("--tokens", type=positive, default=4096, help="tokens of the noisy input (default 4096)")
    parser.add_argument("--text", type=positive, default=512, help="text tokens (default 512)")
    parser.add_argument("--batch", type=positive, default=1, help="samples at a time (default 1)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--topology", default="4x8:a100-efa", help='"NxM", "NxM:preset" or a file (default 4x8:a100-efa)'
    )
    parser.add_argument("--schedule", choices=SCHEDULES, default="auto", help="only plans of this kind")


def _add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--placement", choices=PLACEMENTS, default="auto", help="as in the backend's options")
    parser.add_argument("--wire", choices=WIRES, default="same", help="as in the backend's options")
    parser.add_argument("--weights", choices=WEIGHTS, default="whole", help="as in the backend's options")


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``sfcompile simulate``."""
    parser.add_argument("--paper", action="store_true", help="the StreamFusion paper's table, predicted and published")
    add_model(parser)
    _add_placement(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="folder for the picture and the trace (default: here)"
    )


def add_explain(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``sfcompile explain``."""
    parser.description = (
        "Trace a model on the meta device, run every pass for a topology, and show what each decided: sequence axes, "
        "plan with rejected candidates, bytes, predicted time, memory, what stays whole and why, this rank's graph."
    )
    add_model(parser)
    _add_placement(parser)
    parser.add_argument("--rank", type=int, default=0, help="whose graph is shown (default 0)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the explanation as one page that needs no net")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it for tools")
    parser.add_argument("--full", action="store_true", help="print every line, candidate and schedule")


def run_simulate(args: argparse.Namespace) -> int:
    """``sfcompile simulate``: the exit code."""
    if args.paper and args.model:
        raise OptionError(f"--paper and the model {args.model!r}", "The paper's table has models of its own", "Say one")
    if args.paper:
        from sfcompile.commands.paper import format_table, predict_table

        show(format_table(predict_table()))
        return 0
    if not args.model:
        print("sfcompile simulate: say --paper, or name a model by the start of its class's name", file=sys.stderr)
        return EXIT_USAGE
    check_folder(args.out, "--out")
    prediction = predicted(args)
    show(str(prediction))
    shape = re.sub(r"[^\w]+", "-", args.topology)
    stem = prediction.name if ":" in args.model else f"{args.model}-{args.tokens}"
    for path in prediction.write(args.out / f"{stem}-{shape}"):
        print(f"wrote {path}")
    return 0


def predicted(args: argparse.Namespace) -> Prediction:
    """The plan of the model that the arguments choose.

    Raises:
        StreamFusionError: no such model, topology or plan.
    """
    from sfcompile.runtime.program.topology import Topology

    topology = Topology.parse(args.topology)
    check_model(args)
    from sfcompile.prediction.predict import simulate

    name, model, inputs, kwargs = _built(args)
    with own_code(f"{args.model} is traced, and", alone=False):
        return simulate(model, args=inputs, kwargs=kwargs, topology=topology, options=_options(args), name=name)


def run_explain(args: argparse.Namespace) -> int:
    """``sfcompile explain``: the exit code."""
    if not args.model:
        print(
            "sfcompile explain: name a model by the start of its class's name, or one of your own as file.py:function",
            file=sys.stderr,
        )
        return EXIT_USAGE
    from sfcompile.runtime.program.topology import Topology

    ranks = Topology.parse(args.topology).num_ranks
    if not 0 <= args.rank < ranks:
        raise OptionError(f"There is no rank {args.rank}", f"{args.topology} has ranks 0 to {ranks - 1}", "Name one")
    check_model(args)
    for path, argument in ((args.html, "--html"), (args.json, "--json")):
        if path is not None:
            check_writable(path, argument)
    from sfcompile.prediction.explain import explain

    name, model, inputs, kwargs = _built(args)
    with own_code(f"{args.model} is traced, and", alone=False):
        explanation = explain(
            model, args=inputs, kwargs=kwargs, topology=args.topology, options=_options(args), rank=args.rank, name=name
        )
    show(explanation.full() if args.full else str(explanation))
    for path, write in ((args.html, explanation.to_html), (args.json, explanation.to_json)):
        if path is not None:
            write(path)
            print(f"wrote {path}")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The backend's, of those that a command takes."""
    return {key: getattr(args, key) for key in ("schedule", "placement", "wire", "weights")}


def check_model(args: argparse.Namespace) -> None:
    """What can be known of the model's name and config before it is built.

    Raises:
        OptionError: no such class or file, a bad field, or fields for a model that a function makes.
    """
    fields_of(args.config)
    if ":" not in args.model and not args.model.endswith(".py"):
        check_model_name(args.model)
        return
    if args.config:
        raise OptionError(
            f"--config is for models of diffusers, and {args.model} is a function",
            "It makes its model by itself",
            "Leave --config out",
        )
    check_function(args.model)


def _built(args: argparse.Namespace) -> tuple[str, torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Name, model, and positional and keyword inputs.

    A class of diffusers is built in the dtype asked for, on the meta device; what a function makes is taken as it is.
    """
    if ":" in args.model:
        model, inputs, named = made_by(args.model)
        return type(model).__name__, model, tuple(inputs), dict(named)
    import torch

    from sfcompile.commands.meta_model import build_meta_model

    dtype = getattr(torch, args.dtype)
    built = build_meta_model(args.model, args.tokens, args.batch, args.text, fields_of(args.config))
    kwargs = {key: _cast(value, dtype) for key, value in built.kwargs.items()}
    # nn.Module's own: diffusers' warns of modules that it would keep in fp32, and nothing is computed here.
    return built.class_name, torch.nn.Module.to(built.model, dtype), (), kwargs


def fields_of(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as fields of a config; values are Python literals, or text.

    Raises:
        OptionError: no ``=``, or no name before it.
    """
    fields: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(
                f"--config {pair!r} is no KEY=VALUE",
                "It sets one field of the model's config",
                "Write for example --config num_layers=4 --config 'patch_size=(1, 2, 2)'",
            )
        try:
            fields[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            fields[key] = text
    return fields


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(entry, dtype) for entry in value)
    is_float = getattr(value, "is_floating_point", None)
    return value.to(dtype) if is_float is not None and is_float() else value
