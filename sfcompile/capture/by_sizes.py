"""One Dynamo graph with symbolic sizes, one sharded program for each set of sizes that it is called with.

Who owns which token follows from the lengths, so the passes work on numbers. Dynamo's graph stays symbolic: another
resolution does not trace the model again; it runs the passes and the inner compiler once, on every rank at the same
call, and is looked up from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph import numbers, present
from sfcompile.runtime.rank.session import Session, use_session

Program = Callable[..., Any]


def moving_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[int, ...]:
    """Which inputs of a Dynamo graph are symbolic numbers, or tensors with symbolic sizes."""
    known = numbers(gm, example_inputs)
    return tuple(i for i, value in enumerate(example_inputs) if i in known or _moves(value))


def _moves(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))
    return isinstance(value, (torch.SymInt, torch.SymFloat))


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
        first: Program,
        example_inputs: Sequence[Any],
        moving: tuple[int, ...],
        compile: Callable[[Sequence[Any]], Program],
        session: Session,
    ) -> None:
        self._moving = moving
        known = numbers(gm, example_inputs)
        self._numbers = tuple(known)
        self._compile = compile
        self._session = session
        self._programs = {self._key(example_inputs, list(known.values())): first}

    def _key(self, inputs: Sequence[Any], known: list[float]) -> tuple[Any, ...]:
        key: list[Any] = known
        for i in self._moving:
            value = inputs[i]
            if i in self._numbers:
                continue
            if isinstance(value, torch.Tensor):
                key += map(present, (*value.shape, *value.stride()))
            else:
                key.append(present(value))
        return tuple(key)

    def __len__(self) -> int:
        """How many sets of sizes were compiled."""
        return len(self._programs)

    def __call__(self, *inputs: Any) -> Any:
        """Run on inputs of any sizes that Dynamo's guards allow."""
        key = self._key(inputs, [float(inputs[i].item()) for i in self._numbers])
        program = self._programs.get(key)
        if program is None:
            with self._session.turn(), self._session.guard(), use_session(self._session):
                program = self._programs[key] = self._compile(inputs)
        return program(*inputs)
