"""How the work of one step is done; the training loop does not know which of these it drives.

A strategy holds the learner as this process trains it: whole, in shards, or one stage of it. The
loss is the mean over the global batch, and so are the gradients, whatever the number of processes,
parts and unequal shares: each part is weighed by its share of the batch, and what processes have is
added up. Where an engine takes means over processes instead, the weights make up for it.

What is random is drawn from torch's generator; processes that compute on the same samples have the
same seed, the others have others. Running statistics (of batch normalization) are taken from the
first of the processes that divide the data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from graphopt.training.batches import Part
from graphopt.training.config import Precision
from graphopt.training.objectives import Learner
from graphopt.training.precision import casts
from graphopt.training.processes import World


class Strategy(ABC):
    """How the work of one step is done.

    Attributes:
        learner: what this process trains, its parameters under the names that they have in the
            whole.
        world: the processes.
        precision: of the arithmetic.
        data_rank: which share of each batch comes here.
        data_ranks: how many shares there are.
        data_group: the processes that have the other shares, for the same parameters; None where
            there are none or where they are all.
    """

    def __init__(self, learner: Learner, world: World, precision: Precision) -> None:
        self.learner = learner
        self.world = world
        self.precision = precision
        self.data_rank = 0
        self.data_ranks = 1
        self.data_group: dist.ProcessGroup | None = None

    # ------------------------------------------------------------------ one step

    @abstractmethod
    def backward(self, parts: Sequence[Part], scale: float) -> float:
        """Add the gradients of the mean loss over the global batch, times a scale.

        Args:
            parts: the shares of the batch that this process computes.
            scale: see `graphopt.training.precision.LossScale`.

        Returns:
            The mean loss over the global batch, the same on all processes.
        """

    @abstractmethod
    def outputs(self, inputs: tuple[Tensor, ...]) -> Any:
        """What the module gives in evaluation mode; None where another process has it."""

    def gradient_norm(self) -> float:
        """The L2 norm of the gradients of all parameters, the same on all processes."""
        return math.sqrt(sum_of_squares(self.gradients()))

    def gradients(self) -> list[Tensor]:
        """The gradients of this process."""
        return [p.grad for p in self.learner.parameters() if p.grad is not None]

    # ------------------------------------------------------------------ state

    def module_state(self) -> dict[str, Any]:
        """The values of the module as this process holds them, by name in the whole module."""
        return get_model_state_dict(self.learner.module)

    def set_module_state(self, state: dict[str, Any]) -> None:
        """Take values that `module_state` gave."""
        set_model_state_dict(self.learner.module, state)

    def full_state(self) -> dict[str, Any]:
        """All values of the whole module, on the CPU of the first process; others get nothing."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.learner.module, options=options)
        return state if self.world.first else {}

    def share_buffers(self) -> None:
        """Take running statistics from the first of the processes that divide the data."""
        if self.data_ranks == 1:
            return
        group = self.data_group or dist.group.WORLD
        assert group is not None
        for buffer in self.learner.buffers():
            if not isinstance(buffer, DTensor):
                dist.broadcast(buffer, group_src=0, group=group)


class Replicated(Strategy):
    """A strategy whose processes call the whole learner, part after part."""

    def __init__(self, learner: Learner, world: World, precision: Precision) -> None:
        super().__init__(learner, world, precision)
        self.called: nn.Module = learner
        """What gives the loss: the learner, or what an engine has wrapped it in."""
        self.weight_factor = 1.0
        """Of the weights, where the engine divides the sum of gradients by the processes."""
        self.around: Callable[[], AbstractContextManager[object]] = nullcontext
        """Within, the learner is computed."""

    def syncs(self, last: bool) -> AbstractContextManager[object]:
        """Within, gradients are summed over processes only after the last part of a batch."""
        return nullcontext()

    def finish_gradients(self) -> None:
        """Sum over processes what the engine has not."""

    def backward(self, parts: Sequence[Part], scale: float) -> float:
        """See `Strategy.backward`."""
        total = torch.zeros((), device=self.world.device)
        self.learner.train()
        for number, part in enumerate(parts, start=1):
            with self.around(), self.syncs(number == len(parts)):
                with casts(self.precision, self.world.device):
                    loss = self.called(part.inputs, part.targets)
                total += loss.detach().reshape(()) * part.weight
                factor = part.weight * self.weight_factor * scale
                torch.autograd.backward(loss * factor)
        self.finish_gradients()
        mean = float(total)
        return self.world.sum([mean], self.data_group)[0] if self.data_ranks > 1 else mean

    def outputs(self, inputs: tuple[Tensor, ...]) -> Any:
        """See `Strategy.outputs`."""
        self.learner.eval()
        with self.around(), torch.no_grad(), casts(self.precision, self.world.device):
            return self.learner.module(*inputs)


class Single(Replicated):
    """One process computes it all."""


def sum_of_squares(tensors: Iterable[Tensor]) -> float:
    """The sum of the squares of all elements; DTensors count whole, on each process."""
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_mesh[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    total = 0.0
    for group in by_mesh.values():
        norm = get_total_norm(group)
        total += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    return total


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add up the gradients of processes that have the same parameters.

    Args:
        parameters: those without a gradient have none on any process.
        group: the processes.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        by_dtype[local.dtype].append(local)
    for tensors in by_dtype.values():
        # One message for all: the time of many small ones is in their number.
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        at = 0
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()


def scale_gradients(gradients: Iterable[Tensor], factor: float) -> None:
    """Multiply gradients in place."""
    for gradient in gradients:
        gradient.mul_(factor)
