"""Everything that a run needs, made of its configuration and checked before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from graphopt.errors import ConfigError
from graphopt.training import exporting
from graphopt.training.batches import Splits, first_of, splits_of
from graphopt.training.checkpoints import Checkpoints
from graphopt.training.choosing import strategy_of, words_of
from graphopt.training.config import Config
from graphopt.training.distillation import objective_of
from graphopt.training.importing import made_by
from graphopt.training.loop import Loop, steps_per_epoch
from graphopt.training.objectives import Learner, Objective, TaskLoss, loss_named
from graphopt.training.optimizers import check_schedule, optimizer_of
from graphopt.training.precision import LossScale
from graphopt.training.preparations import preparations_of
from graphopt.training.processes import World
from graphopt.training.recorder import Recorder
from graphopt.training.scoring import Metric, metric_of
from graphopt.training.seeding import seed_all
from graphopt.training.strategy import Strategy
from graphopt.training.trial import SAMPLES, try_metric, try_objective


@dataclass(frozen=True)
class Assembly:
    """A run that can begin.

    Attributes:
        loop: trains.
        whole: a copy of the untrained module, parametrizations and all, on the first process; None
            on the others.
        input_names: of the module, for the export.
    """

    loop: Loop
    whole: nn.Module | None
    input_names: tuple[str, ...]

    def trained_module(self) -> nn.Module | None:
        """The whole module with trained values, in evaluation mode; all processes call this."""
        state = self.loop.strategy.full_state()
        if self.whole is None:
            return None
        # What no stage of a pipeline computes with is as it was.
        self.whole.load_state_dict({**self.whole.state_dict(), **state})
        for preparation in self.loop.preparations:
            preparation.finish(self.whole)
        return self.whole.eval()


def assemble(
    config: Config,
    world: World,
    recorder: Recorder,
    checkpoints: Checkpoints | None,
    progress: Callable[[str], None],
) -> Assembly:
    """Make what a run needs.

    Args:
        config: what to do; its strategy fits the processes.
        world: the processes.
        recorder: keeps the record.
        checkpoints: None where none are written.
        progress: told what goes on.

    Raises:
        ConfigError: something cannot be made, or does not fit the rest.
    """
    progress("loading data")
    seed_all(config.training.seed)
    splits = splits_of(config.data)
    check_schedule(config.schedule, steps_per_epoch(config, splits) * config.training.epochs)
    loss = loss_named(config.training.loss)
    metric = metric_of(config.validation, loss)
    progress("making the model")
    seed_all(config.training.seed)
    module = _module_of(config)
    _share(module, world)
    inputs, _ = first_of(splits.train, SAMPLES)
    objective: Objective = TaskLoss(loss)
    if config.distill is not None:
        objective = objective_of(config, loss, module, inputs, world.device)
    preparations = preparations_of(config)
    for preparation in preparations:
        preparation.attach(module)
    names = exporting.names_of_inputs(module, config.export, len(inputs))
    exporting.axes_of(config.export, names, inputs)
    whole = copy.deepcopy(module) if world.first else None
    learner = Learner(module, objective).to(world.device)
    strategy = _strategy_of(config, world, learner, splits, metric)
    loop = Loop(
        config=config,
        splits=splits,
        strategy=strategy,
        optimizer=optimizer_of(config.optimizer, learner.parameters()),
        preparations=preparations,
        metric=metric if splits.validation is not None else None,
        recorder=recorder,
        checkpoints=checkpoints,
        progress=progress,
        scale=LossScale.of(config.training.precision),
    )
    # Processes that compute on the same samples draw the same numbers.
    seed_all((config.training.seed + strategy.data_rank) % 2**62)
    return Assembly(loop, whole, names)


def _strategy_of(
    config: Config, world: World, learner: Learner, splits: Splits, metric: Metric
) -> Strategy:
    """The strategy, once loss and metric of a few samples are known to have values."""
    samples = first_of(splits.train, SAMPLES, world.device)
    uses_all = try_objective(learner, samples, "pipeline" in words_of(config))
    if splits.validation is not None:
        try_metric(learner, first_of(splits.validation, SAMPLES, world.device), metric)
    inputs, _ = samples
    return strategy_of(config, learner, world, inputs, uses_all)


def _share(module: nn.Module, world: World) -> None:
    """Let all processes begin with the values of the first: what made them may not be seeded."""
    if world.size == 1:
        return
    for tensor in module.state_dict().values():
        on_device = tensor.detach().to(world.device)
        dist.broadcast(on_device, src=0)
        with torch.no_grad():
            tensor.copy_(on_device)


def _module_of(config: Config) -> nn.Module:
    module = made_by(config.model.factory, config.model.options, "model.factory")
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model.factory: {config.model.factory} returned {type(module).__name__}; it must "
            "return a torch.nn.Module"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"model.factory: {config.model.factory} has no parameters to train")
    return module
