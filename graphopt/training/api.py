"""A training run from end to end: train, export, optimize."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from graphopt.errors import ConfigError
from graphopt.json_report import versions
from graphopt.training.assembly import assemble
from graphopt.training.checkpoints import Checkpoints
from graphopt.training.choosing import check_strategy
from graphopt.training.config import Config
from graphopt.training.delivery import Delivery, check_targets, deliver
from graphopt.training.importing import modules_of
from graphopt.training.loop import Loop
from graphopt.training.processes import World, joined, told_to_torchrun
from graphopt.training.reading import read_config
from graphopt.training.recorder import Recorder
from graphopt.training.seeding import set_apart


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
        delivery: the files; empty on all processes but the first.
    """

    module: nn.Module | None
    steps: int
    losses: tuple[float, ...]
    scores: tuple[float, ...]
    best: tuple[float, int] | None
    delivery: Delivery


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
        told_to_torchrun(),
        modules_of(config.folder),
        _threads(config.training.threads),
        joined(config.strategy.timeout_s, config.training.device) as world,
        set_apart(),
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
    check_targets(config)
    checkpoints = _checkpoints(config)
    found = _found(checkpoints, resume)
    if checkpoints is not None:
        checkpoints.check(world)
    recorder = _recorder(config, world)
    assembly = assemble(config, world, recorder, checkpoints, progress)
    loop = assembly.loop
    recorder.add("start", _start_of(config, world, loop))
    if found is not None and checkpoints is not None:
        progress(f"resuming from {found}")
        loop.state = checkpoints.load(found, loop.strategy, loop.optimizer, loop.scale)
        recorder.add("resume", {"step": loop.state.step})
    loop.run()
    module = assembly.trained_module()
    delivery = Delivery()
    if module is not None:
        splits = loop.splits
        samples = splits.validation if splits.validation is not None else splits.train
        delivery = deliver(config, module, samples, assembly.input_names, recorder, progress)
    return Trained(
        module=module,
        steps=loop.steps,
        losses=tuple(loop.losses),
        scores=tuple(loop.scores),
        best=loop.state.best,
        delivery=delivery,
    )


def _checkpoints(config: Config) -> Checkpoints | None:
    folder = config.checkpoint.folder
    if folder is None:
        return None
    return Checkpoints(config.path(folder), config.checkpoint.keep, config.curve())


def _found(checkpoints: Checkpoints | None, resume: bool) -> Path | None:
    """The checkpoint to go on from, if there is one."""
    if checkpoints is None:
        if resume:
            raise ConfigError("there is nothing to resume from: state checkpoint.folder")
        return None
    found = checkpoints.latest()
    if found is not None and not resume:
        raise ConfigError(
            f"there is a checkpoint already, {found}; resume from it (--resume), or give another "
            "checkpoint.folder"
        )
    return found


def _recorder(config: Config, world: World) -> Recorder:
    path = config.log.path
    if path is None or not world.first:
        return Recorder(None)
    recorder = Recorder(config.path(path), config.log.every_steps)
    recorder.check()
    return recorder


def _start_of(config: Config, world: World, loop: Loop) -> dict[str, object]:
    return {
        "versions": {**versions(), "torch": torch.__version__},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": world.size,
        "device": str(world.device),
        "samples": len(loop.splits.train),
        "validation_samples": 0 if loop.splits.validation is None else len(loop.splits.validation),
        "steps": loop.steps,
        "config": config.as_table(),
    }
