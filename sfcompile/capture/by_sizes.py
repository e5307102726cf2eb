"""One Dynamo graph with symbolic sizes, one sharded program for each set of sizes that it is called with.

Who owns which token follows from the lengths, so the passes work on numbers. Dynamo's graph stays symbolic: another
resolution does not trace the model again; it runs the passes and the inner compiler once, on every rank at the same
call, and is looked up from then on. Python numbers that a program does not take as inputs (runtime_numbers.py) are
part of what it is looked up by.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import fx

from sfcompile.capture.graph import numbers, present
from sfcompile.runtime.rank.session import Session, use_session

log = logging.getLogger("sfcompile")
Key = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Of a program: sizes and strides of tensors, then the numbers that it does not take."""


class SizedProgram(NamedTuple):
    """What was compiled for some sizes.

    Attributes:
        run: takes the Dynamo graph's inputs.
        takes: positions of the numbers that it takes at run time: it serves all of their values.
    """

    run: Callable[..., Any]
    takes: tuple[int, ...] = ()


def moving_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[int, ...]:
    """Which inputs of a Dynamo graph are symbolic numbers, or tensors with symbolic sizes."""
    known = numbers(gm, example_inputs)
    return tuple(i for i, value in enumerate(example_inputs) if i in known or _moves(value))


def _moves(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))
    return isinstance(value, (torch.SymInt, torch.SymFloat))


def _exactly(number: Any) -> Any:
    """What a number is looked up by: 0.0 and -0.0 differ, and NaN is equal to itself."""
    return number if isinstance(number, int) else repr(number)


KEPT = 64
"""How many programs of one graph are kept: those that were called last."""


class BySizes:
    """Calls the program of the present sizes, compiling it first where they are new.

    The KEPT programs that were called last are kept. Ranks make the same calls, so they drop the same ones.

    Args:
        gm: Dynamo's graph.
        first: its program for the sizes of ``example_inputs``.
        moving: from :func:`moving_inputs`.
        compile: makes a program for given inputs; collective.
        session: told when a compilation fails, so that no rank waits.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        first: SizedProgram,
        example_inputs: Sequence[Any],
        moving: tuple[int, ...],
        compile: Callable[[Sequence[Any]], SizedProgram],
        session: Session,
    ) -> None:
        known = numbers(gm, example_inputs)
        self._dressed = frozenset(known)  # numbers that arrive as tensors
        self._tensors = tuple(i for i in moving if i not in known and isinstance(example_inputs[i], torch.Tensor))
        self._numbers = tuple(i for i in moving if i not in self._tensors)
        self._said = False
        self._compile = compile
        self._session = session
        self._takes: dict[tuple[Any, ...], tuple[int, ...]] = {}  # by tensor sizes: the numbers that programs take
        self._programs: OrderedDict[Key, Callable[..., Any]] = OrderedDict()  # the one that was called last stands last
        self._looking = Lock()  # threads may call one model
        sizes = self._sizes(example_inputs)
        self._keep(sizes, self._values(example_inputs, first.takes, known), first)

    def _sizes(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(present(size) for i in self._tensors for size in (*inputs[i].shape, *inputs[i].stride()))

    def _values(
        self, inputs: Sequence[Any], takes: tuple[int, ...], known: Mapping[int, float | int] = MappingProxyType({})
    ) -> tuple[Any, ...]:
        """The numbers that a program does not take; ``known``: those whose example inputs cannot be read."""
        asked = [i for i in self._numbers if i not in takes]
        return tuple(
            _exactly(known[i] if i in known else inputs[i].item() if i in self._dressed else present(inputs[i]))
            for i in asked
        )

    def _find(self, inputs: Sequence[Any]) -> Callable[..., Any] | None:
        """The program for some inputs, which is now the one that was called last."""
        sizes = self._sizes(inputs)
        with self._looking:
            key = sizes, self._values(inputs, self._takes.get(sizes, ()))
            run = self._programs.get(key)
            if run is not None:
                self._programs.move_to_end(key)
            return run

    def _keep(self, sizes: tuple[Any, ...], values: tuple[Any, ...], program: SizedProgram) -> None:
        with self._looking:
            self._takes[sizes] = program.takes
            self._programs[sizes, values] = program.run
            if len(self._programs) <= KEPT:
                return
            (dropped, _), _ = self._programs.popitem(last=False)
            if all(there != dropped for there, _ in self._programs):
                del self._takes[dropped]
            if self._said:
                return
            self._said = True
        log.warning(
            "a graph was compiled for more than %d sets of sizes and numbers; those not called for longest are "
            "dropped, and compiled again when they come back. Round sizes to a few buckets.",
            KEPT,
        )

    def __len__(self) -> int:
        """How many programs are kept."""
        return len(self._programs)

    def __call__(self, *inputs: Any) -> Any:
        """Run on inputs of any sizes that Dynamo's guards allow."""
        run = self._find(inputs)
        if run is None:
            with self._session.turn(), self._session.guard(), use_session(self._session):
                run = self._find(inputs)  # another thread may have compiled it meanwhile
                if run is None:
                    program = self._compile(inputs)
                    self._keep(self._sizes(inputs), self._values(inputs, program.takes), program)
                    run = program.run
        return run(*inputs)
