"""Programs by size: which inputs move, one compilation for each set of sizes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import pytest
import torch

from sfcompile.capture.by_sizes import KEPT, BySizes, SizedProgram, moving_inputs
from sfcompile.capture.graph import capture
from sfcompile.runtime.rank.session import Session


class Guarded:
    """Counts how often a compilation was guarded."""

    def __init__(self) -> None:
        self.entered = 0

    @contextmanager
    def guard(self) -> Iterator[None]:
        self.entered += 1
        yield

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_each_set_of_sizes_is_compiled_once() -> None:
    compiled: list[tuple[int, ...]] = []
    traced: list[BySizes] = []
    session = Guarded()

    def make(inputs: Sequence[Any]) -> SizedProgram:
        compiled.append(tuple(int(s) for x in inputs if isinstance(x, torch.Tensor) for s in x.shape if s > 4))
        return SizedProgram(lambda *args: (next(x for x in args if isinstance(x, torch.Tensor) and x.dim() == 3) * 2,))

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        moving = moving_inputs(gm, inputs)
        assert moving and all(not isinstance(x, torch.nn.Parameter) for x in (inputs[i] for i in moving))
        traced.append(BySizes(gm, make(inputs), inputs, moving, make, cast(Session, session)))
        return traced[-1]

    torch._dynamo.reset()
    run = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
    for count in (5, 9, 5, 9, 7):
        x = torch.randn(2, count, 3)
        assert torch.equal(run(x), x * 2)
    assert len(traced) == 1 and len(traced[0]) == 3 and session.entered == 2
    assert [sizes[-1] for sizes in compiled] == [5, 9, 7]


def test_static_inputs_do_not_move() -> None:
    gm = torch.fx.symbolic_trace(lambda x, n, none: x * n)
    assert moving_inputs(gm, [torch.zeros(3), 4, None]) == ()


@pytest.mark.parametrize(("keep", "programs"), [(False, (2, 3)), (True, (1, 2))])
def test_python_floats_are_inputs_or_part_of_what_a_program_is_looked_up_by(
    keep: bool, programs: tuple[int, int]
) -> None:
    traced: list[BySizes] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def make(given: Sequence[Any]) -> SizedProgram:
            got = capture(gm, given, keep)
            run = lambda *args: got.gm(*(got.as_tensors(args)[i] for i in got.tensor_inputs))  # noqa: E731
            return SizedProgram(run, got.numbers)

        traced.append(BySizes(gm, make(inputs), inputs, moving_inputs(gm, inputs), make, cast(Session, Guarded())))
        return traced[-1]

    torch._dynamo.reset()
    run = torch.compile(lambda x, scale: x * scale, backend=backend, dynamic=True)
    x = torch.randn(4, 3)
    for scale in (0.5, 0.25, 0.5):
        assert torch.equal(run(x, scale), x * scale)
    assert sum(map(len, traced)) in programs


def test_zero_has_two_signs() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def make(given: Sequence[Any]) -> SizedProgram:
            got = capture(gm, given, True)
            return SizedProgram(
                lambda *args: got.gm(*(got.as_tensors(args)[i] for i in got.tensor_inputs)), got.numbers
            )

        return BySizes(gm, make(inputs), inputs, moving_inputs(gm, inputs), make, cast(Session, Guarded()))

    torch._dynamo.reset()
    run = torch.compile(lambda x, sign: torch.copysign(x, sign), backend=backend, dynamic=True)
    assert [run(torch.ones(()), sign).item() for sign in (0.5, 0.0, -0.0, 0.0)] == [1.0, 1.0, -1.0, 1.0]


def test_programs_not_called_for_longest_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    compiled: list[int] = []
    traced: list[BySizes] = []

    def make(inputs: Sequence[Any]) -> SizedProgram:
        compiled.append(next(len(x) for x in inputs if isinstance(x, torch.Tensor)))
        return SizedProgram(lambda *args: (next(x for x in args if isinstance(x, torch.Tensor)) * 2,))

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        traced.append(BySizes(gm, make(inputs), inputs, moving_inputs(gm, inputs), make, cast(Session, Guarded())))
        return traced[-1]

    torch._dynamo.reset()
    run = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
    for count in (*range(2, KEPT + 2), 2, KEPT + 2, 2, 3):
        run(torch.zeros(count))
    assert compiled == [*range(2, KEPT + 3), 3] and len(traced[0]) == KEPT  # 2 was called again, so 3 was dropped
    assert sum("Round sizes to a few buckets" in record.message for record in caplog.records) == 1


def test_threads_that_call_one_model_compile_it_once() -> None:
    """Each size once, however many threads ask for it; a program that one thread calls is not missing for another."""
    compiled: list[int] = []
    turns = threading.RLock()
    session = Guarded()
    session.turn = lambda: turns  # type: ignore[method-assign, assignment, return-value]

    def make(inputs: Sequence[Any]) -> SizedProgram:
        compiled.append(next(len(x) for x in inputs if isinstance(x, torch.Tensor)))
        time.sleep(0.01)
        return SizedProgram(lambda *args: (next(x for x in args if isinstance(x, torch.Tensor)) * 2,))

    traced: list[BySizes] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        traced.append(BySizes(gm, make(inputs), inputs, moving_inputs(gm, inputs), make, cast(Session, session)))
        return traced[-1]

    torch._dynamo.reset()
    run = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
    run(torch.zeros(4))

    def call(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            count = rng.randint(2, 9)
            traced[0](count, torch.zeros(count))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert sorted(compiled) == list(range(2, 10))
