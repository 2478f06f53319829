"""Optimizers by name, and learning rates as functions of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from graphopt.errors import ConfigError, did_you_mean
from graphopt.training.config import Optimizer, Schedule
from graphopt.training.importing import is_path, named

ONE_CYCLE_START = 1 / 25
ONE_CYCLE_RISE = 0.3
"""Of a one-cycle schedule: its first factor, and the share of steps in which it rises.

Those of `torch.optim.lr_scheduler.OneCycleLR`. Momentum stays as it is.
"""

CLOSURES = ("lbfgs",)
"""Optimizers that compute the loss several times in a step, which no strategy does."""


def optimizer_of(config: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a configuration names.

    Raises:
        ConfigError: there is none of that name, or it does not take the options.
    """
    cls = _class_named(config.name)
    options = dict(config.options)
    if config.weight_decay is not None:
        options["weight_decay"] = config.weight_decay
    known = [name for name in inspect.signature(cls).parameters if name not in ("params", "lr")]
    for name in options:
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"optimizer {config.name!r} has no option {name!r}{near}")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        optimizer = cls(trained, lr=config.learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {config.name!r} does not take its options: {error}") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer.name is {config.name!r}, which is no torch optimizer")
    return optimizer


def _class_named(name: str) -> Callable[..., Any]:
    if is_path(name):
        found = named(name, "optimizer.name")
        if not isinstance(found, type):
            raise ConfigError(f"optimizer.name is {name!r}; it must name a class")
        return found
    known: dict[str, Callable[..., Any]] = {
        word.lower(): cls
        for word, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
        if cls is not torch.optim.Optimizer and word.lower() not in CLOSURES
    }
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(f"optimizer.name is {name!r}, which is no optimizer{near}")
    return known[name]


def check_schedule(schedule: Schedule, steps: int) -> None:
    """Raise ConfigError when the warmup leaves no step for the rest of the schedule."""
    if schedule.warmup_steps is not None and schedule.warmup_steps >= steps:
        raise ConfigError(
            f"schedule.warmup_steps is {schedule.warmup_steps}, and the run has {steps} steps; it "
            "must have more"
        )


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of a step, over the highest.

    Args:
        schedule: how it changes.
        step: from 0.
        steps: of the whole run.
    """
    if schedule.name == "one-cycle":
        return _one_cycle(schedule, step, steps)
    warmup = schedule.warmup_steps or 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule.name == "linear":
        return 1 + (schedule.final_factor - 1) * progress
    if schedule.name == "cosine":
        return _half_cosine(1, schedule.final_factor, progress)
    return 1.0


def _one_cycle(schedule: Schedule, step: int, steps: int) -> float:
    rise = schedule.warmup_steps
    if rise is None:
        rise = round(ONE_CYCLE_RISE * steps)
    if step < rise:
        return _half_cosine(ONE_CYCLE_START, 1, step / rise)
    return _half_cosine(1, schedule.final_factor, (step - rise) / max(1, steps - 1 - rise))


def _half_cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Let the next step of an optimizer use a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
