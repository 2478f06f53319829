"""How good a model is on the validation data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.errors import ConfigError, did_you_mean
from graphopt.training.batches import Samples, load, shares_of
from graphopt.training.config import Data, Validation
from graphopt.training.importing import is_path, named
from graphopt.training.objectives import UNLABELED, Loss, in_float32
from graphopt.training.strategy import Strategy

WORDS = ("accuracy", "loss")


def _all(_: Tensor) -> float:
    return 1.0


@dataclass(frozen=True)
class Metric:
    """What an epoch is judged by.

    Attributes:
        measure: outputs and targets to the mean over their samples, a number or a scalar.
        goal: whether it should be large or small.
        share: of the samples that the mean is over, by their targets.
    """

    measure: Callable[[Any, Tensor], Any]
    goal: Literal["max", "min"]
    share: Callable[[Tensor], float] = _all

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value is as good or better; on a tie the later epoch wins, and NaN never."""
        if math.isnan(than):
            return True
        return value >= than if self.goal == "max" else value <= than


def metric_of(config: Validation, loss: Loss) -> Metric:
    """The metric that a configuration names.

    Args:
        config: names it.
        loss: of the training, for the metric "loss".

    Raises:
        ConfigError: there is none of that name.
    """
    if is_path(config.metric):
        return Metric(named(config.metric, "validation.metric"), config.goal or "max")
    if config.metric == "accuracy":
        return Metric(accuracy, config.goal or "max", share_labeled)
    if config.metric == "loss":
        return Metric(loss, config.goal or "min")
    near = did_you_mean(config.metric, WORDS)
    raise ConfigError(f"validation.metric is {config.metric!r}, which is no metric{near}")


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of samples whose largest output is that of their class, 0 to 1.

    Args:
        outputs: [samples, classes, ...].
        targets: class numbers, [samples, ...]; those without a label do not count.
    """
    found = outputs.argmax(dim=1)
    if found.shape != targets.shape:
        raise ValueError(
            f"there are classes of shape {list(found.shape)}, and targets of {list(targets.shape)}"
        )
    return (found == targets).sum().double() / (targets != UNLABELED).sum()


def share_labeled(targets: Tensor) -> float:
    """The share of targets that are labels."""
    return float((targets != UNLABELED).double().mean())


def score(
    strategy: Strategy, samples: Samples, metric: Metric, data: Data, batch_size: int
) -> float:
    """The mean of a metric over all samples, the same on all processes; all call this.

    Args:
        strategy: has the model.
        samples: with targets.
        metric: of outputs and targets.
        data: how samples are loaded.
        batch_size: samples that are computed at once, over all processes.

    Raises:
        ConfigError: the metric cannot be taken of outputs and targets.
    """
    strategy.share_buffers()
    numbers = range(len(samples))
    batches = [
        shares_of(numbers[at : at + batch_size], 1, strategy.data_rank, strategy.data_ranks)
        for at in range(0, len(samples), batch_size)
    ]
    total = count = 0.0
    for (part,) in load(samples, batches, strategy.world.device, data.workers):
        outputs = strategy.outputs(part.inputs)
        if outputs is None or not part.count:
            continue
        weight = part.count * (1.0 if part.targets is None else metric.share(part.targets))
        if weight:
            total += weight * measured(metric, outputs, part.targets)
            count += weight
    total, count = strategy.world.sum([total, count])
    return total / count if count else math.nan


def measured(metric: Metric, outputs: Any, targets: Tensor | None) -> float:
    """The mean of a metric over some samples.

    Raises:
        ConfigError: it cannot be taken of outputs and targets.
    """
    if targets is None:
        raise ConfigError(
            "validation needs targets, and the validation samples have None; give samples with "
            "targets, or none at all"
        )
    try:
        with torch.no_grad():
            return float(metric.measure(in_float32(outputs), targets))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"validation.metric cannot be taken of the outputs: {type(error).__name__}: {error}"
        ) from error
