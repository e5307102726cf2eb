"""``sfcompile export``: a package from the command line, and what a package says of itself."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sfcompile.commands import screen
from sfcompile.commands.checks import check_function, check_readable, check_writable
from sfcompile.commands.own_code import own_code
from sfcompile.commands.parsing import add_model_name
from sfcompile.errors import OptionError
from sfcompile.options import WIRES

INNERS = ("auto", "inductor", "eager", "aoti")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments. Needs no torch."""
    parser.usage = (
        "sfcompile export MODEL --topology NxM --out FILE [--weights FILE] [--inner HOW] [--placement HOW]\n"
        "                        [--wire HOW]\n"
        "       sfcompile export --show FILE"
    )
    add_model_name(
        parser,
        "file.py:function or module:function; called without arguments, it returns (model, args) or "
        "(model, args, kwargs)",
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="check a package and print what it holds")
    parser.add_argument("--topology", help='"NxM", "NxM:preset" or a file: the ranks that will run it')
    parser.add_argument("--out", type=Path, help="the package to write")
    parser.add_argument("--weights", default="inside", help="a safetensors file beside the package (default inside)")
    parser.add_argument("--inner", choices=INNERS, default="auto", help="what runs the local graph (default auto)")
    parser.add_argument("--placement", choices=("auto", "shard"), default="auto", help="as in the backend's options")
    parser.add_argument("--wire", choices=WIRES, default="same", help="as in the backend's options")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code.

    Raises:
        StreamFusionError: see sfcompile.export.
    """
    if args.show is not None:
        check_readable(args.show, "--show")
        return show(args.show)
    if not (args.model and args.topology and args.out):
        print("sfcompile export: needs MODEL, --topology and --out; or --show FILE", file=sys.stderr)
        return 2
    from sfcompile.runtime.program.topology import Topology

    if args.topology != "auto":  # export itself says what is wrong with that
        Topology.parse(args.topology)
    check_writable(args.out, "--out")
    check_function(args.model)
    from sfcompile.package.export import export

    model, inputs, kwargs = made_by(args.model)
    with own_code(f"{args.model} is traced, and", alone=False):
        path = export(
            model, inputs, kwargs, args.out, topology=args.topology, weights=args.weights, inner=args.inner,
            placement=args.placement, wire=args.wire,
        )  # fmt: skip
    print(f"wrote {path}, {path.stat().st_size / 2**20:.1f} MiB")
    return show(path)


def made_by(text: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What the function that is named makes: a model, and the arguments that it is called with.

    Raises:
        OptionError: there is no such function, or it returns something else.
    """
    factory = find(text)
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:  # or it is nothing that can be called
        raise OptionError(
            f"{text} is no function without arguments: {error}", "It is called to make the model", "Give them defaults"
        ) from error
    with own_code(f"{text} is called without arguments to make a model, and"):
        returned = factory()
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        raise OptionError(
            f"{text} returned one object, of class {type(returned).__name__}",
            "It is called to say which model is meant and how that is called",
            "Return (model, args) or (model, args, kwargs)",
        )
    model, inputs, kwargs = (*returned, {})[:3]
    odd = [
        f"{type(value).__name__} in place of {what}"
        for value, what, fits in (
            (model, "the model", callable(model)),
            (inputs, "the tuple of its inputs", isinstance(inputs, tuple | list)),
            (kwargs, "a dict", isinstance(kwargs, Mapping)),
        )
        if not fits
    ]
    if odd:
        raise OptionError(
            f"{text} returned {' and '.join(odd)}",
            "(model, args) or (model, args, kwargs) is what it should return",
            "for one input x write return model, (x,)",
        )
    return model, inputs, kwargs


def find(text: str) -> Callable[[], Any]:
    """The function that ``file.py:name`` or ``module:name`` names.

    Raises:
        OptionError: there is none.
    """
    source, _, name = text.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(Path(source).resolve().parent))  # as python does for a script
            with own_code(f"{source} is loaded to find {name!r}, and"):
                spec.loader.exec_module(module)
        elif not _is_there(source):
            raise AttributeError(f"there is no module {source!r}")
        else:
            with own_code(f"{source} is imported to find {name!r}, and"):
                module = importlib.import_module(source)
        factory: Callable[[], Any] = getattr(module, name)
    except AttributeError as error:
        raise OptionError(
            f"model {text!r} cannot be found: {error}",
            "it names a function",
            "write file.py:function or module:function",
        ) from error
    return factory


def _is_there(module: str) -> bool:
    with suppress(ImportError, ValueError):  # of a package that it would be in
        return importlib.util.find_spec(module) is not None
    return False


def show(path: Path) -> int:
    """Check every member of a package and print what it holds."""
    from sfcompile.package.file import Package

    package = Package(path)
    manifest = package.manifest
    weights = manifest["weights"]
    lines = [
        f"{manifest['model']} for {manifest['ranks']} ranks on machines {manifest['machine_of']}, {manifest['mesh']}",
        f"plan: {manifest['plan']}",
        f"runs: {manifest['inner']}; written by {', '.join(f'{k} {v}' for k, v in manifest['versions'].items())}",
        f"weights: {len(weights['tensors'])} tensors {weights['file'] or 'inside'}",
    ]
    for i, facts in enumerate(manifest["signature"]["tensors"]):
        lines.append(f"input {i}: {facts['dtype']}{facts['shape']}")
    for name, entry in manifest["members"].items():
        package.read(name)
        lines.append(f"  {name:<28}{entry['bytes']:>12} bytes  sha256 {entry['sha256'][:12]}")
    screen.show("\n".join(lines))
    return 0
