"""Scenarios: what a model is to be good at, and what may be done for it; by entry points.

The engine knows no pass by name. A scenario says, in text form, what can be done to all of a model
(trunks) and what to each of its layers (treatments), and by what the results are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from graphopt.errors import SpecError, did_you_mean
from graphopt.registry import entry_points_by_name, registered

SCENARIOS_GROUP = "graphopt.scenarios"

Objective = Literal["size", "latency", "memory"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True)
class Trunk:
    """What is done to all of a model, before its layers are treated one by one.

    Attributes:
        name: for the user.
        passes: in text form, after the recipe basic; may be none.
        after: name of a milder trunk; this one is tried only if that keeps within the drop.
        unless: name of a bolder trunk; this one is tried only if that does not.
        least_samples: to fit by, without which it is not tried: what it does to others, few say.
    """

    name: str
    passes: str
    after: str | None = None
    unless: str | None = None
    least_samples: int = 0


@dataclass(frozen=True)
class Scenario:
    """What a model is to be good at.

    Attributes:
        summary: one line for a user who chooses.
        objective: what is made least.
        provider: on which the model will run.
        trunks: from the mildest on.
        treatments: of layers, of which each layer gets one at most.
        finish: what is done after layers were treated, in text form; may be nothing.
    """

    summary: str
    objective: Objective
    provider: str
    trunks: tuple[Trunk, ...]
    treatments: tuple[str, ...]
    finish: str = ""


def scenario_names() -> list[str]:
    """The names of all registered scenarios, sorted."""
    return list(entry_points_by_name(SCENARIOS_GROUP))


def scenario(name: str) -> Scenario:
    """A registered scenario.

    Raises:
        SpecError: there is none of that name, or what is registered is none.
    """
    found: Scenario = registered(
        SCENARIOS_GROUP, name, "scenario", lambda one: isinstance(one, Scenario)
    )
    return found


def scenario_for(objective: str, provider: str) -> Scenario:
    """The scenario of an objective and a provider, where the user names none.

    Raises:
        SpecError: there is no such objective, or no scenario for both.
    """
    if objective not in OBJECTIVES:
        raise SpecError(f"there is no objective {objective!r}{did_you_mean(objective, OBJECTIVES)}")
    for name in scenario_names():
        found = scenario(name)
        if found.objective == objective and found.provider == provider:
            return found
    raise SpecError(f"there is no scenario for {objective} on {provider}; name one by --scenario")
