"""One rank that is not as the others, in ways that torch or the user's code does not tell us of."""

from __future__ import annotations

import threading
from typing import Any

import torch
from model_cases import Plain, tokens
from torch import nn

from torture.faults.out_of_step import another
from torture.rank import Rank
from torture.table import fault


@fault(
    "an error on both at once; then exact", name="a bad value at first, then a good one", args=({"schedule": "spiral"},)
)
@fault(
    "an error on both at once; then exact", name="a bad mesh at first, then a good one", args=({"mesh": {"ring": 3}},)
)
@fault("an error on both at once; then exact", name="no such key at first, then none", args=({"shedule": "ring"},))
def a_bad_option_at_first(rank: Rank, options: dict[str, Any]) -> None:
    """The very first compile is refused on rank 1; all try again, by another transport than rank 1 asked for."""
    model = Plain()
    run = rank.compiled(model, transport="c10d", **(options if rank.number == 1 else {}))
    rank.attempt("first", lambda: run(tokens()), must="error")
    torch._dynamo.reset()
    good = rank.compiled(model, transport="c10d")
    rank.call("good", good, model)


@fault("an OptionError on both, soon")
def a_bad_option_on_every_rank(rank: Rank) -> None:
    """Nobody waits for anybody."""
    model = Plain()
    rank.call("first", rank.compiled(model, schedule="spiral"), model, must="error")


@fault("an OptionError on the one that is there, within the timeout", timeout_s=3.0)
def a_bad_option_and_nobody_there(rank: Rank) -> None:
    """Rank 1 is refused, and rank 0 never compiles anything."""
    if rank.number == 1:
        model = Plain()
        rank.call("alone", rank.compiled(model, schedule="spiral"), model, must="error")
    rank.meet("over")


@fault(
    "an error on both at the next call; then exact", name="written through .data on one rank", args=(False,), quick=True
)
@fault("an error on both at the next call; then exact", name="written in inference mode on one rank", args=(True,))
def written_behind_torchs_back(rank: Rank, inference: bool) -> None:
    """A weight is scaled on rank 1 in a way that torch does not count."""
    run, model = rank.warm()
    weight = next(model.parameters())
    before = weight.detach().clone()

    def write(value: torch.Tensor) -> None:
        with torch.inference_mode(inference):
            (weight if inference else weight.data).copy_(value)

    if rank.number == 1:
        write(2 * before)
    rank.call("scaled on one", run, model, must="error")
    write(2 * before)
    rank.recovers(run, model)
    write(before)
    rank.call("written alike", run, model)


class Counting(nn.Module):
    """Holds a buffer of a size of its own, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.drop = Plain(), nn.Dropout(0.5)
        self.register_buffer("bias", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.drop(self.plain(x) + self.bias.sum())
        return y


@fault("an error on both; then exact")
def a_buffer_of_another_size_on_one_rank(rank: Rank) -> None:
    """Rank 1 gives a buffer another size between two calls: Dynamo compiles there, and not on rank 0."""
    model = Counting().eval()
    run = rank.compiled(model)
    rank.call("warm", run, model)
    if rank.number == 1:
        model.bias = torch.ones(2)
    rank.call("other size", run, model, must="error")
    model.bias = torch.ones(3)
    rank.call("alike", run, model, must="either")
    rank.recovers(run, model)


@fault("an error on both; then exact")
def in_training_mode_on_one_rank(rank: Rank) -> None:
    """Rank 1 calls model.train() between two calls: its dropout draws."""
    model = Counting().eval()
    run = rank.compiled(model)
    rank.call("warm", run, model)
    model.train(rank.number == 1)
    rank.attempt("one trains", lambda: run(tokens()), must="error")
    model.eval()
    rank.recovers(run, model)


@fault("exact: the call waits for the compile", limit_s=60.0)
def called_while_another_thread_compiles(rank: Rank) -> None:
    """A thread compiles a second model while the main one calls the first."""
    run, model = rank.warm()
    second = another()
    began = threading.Event()
    rank.before("sfcompile.backend:run_passes", began.set)

    def compile() -> None:
        with torch.no_grad():
            rank.call("second", rank.compiled(second), second)

    thread = threading.Thread(target=compile)
    thread.start()
    began.wait(30.0)
    rank.call("first again", run, model, tokens() + 1)
    thread.join()
    rank.recovers(run, model)


@fault("exact or an error on both", timeout_s=0.1)
def the_shortest_timeout(rank: Rank) -> None:
    """A tenth of a second, on a busy machine."""
    model = Plain()
    run = rank.compiled(model)
    for step in range(4):
        rank.meet(f"step {step}")
        rank.call(f"call {step}", run, model, tokens() + step, must="either")
