"""A graph of a package as a list of calls, and what runs it: no source is generated from it and no text of it is run.

fx would write Python from its nodes' names and arguments and compile that. Here a call is an operator that was looked
up (operators.py) and places in a table of values, so there is nothing to escape. A value leaves the table after its
last use. Inductor needs a graph of fx's; the names in the one that it gets (:meth:`CallList.as_module`) are ours.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from sfcompile.errors import PackageError, StreamFusionError


@dataclass(frozen=True)
class Ref:
    """The result of a node of the graph, by its index."""

    index: int


@dataclass(frozen=True)
class OperatorCall:
    """One call: an operator, its arguments with :class:`Ref` where a result stands, and the index of its own result."""

    index: int
    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def refs(self) -> Iterator[Ref]:
        """The results that it reads."""
        return refs_of((self.args, tuple(self.kwargs.values())))


def refs_of(value: Any) -> Iterator[Ref]:
    """The results that stand somewhere in a value."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from refs_of(entry)


def filled(value: Any, values: Sequence[Any]) -> Any:
    """A value with results in the places of their refs."""
    if isinstance(value, Ref):
        return values[value.index]
    if isinstance(value, (list, tuple)):
        return type(value)(filled(entry, values) for entry in value)
    return value


@dataclass
class CallList:
    """A rank's graph.

    Attributes:
        names: of every node, by index: inputs first, then constants and calls as they stand.
        inputs: how many inputs there are.
        constants: index -> tensor.
        outputs: what is returned, refs and plain values.
    """

    names: list[str] = field(default_factory=list)
    inputs: int = 0
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: list[OperatorCall] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def runner(self) -> Callable[..., list[Any]]:
        """A function of the inputs' values that makes the calls one by one.

        Raises (when called):
            PackageError: an operator raised; its node is named.
        """
        table, steps = _Table(self), []
        last = self._last_uses()
        for call in self.calls:
            dead = tuple(index for index, step in last.items() if step == call.index)
            steps.append(table.step(call, dead))
        return _running(table.values, self.inputs, steps, self.outputs, self.names)

    def _last_uses(self) -> dict[int, int]:
        """Result -> index of the call after which nothing reads it; constants and what is returned stay."""
        last = {call.index: call.index for call in self.calls} | dict.fromkeys(range(self.inputs), -1)
        for call in self.calls:
            for ref in call.refs():
                last[ref.index] = call.index
        for kept in (*self.constants, *(ref.index for ref in refs_of(self.outputs))):
            last.pop(kept, None)
        return last

    def as_module(self) -> fx.GraphModule:
        """The same as a graph of fx's, whose code holds no name that the package chose."""
        graph, root = fx.Graph(), torch.nn.Module()
        nodes: list[Any] = [None] * len(self.names)
        for index in range(self.inputs):
            nodes[index] = graph.placeholder(f"input_{index}")
        for index, value in self.constants.items():
            root.register_buffer(f"constant_{index}", value, persistent=False)
            nodes[index] = graph.get_attr(f"constant_{index}")
        for call in self.calls:
            args, kwargs = filled(call.args, nodes), {key: filled(v, nodes) for key, v in call.kwargs.items()}
            nodes[call.index] = graph.call_function(call.target, args, kwargs)
        graph.output(filled(self.outputs, nodes))
        return fx.GraphModule(root, graph, "StreamFusionRank")


class _Prepared(NamedTuple):
    """A call as it is made: ``fetch`` takes its positional arguments out of the table, all at once.

    ``lists`` are filled first: places of the table whose value is a list of others; ``keywords`` are those that read
    a result.
    """

    target: Any
    fetch: Callable[[Any], Any]
    kwargs: dict[str, Any]
    out: int
    lists: tuple[tuple[int, Any], ...]
    keywords: tuple[tuple[str, Any], ...]
    dead: tuple[int, ...]


class _Table:
    """Places for results and, behind them, for everything plain that calls are made with."""

    def __init__(self, calls: CallList) -> None:
        self.values: list[Any] = [None] * len(calls.names)
        for index, value in calls.constants.items():
            self.values[index] = value

    def step(self, call: OperatorCall, dead: tuple[int, ...]) -> _Prepared:
        """A call, with its plain arguments put into the table."""
        places, lists = [], []
        for value in call.args:
            if isinstance(value, Ref):
                places.append(value.index)
                continue
            reads = next(refs_of(value), None) is not None
            self.values.append(None if reads else value)
            places.append(len(self.values) - 1)
            if reads:
                lists.append((places[-1], value))
        plain = {key: value for key, value in call.kwargs.items() if next(refs_of(value), None) is None}
        reading = tuple((key, value) for key, value in call.kwargs.items() if key not in plain)
        return _Prepared(call.target, _fetcher(places), plain, call.index, tuple(lists), reading,
                     dead + tuple(place for place, _ in lists))  # fmt: skip


def _fetcher(places: Sequence[int]) -> Callable[[Any], Any]:
    if len(places) > 1:
        return operator.itemgetter(*places)
    if places:
        only = places[0]
        return lambda values: (values[only],)
    return lambda values: ()


def _running(
    table: Sequence[Any], inputs: int, steps: Sequence[_Prepared], outputs: Sequence[Any], names: Sequence[str]
) -> Callable[..., list[Any]]:
    def run(*arguments: Any) -> list[Any]:
        values = list(table)
        values[:inputs] = arguments
        out = -1
        try:
            for target, fetch, kwargs, out, lists, keywords, dead in steps:  # noqa: B007  `out` is told in an error
                for place, value in lists:
                    values[place] = filled(value, values)
                if keywords:
                    kwargs = kwargs | {key: filled(value, values) for key, value in keywords}
                values[out] = target(*fetch(values), **kwargs)
                for place in dead:
                    values[place] = None
        except StreamFusionError:
            raise
        except Exception as error:
            raise PackageError(
                f"a call of the package failed ({type(error).__name__}: {str(error).strip()[:500]})",
                "its graph does not fit the inputs, or this machine has too little memory",
                "call it as the model was called at the export, or export the model again",
                node=names[out],
            ) from error
        return [filled(value, values) for value in outputs]

    return run
