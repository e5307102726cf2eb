"""What a child of a rank finds in the rank's place; children of real ranks are in tests/e2e/test_processes.py."""

from __future__ import annotations

import os

import pytest

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.forks import Forked
from sfcompile.runtime.rank.session import Session, close_session, existing_session, sessions


def test_whatever_is_asked_of_it_is_an_error() -> None:
    gone = Forked(3)
    for use in (lambda: gone.exchange, lambda: gone.size, lambda: gone.turn):
        with pytest.raises(UnsupportedError, match=rf"process {os.getpid()} was forked from .* which is rank 3"):
            use()


class World:
    """One rank that must be asked nothing."""

    rank, global_rank, topology, group, life = 1, 1, Topology((0, 0)), "", 0


def test_a_session_that_was_left_to_the_parent() -> None:
    session = Session(World())  # type: ignore[arg-type]
    session.leave_to_parent()
    with pytest.raises(UnsupportedError, match="which is rank 1"), session.call("a model", []):
        raise AssertionError("a call began")
    for use in (
        lambda: session.turn(),
        lambda: session.agree("graph", {}),
        lambda: session.reconfigure("auto", 1.0),
        lambda: session.attend("p", 0, None),
        lambda: session.load("p", []),
        lambda: session.heap_bytes,
    ):
        with pytest.raises(UnsupportedError, match="which is rank 1"), session.guard():
            use()
    session.close()  # of nothing


def test_a_process_without_sessions_may_fork() -> None:
    assert existing_session() is None and sessions() == []
    pid = os.fork()
    if pid == 0:
        close_session()
        os._exit(0 if sessions() == [] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
