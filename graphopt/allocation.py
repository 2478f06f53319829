"""Which form each weight gets, where forms differ in bytes and in what they do to the outputs.

The errors of independent roundings add up in their squares, so that the best choice under a limit
on the sum of either bytes or squares is, but for the last step, the one that for some price of a
squared error takes for each weight the form of the least bytes + price * square (Everett 1963,
Generalized Lagrange multiplier method; for bits: Shoham and Gersho 1988). One price after the other
gives the lower convex hull of all that can be had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_HALVINGS = 80
_PRICE_MAXIMUM = 1e30


@dataclass(frozen=True)
class Choice:
    """A form that a weight can have.

    Attributes:
        stored_bytes: in the file.
        square: what it adds to the squared error of the outputs.
    """

    stored_bytes: int
    square: float


def front(choices: Sequence[Sequence[Choice]], prices: int = 400) -> list[list[int]]:
    """The choices on the lower convex hull, from that of the least error to that of fewest bytes.

    Args:
        choices: for each weight its forms.
        prices: of a squared error that are tried, evenly on a logarithmic scale.

    Returns:
        The index of a form for each weight, for each point of the hull that was met.
    """
    found: list[list[int]] = []
    for price in np.geomspace(_PRICE_MAXIMUM, 1.0 / _PRICE_MAXIMUM, prices):
        chosen = _at(choices, float(price))
        if not found or chosen != found[-1]:
            found.append(chosen)
    return found


def smallest_within(choices: Sequence[Sequence[Choice]], square: float) -> list[int]:
    """The forms of the fewest bytes whose squared errors add up to a limit at most.

    Args:
        choices: for each weight its forms.
        square: the limit.

    Returns:
        The index of a form for each weight; those of the least error where none is within.
    """
    chosen = _search(choices, lambda chosen: _sum_of_squares(choices, chosen) <= square, cheap=True)
    return _spent(choices, chosen, square)


def closest_within(choices: Sequence[Sequence[Choice]], stored_bytes: float) -> list[int]:
    """The forms of the least error that take so many bytes at most; the smallest if none does."""
    chosen = _search(
        choices, lambda chosen: _sum_of_bytes(choices, chosen) <= stored_bytes, cheap=False
    )
    return _filled(choices, chosen, stored_bytes)


def _filled(
    choices: Sequence[Sequence[Choice]], chosen: list[int], stored_bytes: float
) -> list[int]:
    """The same with what a price leaves of the bytes: it spends them one large weight at a time."""
    left = stored_bytes - _sum_of_bytes(choices, chosen)
    while True:
        better = [
            ((now.square - form.square) / max(more, 1), index, place, more)
            for index, forms in enumerate(choices)
            for place, form in enumerate(forms)
            if form.square < (now := forms[chosen[index]]).square
            and (more := form.stored_bytes - now.stored_bytes) <= left
        ]
        if not better:
            return chosen
        _, index, place, more = max(better)
        chosen[index], left = place, left - more


def _spent(choices: Sequence[Sequence[Choice]], chosen: list[int], square: float) -> list[int]:
    """The same with what a price leaves of the error: of few weights, the hull has few points."""
    left = square - _sum_of_squares(choices, chosen)
    while True:
        smaller = [
            (now.stored_bytes - form.stored_bytes, -more, index, place)
            for index, forms in enumerate(choices)
            for place, form in enumerate(forms)
            if form.stored_bytes < (now := forms[chosen[index]]).stored_bytes
            and (more := form.square - now.square) <= left
        ]
        if not smaller:
            return chosen
        _, less, index, place = max(smaller)
        chosen[index], left = place, left + less


def _search(
    choices: Sequence[Sequence[Choice]], fits: Callable[[list[int]], bool], cheap: bool
) -> list[int]:
    """Find the price at which the choice just fits; by bisection of its logarithm."""
    low, high = 1.0 / _PRICE_MAXIMUM, _PRICE_MAXIMUM
    # What is sure to fit: errors cost everything, or nothing.
    best = _at(choices, high if cheap else low)
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        chosen = _at(choices, middle)
        if fits(chosen):
            best = chosen
        if fits(chosen) == cheap:
            high = middle
        else:
            low = middle
    return best


def _at(choices: Sequence[Sequence[Choice]], price: float) -> list[int]:
    return [
        min(range(len(forms)), key=lambda i: forms[i].stored_bytes + price * forms[i].square)
        for forms in choices
    ]


def _sum_of_squares(choices: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    return sum(forms[i].square for forms, i in zip(choices, chosen, strict=True))


def _sum_of_bytes(choices: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> int:
    return sum(forms[i].stored_bytes for forms, i in zip(choices, chosen, strict=True))
