"""Tensor parallel: processes divide the weights of single layers (`parallelize_module`, DTensor).

The plan names modules by pattern and says how each is divided (Shoeybi et al., arXiv:1909.08053):

- column: the output features of a Linear or Embedding; its input is whole, its output stays divided
  along the last axis.
- column-whole: the same, but its output is put together again.
- row: the input features; it takes a divided input, and its output is whole.
- sequence: the module (a normalization, dropout) computes a share of the positions, axis 1, and its
  output is whole again (Korthikanti et al., arXiv:2205.05198).

So a block is `column` for what opens it and `row` for what closes it. What lies between works on
divided values under torch's own rules for each operator; plain tensors that they meet, such as
masks and rotations, are the same on all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication, register_sharding
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from graphopt.errors import ConfigError, did_you_mean
from graphopt.training.config import Precision
from graphopt.training.objectives import Learner
from graphopt.training.processes import World
from graphopt.training.strategy import Replicated, sum_gradients

STYLES: Final = ("column", "column-whole", "row", "sequence")


class Tensor(Replicated):
    """Processes divide the weights of layers; all of one group compute on the same samples.

    Args:
        learner: its module is divided in place.
        world: the processes.
        precision: of the arithmetic.
        mesh: the processes that divide weights, along one axis.
        plan: how modules are divided, by pattern of their names.
        data: the processes that divide the data and have the same weights; None if there are none.

    Raises:
        ConfigError: the plan does not fit the module.
    """

    def __init__(
        self,
        learner: Learner,
        world: World,
        precision: Precision,
        mesh: DeviceMesh,
        plan: Mapping[str, str],
        data: DeviceMesh | None = None,
    ) -> None:
        super().__init__(learner, world, precision)
        divide(learner.module, mesh, plan)
        self.around = divided
        if data is not None:
            self.data_rank, self.data_ranks = data.get_local_rank(), data.size()
            self.data_group = data.get_group()

    def finish_gradients(self) -> None:
        """Make gradients of divided positions whole, and sum those of the other shares."""
        for parameter in self.learner.parameters():
            grad = parameter.grad
            if not isinstance(grad, DTensor):
                continue
            if isinstance(parameter, DTensor):
                parameter.grad = grad.redistribute(placements=parameter.placements)
            else:
                parameter.grad = grad.full_tensor()
        if self.data_group is not None:
            sum_gradients(self.learner.parameters(), self.data_group)


@contextmanager
def divided() -> Iterator[None]:
    """Within, a divided module is computed: what of it is no DTensor, all processes have whole.

    So masks, rotations and the like may meet divided values.
    """
    _know_attention()
    with implicit_replication():
        yield


@cache
def _know_attention() -> None:
    """Tell torch how attention is divided by heads on the CPU, which it knows of GPUs alone."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    heads, whole = Shard(1), Replicate()

    def ways(results: int, tensors: int, others: int, mask: Any) -> list[Any]:
        """All whole, or all by heads, axis 1; a mask may be the same for all heads."""
        of_mask = heads if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 else whole
        masks: list[list[Any]] = [[], []] if mask is None else [[whole], [of_mask]]
        return [
            ([by] * results, [*[by] * tensors, *[None] * others, *last])
            for by, last in zip((whole, heads), masks, strict=True)
        ]

    @register_sharding(attention)  # type: ignore[untyped-decorator]
    def _(*arguments: Any, attn_mask: Any = None, **_: Any) -> list[Any]:
        return ways(2, 3, len(arguments) - 3, attn_mask)

    @register_sharding(backward)  # type: ignore[untyped-decorator]
    def _(*arguments: Any, attn_mask: Any = None, **_: Any) -> list[Any]:
        return ways(3, 6, len(arguments) - 6, attn_mask)


def divide(module: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> None:
    """Divide the weights of a module between processes, in place.

    Args:
        module: the whole.
        mesh: the processes, along one axis.
        plan: styles by pattern of module names; of two that match, the later one counts.

    Raises:
        ConfigError: the plan is empty, a pattern matches no module, or a style does not fit one.
    """
    if not plan:
        raise ConfigError(
            "strategy.plan is missing: tensor parallel needs to know how modules are divided, for "
            'example {"layers.*.mlp.0" = "column", "layers.*.mlp.2" = "row"}'
        )
    names = dict(module.named_modules())
    chosen: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            near = did_you_mean(style, STYLES)
            raise ConfigError(f"strategy.plan: {pattern!r} is {style!r}, which is no style{near}")
        matched = [name for name in names if name and fnmatchcase(name, pattern)]
        if not matched:
            near = did_you_mean(pattern, filter(None, names))
            raise ConfigError(f"strategy.plan: {pattern!r} matches no module{near}")
        chosen |= dict.fromkeys(matched, style)
    for name, style in chosen.items():
        _check_fits(name, names[name], style)
        _check_own(name, names[name], module)
    for name, style in chosen.items():
        for part in _styles(style):
            parallelize_module(names[name], mesh, part)


def _check_fits(name: str, module: nn.Module, style: str) -> None:
    if style != "sequence" and not isinstance(module, nn.Linear | nn.Embedding):
        raise ConfigError(
            f"strategy.plan: {name!r} is {type(module).__name__}; {style} divides Linear and "
            "Embedding"
        )
    if style == "sequence" and any(module.children()):
        raise ConfigError(
            f"strategy.plan: {name!r} is {type(module).__name__}, which holds other modules; "
            "sequence is for a normalization or dropout"
        )


def _check_own(name: str, layer: nn.Module, module: nn.Module) -> None:
    """A parameter that two modules share would become two, one of them divided."""
    own = {id(parameter) for parameter in layer.parameters()}
    for other, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in own and other.rpartition(".")[0] != name:
            raise ConfigError(
                f"strategy.plan: {name!r} shares a parameter with another module, as {other!r}; "
                "leave both out"
            )


def _styles(style: str) -> tuple[ParallelStyle, ...]:
    """What is applied to a module, one after the other."""
    if style == "row":
        return (RowwiseParallel(),)
    if style == "column":
        # The output stays a DTensor, so that code which splits heads by their number is right.
        return (ColwiseParallel(use_local_output=False),)
    if style == "column-whole":
        return (ColwiseParallel(output_layouts=Replicate()),)
    whole, positions = Replicate(), Shard(1)
    return (
        PrepareModuleInput(input_layouts=whole, desired_input_layouts=positions),
        SequenceParallel(),
        PrepareModuleOutput(output_layouts=positions, desired_output_layouts=whole),
    )
