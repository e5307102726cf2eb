"""Python values as text and back, for what ranks tell each other: JSON, never pickle, which runs what it holds.

JSON's own values stand for themselves; what it lacks is an object with one key that begins with "$": tuples, bytes,
dtypes, dicts whose keys are not text, enums, and our own dataclasses and named tuples by the names of their classes. A
class is looked up among the modules of this package that are loaded already: nothing is imported, and making it runs
nothing but its own checks.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import json
import math
import numbers
import sys
from typing import Any

import torch

from sfcompile.errors import InternalError

_OURS = __name__.split(".", 1)[0] + "."
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encode(value: Any) -> str:
    """The text of a value.

    Raises:
        InternalError: it holds something that has no text.
    """
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False)


def decode(text: str) -> Any:
    """The value of a text that :func:`encode` made.

    Raises:
        ValueError: it is no such text.
    """
    try:
        return _value(json.loads(text))
    except ValueError:
        raise
    except (TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [_plain(entry) for entry in value]
    if kind is tuple:
        return {"$tuple": [_plain(entry) for entry in value]}
    if kind is torch.dtype:
        return {"$dtype": str(value).removeprefix("torch.")}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _plain(entry) for key, entry in value.items()}
        return {"$dict": [[_plain(key), _plain(entry)] for key, entry in value.items()]}
    if kind.__module__.startswith(_OURS) and kind.__qualname__ == kind.__name__:
        name = f"{kind.__module__}:{kind.__name__}"
        if isinstance(value, enum.Enum):
            return {"$enum": [name, value.name]}
        if dataclasses.is_dataclass(value):
            fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"$class": [name, fields]}
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {"$class": [name, {key: _plain(entry) for key, entry in value._asdict().items()}]}
    if isinstance(value, numbers.Real):  # numpy's, say
        return _plain(int(value) if isinstance(value, numbers.Integral) else float(value))
    raise InternalError(
        f"a value of type {kind.__module__}.{kind.__qualname__} cannot be sent to other ranks",
        "ranks tell each other plain values, and dataclasses, named tuples and enums of this package",
        "report this",
    )


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(entry) for entry in plain]
    if not isinstance(plain, dict):
        return plain
    if len(plain) != 1 or not next(iter(plain)).startswith("$"):
        return {key: _value(entry) for key, entry in plain.items()}
    ((kind, content),) = plain.items()
    if kind == "$float":
        return _FLOATS[content]
    if kind == "$dtype":
        dtype = getattr(torch, str(content), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{content} is no dtype")
        return dtype
    if kind == "$tuple":
        return tuple(_value(entry) for entry in content)
    if kind == "$bytes":
        return base64.b64decode(content, validate=True)
    if kind == "$dict":
        return {_value(key): _value(entry) for key, entry in content}
    if kind == "$enum":
        return _class(content[0], enum.Enum)[content[1]]
    if kind == "$class":
        return _object(*content)
    raise ValueError(f"{kind} is no kind of value")


def _class(name: str, base: type) -> Any:
    module, _, attribute = name.partition(":")
    cls = getattr(sys.modules.get(module), attribute, None) if module.startswith(_OURS) else None
    if not isinstance(cls, type) or not issubclass(cls, base) or cls.__module__ != module:
        raise ValueError(f"{name} is no class that ranks send each other")
    return cls


def _object(name: str, fields: dict[str, Any]) -> Any:
    cls = _class(name, object)
    described = bool(dataclasses.is_dataclass(cls))
    if not described:
        if not (issubclass(cls, tuple) and hasattr(cls, "_fields")):
            raise ValueError(f"{name} is no class that ranks send each other")
        return cls(**{key: _value(entry) for key, entry in fields.items()})
    known = {field.name: field for field in dataclasses.fields(cls)}
    if set(fields) != set(known):
        raise ValueError(f"{name} has other fields")
    values = {key: _value(entry) for key, entry in fields.items()}
    whole = cls(**{key: entry for key, entry in values.items() if known[key].init})
    for key, entry in values.items():
        if not known[key].init:
            object.__setattr__(whole, key, entry)
    return whole
