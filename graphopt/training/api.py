"""A training run from end to end: train, export, optimize."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

import graphopt
from graphopt import saving
from graphopt.errors import ConfigError
from graphopt.json_report import run_to_json, versions
from graphopt.ledger import Run
from graphopt.training import exporting
from graphopt.training.batches import Samples, Splits, first_inputs, splits_of
from graphopt.training.checkpoints import Checkpoints
from graphopt.training.choosing import check_strategy, strategy_of
from graphopt.training.config import Config, Optimize
from graphopt.training.distillation import objective_of
from graphopt.training.importing import made_by, modules_of
from graphopt.training.loop import Loop, steps_per_epoch
from graphopt.training.objectives import Learner, Objective, TaskLoss, loss_named
from graphopt.training.optimizers import check_schedule, optimizer_of
from graphopt.training.precision import LossScale
from graphopt.training.preparations import preparations_of
from graphopt.training.processes import World, joined
from graphopt.training.reading import read_config
from graphopt.training.recorder import Recorder
from graphopt.training.scoring import metric_of
from graphopt.validation import OutputError

EXAMPLES = 2
"""Samples on which a divided model is compared with the whole one."""


def _quiet(_: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Trained:
    """What a training run gave.

    Attributes:
        module: with the trained values, on the CPU, in evaluation mode; None on all processes but
            the first.
        steps: optimizer steps of the whole run.
        losses: of each step done in this call, the mean over the global batch.
        scores: of each epoch done in this call, the metric on the validation data.
        best: the best value of the metric and its epoch, from 1; None without validation data.
        exported: the ONNX file; None where none was asked for.
        numerics: the errors of its outputs against the module's.
        optimized: the file that `graphopt.optimize` made of it, or None.
        run: that run, or None.
    """

    module: nn.Module | None
    steps: int
    losses: tuple[float, ...]
    scores: tuple[float, ...]
    best: tuple[float, int] | None
    exported: Path | None = None
    numerics: tuple[OutputError, ...] = ()
    optimized: Path | None = None
    run: Run | None = None


def train(
    config: Config | str | Path,
    *,
    resume: bool = False,
    progress: Callable[[str], None] = _quiet,
) -> Trained:
    """Train a model, export it, and optimize what was exported, as a configuration says.

    With a strategy for several processes each of them calls this; torchrun starts them and tells
    them of each other. The random state of the caller stays as it was.

    Args:
        config: what to do, or the path of a TOML file that says it.
        resume: go on from the newest checkpoint, if there is one.
        progress: called on the first process with a few words on what goes on.

    Raises:
        ConfigError: the configuration is not of its form, or does not fit what is there.
        TrainingFailed: the loss is not finite, or another process was lost.
        GraphoptError: the model cannot be exported or optimized.
    """
    if not isinstance(config, Config):
        config = read_config(config)
    with (
        modules_of(config.folder),
        _threads(config.training.threads),
        joined(config.strategy.timeout_s, config.training.device) as world,
        torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []),
    ):
        return _train(config, world, resume, progress if world.first else _quiet)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(config: Config, world: World, resume: bool, progress: Callable[[str], None]) -> Trained:
    check_strategy(config, world.size)
    target = _check_targets(config)
    checkpoints = _checkpoints(config)
    found = checkpoints.latest() if checkpoints is not None else None
    if found is not None and not resume:
        raise ConfigError(
            f"there is a checkpoint already, {found}; resume from it (--resume), or give another "
            "checkpoint.folder"
        )
    log = config.log.path
    path = config.path(log) if log is not None and world.first else None
    recorder = Recorder(path, config.log.every_steps)
    recorder.check()
    progress("loading data")
    splits = splits_of(config.data)
    steps = steps_per_epoch(config, splits) * config.training.epochs
    check_schedule(config.schedule, steps)
    loss = loss_named(config.training.loss)
    metric = None
    if splits.validation is not None:
        metric = metric_of(config.validation, loss)
    progress("making the model")
    torch.manual_seed(config.training.seed)
    module = _module_of(config)
    preparations = preparations_of(config)
    for preparation in preparations:
        preparation.attach(module)
    inputs = first_inputs(splits.train, EXAMPLES)
    task = TaskLoss(loss)
    objective: Objective = task
    if config.distill is not None:
        objective = objective_of(config, task, module, inputs, world.device)
    names = exporting.names_of_inputs(module, config.export, len(inputs))
    exporting.axes_of(config.export, names, inputs)
    whole = copy.deepcopy(module) if world.first else None
    learner = Learner(module, objective).to(world.device)
    example = tuple(tensor.to(world.device) for tensor in inputs)
    strategy = strategy_of(config, learner, world, example)
    optimizer = optimizer_of(config.optimizer, learner.parameters())
    # Processes that compute on the same samples draw the same numbers.
    torch.manual_seed((config.training.seed + strategy.data_rank) % 2**62)
    scale = LossScale.of(config.training.precision)
    loop = Loop(
        config,
        splits,
        strategy,
        optimizer,
        preparations,
        metric,
        recorder,
        checkpoints,
        progress,
        scale,
    )
    recorder.add(
        "start",
        {
            "versions": {**versions(), "torch": torch.__version__},
            "processes": world.size,
            "steps": steps,
            "config": config.as_table(),
        },
    )
    if found is not None and checkpoints is not None:
        progress(f"resuming from {found}")
        loop.state = checkpoints.load(found, strategy, optimizer, scale)
        recorder.add("resume", {"step": loop.state.step})
    loop.run()
    state = strategy.full_state()
    trained = Trained(None, steps, tuple(loop.losses), tuple(loop.scores), loop.state.best)
    if whole is None:
        return trained
    whole.load_state_dict(state)
    for preparation in preparations:
        preparation.finish(whole)
    trained = replace(trained, module=whole.eval())
    if target is None:
        return trained
    return _export(config, trained, whole, splits, names, target, recorder, progress)


def _checkpoints(config: Config) -> Checkpoints | None:
    folder = config.checkpoint.folder
    if folder is None:
        return None
    return Checkpoints(config.path(folder), config.checkpoint.keep, config.curve())


def _check_targets(config: Config) -> Path | None:
    """Where the export goes; raises where something cannot be written, before any work."""
    if config.export.path is None:
        if config.optimize is not None:
            raise ConfigError(
                "[optimize] works on the exported file, and there is none; state export.path"
            )
        return None
    if find_spec("onnxscript") is None:
        raise ConfigError("the export needs onnxscript: pip install 'graphopt[train]'")
    target = config.path(config.export.path)
    target.parent.mkdir(exist_ok=True)
    saving.check_target(target)
    if config.optimize is not None:
        saving.check_target(_optimized_path(config, config.optimize, target))
    return target


def _optimized_path(config: Config, optimize: Optimize, exported: Path) -> Path:
    if optimize.output is not None:
        return config.path(optimize.output)
    return exported.with_name(f"{exported.stem}.optimized{exported.suffix}")


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


# ------------------------------------------------------------------ after training


def _export(
    config: Config,
    trained: Trained,
    module: nn.Module,
    splits: Splits,
    names: tuple[str, ...],
    target: Path,
    recorder: Recorder,
    progress: Callable[[str], None],
) -> Trained:
    progress("exporting")
    # Real samples that were not trained on, where there are any.
    samples = splits.validation if splits.validation is not None else splits.train
    inputs = first_inputs(samples, config.export.samples)
    axes = exporting.axes_of(config.export, names, inputs)
    model = exporting.exported(
        module, inputs, names, config.export.output_names, axes, config.export.opset
    )
    batches = [dict(zip(names, inputs, strict=True))]
    if all(0 in axes.get(name, {}) for name in names):
        # That the number of samples is free shows with another one.
        batches.append({name: tensor[:1] for name, tensor in batches[0].items()})
    numerics = exporting.write_checked(model, target, module, batches)
    recorder.add(
        "export",
        {
            "path": str(target),
            "bytes": target.stat().st_size,
            "outputs": {
                error.name: {"rel_l2": error.rel_l2, "max_abs": error.max_abs} for error in numerics
            },
        },
    )
    trained = replace(trained, exported=target, numerics=numerics)
    if config.optimize is None:
        return trained
    return _optimize(config, config.optimize, trained, samples, names, target, recorder, progress)


def _optimize(
    config: Config,
    optimize: Optimize,
    trained: Trained,
    samples: Samples,
    names: tuple[str, ...],
    target: Path,
    recorder: Recorder,
    progress: Callable[[str], None],
) -> Trained:
    output = _optimized_path(config, optimize, target)
    run = graphopt.optimize(
        target,
        recipe=optimize.recipe,
        passes=optimize.passes,
        samples=_feeds(samples, names, optimize.samples),
        max_error=optimize.max_error or None,
        require=optimize.require,
        benchmark=optimize.benchmark,
        progress=progress,
    ).save(output)
    recorder.add("optimize", {"path": str(output), "result": run_to_json(run)})
    return replace(trained, optimized=output, run=run)


def _feeds(samples: Samples, names: tuple[str, ...], count: int) -> Iterator[dict[str, np.ndarray]]:
    """Samples as `graphopt.optimize` takes them, each a batch of one."""
    inputs = first_inputs(samples, count)
    for number in range(inputs[0].shape[0]):
        yield {
            name: exporting.array_of(tensor[number : number + 1])
            for name, tensor in zip(names, inputs, strict=True)
        }
