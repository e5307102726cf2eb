"""Token labels: one integer per token position, kept as runs, with union-find on intervals.

Every position along a token dim carries a label; two positions with the same label must live on the same rank.
Sequences have 10^5 positions and graphs 10^4 values, so a vector of labels is stored as runs ``(start, length)`` of
consecutive integers, and the union-find works on whole intervals: the label line ``[0, size)`` is cut into intervals,
each either a root or a pointer to an equally long interval of smaller labels.
"""

from __future__ import annotations

from bisect import bisect_right

from sfcompile.runtime.program.intervals import Runs, join


class LabelSpace:
    """The label line with its union-find.

    Attributes:
        kin: pairs of vectors that count the same thing in other steps (the rows of a grid, and those of the grid at
            half the size): values hold the one or the other, and should be sharded along all of them or none.
        glued: stretches ``(first, length, label, grain)`` of rows of ``grain`` labels that are no tokens of anything,
            and go to the owner of that label (rows of padding beside the edge of a grid). Where they turn out to be
            tokens of something else (choose_layouts.py), they are not.
    """

    def __init__(self) -> None:
        self.kin: list[tuple[Runs, Runs]] = []
        self.glued: list[tuple[int, int, int, int]] = []
        self._starts: list[int] = []
        self._targets: list[int] = []  # -1 for a root interval, else where its first label points to
        self._size = 0

    @property
    def size(self) -> int:
        """Number of labels handed out so far."""
        return self._size

    def fresh(self, length: int) -> Runs:
        """A vector of ``length`` labels that nothing else carries."""
        if length == 0:
            return ()
        start = self._size
        self._starts.append(start)
        self._targets.append(-1)
        self._size += length
        return ((start, length),)

    def _end(self, index: int) -> int:
        return self._starts[index + 1] if index + 1 < len(self._starts) else self._size

    def _find(self, label: int, length: int) -> tuple[int, int]:
        """Root of ``label`` and for how many of the next ``length`` labels the answer continues by one."""
        chain: list[tuple[int, int]] = []
        at, limit = label, length
        while True:
            index = bisect_right(self._starts, at) - 1
            limit = min(limit, self._end(index) - at)
            target = self._targets[index]
            if target < 0:
                break
            chain.append((index, at - self._starts[index]))
            at = target + at - self._starts[index]
        # Path compression is safe only where the whole interval shares the answer found for this label.
        for index, offset in chain[:-1]:
            if offset == 0 and limit >= self._end(index) - self._starts[index]:
                self._targets[index] = at
        return at, limit

    def roots(self, runs: Runs) -> Runs:
        """The same vector with every label replaced by its root, neighbouring runs joined."""
        out: list[tuple[int, int]] = []
        for start, length in runs:
            done = 0
            while done < length:
                root, count = self._find(start + done, length - done)
                out.append((root, count))
                done += count
        return join(out)

    def _cut(self, label: int) -> None:
        """Make ``label`` the first of its interval."""
        index = bisect_right(self._starts, label) - 1
        offset = label - self._starts[index]
        if offset == 0 or label == self._size:
            return
        target = self._targets[index]
        self._starts.insert(index + 1, label)
        self._targets.insert(index + 1, target if target < 0 else target + offset)

    def _point(self, source: int, target: int, length: int) -> None:
        self._cut(source)
        self._cut(source + length)
        index = bisect_right(self._starts, source) - 1
        while index < len(self._starts) and self._starts[index] < source + length:
            self._targets[index] = target + self._starts[index] - source
            index += 1

    def unite(self, left: Runs, right: Runs) -> bool:
        """Make two equally long vectors equal, position by position.

        Vectors that would tie tokens in a chain (a difference of neighbours ties the first to the second, that to the
        third, and all to one rank) are left apart altogether and the result is False: the two then disagree, and
        whoever meets both moves one of them.
        """
        if self._chains(left, right):
            return False
        agreed = True
        todo = [(left, right)]
        while todo:
            a, b = todo.pop()
            for x, y, length in _zip_runs(a, b):
                done = 0
                while done < length:
                    root_x, count_x = self._find(x + done, length - done)
                    root_y, count_y = self._find(y + done, count_x)
                    count = min(count_x, count_y)
                    done += count
                    if root_x == root_y:
                        continue
                    low, high = min(root_x, root_y), max(root_x, root_y)
                    if low + count > high:
                        agreed = False
                        continue
                    self._point(high, low, count)
        return agreed

    def _chains(self, left: Runs, right: Runs) -> bool:
        """Whether some label would get one partner as a position of ``left`` and another as one of ``right``."""
        on_left: list[tuple[int, int, int]] = []  # (first root, length, distance to the partner)
        on_right: list[tuple[int, int, int]] = []
        for x, y, length in _zip_runs(left, right):
            done = 0
            while done < length:
                root_x, count_x = self._find(x + done, length - done)
                root_y, count = self._find(y + done, count_x)
                done += count
                if root_x != root_y:
                    on_left.append((root_x, count, root_y - root_x))
                    on_right.append((root_y, count, root_x - root_y))
        on_left.sort()
        on_right.sort()
        i = j = 0
        while i < len(on_left) and j < len(on_right):
            (a, n, ahead), (b, m, back) = on_left[i], on_right[j]
            if max(a, b) < min(a + n, b + m) and ahead != back:
                return True
            if a + n <= b + m:
                i += 1
            else:
                j += 1
        return False


def _zip_runs(a: Runs, b: Runs) -> list[tuple[int, int, int]]:
    """Pairs of runs of common length."""
    out: list[tuple[int, int, int]] = []
    i = j = di = dj = 0
    while i < len(a) and j < len(b):
        count = min(a[i][1] - di, b[j][1] - dj)
        out.append((a[i][0] + di, b[j][0] + dj, count))
        di, dj = di + count, dj + count
        if di == a[i][1]:
            i, di = i + 1, 0
        if dj == b[j][1]:
            j, dj = j + 1, 0
    return out
