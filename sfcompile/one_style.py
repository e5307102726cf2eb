"""How functions of the door are called: ``f(model, args=(x,), kwargs={...}, topology=..., options={...})``.

``options`` is the dict that ``torch.compile`` takes. What came before that style keeps its meaning: inputs one by one
behind the model, options as keywords of their own. Nothing may be said twice.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sfcompile.errors import OptionError
from sfcompile.options import Options, named_options


def model_call(
    model: object,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: positional and keyword inputs.

    Args:
        model: what is called.
        inputs, named: as they stand behind the model.
        args, kwargs: as a sequence and a mapping.

    Raises:
        OptionError: both ways, ``args`` is no sequence of inputs, no model, or an option that is misspelt.
    """
    check_model(model)
    for first, name, second in ((inputs, "args", args), (named, "kwargs", kwargs)):
        if first and second is not None:
            raise OptionError(
                f"{len(first)} inputs stand behind the model, and {name}= holds {len(second)}",
                "both say what the model is called with",
                "say it once: f(model, x, ...) or f(model, args=(x,), kwargs={...})",
            )
    if args is not None and not isinstance(args, (tuple, list)):
        raise OptionError(
            f"args={type(args).__name__} is no tuple of inputs", "a model may take several", "write args=(x,)"
        )
    _refuse_slips(model, named)
    return tuple(inputs or args or ()), {**named, **(kwargs or {})}


def check_model(model: object, modules: bool = False) -> None:
    """That it can be called, or has modules.

    Raises:
        OptionError: it is no model.
    """
    if not callable(getattr(model, "named_modules", None) if modules else model):
        raise OptionError(
            f"{model!r:.80} is {type(model).__name__}, no model",
            "A torch.nn.Module is wanted" if modules else "A torch.nn.Module, or a function of tensors, is wanted",
            "Hand in the model itself"
            + ("; names are for the command sfcompile explain" if isinstance(model, str) else ""),
        )


def _refuse_slips(model: object, named: Mapping[str, Any]) -> None:
    """A keyword that the model does not take, and that is nearly an option's name.

    Raises:
        OptionError: there is one.
    """
    try:
        taken = inspect.signature(getattr(model, "forward", model)).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return
    if any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in taken.values()):
        return
    for name in named:
        close = difflib.get_close_matches(name, [entry.name for entry in fields(Options)], n=1)
        if name not in taken and close:
            raise OptionError(
                f"{name}= is neither an input of {type(model).__name__} nor an option",
                f"Did you mean {close[0]!r}?",
                "Write options={...}, whose names are checked",
            )


def merged(options: Mapping[str, Any] | None, spelled: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with what was spelled as keywords beside them, where that is not the default.

    Raises:
        OptionError: an option is given in both ways.
    """
    asked = named_options(options)
    for name, value in spelled.items():
        if name in default and (value is default[name] or value == default[name]):
            continue
        if name in asked:
            raise OptionError(
                f"{name} is given twice: {name}={value!r} and options={{{name!r}: {asked[name]!r}}}",
                "one of the two would be ignored",
                "leave one of them out",
            )
        asked[name] = value
    return asked
