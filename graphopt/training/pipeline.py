"""Pipeline parallel: each process computes one stage (`torch.distributed.pipelining`).

A batch passes the stages in microbatches, by one of two schedules: GPipe (Huang et al.,
arXiv:1811.06965) or 1F1B (Narayanan et al., arXiv:1806.03377). Microbatches are of one size. A
batch that cannot be cut into as many as are wanted, as the last one of an epoch, is cut into fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from graphopt.training.batches import Part
from graphopt.training.config import Precision
from graphopt.training.objectives import Learner
from graphopt.training.precision import casts
from graphopt.training.processes import World
from graphopt.training.stages import Stage, arguments_of
from graphopt.training.strategy import Strategy, sum_gradients, sum_of_squares


class Pipeline(Strategy):
    """Each process computes one stage of the module.

    Args:
        learner: its module is replaced by the stage of this process.
        world: the processes.
        precision: of the arithmetic.
        mesh: the processes that have the stages, along one axis.
        stages: all of them.
        schedule: gpipe or 1f1b.
        microbatches: that the share of a batch passes the stages in.
        data: the processes that divide the data and have the same stage; None if there are none.
    """

    def __init__(
        self,
        learner: Learner,
        world: World,
        precision: Precision,
        mesh: DeviceMesh,
        stages: Sequence[Stage],
        schedule: Literal["gpipe", "1f1b"],
        microbatches: int,
        data: DeviceMesh | None = None,
    ) -> None:
        super().__init__(learner, world, precision)
        self.number, self.count = mesh.get_local_rank(), mesh.size()
        self.group = mesh.get_group()
        self.stage = stages[self.number]
        self.schedule = schedule
        self.microbatches = microbatches
        learner.module = self.stage.module
        if not self.last:
            # The objective is taken of the outputs.
            learner.adapters = nn.ParameterList()
        if data is not None:
            self.data_rank, self.data_ranks = data.get_local_rank(), data.size()
            self.data_group = data.get_group()
        self.part: Part | None = None
        self.scale = 1.0
        self._schedules: dict[tuple[Any, ...], PipelineScheduleSingle] = {}

    @property
    def last(self) -> bool:
        """This process has the outputs."""
        return self.number == self.count - 1

    def backward(self, parts: Sequence[Part], scale: float) -> float:
        """See `Strategy.backward`; a batch is one part, since microbatches divide it already."""
        (part,) = parts
        self.part, self.scale = part, scale
        samples = part.inputs[0].shape[0]
        count = _pieces(samples, self.microbatches)
        schedule = self._schedule_for(part.inputs, count)
        arguments: dict[str, Any] = arguments_of(self.stage, part.inputs)
        losses: list[Tensor] = []
        self.learner.train()
        with casts(self.precision, self.world.device):
            if self.last:
                rows = torch.arange(samples, device=self.world.device)
                schedule.step(**arguments, target=rows, losses=losses, return_outputs=False)
            else:
                schedule.step(**arguments)
        for adapter in self.learner.adapters:
            # The schedule does this for the parameters of the stage.
            if adapter.grad is not None:
                adapter.grad.div_(count)
        if self.data_group is not None:
            sum_gradients(self.learner.parameters(), self.data_group)
        mean = sum(float(loss.detach()) for loss in losses) / count / scale
        return self.world.sum([mean])[0]

    def _loss(self, outputs: Any, rows: Tensor) -> Tensor:
        """What the schedule makes small for a microbatch: targets are the rows of the batch."""
        assert self.part is not None, "a schedule runs within a step"
        inputs = tuple(tensor[rows] for tensor in self.part.inputs)
        targets = None if self.part.targets is None else self.part.targets[rows]
        loss = self.learner.objective.on_outputs(outputs, inputs, targets)
        return loss * (self.part.weight * self.scale)

    def _schedule_for(self, inputs: tuple[Tensor, ...], count: int) -> PipelineScheduleSingle:
        """The engine's schedule, which is made for one number and size of microbatches."""
        size = inputs[0].shape[0] // count
        key = (count, size, *(tensor.shape[1:] for tensor in inputs))
        if key not in self._schedules:
            # In evaluation mode: no statistics are updated, no dropout is drawn.
            self.learner.eval()
            with casts(self.precision, self.world.device):
                taken, given = self._relay(tuple(tensor[:size] for tensor in inputs))
            stage = PipelineStage(
                self.stage.module,
                self.number,
                self.count,
                self.world.device,
                input_args=taken,
                output_args=given,
                group=self.group,
            )
            # 1F1B keeps every stage busy, which takes a microbatch for each.
            alternates = self.schedule == "1f1b" and count >= self.count
            kind = Schedule1F1B if alternates else ScheduleGPipe
            self._schedules[key] = kind(stage, count, self._loss)
        return self._schedules[key]

    def _relay(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What this stage takes and gives for some samples; all processes of the group call this.

        The stage before sends what it gives, with shapes, types and whether gradients flow back.
        """
        taken = () if self.number == 0 else self._receive()
        given = self.stage.module(*taken, **arguments_of(self.stage, inputs))
        given = given if isinstance(given, tuple) else (given,)
        if not self.last:
            self._send(given)
        return taken, given

    def _send(self, values: Sequence[Tensor]) -> None:
        to = dist.get_global_rank(self.group, self.number + 1)
        metas = [(tuple(v.shape), v.dtype, v.requires_grad) for v in values]
        dist.send_object_list([metas], dst=to, group=self.group, device=self.world.device)
        for value in values:
            dist.send(value.detach().contiguous(), dst=to, group=self.group)

    def _receive(self) -> tuple[Tensor, ...]:
        source = dist.get_global_rank(self.group, self.number - 1)
        told: list[Any] = [None]
        dist.recv_object_list(told, src=source, group=self.group, device=self.world.device)
        values = []
        for shape, dtype, requires_grad in told[0]:
            value = torch.empty(shape, dtype=dtype, device=self.world.device)
            dist.recv(value, src=source, group=self.group)
            values.append(value.requires_grad_(requires_grad))
        return tuple(values)

    def outputs(self, inputs: tuple[Tensor, ...]) -> Any:
        """See `Strategy.outputs`; a stage is at one batch while the next is at the one before."""
        self.learner.eval()
        with torch.no_grad(), casts(self.precision, self.world.device):
            _, given = self._relay(inputs)
        return (given[0] if len(given) == 1 else given) if self.last else None

    def gradient_norm(self) -> float:
        """See `Strategy.gradient_norm`."""
        (squares,) = self.world.sum([sum_of_squares(self.gradients())], self.group)
        return math.sqrt(squares)

    def full_state(self) -> dict[str, Any]:
        """See `Strategy.full_state`."""
        own = {name: value.detach().cpu() for name, value in self.module_state().items()}
        gathered: list[Any] = [None] * self.world.size
        dist.gather_object(own, gathered if self.world.first else None)
        if not self.world.first:
            return {}
        # Processes that divide the data hold the same.
        return {name: value for state in reversed(gathered) for name, value in state.items()}


def _pieces(samples: int, wanted: int) -> int:
    """The largest number of equal pieces, at most as many as are wanted."""
    return next(count for count in range(min(wanted, samples), 0, -1) if samples % count == 0)
