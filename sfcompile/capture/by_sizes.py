"""One Dynamo graph with symbolic sizes, one sharded program for each set of sizes that it is called with.

Who owns which token follows from the lengths, so the passes work on numbers. Dynamo's graph stays symbolic: another
resolution does not trace the model again; it runs the passes and the inner compiler once, on every rank at the same
call, and is looked up from then on. Python numbers that a program does not take as inputs (runtime_numbers.py) are
part of what it is looked up by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from sfcompile.capture.graph import numbers, present
from sfcompile.runtime.rank.session import Session, use_session


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


class _OfSizes:
    """The programs for one set of tensor sizes: one, or one for each set of the numbers that it does not take."""

    def __init__(self, takes: tuple[int, ...]) -> None:
        self.takes = takes
        self.programs: dict[tuple[Any, ...], Callable[..., Any]] = {}


class BySizes:
    """Calls the program of the present sizes, compiling it first where they are new.

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
        self._dressed = frozenset(known)  # floats that arrive as tensors
        self._tensors = tuple(i for i in moving if i not in known and isinstance(example_inputs[i], torch.Tensor))
        self._numbers = tuple(i for i in moving if i not in self._tensors)
        self._compile = compile
        self._session = session
        self._by_sizes: dict[tuple[Any, ...], _OfSizes] = {}
        present_numbers = {i: known[i] if i in known else present(example_inputs[i]) for i in self._numbers}
        self._keep(self._sizes(example_inputs), present_numbers, first)

    def _sizes(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(present(size) for i in self._tensors for size in (*inputs[i].shape, *inputs[i].stride()))

    def _keep(self, sizes: tuple[Any, ...], values: dict[int, Any], program: SizedProgram) -> None:
        there = self._by_sizes.get(sizes)
        if there is None or there.takes != program.takes:  # those of before would be looked up by other numbers
            there = self._by_sizes[sizes] = _OfSizes(program.takes)
        there.programs[_but(values, program.takes)] = program.run

    def __len__(self) -> int:
        """How many programs were compiled."""
        return sum(len(there.programs) for there in self._by_sizes.values())

    def __call__(self, *inputs: Any) -> Any:
        """Run on inputs of any sizes that Dynamo's guards allow."""
        sizes = self._sizes(inputs)
        values = {i: float(inputs[i].item()) if i in self._dressed else present(inputs[i]) for i in self._numbers}
        there = self._by_sizes.get(sizes)
        run = there.programs.get(_but(values, there.takes)) if there is not None else None
        if run is None:
            with self._session.turn(), self._session.guard(), use_session(self._session):
                program = self._compile(inputs)
            self._keep(sizes, values, program)
            run = program.run
        return run(*inputs)


def _but(values: dict[int, Any], takes: tuple[int, ...]) -> tuple[Any, ...]:
    """The values of the numbers that a program does not take."""
    return tuple(value for i, value in values.items() if i not in takes)
