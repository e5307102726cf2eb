"""Ranks at the edges of a job, as tests/e2e/test_edges.py runs them: wrong options, children, early ends.

As a program, under torchrun or our launcher: ``edge_cases.py CASE [ARGUMENT...]``.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from model_cases import Plain, close, compiled, rank, tokens

from sfcompile.errors import StreamFusionError
from sfcompile.runtime.rank.session import close_session


def run(rank: int, case: str, *arguments: str) -> None:
    """One case on one rank."""
    with torch.no_grad():
        globals()[f"case_{case}"](*arguments)


def case_refused_options(where: str) -> None:
    """A later compile with wrong options, on all ranks or on rank 1 alone: an error, and the first model goes on."""
    model, x = Plain(), tokens()
    run = compiled(model, placement="shard", timeout_s=20.0)
    run(x)
    second = Plain()
    wrong: tuple[dict[str, Any], ...] = (
        {"transport": "c10d"}, {"topology": "1x7"}, {"topology": "/no/such.toml"}, {"timeout_s": 1e300}, {"no_such": 1},
    )  # fmt: skip
    for options in wrong:
        try:
            compiled(second, **(options if where == "all" or rank() == 1 else {}))(x)
        except Exception as error:
            print(f"{options}: {error}")
            mismatch = "would compile something else" in str(error)
            assert mismatch == (where == "one" and rank() == 0), error  # rank 1 is told what is wrong with its own
            assert mismatch <= ("refused" in str(error)), error
        else:
            raise AssertionError(f"{options} was taken on {where}")
        close(run(x), model(x))
    close(compiled(second, placement="shard")(x), model(x))


def case_forks() -> None:
    """Children of a rank use nothing of it and end at once; the rank goes on, in step with the others."""
    model, x = Plain(), tokens()
    run = compiled(model, placement="shard", timeout_s=60.0)
    close(run(x), model(x))
    for child in (_child_that_calls, _child_that_compiles, _child_that_exits):
        pid = os.fork()
        if pid == 0:
            child(run, x)
            os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, child.__name__
        close(run(x), model(x))
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the tests' server is
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(abs, [-1, 2, -3])) == [1, 2, 3]
    loader = torch.utils.data.DataLoader([x[0], x[1]], batch_size=2, num_workers=2)
    close(run(next(iter(loader))), model(x))
    torch._dynamo.reset()
    close(compiled(Plain(), placement="shard")(x), model(x))


def _child_that_calls(run: Any, x: torch.Tensor) -> None:
    _refused(lambda: run(x))


def _child_that_compiles(run: Any, x: torch.Tensor) -> None:
    torch._dynamo.reset()
    _refused(lambda: compiled(Plain())(x))


def _child_that_exits(run: Any, x: torch.Tensor) -> None:
    """As a script does: with exit handlers and destructors, some of which would wait for threads of the parent."""
    ctypes.pythonapi.Py_Exit(0)


def _refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except StreamFusionError as error:
        if f"was forked from process {os.getppid()}, which is rank {rank()}" in str(error):
            close_session()
            os._exit(0)
    os._exit(98)


def case_leaves(how: str) -> None:
    """Rank 1 ends between two steps, by an error of its own or as if it had done its work."""
    run = compiled(Plain(), placement="shard")
    run(tokens())
    if rank() == 1:
        if how == "error":
            raise ValueError("no such prompt")
        return
    run(tokens())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(rank(), *sys.argv[1:])
