"""Passes by name, from the entry points of every installed distribution.

Built-in passes register through the group `graphopt.passes` like anyone else's. A pass is
imported only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from graphopt.contract import Pass
from graphopt.errors import SpecError, did_you_mean
from graphopt.spec import parse_pipeline

PASSES_GROUP = "graphopt.passes"


def entry_points_by_name(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group, sorted by name.

    Raises:
        SpecError: two distributions claim the same name for different things.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise SpecError(
                f"{point.name!r} is claimed in {group} by both {other.value} and {point.value}; "
                "uninstall one of them"
            )
    return found


def versions(group: str) -> list[str]:
    """What is installed that registers in a group, as `NAME VERSION`, sorted."""
    found = {point.dist for point in entry_points(group=group) if point.dist is not None}
    return sorted({f"{one.name} {one.version}" for one in found})


def pass_names() -> list[str]:
    """The names of all registered passes, sorted."""
    return list(entry_points_by_name(PASSES_GROUP))


def pass_class(name: str) -> type[Pass]:
    """The class of a registered pass.

    Raises:
        SpecError: there is none of that name, or its entry point does not lead to such a pass.
    """
    return _pass_class(name, entry_points_by_name(PASSES_GROUP))


def _pass_class(name: str, points: Mapping[str, EntryPoint]) -> type[Pass]:
    if name not in points:
        raise SpecError(f"there is no pass {name!r}{did_you_mean(name, points)}")
    cls = points[name].load()
    if not (isinstance(cls, type) and issubclass(cls, Pass) and cls.name == name):
        raise SpecError(
            f"the entry point {name!r} leads to {cls!r}, which is not a pass of that name"
        )
    return cls


def parse_passes(text: str) -> tuple[Pass, ...]:
    """The passes that a text such as `fold-constants,drop-unused` names, in order.

    Raises:
        SpecError: see `graphopt.spec.parse_pipeline`.
    """
    # Looked up once: that takes longer than all the rest.
    find = partial(_pass_class, points=entry_points_by_name(PASSES_GROUP))
    passes: tuple[Pass, ...] = parse_pipeline(text, find)
    return passes
