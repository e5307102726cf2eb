"""Index arithmetic for generated code: where in a tensor an element of a row comes from.

An index is a sum of whole multiples of factors and a constant. Factors are atoms (a variable of the generated code and
how many values it takes), quotients and remainders. Ranges are known, so what a chain of views, splits and transposes
makes of an index comes out as short as it was: ``(h * W + w) // W`` is ``h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod


@dataclass(frozen=True)
class Atom:
    """A variable of the generated code with values 0 to ``size - 1``.

    Attributes:
        block: elements that a block of it has; 0: it goes with rows (batch, head, token), not with columns.
    """

    name: str
    size: int
    block: int = 0

    def half(self) -> Atom:
        """The columns of which each stands for two of these."""
        return Atom(f"{self.name}_half", self.size // 2, self.block // 2)

    def whole(self) -> Atom:
        """The columns that these are the half of."""
        return Atom(self.name.removesuffix("_half"), self.size * 2, self.block * 2)


@dataclass(frozen=True)
class Quotient:
    """``index // by``."""

    index: Index
    by: int


@dataclass(frozen=True)
class Remainder:
    """``index % by``."""

    index: Index
    by: int


@dataclass(frozen=True)
class Within:
    """``index``, of which only values from 0 to ``size - 1`` matter: a condition leaves out the others."""

    index: Index
    size: int


Factor = Atom | Quotient | Remainder | Within


@dataclass(frozen=True)
class Index:
    """``sum(times * factor) + start``; see the module."""

    terms: tuple[tuple[Factor, int], ...] = ()
    start: int = 0

    @staticmethod
    def of(atom: Atom) -> Index:
        """The atom itself; 0 if it takes no other value."""
        return Index(((atom, 1),)) if atom.size > 1 else Index()

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest value that it can have."""
        low = high = self.start
        for factor, times in self.terms:
            least, most = _range(factor)
            low += times * (least if times > 0 else most)
            high += times * (most if times > 0 else least)
        return low, high

    @property
    def atoms(self) -> frozenset[Atom]:
        """Every atom in it."""
        return frozenset().union(*(_atoms(factor) for factor, _ in self.terms))

    def __add__(self, other: Index | int) -> Index:
        if isinstance(other, int):
            return Index(self.terms, self.start + other)
        return _sum([*self.terms, *other.terms], self.start + other.start)

    def __mul__(self, times: int) -> Index:
        return Index(tuple((f, t * times) for f, t in self.terms), self.start * times) if times else Index()

    def __floordiv__(self, by: int) -> Index:
        whole, rest = self._split(by)
        low, high = rest.range
        if low // by == high // by:
            return whole + low // by
        inner = rest._inner()
        if inner is not None:
            return whole + (inner // by).within(high // by + 1)
        shared = gcd(by, *(times for _, times in rest.terms))
        left = Index(tuple((f, t // shared) for f, t in rest.terms), rest.start // shared)
        return whole + _quotient(left, by // shared)

    def __mod__(self, by: int) -> Index:
        _, rest = self._split(by)
        low, high = rest.range
        if low // by == high // by:
            return rest + -(low // by) * by
        inner = rest._inner()
        if inner is not None:
            return inner % by
        shared = gcd(by, *(times for _, times in rest.terms))
        left = Index(tuple((f, t // shared) for f, t in rest.terms), rest.start // shared)
        if by == shared:
            return Index((), rest.start % shared)
        return Index(((Remainder(left, by // shared), shared),), rest.start % shared)

    def _split(self, by: int) -> tuple[Index, Index]:
        """``(a, b)`` with ``self == a * by + b``, as much in a as there is."""
        whole = tuple((f, t // by) for f, t in self.terms if t % by == 0)
        rest = tuple((f, t) for f, t in self.terms if t % by)
        return Index(whole, self.start // by), Index(rest, self.start % by)

    def _inner(self) -> Index | None:
        """If it is one Within and a constant: the same, its range forgotten."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and isinstance(self.terms[0][0], Within):
            return self.terms[0][0].index + self.start
        return None

    def within(self, size: int) -> Index:
        """The index, where only values from 0 to ``size - 1`` matter."""
        low, high = self.range
        return self if low >= 0 and high < size else Index(((Within(self, size), 1),)) if size > 1 else Index()

    def put(self, values: Mapping[Atom, Index]) -> Index:
        """The index with atoms replaced."""
        total = Index((), self.start)
        for factor, times in self.terms:
            if isinstance(factor, Atom):
                value = values.get(factor, Index(((factor, 1),)))
            elif isinstance(factor, Within):
                value = factor.index.put(values).within(factor.size)
            elif isinstance(factor, Quotient):
                value = factor.index.put(values) // factor.by
            else:
                value = factor.index.put(values) % factor.by
            total = total + value * times
        return total

    def where(self, keep: Callable[[Factor], bool]) -> Index:
        """The terms whose factors are kept, without the constant."""
        return Index(tuple((f, t) for f, t in self.terms if keep(f)))

    def __str__(self) -> str:
        words = [_text(f) if t == 1 else f"{_text(f)} * {t}" for f, t in self.terms]
        return " + ".join([*words, *([str(self.start)] if self.start or not words else [])])


def is_column(factor: Factor) -> bool:
    """Whether a factor changes from column to column."""
    return any(atom.block for atom in _atoms(factor))


def is_mixed(factor: Factor) -> bool:
    """Whether a factor takes rows and columns: no vector of the generated code holds it."""
    return len({atom.block > 0 for atom in _atoms(factor)}) > 1


def reshaped(index: Sequence[Index], shape: Sequence[int], before: Sequence[int]) -> tuple[Index, ...]:
    """Where an element of a reshaped tensor was: ``index`` into ``shape`` -> index into the shape ``before``."""
    at = Index()
    for entry, size in zip(index, shape, strict=True):
        at = at * size + entry
    return tuple(at // prod(before[dim + 1 :]) % size if size > 1 else Index() for dim, size in enumerate(before))


def parity_of(indices: Iterable[Index]) -> Atom | None:
    """A column atom whose parity some of the indices take, with halves of a block's size to tell apart."""
    for index in indices:
        for factor, _ in index.terms:
            if isinstance(factor, Remainder | Quotient) and factor.by == 2:
                for atom in sorted(_atoms(factor), key=lambda entry: entry.name):
                    if atom.block > 1 and atom.size % 2 == 0:
                        return atom
    return None


def _atoms(factor: Factor) -> frozenset[Atom]:
    return frozenset([factor]) if isinstance(factor, Atom) else factor.index.atoms


def _range(factor: Factor) -> tuple[int, int]:
    if isinstance(factor, Atom | Within):
        return 0, factor.size - 1
    low, high = factor.index.range
    if isinstance(factor, Quotient):
        return low // factor.by, high // factor.by
    return 0, factor.by - 1


def _quotient(index: Index, by: int) -> Index:
    (factor, times), *others = index.terms
    if by == 1:
        return index
    if not others and times == 1 and isinstance(factor, Quotient) and index.start == 0:
        return _quotient(factor.index, factor.by * by)
    return Index(((Quotient(index, by), 1),))


def _sum(terms: Sequence[tuple[Factor, int]], start: int) -> Index:
    """Equal factors together, in one order; ``i // n * n + i % n`` is ``i`` again, ``i // n % m * n + i % n`` is
    ``i % (n * m)``."""
    summed: dict[Factor, int] = {}
    for factor, times in terms:
        summed[factor] = summed.get(factor, 0) + times
    for low, times in list(summed.items()):
        if not isinstance(low, Remainder) or not times:
            continue
        quotient = Quotient(low.index, low.by)
        for high, more in list(summed.items()):
            joined: Index | None = None
            if more == times * low.by and high == quotient:
                joined = low.index * times
            elif more == times * low.by and isinstance(high, Remainder) and high.index == Index(((quotient, 1),)):
                joined = Index(((Remainder(low.index, low.by * high.by), times),))
            if joined is not None:
                del summed[low], summed[high]
                return _sum([*summed.items(), *joined.terms], start + joined.start)
    kept = [(factor, times) for factor, times in summed.items() if times]
    return Index(tuple(sorted(kept, key=lambda entry: _text(entry[0]))), start)


def _text(factor: Factor) -> str:
    if isinstance(factor, Atom):
        return factor.name
    inner = str(factor.index)
    inner = f"({inner})" if " " in inner else inner
    if isinstance(factor, Within):
        return inner
    return f"({inner} {'//' if isinstance(factor, Quotient) else '%'} {factor.by})"
