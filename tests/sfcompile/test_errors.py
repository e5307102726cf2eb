"""Errors: three sentences, the place they are about, and a round trip through pickle."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest

from sfcompile import errors
from sfcompile.errors import RuntimeTimeoutError, StreamFusionError, source_line

TRACE = """  File "/home/user/dit.py", line 12, in forward
    x = self.block(x)
  File "/home/user/blocks.py", line 88, in forward
    return self.proj(x)
"""
CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StreamFusionError)]


@dataclass
class Node:
    """What an error needs of an fx node."""

    name: str
    stack_trace: str | None

    def __str__(self) -> str:
        return self.name


def test_sentences_are_closed_and_empty_ones_left_out() -> None:
    assert (
        str(StreamFusionError("4093 tokens on 8 ranks", "", "Pad to 4096.")) == "4093 tokens on 8 ranks. Pad to 4096."
    )


def test_why_and_fix_begin_as_sentences_do_and_names_stay_as_they_are_written() -> None:
    error = StreamFusionError("x is too long", "it has 3 rows", "pip install more")
    assert str(error) == "x is too long. It has 3 rows. pip install more." and error.why == "it has 3 rows"
    assert str(StreamFusionError("x", "mesh=2", "a file; name one")) == "x. mesh=2. A file; name one."


def test_graph_error_shows_node_and_innermost_user_line() -> None:
    text = str(StreamFusionError("no rule", node=Node("view_12", TRACE)))
    assert "at node `view_12`" in text
    assert "in /home/user/blocks.py:88: return self.proj(x)" in text


def test_given_source_wins_over_the_trace() -> None:
    assert StreamFusionError("x", node=Node("a", TRACE), source="dit.py:1").source == "dit.py:1"


def test_runtime_error_shows_rank_peer_slot_and_epochs() -> None:
    error = RuntimeTimeoutError("waited 60 s", rank=3, world_size=8, peer=0, slot=7, epoch=41, seen_epoch=40)
    assert str(error).startswith("[rank 3/8] waited 60 s.")
    assert "peer rank 0, slot 7, wanted epoch 41, seen epoch 40" in str(error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_pickle_keeps_class_text_and_fields(cls: type[StreamFusionError]) -> None:
    error = cls("what", "why", "fix", node=Node("n", TRACE), rank=1, world_size=2, peer=0, slot=3, epoch=4)
    error.add_note("a note that is not one of our fields")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is cls
        assert str(other) == str(error)
        assert (other.peer, other.slot, other.epoch, other.node) == (0, 3, 4, "n")


@pytest.mark.parametrize(
    ("trace", "want"),
    [
        (None, None),
        ("", None),
        ("no frame here", None),
        ('File "a.py", line 3, in f', "a.py:3"),
        ('  File "a.py", line 3, in f\n    y = 1\n', "a.py:3: y = 1"),
    ],
)
def test_source_line(trace: str | None, want: str | None) -> None:
    assert source_line(trace) == want
