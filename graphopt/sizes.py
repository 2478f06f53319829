"""Sizes that are not known before run time, and what can be said of them all the same.

A size is an integer or a polynomial with integer coefficients over atoms: the dimensions of the
inputs, and whatever else is not looked into. Two sizes are equal for certain when they are the same
polynomial: N * 8 / 2 and 4 * N, but also S + P - P and S.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul

TERMS_LARGEST = 12
"""A product that would have more terms becomes an atom of its own."""


@dataclass(frozen=True, eq=False)
class Atom:
    """Something that is not looked into; equal to itself only.

    Attributes:
        what: what it is, for example a value and an axis of it.
        order: for a canonical order of factors.
        is_dimension: it is a dimension, so at least 0. Others may have any sign.
    """

    what: object
    order: int
    is_dimension: bool


Monomial = tuple[Atom, ...]


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of atoms, never a plain integer.

    Attributes:
        terms: pairs of a product of atoms and its coefficient, in canonical order; the empty
            product is the constant term.
    """

    terms: tuple[tuple[Monomial, int], ...]


Size = int | Polynomial


class Algebra:
    """Makes atoms, and calculates with sizes."""

    def __init__(self) -> None:
        self._atoms: dict[object, Atom] = {}

    def atom(self, what: object, is_dimension: bool = False) -> Polynomial:
        """The size that stands for something, always the same for the same."""
        if what not in self._atoms:
            self._atoms[what] = Atom(what, len(self._atoms), is_dimension)
        return Polynomial((((self._atoms[what],), 1),))

    def product(self, first: Size, second: Size) -> Size:
        """The first times the second."""
        if isinstance(first, int) and isinstance(second, int):
            return first * second
        pairs = [(a, b) for a in _terms(first) for b in _terms(second)]
        if len(pairs) > TERMS_LARGEST:
            is_dimension = may_not_be_negative(first) and may_not_be_negative(second)
            return self.atom(("Mul", first, second), is_dimension)
        return _sum((_sorted(a + b), c * d) for (a, c), (b, d) in pairs)

    def products(self, sizes: Iterable[Size]) -> Size:
        """The product of all."""
        total: Size = 1
        for size in sizes:
            total = self.product(total, size)
        return total

    def quotient(self, first: Size, second: Size) -> Size:
        """The first divided by the second, towards 0, as Div of integers; not for a second of 0."""
        exact = exact_quotient(first, second)
        if exact is not None:
            return exact
        is_dimension = may_not_be_negative(first) and may_not_be_negative(second)
        return self.atom(("Div", first, second), is_dimension)


def total(first: Size, second: Size) -> Size:
    """The first and the second together."""
    if isinstance(first, int) and isinstance(second, int):
        return first + second
    return _sum([*_terms(first), *_terms(second)])


def difference(first: Size, second: Size) -> Size:
    """The first without the second."""
    if isinstance(first, int) and isinstance(second, int):
        return first - second
    return _sum([*_terms(first), *((m, -c) for m, c in _terms(second))])


def exact_quotient(first: Size, second: Size) -> Size | None:
    """The size which times the second is the first, whatever the atoms are; None without one."""
    if second == 0:
        return None
    if isinstance(first, int) and isinstance(second, int):
        quotient = abs(first) // abs(second)
        return quotient if (first < 0) == (second < 0) else -quotient
    if first == second:
        # Not where both are 0 at run time; Div fails there.
        return 1
    if isinstance(second, Polynomial) and len(second.terms) > 1:
        return None
    ((divisor, factor),) = _terms(second)
    quotients = []
    for monomial, coefficient in _terms(first):
        left = list(monomial)
        if coefficient % factor or not all(_take(left, atom) for atom in divisor):
            return None
        quotients.append((tuple(left), coefficient // factor))
    return _sum(quotients)


def may_not_be_negative(size: Size) -> bool:
    """The size is at least 0 for certain."""
    return all(
        coefficient >= 0 and all(atom.is_dimension for atom in monomial)
        for monomial, coefficient in _terms(size)
    )


def is_positive(size: Size) -> bool:
    """The size is at least 1 for certain."""
    return may_not_be_negative(size) and dict(_terms(size)).get((), 0) > 0


def sign(size: Size) -> int | None:
    """1, 0 or -1 where that is certain."""
    if isinstance(size, int):
        return (size > 0) - (size < 0)
    if is_positive(size):
        return 1
    return -1 if is_positive(difference(0, size)) else None


def may_overflow(size: Size, bits: int) -> bool:
    """The size may be no integer of so many bits; dimensions and what a few of them make are."""
    if isinstance(size, int):
        return not -(2 ** (bits - 1)) <= size < 2 ** (bits - 1)
    return any(abs(coefficient) >= 2**31 for _, coefficient in size.terms)


def _terms(size: Size) -> tuple[tuple[Monomial, int], ...]:
    if isinstance(size, Polynomial):
        return size.terms
    return (((), size),) if size else ()


def _sorted(monomial: Monomial) -> Monomial:
    return tuple(sorted(monomial, key=lambda atom: atom.order))


def _take(left: list[Atom], atom: Atom) -> bool:
    if atom not in left:
        return False
    left.remove(atom)
    return True


def _sum(terms: Iterable[tuple[Monomial, int]]) -> Size:
    totals: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        totals[monomial] = totals.get(monomial, 0) + coefficient
    kept = {m: c for m, c in totals.items() if c}
    if not kept.keys() - {()}:
        return kept.get((), 0)
    order = sorted(kept.items(), key=lambda term: [atom.order for atom in term[0]])
    return Polynomial(tuple(order))


def evaluate(size: Size, atoms: Mapping[Atom, int]) -> int:
    """The integer that a size is when its atoms are integers; the law that tests hold it to."""
    return sum(c * reduce(mul, (atoms[a] for a in m), 1) for m, c in _terms(size))
