"""Failures one upon the other: in a recovery, in a compile that is tried again, over the slower transport."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import Plain, tokens

from torture.faults.out_of_step import ATTEND, another, raising
from torture.rank import Injected, Rank
from torture.table import fault


@fault("an error on both each time; then exact", limit_s=80.0)
def five_failures_in_a_row(rank: Rank) -> None:
    """Calls fail one after another, now on one rank and now on the other, before one goes well."""
    run, model = rank.warm()
    for number in range(5):
        if rank.number == number % 2:
            rank.before(ATTEND, raising(Injected(f"failure {number}")))
        rank.call(f"failure {number}", run, model, tokens() + number, must="error", own=(Injected,))
        rank.meet(f"failure {number}")
        rank.call(f"after {number}", run, model, tokens(), must="either")
        rank.meet(f"after {number}")
    rank.recovers(run, model)


@fault("an error on all; then exact", name="interrupted with transport c10d", args=("c10d", (0, 0)), limit_s=60.0)
@fault("an error on all; then exact", name="interrupted over TCP", args=("auto", (0, 1)), machines=(0, 1))
def interrupted_over_messages(rank: Rank, transport: str, homes: tuple[int, ...]) -> None:
    """An interrupt on rank 1 in the middle of a call whose chunks travel as messages."""
    run, model = rank.warm(transport=transport)
    if rank.number == 1:
        rank.before(ATTEND, raising(KeyboardInterrupt()), nth=2)
    rank.call("interrupted", run, model, must="error", own=(KeyboardInterrupt,))
    rank.recovers(run, model)


@fault("an error on the survivor", name="killed with transport c10d", args=("c10d",))
def killed_over_messages(rank: Rank, transport: str) -> None:
    """Rank 1 is killed in the middle of a call over gloo."""
    run, model = rank.warm(transport=transport)
    if rank.number == 1:
        rank.before(ATTEND, rank.die, nth=2)
    rank.call("killed", run, model, must="error")
    rank.call("and again", run, model, must="error")


@fault("KeyboardInterrupt on one, an error on the other; then exact")
def interrupted_in_a_compile(rank: Rank) -> None:
    """Ctrl-C reaches rank 1 while both compile a second model; then both try again."""
    run, model = rank.warm()
    second = another()
    compiled = rank.compiled(second)
    if rank.number == 1:
        rank.before("sfcompile.lowering.compile_once:run_inner", raising(KeyboardInterrupt()))
    rank.call("interrupted", compiled, second, must="error", own=(KeyboardInterrupt,))
    rank.meet("interrupted")
    rank.call("old model", run, model, must="either")
    rank.recovers(compiled, second)


@fault("an error on all; then exact", ranks=3, limit_s=60.0)
def killed_in_a_recovery(rank: Rank) -> None:
    """A call fails on all; when they start afresh, rank 1 is killed."""
    run, model = rank.warm()
    if rank.number == 0:
        rank.before(ATTEND, raising(Injected("first")), nth=1)
    rank.call("first", run, model, must="error", own=(Injected,))
    rank.meet("first")
    if rank.number == 1:
        rank.die()
    rank.call("again", run, model, must="error")
    rank.call("and again", run, model, must="error")


@fault("an error on both; then exact when both compile", limit_s=60.0)
def compiled_anew_on_one_rank(rank: Rank) -> None:
    """Rank 1 drops its compiled graphs between two calls; then both do."""
    run, model = rank.warm()
    if rank.number == 1:
        torch._dynamo.reset()
    rank.call("one compiles", run, model, must="error")
    rank.meet("one compiled")
    torch._dynamo.reset()
    rank.recovers(run, model)


@fault("exact, or an error on both")
def overlapping_views(rank: Rank) -> None:
    """Two inputs are views of one tensor, and the model writes to one of them, as caches of keys do."""

    class Cache(Plain):
        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            x.add_(1.0)
            return super().forward(x) + other  # type: ignore[no-any-return]

    model = Cache()
    run = rank.compiled(model)

    def views() -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(3))
        return whole[:, :50], whole[:, 10:]

    rank.attempt("views", lambda: run(*views()), lambda: model(*views()), must="either")


@fault("exact: who writes to the view writes to the input")
def views_handed_back(rank: Rank) -> None:
    """The model returns a part of its input and of a cache that it writes to, and the caller writes to both."""

    class Cache(Plain):
        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> Any:  # type: ignore[override]
            cache.add_(x)
            return super().forward(x), x[:, 3:], cache[:, :7]

    model = Cache()
    run = rank.compiled(model)

    def written(call: Any) -> torch.Tensor:
        x, cache = tokens(), tokens() * 2
        out, part, kept = call(x, cache)
        part.mul_(3.0)
        kept.zero_()
        return torch.cat([out, x, cache])

    rank.attempt("views", lambda: written(run), lambda: written(model))


@fault("exact for rank 0's inputs, on every rank", ranks=3)
def noise_of_its_own_with_rank_0s_inputs(rank: Rank) -> None:
    """Each rank draws its own noise, and ``inputs="rank0"`` says whose counts; other shapes are an error still."""
    model = Plain()
    run = rank.compiled(model, inputs="rank0")

    def noise(number: int, step: int) -> torch.Tensor:
        return torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(10 * step + number))

    for step in range(3):
        mine, first = noise(rank.number, step), noise(0, step)
        rank.attempt(f"step {step}", lambda x=mine: run(x), lambda x=first: model(x))  # type: ignore[misc]
    rank.call("other shapes", run, model, tokens(48 if rank.number == 1 else 50), must="error")
    rank.recovers(run, model)


@fault("an error on the survivors", ranks=3, machines=(0, 1, 1))
def rank_0_killed_with_its_inputs_awaited(rank: Rank) -> None:
    """The others wait for rank 0's inputs when it is killed."""
    model = Plain()
    run = rank.compiled(model, inputs="rank0")
    rank.call("warm", run, model)
    rank.meet("warm")
    if rank.number == 0:
        rank.die()
    rank.call("next", run, model, must="error")
