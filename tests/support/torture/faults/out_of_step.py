"""Ranks that do not do the same: other calls, other inputs, other weights, a call that ends early on some of them."""

from __future__ import annotations

import signal
import time
import types
from typing import Any, NoReturn

import torch
from model_cases import Plain, tokens
from torch import nn

from torture.rank import Injected, Rank
from torture.table import fault

ATTEND = "sfcompile.runtime.rank.session:Session.attend"


def other(seed: int = 7) -> Plain:
    """A model of the same architecture with other weights, on every rank the same."""
    model = Plain()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + number))
    return model


def another(seed: int = 7) -> Plain:
    """As :func:`other`, of a class of its own: Dynamo compiles it anew, and to the same graph."""
    code = Plain.forward.__code__
    forward = types.FunctionType(code.replace(co_firstlineno=code.co_firstlineno + seed), Plain.forward.__globals__)
    model = other(seed)
    model.__class__ = type("Another", (Plain,), {"forward": forward})
    return model


def raising(error: BaseException) -> Any:
    """What raises it when called."""

    def do() -> NoReturn:
        raise error

    return do


@fault("an error on all; then exact", name="two models of one class in another order", args=(True,), quick=True)
@fault("an error on all; then exact", name="two models of one graph in another order", args=(False,))
def two_models_in_another_order(rank: Rank, one_class: bool) -> None:
    """A, B on rank 0 and B, A on the others; both of one architecture, of one compile or of two."""
    a, b = Plain(), other() if one_class else another()
    run_a, run_b = rank.compiled(a), rank.compiled(b)
    rank.call("warm A", run_a, a)
    rank.call("warm B", run_b, b)
    order = ((run_a, a), (run_b, b)) if rank.number == 0 else ((run_b, b), (run_a, a))
    rank.call("first", *order[0], must="error")
    rank.call("second", *order[1], must="error")
    rank.recovers(run_a, a)


@fault("an error on all; then exact", quick=True)
def one_rank_skips_a_call(rank: Rank) -> None:
    """A request is cancelled on rank 1, which goes on with the next one."""
    run, model = rank.warm()
    if rank.number == 1:
        rank.strike(victim=False)
    rank.call("out of step", run, model, tokens() + 1 + rank.number, must="error")
    rank.recovers(run, model)


@fault("an error on the others within the timeout; then exact")
def one_rank_skips_and_stays_away(rank: Rank) -> None:
    """Rank 1 raises before its call and makes no other for a while."""
    run, model = rank.warm()
    if rank.number == 1:
        rank.strike(victim=False)
    else:
        rank.call("alone", run, model, must="error")
    rank.recovers(run, model)


@fault("an error on all but the victim; then exact", ranks=3)
def a_loop_ends_one_step_early(rank: Rank) -> None:
    """Rank 1 makes three steps and the others four."""
    run, model = rank.warm()
    for step in range(3):
        rank.call(f"step {step}", run, model, tokens() + step)
    if rank.number != 1:
        rank.call("step 3", run, model, tokens() + 3, must="error")
    rank.recovers(run, model)


@fault("KeyboardInterrupt on all; then exact", quick=True)
def interrupted_on_all_ranks(rank: Rank) -> None:
    """Ctrl-C in the middle of a call, caught, and called again."""
    run, model = rank.warm()
    rank.before(ATTEND, raising(KeyboardInterrupt()), nth=2)
    rank.call("interrupted", run, model, must="error", own=(KeyboardInterrupt,))
    rank.recovers(run, model)


@fault("KeyboardInterrupt on one, an error on the others; then exact", ranks=3)
def interrupted_on_one_rank(rank: Rank) -> None:
    """Ctrl-C reaches one rank only."""
    run, model = rank.warm()
    if rank.number == 1:
        rank.before(ATTEND, raising(KeyboardInterrupt()), nth=2)
    rank.call("interrupted", run, model, must="error", own=(KeyboardInterrupt,))
    rank.recovers(run, model)


@fault("KeyboardInterrupt on one, an error on the other; then exact")
def interrupted_by_a_timer(rank: Rank) -> None:
    """A real SIGINT, somewhere in a loop of calls."""
    run, model = rank.warm()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank.number == 1:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))

    def loop() -> None:
        end = time.monotonic() + 3 * rank.timeout_s
        while time.monotonic() < end:
            run(tokens())

    rank.attempt("loop", loop, must="error", own=(KeyboardInterrupt,))
    signal.signal(signal.SIGINT, previous)
    rank.recovers(run, model)


@fault("the user's error on one, ours on the others; then exact", ranks=3)
def an_exception_in_a_hook(rank: Rank) -> None:
    """A callback of the user's, between two graphs of a model, raises on one rank."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Plain(), other()
            self.armed = False

        @torch._dynamo.disable
        def hook(self) -> None:
            if self.armed:
                raise Injected("a callback of the user's")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            self.hook()
            return self.second(x)  # type: ignore[no-any-return]

    model = Hooked()
    run = rank.compiled(model)
    rank.call("warm", run, model)
    model.armed = rank.number == 1
    rank.attempt("hook", lambda: run(tokens()), must="error", own=(Injected,))
    model.armed = False
    rank.recovers(run, model)


@fault("RecursionError on one, ours on the other; then exact")
def too_deep_on_one_rank(rank: Rank) -> None:
    """The stack of one rank is full in the middle of a call."""
    run, model = rank.warm()

    def deeper() -> None:
        deeper()

    if rank.number == 1:
        rank.before(ATTEND, deeper, nth=1)
    rank.call("too deep", run, model, must="error", own=(RecursionError,))
    rank.recovers(run, model)


@fault("an error on both", quick=True)
def other_shapes_at_first(rank: Rank) -> None:
    """Each rank has another number of tokens."""
    model = Plain()
    rank.call("first", rank.compiled(model), model, tokens(50 - 2 * rank.number), must="error")


@fault("an error on all; then exact", ranks=3)
def other_shapes_later(rank: Rank) -> None:
    """After a good call one rank compiles for other shapes while the others call."""
    run, model = rank.warm()
    rank.call("other shapes", run, model, tokens(48 if rank.number == 1 else 50), must="error")
    rank.recovers(run, model)


@fault("an error on both")
def another_dtype_on_one_rank(rank: Rank) -> None:
    """Rank 1 has loaded its model in double precision."""
    model = Plain().double() if rank.number == 1 else Plain()
    x = tokens().double() if rank.number == 1 else tokens()
    rank.call("first", rank.compiled(model), model, x, must="error")


@fault("an error on both")
def other_weights_on_one_rank(rank: Rank) -> None:
    """A forgotten seed."""
    model = other(7 + rank.number)
    rank.call("first", rank.compiled(model), model, must="error")


@fault("an error on both")
def other_weights_in_a_second_model(rank: Rank) -> None:
    """The second model of a class takes the compile of the first; its weights differ between the ranks."""
    rank.warm()
    model = other(7 + rank.number)
    rank.call("second", rank.compiled(model), model, must="error")


@fault("an error on both; then exact")
def weights_changed_on_one_rank(rank: Rank) -> None:
    """Rank 1 merges an adapter into its weights after the compile; then all do."""
    run, model = rank.warm()

    def merge() -> None:
        for weight in model.parameters():
            weight.mul_(1.5)

    if rank.number == 1:
        merge()
    rank.call("merged on one", run, model, must="error")
    if rank.number == 0:
        merge()
    rank.recovers(run, model)


@fault("an error on both; then exact")
def weights_moved_on_one_rank(rank: Rank) -> None:
    """Rank 1 gives its weights other memory by ``weight.data = ...``; then all do."""
    run, model = rank.warm()

    def move() -> None:
        for weight in model.parameters():
            weight.data = weight.data * 1.5

    if rank.number == 1:
        move()
    rank.call("moved on one", run, model, must="error")
    if rank.number == 0:
        move()
    rank.recovers(run, model)


class Kept(nn.Module):
    """Keeps what it computed, adds it to the next input, and scales by numbers that become a constant of the graph."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.model = Plain()
        self.scale = [scale, 1.0] * 16
        self.register_buffer("kept", torch.zeros(2, 50, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.model(x * torch.tensor(self.scale) + self.kept)
        self.kept.copy_(out)
        return out


@fault("an error on both")
def another_cache_on_one_rank(rank: Rank) -> None:
    """Rank 1 resets a buffer that the model writes to."""
    model = Kept()
    run = rank.compiled(model)
    rank.attempt("warm", lambda: run(tokens()))
    if rank.number == 1:
        model.kept.zero_()
    rank.attempt("reset on one", lambda: run(tokens()), must="error")


@fault("an error on both")
def another_constant_on_one_rank(rank: Rank) -> None:
    """A list of numbers, which the graph holds as a tensor, is another one on rank 1."""
    run = rank.compiled(Kept(1.0 + rank.number))
    rank.attempt("first", lambda: run(tokens()), must="error")


class Noisy(nn.Module):
    """Draws noise inside."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x + torch.randn_like(x))


@fault("an error on both; then exact")
def another_seed_of_noise_drawn_inside(rank: Rank) -> None:
    """The model draws noise itself, from generators that ranks seeded differently; then alike."""
    model = Noisy()
    run = rank.compiled(model)

    def seeded(run: Any, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return run(tokens())

    rank.attempt("alike", lambda: seeded(run, 1), lambda: seeded(model, 1))
    rank.attempt("differently", lambda: seeded(run, 2 + rank.number), must="error")
    for name, must in (("again", "either"), ("again 2", "exact")):
        rank.meet(name)
        rank.attempt(name, lambda: seeded(run, 1), lambda: seeded(model, 1), must=must)


@fault("an error on both; then exact")
def noise_of_its_own_on_each_rank(rank: Rank) -> None:
    """Each rank draws its own."""
    run, model = rank.warm()
    rank.call("noise", run, model, torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(rank.number)),
              must="error")  # fmt: skip
    rank.recovers(run, model)


@fault("an error on both; then exact")
def one_element_differs(rank: Rank) -> None:
    """The last element of the input is not the same number on rank 1."""
    run, model = rank.warm()
    x = tokens()
    x[-1, -1, -1] += rank.number
    rank.call("noise", run, model, x, must="error")
    rank.recovers(run, model)


@fault("an error on all; then exact", ranks=3)
def late_in_a_compile(rank: Rank) -> None:
    """Rank 1 comes to the compile when the others have given up; then all try again."""
    model = Plain()
    run = rank.compiled(model)
    rank.call("before", run, model)
    run = rank.compiled(second := another())
    if rank.number == 1:
        rank.await_mark("gave up", 2 * rank.timeout_s + 10)
    rank.call("late", run, second, must="error")
    rank.mark("gave up")
    rank.recovers(run, second)


@fault("exact in every mode")
def modes_in_turn(rank: Rank) -> None:
    """Warm-up under inference_mode, then no_grad, then with gradients enabled and no weight that wants one."""
    model = Plain()
    run = rank.compiled(model)
    for number in range(2):
        with torch.inference_mode():
            rank.call(f"inference_mode {number}", run, model, tokens() + number)
        rank.call(f"no_grad {number}", run, model, tokens() + number)
    model.requires_grad_(False)
    with torch.enable_grad():
        rank.call("frozen", run, model)


@fault("exact on both")
def other_modes_on_other_ranks(rank: Rank) -> None:
    """Rank 0 under no_grad, rank 1 under inference_mode."""
    model = Plain()
    run = rank.compiled(model)
    with torch.inference_mode() if rank.number == 1 else torch.no_grad():
        for step in range(3):
            rank.call(f"step {step}", run, model, tokens() + step)


@fault("an error on both; then exact")
def gradients_wanted(rank: Rank) -> None:
    """A call with autograd on, as in training."""
    run, model = rank.warm()
    with torch.enable_grad():
        rank.call("training", run, model, must="error")
    rank.recovers(run, model)


@fault("an error on both; then exact")
def gradients_wanted_on_one_rank(rank: Rank) -> None:
    """Rank 1 has forgotten no_grad."""
    run, model = rank.warm()
    with torch.set_grad_enabled(rank.number == 1):
        rank.call("training", run, model, must="error")
    rank.recovers(run, model)


@fault("an error on both")
def gradients_wanted_on_one_rank_at_first(rank: Rank) -> None:
    """Rank 1 has forgotten no_grad at the very first call."""
    model = Plain()
    run = rank.compiled(model)
    with torch.set_grad_enabled(rank.number == 1):
        rank.call("training", run, model, must="error")


@fault("exact, or an error on both; then exact")
def a_call_inside_a_call(rank: Rank) -> None:
    """An operator of the user's, in the middle of one compiled model, calls another compiled model."""
    inner = other()
    run_inner = rank.compiled(inner)
    rank.call("warm", run_inner, inner)

    @torch.library.custom_op(f"torture::inner{rank.number}", mutates_args=())
    def nested(x: torch.Tensor) -> torch.Tensor:
        return run_inner(x).clone()  # type: ignore[no-any-return]

    @nested.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Outer(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nested(x))  # type: ignore[no-any-return]

    model = Outer()
    want = Plain()(inner(tokens()))
    run = rank.compiled(model)
    rank.attempt("nested", lambda: run(tokens()), want, must="either")
    rank.recovers(run_inner, inner)
