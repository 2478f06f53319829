"""A few samples through everything before training: what does not fit together shows at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from graphopt.errors import ConfigError, GraphoptError
from graphopt.training.batches import Collated
from graphopt.training.objectives import Learner
from graphopt.training.scoring import Metric, measured

SAMPLES = 2
"""One would not do: a batch of one is a special case to many modules."""


def try_objective(learner: Learner, samples: Collated, on_outputs: bool) -> bool:
    """Compute the objective of a few samples.

    Args:
        learner: whole; it is left in evaluation mode.
        samples: inputs and targets, where the learner is.
        on_outputs: take it of the outputs alone, as the last stage of a pipeline does.

    Returns:
        Whether all parameters that are trained have a part in it.

    Raises:
        ConfigError: it cannot be computed, is no scalar, or none of them has.
    """
    learner.eval()
    # cuDNN does not take gradients of recurrent layers in evaluation.
    with torch.backends.cudnn.flags(enabled=False), _told("the loss of the first samples"):
        if on_outputs:
            loss = learner.objective.on_outputs(learner.module(*samples[0]), *samples)
        else:
            loss = learner(*samples)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shown = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"the loss is {shown}; it must be one number, the mean over the samples")
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    if not loss.requires_grad:
        raise ConfigError("the loss does not depend on any parameter of the model")
    gradients = torch.autograd.grad(loss.sum(), trained, allow_unused=True)
    return all(gradient is not None for gradient in gradients)


def try_metric(learner: Learner, samples: Collated, metric: Metric) -> None:
    """Compute the metric of a few samples.

    Args:
        learner: whole; it is left in evaluation mode.
        samples: inputs and targets of the validation data, where the learner is.
        metric: of outputs and targets.

    Raises:
        ConfigError: it cannot be computed.
    """
    learner.eval()
    inputs, targets = samples
    with torch.no_grad():
        with _told("the outputs of validation samples"):
            outputs = learner.module(*inputs)
        measured(metric, outputs, targets)


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except GraphoptError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{what} cannot be computed: {type(error).__name__}: {error}; do model, data and "
            "training.loss fit together?"
        ) from error
