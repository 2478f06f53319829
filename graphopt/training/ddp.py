"""Data parallel: every process holds the whole module (`DistributedDataParallel`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from graphopt.training.config import Precision
from graphopt.training.objectives import Learner
from graphopt.training.processes import World
from graphopt.training.strategy import Replicated


class Ddp(Replicated):
    """Every process computes its share of each batch; gradients are summed during the backward.

    Args:
        learner: whole.
        world: the processes.
        precision: of the arithmetic.
        uses_all: all parameters have a part in the loss; otherwise each step looks for those.
    """

    def __init__(
        self, learner: Learner, world: World, precision: Precision, uses_all: bool = True
    ) -> None:
        super().__init__(learner, world, precision)
        self.data_rank, self.data_ranks = world.rank, world.size
        device_ids = [world.device] if world.device.type == "cuda" else None
        # Buffers are shared where they are read: see Strategy.share_buffers.
        self.wrapped: DistributedDataParallel = DistributedDataParallel(
            learner,
            device_ids=device_ids,
            forward_sync_buffers=False,
            find_unused_parameters=not uses_all,
        )
        self.called = self.wrapped
        # The engine takes the mean of gradients over processes; shares need not be equal.
        self.weight_factor = float(world.size)

    def syncs(self, last: bool) -> AbstractContextManager[Any]:
        """See `Replicated.syncs`."""
        return nullcontext() if last else self.wrapped.no_sync()
