"""Running sums over tokens: each rank's own, and what stands before them."""

from __future__ import annotations

import torch
from helpers import captured, check_sharded, placeholder_values, rewritten, run_lockstep
from hypothesis import given
from hypothesis import strategies as st
from random_ops import few, rand, ranks, tokens
from torch import fx


@few
@given(tokens, st.integers(1, 6), ranks)
def test_over_tokens_in_stretches(n: int, text: int, p: int) -> None:
    def step(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joint = torch.cat([t * 2, x * 3], 1)  # two stretches on a rank
        return joint.cumsum(1) + joint, joint.flip(1).cumsum(1).flip(1), (joint > 0).cumsum(1), joint.cumsum(-1)

    check_sharded(step, [rand(2, n, 3), rand(2, text, 3)], (0, 1), (1, 1), ranks=p)
    check_sharded(lambda x: (x * 2).cumsum(0), [rand(n)], (0, 0), ranks=p)


def test_half_precision_adds_up_in_single_and_keeps_its_dtype() -> None:
    got = captured(lambda x: x.to(torch.float16).mul(2).cumsum(1), torch.ones(1, 3000, 2))
    placement, _, locals_ = rewritten(got, [(0, 1)], 3)
    assert not placement.reasons, "no op is computed whole"
    graphs = [(fx.GraphModule(local.root, local.graph), local.sites) for local in locals_]
    values = [torch.ones_like(value) for value in placeholder_values(got)]
    for (out,) in run_lockstep(lambda rank: graphs[rank], 3, values):
        assert out.dtype == torch.float16 and torch.equal(out, got.gm(*values)[0])


def test_rows_of_a_grid() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).unflatten(1, (5, 3)).cumsum(1).flatten(1, 2) + x

    check_sharded(step, [rand(2, 15, 4)], (0, 1), ranks=5)
