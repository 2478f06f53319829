"""Options that say of single weights what each gets: `NAME:NUMBER`, and all others stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from graphopt.contract import Change
from graphopt.errors import SpecError, did_you_mean

Number = TypeVar("Number", int, float)


def parse_each(
    pass_name: str, texts: Iterable[str], kind: type[Number], allowed: str
) -> dict[str, Number]:
    """What each weight gets, by its name.

    Args:
        pass_name: for the message.
        texts: `NAME:NUMBER`; the name may itself hold colons.
        kind: of the numbers.
        allowed: which these are, in words.

    Raises:
        SpecError: a text is not of that form, or names a weight a second time.
    """
    found: dict[str, Number] = {}
    for text in texts:
        name, _, number = text.rpartition(":")
        try:
            value = kind(number)
        except ValueError:
            name = ""
        if not name:
            raise SpecError(
                f"{pass_name!r} takes each=(NAME:NUMBER,...), the number {allowed}; not {text!r}"
            )
        if name in found:
            raise SpecError(f"{pass_name!r} is told twice what {name!r} gets; say it once")
        found[name] = value
    return found


def skip_others(each: Mapping[str, object], names: Sequence[str], change: Change) -> None:
    """Say which of the weights that are named are not among those that are there.

    Args:
        each: by the names that are asked for.
        names: of the weights that can be changed.
        change: told.
    """
    for name in each.keys() - set(names):
        change.skip(name, f"there is no such weight to change here{did_you_mean(name, names)}")
