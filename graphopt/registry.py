"""Passes by name, from the entry points of every installed distribution.

Built-in passes register through the group `graphopt.passes` like anyone else's. A pass is
imported only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

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


def registered(group: str, name: str, kind: str, fits: Callable[[Any], bool]) -> Any:
    """What is registered in a group under a name.

    Args:
        group: of entry points.
        name: as the user writes it.
        kind: of what it is, for the user.
        fits: what the entry point leads to is such a thing.

    Raises:
        SpecError: there is none of that name, or the entry point leads to something else.
    """
    return _loaded(entry_points_by_name(group), name, kind, fits)


def _loaded(
    points: Mapping[str, EntryPoint], name: str, kind: str, fits: Callable[[Any], bool]
) -> Any:
    if name not in points:
        raise SpecError(f"there is no {kind} {name!r}{did_you_mean(name, points)}")
    found = points[name].load()
    if not fits(found):
        raise SpecError(f"the entry point {name!r} leads to {found!r}, which is not a {kind}")
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
    def fits(found: Any) -> bool:
        return isinstance(found, type) and issubclass(found, Pass)

    cls: type[Pass] = _loaded(points, name, "pass", fits)
    if cls.name != name:
        raise SpecError(f"the entry point {name!r} leads to {cls!r}, which is named {cls.name!r}")
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
