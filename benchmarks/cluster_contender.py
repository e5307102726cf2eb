"""One way to run a model in benchmarks/cluster_rank.py, and the wires of a run without communication."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sfcompile.runtime.rank.cpu_side import CpuSide
from sfcompile.runtime.rank.session import Session
from sfcompile.runtime.rank.sides import Wires


@dataclass
class Contender:
    """One way to run the model.

    Attributes:
        key: what it really is; two contenders with one key are timed once.
        across_bytes: between machines, all ranks, a step; None: not counted.
        seconds: the slowest rank's time of each round.
        blocked: seconds that the most blocked rank waited for peers in each round.
    """

    name: str
    run: Callable[[], torch.Tensor]
    key: str
    plan: str = ""
    across_bytes: int | None = None
    error: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)


class Silence:
    """A transport that moves nothing and never waits: what is left of a step is compute alone."""

    def open(self, epoch: int, arrivals: Sequence[Any], tag: int = 0) -> None:
        """Nothing."""

    def notice(self) -> None:
        """Nothing has failed."""

    def put(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """Nothing."""

    def finish(self, epoch: int) -> None:
        """Nothing."""

    def abort(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@contextmanager
def silenced(session: Session) -> Iterator[None]:
    """Communication replaced by nothing, on all ranks at once."""
    side = session.side
    assert isinstance(side, CpuSide)
    session.meet()
    wires, side._wires = side._wires, Wires(Silence(), None)
    try:
        yield
    finally:
        side._wires = wires
        own = side._segments[session.rank]
        assert own is not None
        own.done = session._finished  # what the epochs in between would have left behind
        session.meet()
