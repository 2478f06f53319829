"""Recipes: named pipelines, from the entry-point group `graphopt.recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.contract import Pass
from graphopt.errors import SpecError, did_you_mean
from graphopt.registry import entry_points_by_name, parse_passes

RECIPES_GROUP = "graphopt.recipes"


@dataclass(frozen=True)
class Recipe:
    """A pipeline with a name.

    Attributes:
        summary: one line for a user who chooses.
        passes: in text form.
        repeat: run the passes again and again until none of them finds anything.
    """

    summary: str
    passes: str
    repeat: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run is to do: passes in order, once or until nothing changes.

    Attributes:
        passes: in order.
        repeat: until none of them finds anything.
        recipe: the name it came from, if any.
    """

    passes: tuple[Pass, ...]
    repeat: bool = False
    recipe: str | None = None

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))


def recipe_names() -> list[str]:
    """The names of all registered recipes, sorted."""
    return list(entry_points_by_name(RECIPES_GROUP))


def recipe(name: str) -> Recipe:
    """A registered recipe.

    Raises:
        SpecError: there is none of that name.
    """
    points = entry_points_by_name(RECIPES_GROUP)
    if name not in points:
        raise SpecError(f"there is no recipe {name!r}{did_you_mean(name, points)}")
    found = points[name].load()
    if not isinstance(found, Recipe):
        raise SpecError(f"the entry point {name!r} leads to {found!r}, which is not a recipe")
    return found


def plan(recipe_name: str | None, passes: str | Sequence[Pass] | None, opset: int | None) -> Plan:
    """The plan for a recipe or for passes; `basic` when neither is given.

    Args:
        recipe_name: of a registered recipe.
        passes: in text form, or as objects.
        opset: raise the model to this opset: given to the plan's raise-opset pass, which is put
            first where there is none.

    Raises:
        SpecError: both are given, or one of them names something that is not there.
    """
    if recipe_name is not None and passes is not None:
        raise SpecError("give a recipe or passes, not both")
    if passes is not None:
        steps = parse_passes(passes) if isinstance(passes, str) else tuple(passes)
        return Plan(_with_opset(steps, opset))
    name = recipe_name or "basic"
    found = recipe(name)
    return Plan(_with_opset(parse_passes(found.passes), opset), found.repeat, name)


def _with_opset(passes: tuple[Pass, ...], opset: int | None) -> tuple[Pass, ...]:
    if opset is None:
        return passes
    (raising,) = parse_passes(f"raise-opset{{opset={opset},grow=true}}")
    if any(p.name == raising.name for p in passes):
        return tuple(raising if p.name == raising.name else p for p in passes)
    return (raising, *passes)
