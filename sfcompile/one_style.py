"""How functions of the door are called: ``f(model, args=(x,), kwargs={...}, topology=..., options={...})``.

``options`` is the dict that ``torch.compile`` takes. What came before that style keeps its meaning: inputs one by one
behind the model, options as keywords of their own. Nothing may be said twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfcompile.errors import OptionError
from sfcompile.options import named_options


def model_call(
    inputs: Sequence[Any],
    named: Mapping[str, Any],
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: positional and keyword inputs.

    Args:
        inputs, named: as they stand behind the model.
        args, kwargs: as a sequence and a mapping.

    Raises:
        OptionError: both ways, or ``args`` is no sequence of inputs.
    """
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
    return tuple(inputs or args or ()), {**named, **(kwargs or {})}


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
