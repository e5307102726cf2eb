"""A graph's first calls compared with one process: ``options={"verify": N}``.

Every rank runs the graph as Dynamo gave it as well, from the same inputs and the same state of the generator, with
torch's own kernels and nothing of ours, and compares what the ranks gave it. It takes the time and the memory of one
process for these calls. What one process computes is rounded too, in another order, so the two agree to a limit
(docs/numerics.md); a result that is wrong is far beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph import Captured
from sfcompile.capture.randomness import generator_state, set_generator_state
from sfcompile.errors import NumericsError
from sfcompile.options import AS_IT_IS, Wire
from sfcompile.torch_private import AutocastState, autocast_as

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference allowed, of the output's largest magnitude, by the coarsest dtype that the graph computes in. The
contract is ten times narrower in fp32; deep models add up what rounding makes, and a wrong shard is off by 1."""
WIRE_LIMITS = {"bf16": 5e-2, "fp8": 2e-1}
"""Where chunks are rounded on their way."""


class Verifier:
    """Compares a graph's first calls with one process.

    Attributes:
        calls: how many are still to be compared.
        worst: the largest difference so far, of the output's largest magnitude.
    """

    def __init__(
        self, gm: fx.GraphModule, captured: Captured, calls: int, wire: Wire, tell: Callable[[str], None]
    ) -> None:
        self.calls, self.worst = calls, 0.0
        self._gm, self._captured, self._tell, self._done = gm, captured, tell, 0
        self.limit = limit_of(captured.gm, wire)

    def expected(
        self, args: Sequence[Any], inputs: Sequence[Any], around: AutocastState, device: torch.device
    ) -> list[Any]:
        """What one process gives: outputs, then the inputs that the graph writes to. Nothing is changed by it.

        Args:
            args: of the call, as Dynamo gives them; ``inputs``: the same with the values that the step is computed
                from (rank 0's, say), numbers as tensors.
            around: the autocast region that the call stands in.
        """
        values = [_as_given(arg, value) for arg, value in zip(args, inputs, strict=True)]
        for i in self._captured.written:
            values[i] = values[i].clone()
        state = generator_state(device).clone()
        with torch.no_grad(), autocast_as(around):
            out = self._gm(*values)
        set_generator_state(device, state)
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        return [*outputs, *(values[i] for i in self._captured.written)]

    def compare(self, out: Sequence[Any], want: Sequence[Any], exchange: Callable[[Any, str], list[Any]]) -> None:
        """Collective: this rank's results beside what one process gives.

        Raises:
            NumericsError: those of some rank are further off than the limit; on every rank.
        """
        differences = [difference(mine, theirs) for mine, theirs in zip(out, want, strict=True)]
        mine = max(enumerate(differences), key=lambda entry: entry[1], default=(0, 0.0))
        everyone = exchange(mine, "compare results with one process")
        rank = max(range(len(everyone)), key=lambda r: everyone[r][1])
        place, error = everyone[rank]
        self.calls, self._done, self.worst = self.calls - 1, self._done + 1, max(self.worst, error)
        self._tell(
            f"{self._done} call{'s' * (self._done > 1)} compared with one process: largest difference {self.worst:.1e} "
            f"of the output's largest magnitude, {self.limit:.0e} allowed"
        )
        if error > self.limit:
            outputs = len(want) - len(self._captured.written)
            what = f"output {place}"
            if place >= outputs:
                what = f"input {self._captured.written[place - outputs]}, which the graph writes to,"
            failure = NumericsError(
                f"{what} of rank {rank} differs from one process by {error:.1e} of its largest magnitude",
                f"{self.limit:.0e} is what rounding in another order may do to this graph",
                "report this model, with the folder that options={'dump': DIR} writes; an operator that answers "
                "differently each time (it draws numbers by itself, or reads memory that nobody wrote) does this too",
                rank=rank,
                world_size=len(everyone),
            )
            failure.on_every_rank = True
            raise failure


def _as_given(arg: Any, value: Any) -> Any:
    """A value in the form in which Dynamo gives it: numbers that became tensors are numbers again."""
    return type(arg)(value.item()) if isinstance(value, torch.Tensor) and isinstance(arg, (int, float)) else value


def difference(mine: Any, want: Any) -> float:
    """The largest difference over the largest magnitude of ``want``; infinite where only one is a number."""
    if not isinstance(want, torch.Tensor):
        return 0.0 if mine == want else math.inf
    if mine.shape != want.shape or mine.dtype != want.dtype:
        return math.inf
    if not want.numel():
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if torch.equal(mine, want) else math.inf
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = mine.to(wide), want.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities, and what is no number on both
    finite = a.isfinite() & b.isfinite()
    if bool((~finite & ~same).any()):
        return math.inf
    scale = float(torch.where(finite, b.abs(), 0.0).max())
    apart = float(torch.where(finite, (a - b).abs(), 0.0).max())
    return apart / scale if scale else (math.inf if apart else 0.0)


def limit_of(gm: fx.GraphModule, wire: Wire) -> float:
    """The limit of a graph, by the coarsest dtype of its values and by how chunks travel."""
    dtypes = {
        value.dtype
        for node in gm.graph.nodes
        for value in _tensors(node.meta.get("val"))
        if value.is_floating_point() and value.numel() > 1
    }
    narrow = [LIMITS.get(dtype, LIMITS[torch.bfloat16]) for dtype in dtypes]
    travels = [] if wire == AS_IT_IS else [WIRE_LIMITS[kind] for kind in wire if kind in WIRE_LIMITS]
    return max([*narrow, *travels], default=LIMITS[torch.float32])


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]
