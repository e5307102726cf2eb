"""What a package says of itself, looked at entry by entry before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfcompile.options import INPUTS
from sfcompile.package.limits import (
    DTYPE_OF,
    SCHEDULES,
    check_facts,
    entries,
    integer,
    is_key,
    refused,
    shown,
    table,
    text,
)

INNERS = ("auto", "inductor", "eager", "aoti")
ATTENTIONS = ("auto", "aten", "triton")
_RANKS = 1 << 20
_DEVICES = ("cpu", "meta")


def check_manifest(manifest: Any) -> None:
    """
    Raises:
        PackageError: something is missing, of another kind, or names what is not there.
    """
    manifest = table(manifest, "the manifest")
    for name in ("model", "plan", "topology", "inner", "attention", "inputs"):
        text(manifest.get(name), f"the manifest's {name}", 1 << 20)
    for name, allowed in (("inner", INNERS), ("attention", ATTENTIONS), ("inputs", INPUTS)):
        if manifest[name] not in allowed:
            raise refused(f"its {name} is {shown(manifest[name])}, and not one of {', '.join(allowed)}")
    if manifest.get("native") is not None:
        text(manifest["native"], "the manifest's native")
    for version in ("sfcompile", "torch"):
        text(table(manifest.get("versions"), "versions").get(version), f"the version of {version}")
    ranks = integer(manifest.get("ranks"), "the number of ranks", 1, _RANKS)
    table(manifest.get("mesh"), "the mesh")
    for name in ("machine_of", "graphs"):
        if len(_numbers(manifest.get(name), f"the manifest's {name}")) != ranks:
            raise refused(f"its {name} is not for {ranks} ranks")
    programs = entries(manifest.get("programs"), "the ranks' programs", ranks)
    if len(programs) != ranks:
        raise refused(f"its programs are for {len(programs)} ranks of {ranks}")
    for mine in programs:
        if not all(map(is_key, entries(mine, "a rank's programs", SCHEDULES))) or len(set(mine)) != len(mine):
            raise refused("the key of a program is no key, or stands twice")
    _check_tensors(manifest)


def _check_tensors(manifest: Mapping[str, Any]) -> None:
    """Inputs, weights, placeholders, what is written and what is returned."""
    signature = table(manifest.get("signature"), "the signature")
    inputs = entries(signature.get("tensors"), "the inputs")
    for i, facts in enumerate(inputs):
        check_facts(facts, f"input {i}")
        if facts.get("device", "cpu") not in _DEVICES:
            raise refused(f"input {i} is on {shown(facts['device'])}")
    arguments = table(signature.get("arguments"), "the arguments")
    if not all(isinstance(name, str) and len(name) < 256 for name in arguments):
        raise refused("an argument has a name of more than 256 characters")
    positional = entries(signature.get("positional"), "the positional arguments")
    if not all(isinstance(name, str) and name in arguments for name in positional) or len(set(positional)) < len(
        positional
    ):
        raise refused("the positional arguments are not among the arguments")
    seen: list[int] = []
    for name, tree in arguments.items():
        check_tree(tree, len(inputs), f"argument {name}", seen)
    if sorted(seen) != list(range(len(inputs))):
        raise refused(f"the arguments do not hold each of {len(inputs)} inputs once")
    weights = table(table(manifest.get("weights"), "the weights").get("tensors"), "the weights")
    for name, facts in weights.items():
        check_facts(facts, f"weight {name[:200]}")
    if manifest["weights"].get("sha256") is not None:
        text(manifest["weights"]["sha256"], "the hash of the weights", 64)
    placeholders = entries(manifest.get("placeholders"), "the placeholders")
    for entry in placeholders:
        kind, source = entries(entry, "a placeholder", 2) if entry and len(entry) == 2 else (None, None)
        if kind == "input":
            integer(source, "a placeholder's input", 0, len(inputs) - 1)
        elif kind != "weight" or not isinstance(source, str) or source not in weights:
            raise refused(f"a placeholder is {shown(kind)} {shown(source)}")
    for place in _numbers(manifest.get("written"), "what is written"):
        integer(place, "a place that is written", 0, len(placeholders) - 1)


def check_tree(tree: Any, tensors: int, what: str, seen: list[int] | None = None) -> None:
    """
    Args:
        tensors: how many there are.
        seen: the numbers that stand in the structure are added to it.

    Raises:
        PackageError: it is no structure that call.py's describe() writes.
    """
    tree = table(tree, what)
    ((kind, inner),) = tree.items() if len(tree) == 1 else ((None, None),)
    if kind == "tensor":
        number = integer(inner, f"a tensor of {what}", 0, tensors - 1)
        if seen is not None:
            seen.append(number)
    elif kind == "value":
        if isinstance(inner, dict):
            float.fromhex(text(inner.get("float"), f"a number of {what}", 64))
        elif not (inner is None or isinstance(inner, (bool, int, float, str))):
            raise refused(f"a value of {what} is {shown(inner)}")
    elif kind == "name":
        named(inner)
    elif kind in ("list", "tuple"):
        for entry in entries(inner, what):
            check_tree(entry, tensors, what, seen)
    elif kind in ("dict", "record"):
        for entry in table(inner, what).values():
            check_tree(entry, tensors, what, seen)
    else:
        raise refused(f"{what} is a {shown(kind)}")


def named(name: Any) -> torch.dtype | torch.device:
    """The dtype or device that a package names.

    Raises:
        PackageError: there is none of that name.
    """
    short = text(name, "a name", 64).removeprefix("torch.")
    if short in DTYPE_OF:
        return DTYPE_OF[short]
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise refused(f"{shown(name)} is no dtype and no device") from error


def _numbers(value: Any, what: str) -> Sequence[int]:
    return [integer(number, what) for number in entries(value, what)]
