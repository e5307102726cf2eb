"""Which stretches of a sequence repeat, and where they are cut."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sfcompile.lowering.repeats import Repeat, cuts, longest_repeat


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def pieces(text: str, costs: list[float] | None = None, least: int = 2, worth: int = 2) -> list[str]:
    places = cuts(letters(text), costs or [1.0] * (len(text) + 1), least, worth)
    return [text[first:stop] for first, stop in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("abcdef", None),
        ("xabcabcabcy", Repeat(1, 9, 3)),
        ("xabcabcabcaby", Repeat(1, 11, 3)),
        ("abababab", Repeat(0, 8, 2)),  # the shortest period, not twice that
        ("aaaabcdbcd", Repeat(4, 6, 3)),  # a period of one is too short
        ("ababcdefcdefcdef", Repeat(4, 12, 4)),  # spares eight, not two
        ("", None),
    ],
)
def test_the_repeat_that_spares_most(text: str, wanted: Repeat | None) -> None:
    assert longest_repeat(np.array(letters(text), dtype=np.int64), least=2) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("xabcabcabcy", ["x", "abc", "abc", "abc", "y"]),
        ("pqddeddeddesfsfsfz", ["pq", "dde", "dde", "dde", "sf", "sf", "sf", "z"]),  # two kinds, one after the other
        ("abcxabcyabcz", ["abcxabcyabcz"]),
        ("abcabc", ["abc", "abc"]),
        ("abcabcdabcabcd", ["abcabcd", "abcabcd"]),
        ("abcabcabcabcxbcabcabcabc", ["abc"] * 4 + ["xbc"] + ["abc"] * 3),  # not bca, as there is abc
    ],
)
def test_what_repeats_is_cut_apart(text: str, wanted: list[str]) -> None:
    assert pieces(text) == wanted


def test_a_repeat_is_cut_where_least_is_handed_on() -> None:
    text = "xabcdabcdabcdaby"
    costs = [5.0] * (len(text) + 1)
    for place in (3, 7, 11, 15):
        costs[place] = 1.0
    assert pieces(text, costs) == ["xab", "cdab", "cdab", "cdab", "y"]


def test_more_repetitions_are_worth_a_few_bytes() -> None:
    text = "abcdabcdabcd"
    costs = [9.0] * (len(text) + 1)
    for place in (0, 4, 8, 12):
        costs[place] = 1.2
    for place in (1, 5, 9):
        costs[place] = 1.0
    assert pieces(text, costs) == ["abcd"] * 3


def test_there_is_no_cut_where_none_may_be() -> None:
    text = "abcdabcdabcd"
    costs = [1.0 if place % 4 == 2 else math.inf for place in range(len(text) + 1)]
    assert pieces(text, costs) == ["ab", "cdab", "cdab", "cd"]
    assert pieces(text, [math.inf] * (len(text) + 1)) == [text]


def test_what_spares_little_is_left() -> None:
    assert pieces("xabcabcy", worth=4) == ["xabcabcy"]
    assert pieces("xabcabcabcy", least=4) == ["xabcabcabcy"]
