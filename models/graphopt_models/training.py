"""Trains the digit classifiers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graphopt_models import digits
from graphopt_models.digits import Split, View

_BATCH: Final = 64
_PEAK_LEARNING_RATE: Final = 5e-3
_WEIGHT_DECAY: Final = 1e-2


@dataclass(frozen=True)
class Classifier:
    """A digit classifier and how to train it.

    Attributes:
        name: stem of the files that are written for it.
        view: the name of its one input, which also says what that input holds.
        module: makes the untrained module; its forward takes float32 [batch, ...] under the name
            of the view and returns float32 logits [batch, 10].
        epochs: passes over the training data that reach its accuracy.
    """

    name: str
    view: View
    module: Callable[[], nn.Module]
    epochs: int


def train(classifier: Classifier, *, epochs: int | None = None, seed: int = 0) -> nn.Module:
    """Train a classifier and return it, in evaluation mode, at its best validation accuracy.

    The same seed gives the same weights on the same machine, torch version and thread count; the
    caller's random state stays as it was.

    Args:
        classifier: what to train.
        epochs: passes over the training data, at least 1; the classifier's own number if None.
        seed: seeds the initial weights, the order of the batches and dropout.

    Raises:
        ValueError: `epochs` is less than 1.
    """
    epochs = classifier.epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    data = digits.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = classifier.module()
        _fit(module, data.train, data.validation, view=classifier.view, epochs=epochs)
    return module.eval()


def accuracy(module: nn.Module, split: Split, view: View) -> float:
    """Return the share of the split's images, 0 to 1, that the module gets right."""
    module.eval()
    inputs, labels = _tensors(split, view)
    with torch.no_grad():
        predicted = module(inputs).argmax(dim=1)
    return float((predicted == labels).float().mean())


def _fit(
    module: nn.Module, train_split: Split, validation: Split, *, view: View, epochs: int
) -> None:
    """Train in place with AdamW under a one-cycle schedule, then restore the best epoch."""
    inputs, labels = _tensors(train_split, view)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=_PEAK_LEARNING_RATE,
        epochs=epochs,
        steps_per_epoch=-(-len(labels) // _BATCH),
    )
    best = -1.0
    best_state: dict[str, Tensor] = {}
    for _ in range(epochs):
        module.train()
        order = torch.randperm(len(labels))
        for first in range(0, len(labels), _BATCH):
            batch = order[first : first + _BATCH]
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(module(inputs[batch]), labels[batch]))
            optimizer.step()
            schedule.step()
        reached = accuracy(module, validation, view)
        # On a tie the later epoch wins: its learning rate was lower.
        if reached >= best:
            best, best_state = reached, copy.deepcopy(module.state_dict())
    module.load_state_dict(best_state)


def _tensors(split: Split, view: View) -> tuple[Tensor, Tensor]:
    """Return inputs, float32 [n, ...], and labels, int64 [n]."""
    return torch.from_numpy(split.inputs(view)), torch.from_numpy(split.labels)
