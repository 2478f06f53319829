"""Recipes: named pipelines, from the entry-point group `graphopt.recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.contract import Pass
from graphopt.errors import SpecError
from graphopt.registry import entry_points_by_name, parse_passes, registered

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
    found: Recipe = registered(RECIPES_GROUP, name, "recipe", lambda one: isinstance(one, Recipe))
    return found


def plan(
    recipe_name: str | None, passes: str | Sequence[Pass | str] | None, opset: int | None
) -> Plan:
    """The plan for a recipe or for passes; `basic` when neither is given.

    Args:
        recipe_name: of a registered recipe.
        passes: in text form, or several, as text or objects.
        opset: raise the model to this opset: given to the plan's raise-opset pass, which is put
            first where there is none.

    Raises:
        SpecError: both are given, or one of them names something that is not there; the passes
            state another opset themselves.
    """
    if recipe_name is not None and passes is not None:
        raise SpecError("give a recipe or passes, not both")
    if passes is not None:
        steps = _objects([passes] if isinstance(passes, str) else passes)
        return Plan(_with_opset(steps, opset))
    name = recipe_name or "basic"
    found = recipe(name)
    return Plan(_with_opset(parse_passes(found.passes), opset), found.repeat, name)


def _objects(passes: Sequence[Pass | str]) -> tuple[Pass, ...]:
    found: list[Pass] = []
    for one in passes:
        if not isinstance(one, Pass | str):
            raise SpecError(f"a pass is an object or its text, not a {type(one).__name__}")
        found += parse_passes(one) if isinstance(one, str) else [one]
    return tuple(found)


def _with_opset(passes: tuple[Pass, ...], opset: int | None) -> tuple[Pass, ...]:
    if opset is None:
        return passes
    (raising,) = parse_passes(f"raise-opset{{opset={opset},grow=true}}")
    stated = [p for p in passes if p.name == raising.name]
    (plain,) = parse_passes(raising.name)
    if any(p not in (plain, raising) for p in stated):
        raise SpecError(f"opset {opset} is asked for beside {stated[0]}; say it in one place")
    if stated:
        return tuple(raising if p.name == raising.name else p for p in passes)
    return (raising, *passes)
