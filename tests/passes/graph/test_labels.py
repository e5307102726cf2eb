from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.runtime.program.intervals import Runs, count, flip, join, stretch


def spelled(runs: Runs) -> list[int]:
    return [label for first, length in runs for label in range(first, first + length)]


class Naive:
    """Union-find on single labels."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            label = self.parent[label]
        return label

    def unite(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_interval_union_find_is_union_find(data: st.DataObject) -> None:
    space, sizes = LabelSpace(), data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    vectors = [space.fresh(size) for size in sizes]
    naive = Naive(space.size)
    for _ in range(data.draw(st.integers(1, 8))):
        a, b = data.draw(st.sampled_from(vectors)), data.draw(st.sampled_from(vectors))
        if a is b:
            continue
        length = data.draw(st.integers(1, min(count(a), count(b))))
        i = data.draw(st.integers(0, count(a) - length))
        j = data.draw(st.integers(0, count(b) - length))
        left, right = stretch(a, i, i + length), stretch(b, j, j + length)
        agreed = space.unite(left, right)
        if agreed:
            for x, y in zip(spelled(left), spelled(right), strict=True):
                naive.unite(x, y)
            for x, y in zip(spelled(left), spelled(right), strict=True):
                assert spelled(space.roots(((x, 1),))) == spelled(space.roots(((y, 1),)))
        else:
            return  # a shifted self-union was refused; the naive model would merge more
    for a in range(space.size):
        for b in range(a):
            same = spelled(space.roots(((a, 1),))) == spelled(space.roots(((b, 1),)))
            assert same == (naive.find(a) == naive.find(b))


def test_a_shifted_copy_of_itself_is_refused_and_harmless() -> None:
    space = LabelSpace()
    x, other = space.fresh(8), space.fresh(8)
    assert not space.unite(stretch(x, 0, 7), stretch(x, 1, 8))
    assert space.unite(x, other)
    assert space.roots(other) == x


def test_chains_are_refused_however_the_labels_are_cut_up() -> None:
    space = LabelSpace()
    x = space.fresh(8)
    for i in range(0, 8, 2):  # single labels, each an interval of its own
        assert space.unite(stretch(x, i, i + 1), space.fresh(1))
    before = space.roots(x)
    assert not space.unite(stretch(x, 0, 7), stretch(x, 1, 8)), "all eight would be one"
    shifted = space.fresh(7)
    assert space.unite(stretch(x, 1, 8), shifted)
    assert not space.unite(stretch(x, 0, 7), shifted), "nor by way of another vector"
    assert space.roots(x) == before


def test_pairs_and_copies_are_no_chains() -> None:
    space = LabelSpace()
    x, twice, y = space.fresh(6), space.fresh(12), space.fresh(6)
    assert space.unite(x, flip(x)) and len(set(spelled(space.roots(x)))) == 3
    assert space.unite(join((*y, *y)), twice), "two copies of each token live with it"
    assert spelled(space.roots(twice)) == spelled(space.roots(y)) * 2
