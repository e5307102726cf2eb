"""Instructions: values that print."""

from __future__ import annotations

import pickle

from sfcompile.runtime.program.instructions import Arrival, Attend, Chunk, Forward, Push, Put, RankProgram, Wait

PAIR = Attend((Chunk(1), Chunk(0, 2)), (Chunk(2),), (0, None), (3,), (4,))


def test_they_print_for_people() -> None:
    assert str(Put("k", 0, 3, 7)) == "put k -> rank 3 slot 7"
    assert str(Put("k", 1, 3, 7)) == "put k.1 -> rank 3 slot 7"
    assert str(Forward(4, 1, 5)) == "forward slot 4 -> rank 1 slot 5"
    assert str(Wait(4, 0)) == "wait slot 4 from rank 0"
    assert str(PAIR) == "attend Q{1,0.2} x KV{2}"
    assert str(Push(Chunk(1, 1), 9)) == "push O1.1 -> rank 1 slot 9"
    assert str(Arrival(4, 1, "k", Chunk(3))) == "k3 in slot 4 from rank 1"
    program = RankProgram(5, {"put_q": (Put("q", 0, 0, 0),), "attend": (Wait(1, 0),)})
    assert str(program).splitlines() == [
        "rank 5",
        "  put_q           put q -> rank 0 slot 0",
        "  attend          wait slot 1 from rank 0",
    ]


def test_they_are_data() -> None:
    program = RankProgram(0, {"attend": (PAIR,)}, (Arrival(1, 1, "v", Chunk(1)),))
    assert pickle.loads(pickle.dumps(program)) == program
