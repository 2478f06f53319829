"""The strategy that a configuration names, checked against the processes and the model."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from graphopt.errors import ConfigError, did_you_mean
from graphopt.training import stages
from graphopt.training.config import Config
from graphopt.training.ddp import Ddp
from graphopt.training.fsdp import Fsdp
from graphopt.training.importing import described
from graphopt.training.objectives import Learner
from graphopt.training.pipeline import Pipeline
from graphopt.training.processes import World, is_loss
from graphopt.training.strategy import Single, Strategy
from graphopt.training.tensor import Tensor as TensorParallel
from graphopt.training.tensor import divided

NAMES: Final = (
    "single",
    "ddp",
    "fsdp",
    "tensor",
    "pipeline",
    "ddp x tensor",
    "ddp x pipeline",
    "fsdp x tensor",
)
DATA: Final = ("ddp", "fsdp")
"""Words for dividing the data."""

AGREEMENT: Final = 1e-3
"""How far, relative to the largest, outputs of a divided model may be from those of the whole."""


def words_of(config: Config) -> tuple[str, ...]:
    """The words of the strategy's name.

    Raises:
        ConfigError: there is no such strategy.
    """
    words = tuple(config.strategy.name.split())
    name = " ".join(words)
    if name not in NAMES:
        near = did_you_mean(name, NAMES)
        raise ConfigError(f"strategy.name is {config.strategy.name!r}, which is none{near}")
    return tuple(name.split(" x "))


def sizes_of(config: Config, world_size: int) -> dict[str, int]:
    """The number of processes along each word of the strategy.

    Raises:
        ConfigError: the sizes do not fit the strategy, the processes or the data.
    """
    words, sizes = words_of(config), config.strategy.sizes
    if not sizes and len(words) == 1:
        sizes = (world_size,)
    if len(sizes) != len(words) or min(sizes) < 1:
        raise ConfigError(
            f"strategy.sizes is {list(sizes)}; {config.strategy.name!r} needs {len(words)} sizes, "
            "each at least 1: the processes along each word"
        )
    needed = math.prod(sizes)
    if needed != world_size:
        raise ConfigError(
            f"strategy {config.strategy.name!r} of sizes {list(sizes)} takes {needed} processes, "
            f"and there are {world_size}; start them with torchrun --nproc_per_node={needed} -m "
            "graphopt.training CONFIG"
        )
    if words == ("single",) and world_size > 1:
        raise ConfigError(
            f"strategy.name is 'single', and there are {world_size} processes; start one, or name "
            f"one of {', '.join(NAMES[1:])}"
        )
    if words != ("single",) and not dist.is_initialized():
        raise ConfigError(
            f"strategy {config.strategy.name!r} needs processes that know of each other; start "
            "them with torchrun --nproc_per_node=N -m graphopt.training CONFIG"
        )
    return dict(zip(words, sizes, strict=True))


def check_strategy(config: Config, world_size: int) -> None:
    """Raise ConfigError where the strategy does not fit the processes or the rest of the file."""
    sizes = sizes_of(config, world_size)
    if "pipeline" in sizes:
        _check_pipeline(config, sizes)
    if "tensor" in sizes and config.prepare:
        raise ConfigError(
            "[[prepare]] does not go with the strategy tensor, which divides weights as they are; "
            "use ddp, fsdp or pipeline"
        )


def _check_pipeline(config: Config, sizes: dict[str, int]) -> None:
    strategy = config.strategy
    if len(strategy.stages) != sizes["pipeline"] - 1:
        raise ConfigError(
            f"strategy.stages is {list(strategy.stages)}; {sizes['pipeline']} stages need "
            f"{sizes['pipeline'] - 1} names: of the modules that all but the first begin with"
        )
    if config.training.accumulation > 1:
        raise ConfigError(
            "training.accumulation does not go with the strategy pipeline, where "
            "strategy.microbatches divides batches; leave it out"
        )
    share, rest = divmod(config.data.batch_size, sizes.get("ddp", 1))
    if rest or share % strategy.microbatches:
        raise ConfigError(
            f"data.batch_size is {config.data.batch_size}; it must be a multiple of "
            f"{sizes.get('ddp', 1)} x {strategy.microbatches}: the processes that divide the data, "
            "times strategy.microbatches"
        )


def strategy_of(
    config: Config,
    learner: Learner,
    world: World,
    example: tuple[Tensor, ...],
    uses_all: bool,
) -> Strategy:
    """The strategy of a run, the learner divided as it says.

    Args:
        config: checked by `check_strategy`.
        learner: whole, the same on all processes, on the device.
        world: the processes.
        example: inputs of a few samples, on the device.
        uses_all: all parameters have a part in the loss.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    sizes = sizes_of(config, world.size)
    if "single" in sizes:
        return Single(learner, world, config.training.precision)
    if tuple(sizes) == ("ddp",):
        return Ddp(learner, world, config.training.precision, uses_all)
    mesh = world.mesh(tuple(sizes.values()), tuple(sizes))
    data = mesh["ddp"] if "ddp" in sizes else None
    precision = config.training.precision
    if "pipeline" in sizes:
        chain = stages.split(learner.module.train(), config.strategy.stages)
        _check_chain(learner.module, chain, example)
        return Pipeline(
            learner,
            world,
            precision,
            mesh["pipeline"],
            chain,
            config.strategy.schedule,
            config.strategy.microbatches,
            data,
        )
    if "tensor" not in sizes:
        return Fsdp(learner, world, precision, mesh["fsdp"], config.strategy.layers)
    whole = _learnt(learner.module, example)
    by_tensor = TensorParallel(
        learner, world, precision, mesh["tensor"], config.strategy.plan, data
    )
    _check_divided(learner.module, whole, example)
    if "fsdp" not in sizes:
        return by_tensor
    both = Fsdp(learner, world, precision, mesh["fsdp"], config.strategy.layers)
    both.around = divided
    return both


def _evaluated(module: nn.Module, example: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(module.eval()(*example))


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if not isinstance(outputs, dict | list | tuple):
        return []
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values for tensor in _tensors(value)]


def _check_chain(module: nn.Module, chain: list[stages.Stage], example: tuple[Tensor, ...]) -> None:
    whole = _evaluated(module, example)
    with torch.no_grad():
        results = stages.run(chain, example)
    for number, result in enumerate(results[:-1]):
        kinds = {type(value).__name__ for value in result if not isinstance(value, Tensor)}
        if kinds:
            raise ConfigError(
                f"strategy.stages: stage {number + 1} needs {' and '.join(sorted(kinds))} of stage "
                f"{number}, which passes tensors alone; compute that within the modules that use it"
            )
    _check_same(whole, _tensors(results[-1]), "strategy.stages")


Learnt = tuple[list[Tensor], dict[str, Tensor]]
"""Outputs, and the gradients of the sum of their squares, by parameter."""


def _learnt(module: nn.Module, example: tuple[Tensor, ...]) -> Learnt:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    # cuDNN does not take gradients of recurrent layers in evaluation.
    with torch.backends.cudnn.flags(enabled=False):
        outputs = _tensors(module.eval()(*example))
        total = torch.stack([y.square().sum() for y in outputs if y.requires_grad]).sum()
        gradients = torch.autograd.grad(total, tuple(named.values()), allow_unused=True)
    learnt = {name: _whole(g) for name, g in zip(named, gradients, strict=True) if g is not None}
    return [output.detach() for output in outputs], learnt


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check_divided(module: nn.Module, whole: Learnt, example: tuple[Tensor, ...]) -> None:
    try:
        with divided():
            outputs, gradients = _learnt(module, example)
    except Exception as error:
        if is_loss(error):
            raise
        raise ConfigError(
            f"strategy.plan: the divided model cannot be computed: {described(error)}; each column "
            "needs a row after it"
        ) from error
    _check_same(whole[0], outputs, "strategy.plan")
    largest = max(float(gradient.abs().max()) for gradient in whole[1].values())
    for name, gradient in whole[1].items():
        other = gradients.get(name)
        if other is None or not bool((gradient - other).abs().max() <= AGREEMENT * largest):
            raise ConfigError(
                f"strategy.plan: the divided model gives other gradients of {name!r} than the "
                "whole one; divide it elsewhere"
            )


def _check_same(whole: list[Tensor], parts: list[Tensor], where: str) -> None:
    """Raise ConfigError where the divided model computes something else than the whole."""
    for one, other in zip(whole, parts, strict=True):
        same = type(one) is type(other) and one.shape == other.shape
        if same and bool((one - other).abs().max() <= AGREEMENT * one.abs().max()):
            continue
        raise ConfigError(
            f"{where}: the divided model gives other outputs than the whole one; divide it "
            "elsewhere"
        )
