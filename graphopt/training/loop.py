"""The training loop: epochs of steps, whatever the strategy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from graphopt.errors import ConfigError, GraphoptError, TrainingFailed
from graphopt.training.batches import Part, Splits, epoch_seed, load, order_of, shares_of
from graphopt.training.checkpoints import Checkpoints, Progress
from graphopt.training.config import Config
from graphopt.training.importing import described
from graphopt.training.optimizers import learning_rate_factor, set_learning_rate
from graphopt.training.precision import LossScale
from graphopt.training.preparation import Preparation
from graphopt.training.processes import is_loss
from graphopt.training.recorder import Recorder
from graphopt.training.scoring import Metric, score
from graphopt.training.strategy import Strategy, scale_gradients

SMALLEST_SCALE: Final = 2.0**-24
"""A loss scale below this means that gradients are not finite whatever the scale."""


@dataclass
class Loop:
    """Trains a learner.

    Attributes:
        config: how.
        splits: on what.
        strategy: has the learner.
        optimizer: of the parameters of this process.
        preparations: what the module is trained towards beside the objective.
        metric: judges epochs; None where there is no validation data.
        recorder: keeps the record.
        checkpoints: None where none are written.
        progress: told what goes on, in a few words.
        scale: of the loss, for float16.
        state: how far training is.
        losses: of each step done here, the mean over the global batch.
        scores: of each epoch done here.
    """

    config: Config
    splits: Splits
    strategy: Strategy
    optimizer: torch.optim.Optimizer
    preparations: Sequence[Preparation]
    metric: Metric | None
    recorder: Recorder
    checkpoints: Checkpoints | None
    progress: Callable[[str], None]
    scale: LossScale
    state: Progress = field(default_factory=Progress)
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return steps_per_epoch(self.config, self.splits)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.steps_per_epoch * self.config.training.epochs

    def run(self) -> None:
        """Train to the end, from where the state is.

        Raises:
            TrainingFailed: the loss is not finite.
        """
        while self.state.step < self.steps:
            epoch = self.state.step // self.steps_per_epoch
            self._epoch(epoch)
        if self.state.best_state is not None:
            self.strategy.set_module_state(self.state.best_state)
        self.strategy.share_buffers()

    def _epoch(self, epoch: int) -> None:
        started = begun = time.perf_counter()
        first, done_before = self.state.step, len(self.losses)
        for parts in self._batches(epoch):
            self._step(epoch, parts, begun)
            every = self.config.checkpoint.every_steps
            # The end of an epoch is saved after validation.
            if every and self.state.step % every == 0 and self.state.step % self.steps_per_epoch:
                self._save()
            begun = time.perf_counter()
        seconds = time.perf_counter() - started
        done = {
            "epoch": epoch + 1,
            "step": self.state.step,
            "loss": statistics.fmean(self.losses[done_before:]),
            "seconds": seconds,
            "samples_per_second": self._samples_since(first, epoch) / seconds,
        }
        if self.metric is not None:
            done["score"] = self._validate(epoch, self.metric)
        self.recorder.add("epoch", done)
        every = self.config.checkpoint.every_steps
        if every is None or self.state.step % every == 0 or self.state.step == self.steps:
            self._save()

    def _samples_since(self, step: int, epoch: int) -> int:
        size = self.config.data.batch_size
        before = (step - epoch * self.steps_per_epoch) * size
        return min(len(self.splits.train), self.steps_per_epoch * size) - before

    def _batches(self, epoch: int) -> Iterator[tuple[Part, ...]]:
        """The batches of an epoch that are still to be done."""
        config, strategy = self.config, self.strategy
        order = order_of(len(self.splits.train), config.training.seed, epoch)
        size = config.data.batch_size
        done = self.state.step % self.steps_per_epoch
        shares = [
            shares_of(
                order[at : at + size],
                config.training.accumulation,
                strategy.data_rank,
                strategy.data_ranks,
            )
            for at in range(done * size, self.steps_per_epoch * size, size)
        ]
        seed = epoch_seed(config.training.seed, epoch)
        return load(self.splits.train, shares, strategy.world.device, config.data.workers, seed)

    def _step(self, epoch: int, parts: tuple[Part, ...], begun: float) -> None:
        config = self.config
        step, steps = self.state.step, self.steps
        factor = learning_rate_factor(config.schedule, step, steps)
        learning_rate = config.optimizer.learning_rate * factor
        set_learning_rate(self.optimizer, learning_rate)
        for preparation in self.preparations:
            preparation.advance(step, steps)
        self.optimizer.zero_grad()
        with _told(f"step {step + 1} (epoch {epoch + 1})", parts):
            loss = self.strategy.backward(parts, self.scale.factor)
        for preparation in self.preparations:
            preparation.gather()
        norm = self._clip()
        if not math.isfinite(loss):
            self.recorder.add("stopped", {"step": step + 1, "loss": loss})
            raise TrainingFailed(
                f"the loss is {loss} in step {step + 1} (epoch {epoch + 1}); lower "
                f"optimizer.learning_rate (it was {learning_rate:g}), set "
                "training.gradient_clip_norm, or look for such values in the data"
            )
        if norm is None or self.scale.update(norm):
            self.optimizer.step()
        elif self.scale.factor < SMALLEST_SCALE:
            raise TrainingFailed(
                f"gradients are not finite in step {step + 1}, whatever the loss is scaled by; use "
                "training.precision bfloat16 or float32"
            )
        self.state.step += 1
        self.losses.append(loss)
        content = {
            "epoch": epoch + 1,
            "loss": loss,
            "learning_rate": learning_rate,
            "seconds": time.perf_counter() - begun,
        }
        if norm is not None:
            content["gradient_norm"] = norm
        self.recorder.step(self.state.step, content)
        self.progress(
            f"epoch {epoch + 1} of {config.training.epochs}, step {self.state.step} of {steps}, "
            f"loss {loss:.4g}"
        )

    def _clip(self) -> float | None:
        """Undo the scale and clip; the norm of the gradients, where anything depends on it."""
        most = self.config.training.gradient_clip_norm
        if most is None and not self.scale.enabled:
            return None
        norm = self.strategy.gradient_norm() / self.scale.factor
        factor = 1 / self.scale.factor
        if most is not None and norm > most:
            factor *= most / norm
        if factor != 1 and math.isfinite(norm):
            scale_gradients(self.strategy.gradients(), factor)
        return norm

    def _validate(self, epoch: int, metric: Metric) -> float:
        self.progress(f"epoch {epoch + 1} of {self.config.training.epochs}, validating")
        assert self.splits.validation is not None, "a metric is there with validation data only"
        size = self.config.validation.batch_size or self.config.data.batch_size
        value = score(self.strategy, self.splits.validation, metric, self.config.data, size)
        self.scores.append(value)
        if not all(p.is_settled(self.state.step, self.steps) for p in self.preparations):
            return value
        if self.state.best is None or metric.is_better(value, self.state.best[0]):
            self.state.best = (value, epoch + 1)
            if self.config.validation.keep_best:
                self.state.best_state = _copied(self.strategy.module_state())
        return value

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        self.progress(f"saving step {self.state.step}")
        self.strategy.share_buffers()
        self.checkpoints.save(self.strategy, self.optimizer, self.scale, self.state)
        self.recorder.add("checkpoint", {"step": self.state.step})


def steps_per_epoch(config: Config, splits: Splits) -> int:
    """Batches of an epoch.

    Raises:
        ConfigError: there is none.
    """
    whole, rest = divmod(len(splits.train), config.data.batch_size)
    if not whole and config.data.drop_last:
        raise ConfigError(
            f"data.drop_last leaves nothing: there are {len(splits.train)} samples to train on, "
            f"and data.batch_size is {config.data.batch_size}"
        )
    return whole if config.data.drop_last or not rest else whole + 1


@contextmanager
def _told(what: str, parts: Sequence[Part]) -> Iterator[None]:
    """Within, errors of the model and the loss are told; other processes' are left as they are."""
    try:
        yield
    except GraphoptError:
        raise
    except Exception as error:
        if is_loss(error):
            raise
        alone = any(len(part.inputs[0]) == 1 for part in parts)
        hint = "; one sample was computed by itself: is data.drop_last wanted?" if alone else ""
        raise TrainingFailed(f"{what} cannot be computed: {described(error)}{hint}") from error


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }
