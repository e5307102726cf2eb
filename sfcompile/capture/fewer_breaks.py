"""Dynamo breaks a model in fewer places while it traces for this backend; models are not touched.

A break costs what a sharded graph saves: values are gathered where one graph ends, and an attention whose queries and
keys stand in two graphs is not seen as one. Two kinds of lines break models for nothing:

* a tensor is made of sizes and read back as numbers (``torch.tensor(x.shape).tolist()``). Its values are constants of
  the trace, and are folded. Numbers that depend on data break as ever;
* warnings, prints and records of loggers. They are written when the graph has run, at every call.

A third kind is kept whole, as one op: attention that a library offers as a function (library_functions.py).

What is changed of Dynamo holds while it traces for a marked backend. Other compiled models are traced as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import ParamSpec, TypeVar

from torch import fx

from sfcompile.capture.library_functions import KEPT
from sfcompile.torch_breaks import Programs, Refused, Returned, keep_whole, trace_with_fewer_breaks

Rest = ParamSpec("Rest")
Compiled = TypeVar("Compiled")


def fewer_breaks(
    backend: Callable[Rest, Compiled],
    skipped: Callable[[CodeType, str], None] | None = None,
    returned: Returned = lambda options: None,
    programs: Programs = lambda options: 0,
    refused: Refused = lambda options, code, reason: None,
) -> Callable[Rest, Compiled]:
    """A backend of ``torch.compile`` for which Dynamo breaks models in fewer places; also as a decorator.

    Args:
        skipped: is told of each function that Dynamo leaves to Python, with the break in it.
        returned: says, of the options, what goes over the results of compiled functions; None: nothing.
        programs: says, of the options, how many programs a function may have before Dynamo leaves it to Python.
        refused: raises, of the options, where Python must not run a function and all that it calls.
    """

    @functools.wraps(backend)
    def marked(*args: Rest.args, **kwargs: Rest.kwargs) -> Compiled:
        (gm,) = (value for value in args if isinstance(value, fx.GraphModule))
        _drop_folded_reads(gm)
        return backend(*args, **kwargs)

    keep_whole(KEPT)
    trace_with_fewer_breaks(marked, skipped or (lambda code, reason: None), returned, programs, refused)
    return marked


def _drop_folded_reads(gm: fx.GraphModule) -> None:
    """Erase from a Dynamo graph the reads of numbers that nobody uses, as the numbers became constants."""
    for node in reversed(gm.graph.nodes):
        if node.op == "call_method" and node.target == "item" and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
