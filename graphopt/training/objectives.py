"""What training makes small."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt.errors import ConfigError, did_you_mean
from graphopt.training.importing import is_path, named

Loss = Callable[[Any, Tensor], Tensor]

UNLABELED: Final = -100
"""The target of a sample without a label, as `torch.nn.functional.cross_entropy` has it."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of classes, the mean over all samples and positions.

    What has no label adds nothing to the mean, and counts: a mean over those with a label would
    weigh them by who else is in their part of a batch, and there may be none.

    Args:
        outputs: logits, [samples, classes, ...].
        targets: class numbers or `UNLABELED`, [samples, ...]; or probabilities, as the outputs.
    """
    if targets.is_floating_point():
        return functional.cross_entropy(outputs, targets)
    return functional.cross_entropy(outputs, targets, reduction="sum") / targets.numel()


LOSSES: Final[dict[str, Loss]] = {
    "binary-cross-entropy": functional.binary_cross_entropy_with_logits,
    "cross-entropy": cross_entropy,
    "l1": functional.l1_loss,
    "mse": functional.mse_loss,
    "smooth-l1": functional.smooth_l1_loss,
}


class Objective(Protocol):
    """What training makes small: a mean over samples.

    A strategy weighs what several calls give by their numbers of samples.
    """

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None
    ) -> Tensor:
        """The mean over the samples given, a scalar; calls the module once.

        Args:
            module: what is trained, its submodules under the names that its factory gave them.
            inputs: each [samples, ...].
            targets: [samples, ...], or None where the data has none.
        """

    def on_outputs(
        self, outputs: Any, inputs: tuple[Tensor, ...], targets: Tensor | None
    ) -> Tensor:
        """The same from the outputs of the module: what the last stage of a pipeline calls.

        Raises:
            ConfigError: the objective needs more than the outputs.
        """

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of its own, which are trained beside the module's."""


class TaskLoss:
    """The objective of plain training: a loss between outputs and targets.

    Attributes:
        loss: of outputs and targets, the mean over the samples.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None
    ) -> Tensor:
        """The loss of the module's outputs."""
        return self.on_outputs(module(*inputs), inputs, targets)

    def on_outputs(
        self, outputs: Any, inputs: tuple[Tensor, ...], targets: Tensor | None
    ) -> Tensor:
        """The loss of outputs."""
        if targets is None:
            raise ConfigError(
                "the loss needs targets, and the samples have None; give samples with targets, or "
                "an objective that does without them"
            )
        return self.loss(in_float32(outputs), targets)

    def parameters(self) -> Iterable[nn.Parameter]:
        """None."""
        return ()


def in_float32(outputs: Any) -> Any:
    """Outputs that were computed in half precision, as float32; a loss is not computed in less."""
    if isinstance(outputs, tuple | list):
        return type(outputs)(map(in_float32, outputs))
    half = isinstance(outputs, Tensor) and outputs.dtype in (torch.float16, torch.bfloat16)
    return outputs.float() if half else outputs


def loss_named(name: str) -> Loss:
    """A loss by its word or import path.

    Raises:
        ConfigError: there is none.
    """
    if is_path(name):
        return named(name, "training.loss")
    if name not in LOSSES:
        raise ConfigError(
            f"training.loss is {name!r}, which is no loss{did_you_mean(name, LOSSES)}"
        )
    return LOSSES[name]


class Learner(nn.Module):
    """A module with its objective: its forward gives the loss.

    Strategies wrap this, so that parameters of the objective are treated as those of the module.
    """

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module = module
        self.adapters = nn.ParameterList(objective.parameters())
        # Not as a submodule: a teacher in it is not trained.
        object.__setattr__(self, "objective", objective)

    objective: Objective

    def forward(self, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """The mean of the objective over samples, a scalar."""
        return self.objective(self.module, inputs, targets)
