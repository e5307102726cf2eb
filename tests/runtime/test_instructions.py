"""Instructions: values that print."""

from __future__ import annotations

import pickle

from sfcompile.runtime.instructions import Arrival, Attend, Forward, Push, Put, RankProgram, Wait


def test_they_print_for_people() -> None:
    assert str(Put("k", (2, 4), 3, 7)) == "put k[h2:4] -> rank 3 slot 7"
    assert str(Put("x", None, 3, 7)) == "put x -> rank 3 slot 7"
    assert str(Forward(1, 4)) == "forward slot 4 -> rank 1"
    assert str(Wait(4, 0)) == "wait slot 4 from rank 0"
    assert str(Attend(1, 2, 0, None, None)) == "attend Q1 x KV2"
    assert str(Push(1, 9)) == "push O -> rank 1 slot 9"
    program = RankProgram(5, {"put_q": (Put("q", (0, 1), 0, 0),), "attend": (Wait(1, 0),)})
    assert str(program).splitlines() == [
        "rank 5",
        "  put_q         put q[h0:1] -> rank 0 slot 0",
        "  attend        wait slot 1 from rank 0",
    ]


def test_they_are_data() -> None:
    program = RankProgram(0, {"attend": (Attend(0, 0, None, 1, 2),)}, (Arrival(1, 1, (1, 2, 3, 4)),), {0: (0, 2)})
    assert pickle.loads(pickle.dumps(program)) == program
