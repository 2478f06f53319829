"""The processes that heal together: each takes its share of every batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of the group; one alone needs no group.

    Attributes:
        rank: of this process.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    def share_of(self, samples: int) -> slice:
        """Which samples of a batch are this process's: as many as others have, or one fewer."""
        ends = [samples * rank // self.count for rank in (self.rank, self.rank + 1)]
        return slice(*ends)

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Let all have the sum of all gradients.

        Each is of a loss that is the share of the samples in the batch, so that the sum is that of
        the mean over the batch: no division by the number of processes, whose shares may differ.
        """
        if self.count == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        start = 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            part = flat[start : start + gradient.numel()]
            parameter.grad = part.reshape(gradient.shape)
            start += gradient.numel()

    def agreed(self, number: float) -> float:
        """What the first process says: clocks differ."""
        if self.count == 1:
            return number
        said = torch.tensor([number], dtype=torch.float64)
        dist.broadcast(said, src=0)
        return float(said)
