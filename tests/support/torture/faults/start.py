"""Jobs that are started wrongly: other environments, places, secrets and times on some ranks."""

from __future__ import annotations

import os
import resource
import time

import torch
from model_cases import Plain, tokens

from torture.rank import Rank
from torture.table import fault


def first_call(rank: Rank, must: str) -> None:
    """The first call of a job, which finds out that something is wrong."""
    model = Plain()
    rank.call("first", rank.compiled(model), model, must=must)


@fault("an error on both", name="a secret on one rank only", args=("SFCOMPILE_SECRET", "of rank 1"))
@fault("an error on both", name="another port on one rank", args=("MASTER_PORT", "1"))
@fault("an error on both", name="no such network interface on one rank", args=("GLOO_SOCKET_IFNAME", "none0"))
@fault("an error on both", name="another world size on one rank", args=("WORLD_SIZE", "3"))
@fault("an error on both", name="the same rank twice", args=("RANK", "0"))
@fault("an error on both", name="no such rank", args=("RANK", "2"))
@fault("an error on both", name="a rank that is no number", args=("RANK", "one"))
def another_environment_on_one_rank(rank: Rank, name: str, value: str) -> None:
    """Rank 1 is started with another variable than it should be."""
    if rank.number == 1:
        os.environ[name] = value
    model = Plain()
    run = rank.compiled(model, mesh={"ring": 2})
    rank.call("first", run, model, must="error")


@fault("exact", timeout_s=12.0)
def a_rank_starts_late(rank: Rank) -> None:
    """Rank 1 needs three seconds more to load its weights."""
    if rank.number == 1:
        time.sleep(3.0)
    first_call(rank, "exact")


@fault("an error on both")
def a_rank_starts_too_late(rank: Rank) -> None:
    """Rank 1 comes when rank 0 has given up."""
    if rank.number == 1:
        rank.await_mark("gave up", 3 * rank.timeout_s + 10)
    first_call(rank, "error")
    rank.mark("gave up")


@fault("an error on rank 0")
def a_rank_never_starts(rank: Rank) -> None:
    """Rank 1 was never launched."""
    if rank.number == 1:
        rank.strike()
        return
    first_call(rank, "error")


@fault("exact")
def other_thread_counts(rank: Rank) -> None:
    """Rank 1 computes with two threads, rank 0 with one."""
    torch.set_num_threads(1 + rank.number)
    model = Plain()
    run = rank.compiled(model)
    for step in range(3):
        rank.call(f"step {step}", run, model, tokens() + step)


@fault("an error on both")
def no_files_left_on_one_rank(rank: Rank) -> None:
    """Rank 1 may open no more files when it compiles: no sockets, no shared memory."""
    model = Plain()
    run = rank.compiled(model)
    own: tuple[type[BaseException], ...] = ()
    if rank.number == 1:
        held = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        own = (OSError,)
    rank.call("first", run, model, must="error", own=own)


@fault("exact on both, or an error on both")
def the_machine_has_no_group_rank(rank: Rank) -> None:
    """No torchrun: machines are told apart by the kernel and the network namespace."""
    os.environ.pop("GROUP_RANK", None)
    first_call(rank, "exact")
