"""``compile_repeated_blocks(model)``: each kind of block is traced, planned and compiled once, however deep the model.

``torch.compile(model)`` traces the model as one graph: Dynamo walks through every block, at every start, and that grows
with depth. Here blocks are compiled in place, each by itself, so that blocks of one kind share one program, which takes
their weights as inputs. What is between them (the loop, embeddings, the last projection) stays Python.

A value goes from block to block in shards (sfcompile/boundary.py, ``boundaries="regions"``): the next block takes this
rank's rows as they are, Python that reads it gathers it, and what the model returns is whole.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from sfcompile.backend import streamfusion_backend
from sfcompile.errors import OptionError
from sfcompile.one_style import check_model
from sfcompile.options import Options, named_options
from sfcompile.pipelines import METHODS, CompiledMethod, as_written, innermost_forward, mode_or_options

log = logging.getLogger("sfcompile")
Model = TypeVar("Model", bound=nn.Module)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Where a model keeps its blocks."""
_NOT_CALLED = (nn.ModuleList, nn.ModuleDict)


def compile_repeated_blocks(
    model: Model,
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
) -> Model:
    """Compile the blocks that a model repeats with this backend, in place, each kind of block once.

    Call it on every rank with the same model, then call the model as ever. The first result of a deep model comes
    sooner than by ``torch.compile(model)``, in later starts of a job too; a step may be slower, for every rank computes
    all that stands between blocks, eagerly, and a guidance pair is not divided between groups of ranks.

    Args:
        model: blocks are members of a ``ModuleList``, ``ModuleDict`` or ``Sequential``, the outermost, of which there
            are at least two alike: one class, parameters of the same names, shapes and dtypes, modules inside.
        options: of the backend, as for ``torch.compile``. With ``{"boundaries": "whole"}`` blocks hand on whole values.
        mode: as for ``torch.compile``, which takes no options beside it: blocks then hand on whole values.
        dynamic: as for ``torch.compile``.

    Returns:
        ``model``.

    Raises:
        OptionError: unknown options, or nothing repeats.
    """
    check_model(model, modules=True)
    mode_or_options(mode, options)
    asked = {"boundaries": "regions", **named_options(options)}
    if asked.get("inputs") == "rank0" and "boundaries" not in (options or {}):
        asked["boundaries"] = "whole"
    Options.from_dict(asked, mode)  # a mistake is told here, before any block has changed
    blocks = list(repeated_blocks(model))
    if not blocks:
        raise OptionError(
            f"the {type(model).__name__} has no blocks that repeat",
            f"no ModuleList, ModuleDict or Sequential among its {sum(1 for _ in model.modules())} modules holds two "
            "that have modules inside, one class, and parameters of the same shapes",
            'compile it whole: torch.compile(model, backend="streamfusion")',
        )
    compiled = functools.partial(
        torch.compile, backend=streamfusion_backend, options=None if mode else asked, mode=mode, dynamic=dynamic
    )
    for block in blocks:
        owner, name = innermost_forward(block)
        setattr(owner, name, CompiledMethod(block, as_written(getattr(owner, name)), compiled))
    _return_wholes(model)
    kinds = Counter(type(block).__name__ for block in blocks)
    log.info("compiled when called: %s", ", ".join(f"{count} {name}" for name, count in kinds.items()))
    return model


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, as :func:`compile_repeated_blocks` finds them, in the order of its modules.

    In a list in which blocks repeat, those that stand there once are blocks too (a first one with more inputs, say),
    unless they hold repeated blocks of their own.
    """
    yield from _blocks(model, {})


def _blocks(module: nn.Module, beside: Mapping[Hashable, int]) -> Iterator[nn.Module]:
    """Those in a module.

    Args:
        beside: of a list in a list of lists (each a block's parts), how many parts all of them have of each kind.
    """
    members = [(member, _kind(member)) for member in module.children()]
    lists = [member for member, _ in members if isinstance(module, _LISTS) and isinstance(member, _NOT_CALLED)]
    parts = Counter(_kind(part) for member in lists for part in member.children())
    kinds = beside or Counter(kind for _, kind in members)
    repeat = {kind for _, kind in members if kind is not None and kinds[kind] > 1 and isinstance(module, _LISTS)}
    for member, kind in members:
        inner = [] if kind in repeat else list(_blocks(member, parts if member in lists else {}))
        yield from inner or ([member] if repeat and kind is not None else [])


def _kind(block: nn.Module) -> Hashable:
    """Equal for blocks that are alike; None: it is no block: a single layer, or a list, which nobody calls."""
    if isinstance(block, _NOT_CALLED) or next(block.children(), None) is None:
        return None
    facts = tuple((name, tuple(value.shape), value.dtype) for name, value in block.named_parameters())
    return (type(block), facts) if facts else None


def _return_wholes(model: nn.Module) -> None:
    """What a model returns is its caller's, who may do with it on one rank what the others do not."""
    owner, name = innermost_forward(model)
    setattr(owner, name, CompiledMethod(model, as_written(getattr(owner, name)), _as_it_is, wholes=True))
    for other in METHODS:
        if callable(method := getattr(model, other, None)):
            setattr(model, other, CompiledMethod(model, as_written(method), _as_it_is, hooked=True, wholes=True))


def _as_it_is(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


__all__ = ["compile_repeated_blocks", "repeated_blocks"]
