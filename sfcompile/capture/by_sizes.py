"""One Dynamo graph with symbolic sizes, one sharded program for each set of sizes that it is called with.

Who owns which token follows from the lengths, so the passes work on numbers. Dynamo's graph stays symbolic: another
resolution does not trace the model again; it runs the passes and the inner compiler once, on every rank at the same
call, and is looked up from then on. Python numbers that a program does not take as inputs (runtime_numbers.py) are
part of what it is looked up by.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
        self._dressed = frozenset(known)  # floats that arrive as tensors
        self._tensors = tuple(i for i in moving if i not in known and isinstance(example_inputs[i], torch.Tensor))
        self._numbers = tuple(i for i in moving if i not in self._tensors)
        self._said = False
        self._compile = compile
        self._session = session
        self._takes: dict[tuple[Any, ...], tuple[int, ...]] = {}  # by tensor sizes: the numbers that programs take
        self._programs: dict[Key, Callable[..., Any]] = {}  # the one that was called last stands last
        values = {i: known[i] if i in known else present(example_inputs[i]) for i in self._numbers}
        self._keep(self._sizes(example_inputs), values, first)

    def _sizes(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(present(size) for i in self._tensors for size in (*inputs[i].shape, *inputs[i].stride()))

    def _keep(self, sizes: tuple[Any, ...], values: dict[int, Any], program: SizedProgram) -> None:
        self._takes[sizes] = program.takes
        self._programs[sizes, _but(values, program.takes)] = program.run
        if len(self._programs) > KEPT:
            dropped, _ = next(iter(self._programs))
            del self._programs[next(iter(self._programs))]
            if all(there != dropped for there, _ in self._programs):
                del self._takes[dropped]
            if not self._said:
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
        sizes = self._sizes(inputs)
        values = {i: float(inputs[i].item()) if i in self._dressed else present(inputs[i]) for i in self._numbers}
        key = sizes, _but(values, self._takes.get(sizes, ()))
        run = self._programs.pop(key, None)
        if run is None:
            with self._session.turn(), self._session.guard(), use_session(self._session):
                program = self._compile(inputs)
            self._keep(sizes, values, program)
            run = program.run
        else:
            self._programs[key] = run
        return run(*inputs)


def _but(values: dict[int, Any], takes: tuple[int, ...]) -> tuple[Any, ...]:
    """The values of the numbers that a program does not take."""
    return tuple(value for i, value in values.items() if i not in takes)
