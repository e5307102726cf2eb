"""How a model is called, as JSON: where its tensors stand among its arguments, and what its result looks like.

Arguments are kept by the names of forward()'s parameters, so that a loaded package may be called as the model was, by
position or by name. Everything that is no tensor was a constant of the trace: it must be the same at every call.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sfcompile.errors import InputError, PackageError, UnsupportedError

_PLAIN = (bool, int, float, str, type(None))
_MISSING = object()


class Record(dict[str, Any]):
    """A result with named fields, read as ``out.sample``, ``out["sample"]`` or ``out[0]``.

    Stands for dataclasses and named tuples of the model: a package needs none of the model's source.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the result has no field {name!r}; fields are {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)


def bind(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Names of forward()'s parameters that may be given by position, and the arguments by name, defaults filled in.

    Raises:
        UnsupportedError: forward() takes ``*args``, and some were given.
        InputError: the arguments do not fit forward().
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the arguments do not fit {type(model).__name__}.forward{signature}: {error}",
            "",
            "correct args and kwargs",
        ) from error
    bound.apply_defaults()
    named: dict[str, Any] = {}
    positional = []
    for name, parameter in signature.parameters.items():
        value = bound.arguments[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= value
        elif parameter.kind is parameter.VAR_POSITIONAL:
            if value:
                raise UnsupportedError(
                    f"{type(model).__name__}.forward takes *{name}, and {len(value)} were given",
                    "a package names its inputs",
                    "wrap the model in a module whose forward() names them",
                )
        else:
            named[name] = value
            if parameter.kind is not parameter.KEYWORD_ONLY:
                positional.append(name)
    return positional, named


def describe(value: Any, leaf: Callable[[torch.Tensor], int], where: str) -> Any:
    """A structure of lists, tuples, dicts, records, plain values and tensors as JSON; tensors become ``leaf``'s number.

    Raises:
        UnsupportedError: it holds something else; ``where`` says in the message where.
    """
    if isinstance(value, torch.Tensor):
        return {"tensor": leaf(value)}
    if isinstance(value, _PLAIN):
        return {"value": value if not isinstance(value, float) else {"float": value.hex()}}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"name": str(value)}
    fields = _fields(value)
    if fields is not None:
        return {"record": {key: describe(entry, leaf, f"{where}.{key}") for key, entry in fields.items()}}
    if isinstance(value, (list, tuple)):
        inner = [describe(entry, leaf, f"{where}[{i}]") for i, entry in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": inner}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe(entry, leaf, f"{where}[{key!r}]") for key, entry in value.items()}}
    raise UnsupportedError(
        f"{where} holds a {type(value).__name__}",
        "a package can say tensors, numbers, strings, None, lists, tuples, dicts, dataclasses and named tuples",
        "pass it as one of those, or fix it inside a module that wraps the model",
    )


def _fields(value: Any) -> Mapping[str, Any] | None:
    """The fields of a dataclass or named tuple that are set, by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        # Those that are mappings too (diffusers' outputs) leave out what is None.
        return {key: entry for key, entry in fields.items() if not isinstance(value, Mapping) or entry is not None}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return None


def restore(tree: Mapping[str, Any], tensors: Sequence[Any]) -> Any:
    """The structure of :func:`describe` with tensors in their places."""
    ((kind, inner),) = tree.items()
    match kind:
        case "tensor":
            return tensors[inner]
        case "value":
            return float.fromhex(inner["float"]) if isinstance(inner, dict) else inner
        case "name":
            return _named(inner)
        case "list":
            return [restore(entry, tensors) for entry in inner]
        case "tuple":
            return tuple(restore(entry, tensors) for entry in inner)
        case "dict":
            return {key: restore(entry, tensors) for key, entry in inner.items()}
        case "record":
            return Record({key: restore(entry, tensors) for key, entry in inner.items()})
        case _:
            raise PackageError(f"the package describes a {kind!r}", "it is damaged", "export the model again")


def _named(name: str) -> Any:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.device(name)


class Signature:
    """What a package may be called with.

    Args:
        data: ``positional`` (names), ``arguments`` (name -> description), ``tensors`` (shape and dtype of each).
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._positional: list[str] = list(data["positional"])
        self._arguments: dict[str, Any] = dict(data["arguments"])
        self._tensors: list[Mapping[str, Any]] = list(data["tensors"])

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the package's order.

        Raises:
            InputError: another number of arguments, another structure, shape, dtype or device, another constant.
        """
        if len(args) > len(self._positional):
            raise _wrong(f"{len(args)} arguments by position, forward() takes {len(self._positional)}")
        arguments = dict(zip(self._positional, args, strict=False))
        for name, value in kwargs.items():
            if name in arguments:
                raise _wrong(f"argument {name!r} is given twice")
            if name not in self._arguments:
                raise _wrong(f"argument {name!r} is unknown; there are {', '.join(self._arguments)}")
            arguments[name] = value
        tensors: list[Any] = [None] * len(self._tensors)
        for name, tree in self._arguments.items():
            value = arguments.get(name, _MISSING)
            if value is _MISSING:
                if _has_tensor(tree):
                    raise _wrong(f"argument {name!r} is missing")
                continue
            self._match(name, tree, value, tensors)
        return tensors

    def _match(self, where: str, tree: Mapping[str, Any], value: Any, tensors: list[Any]) -> None:
        ((kind, inner),) = tree.items()
        if kind == "tensor":
            self._match_tensor(where, inner, value)
            tensors[inner] = value
        elif kind in ("list", "tuple"):
            if not isinstance(value, (list, tuple)) or len(value) != len(inner):
                raise _wrong(f"{where} must be a {kind} of {len(inner)}, got {_said(value)}")
            for i, (entry, part) in enumerate(zip(inner, value, strict=True)):
                self._match(f"{where}[{i}]", entry, part, tensors)
        elif kind in ("dict", "record"):
            fields = _fields(value) or value
            if not isinstance(fields, Mapping) or set(fields) != set(inner):
                raise _wrong(f"{where} must have the entries {', '.join(inner)}, got {_said(value)}")
            for key, entry in inner.items():
                self._match(f"{where}[{key!r}]", entry, fields[key], tensors)
        else:
            want = restore(tree, ())
            if type(value) is not type(want) or (value != want and not (want != want and value != value)):
                raise _wrong(f"{where} was {want!r} when the model was exported, got {_said(value)}")

    def _match_tensor(self, where: str, index: int, value: Any) -> None:
        facts = self._tensors[index]
        want = f"{facts['dtype']}{facts['shape']}"
        if not isinstance(value, torch.Tensor):
            raise _wrong(f"{where} must be a tensor {want}, got {_said(value)}")
        got = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if got != want:
            raise _wrong(f"{where} must be {want}, got {got}")
        if value.device.type != facts.get("device", "cpu"):
            raise _wrong(f"{where} must be on {facts.get('device', 'cpu')}, got {value.device}")


def _has_tensor(tree: Mapping[str, Any]) -> bool:
    ((kind, inner),) = tree.items()
    if kind in ("list", "tuple"):
        return any(_has_tensor(entry) for entry in inner)
    if kind in ("dict", "record"):
        return any(_has_tensor(entry) for entry in inner.values())
    return kind == "tensor"


def _said(value: Any) -> str:
    text = repr(value) if isinstance(value, _PLAIN) else f"a {type(value).__name__}"
    return f"{text} of {len(value)}" if isinstance(value, (list, tuple, dict)) else text


def _wrong(what: str) -> InputError:
    return InputError(
        what,
        "a package is made for one set of shapes and constants",
        "call it as the model was called at the export, or export once more with these inputs",
    )
