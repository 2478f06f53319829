"""Healing: an optimized graph learns from the original again what it lost, without labels.

The optimized graph is run in torch, operator by operator. Its weights learn, in the form in which
they are stored (`graphopt.training.stored_weights`), to give again the outputs of the original and
values on the way to them: first each part of the network for itself, its inputs taken as they come
(as in BRECQ, Li et al. 2021), then all together (distillation, Hinton et al. 2015). Rounding to a
grid or a codebook lets gradients through as they are (Bengio et al. 2013). Samples that the
training never sees say whether it helped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.errors import ModelError
from graphopt.samples import Samples
from graphopt.signature import Input
from graphopt.training.common_values import Feature, features
from graphopt.training.interpreter import Interpreter
from graphopt.training.original_weights import wanted_numbers
from graphopt.training.output_aims import Aim, aim_of, squares
from graphopt.training.ranks import Ranks
from graphopt.training.sample_batches import (
    Batches,
    Runner,
    Sequences,
    Tensors,
    from_all_over,
    way_of,
)
from graphopt.training.settling import Settling
from graphopt.training.stored_weights import stored_weights
from graphopt.training.weight_forms import StoredWeight

RATE = 0.01
"""Of Adam: by how much of its own size a weight changes in a step, about."""

VECTOR_SHARE = 0.05
"""Of this rate, what biases and scales take: one of them moves a whole channel."""

CODE_WAY = 1.0
"""Of the distance between two numbers that can be stored, what one that is rounded may go in all,
about. Only what is pushed one way for long should move, however many steps there are."""

LOST_MUCH = 0.1
"""An error from which on rates are whole. How far weights are from where they should be goes with
the square root of the error, and so do rates: larger ones would lose more than there is to find."""

NEARER = 0.5
"""Where learning begins: so far on the way from a rounded number to that of the original, or to
where it would be rounded to another one."""

FEATURES_WEIGHT = 20.0
"""Of values on the way, beside the outputs: on each sample they say far more, so that few samples
are enough, which the outputs alone would only be learnt by heart."""

SAMPLES_ENOUGH, SAMPLES_FEW = 250, 50
"""With fewer samples than the first, such values count more by as much, down to the second."""

WARM_UP_SHARE, APART_SHARE = 0.05, 0.1
"""Of the time: while the rate rises, and while each part learns for itself."""

CHECKS = 12
"""How often the samples that are not learnt from are asked."""

LOOKS = 8
"""Samples by which values of both models are found to be the same."""

AIM_LOOKS, AIM_BYTES = 64, 1 << 28
"""Samples by which it is known how much an output varies, and how much of their outputs is kept: a
few that follow one another may all be alike."""

BATCH_MAXIMUM, BATCHES_MINIMUM = 16, 6
"""Samples in a batch, and batches in an epoch."""

MEMORY_BYTES = 4 << 30
"""What the values of a batch may take, about, while gradients are reckoned."""

WINDOW = 16
"""Steps of a roll-out through which gradients go back."""


@dataclass(frozen=True)
class Point:
    """The state of healing at one moment.

    Attributes:
        minutes: since it began.
        steps: taken until then.
        error: of the outputs on held-out samples, the mean over the outputs; see
            `graphopt.training.output_aims`.
    """

    minutes: float
    steps: int
    error: float


@dataclass(frozen=True)
class Budget:
    """How long healing goes on.

    Attributes:
        minutes: of the clock.
        steps: of the optimizer; None lets the clock alone decide, so that two runs may differ.
    """

    minutes: float
    steps: int | None = None

    def share(self, seconds: float, steps: int) -> float:
        """What is over, 0 to 1 or more."""
        if self.steps is not None:
            return steps / self.steps
        return seconds / 60 / self.minutes


@dataclass(frozen=True)
class Material:
    """What is learnt from.

    Attributes:
        original: the model that shows how; not modified.
        training: samples to learn from.
        held_out: samples to judge by.
        inputs: of the original.
        state: pairs of output and input that carry state from sample to sample.
        seed: of the order and the views of samples.
    """

    original: ir.Model
    training: Samples
    held_out: Samples
    inputs: tuple[Input, ...]
    state: tuple[tuple[str, str], ...] = ()
    seed: int = 0


@dataclass
class Healing:
    """An optimized model that learns.

    Attributes:
        optimized: not modified.
        material: what it learns from.
        device: where it runs.
        ranks: the processes that learn together.
        progress: is told what goes on.
        curve: the error on held-out samples since it began.

    Raises:
        ModelError: an operator of a model is not known, no weight can learn, or no output is of
            floating point.
    """

    optimized: ir.Model
    material: Material
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    progress: Callable[[str], None] = lambda _: None
    curve: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = stored_weights(self.optimized.graph, self.device)
        if not self.weights:
            raise ModelError("the optimized model has no weight in a known form that could learn")
        if not self.outputs:
            raise ModelError("the original has no output of floating point that could be learnt")
        student = Interpreter(self.optimized, self.device, straight_through=True, wide=True)
        teacher = Interpreter(self.material.original, self.device, wide=True)
        looks = list(self._looks(teacher, LOOKS))
        self.progress("looking for values that both models compute")
        self.features = features(student, teacher, self._candidates(), looks)
        alike = [s for s in looks if _shapes(s) == _shapes(looks[0])]
        way = way_of((student, teacher), (alike * 2)[:2])
        self.student, self.teacher = Runner(student, way), Runner(teacher, way)
        self.aims = self._aims(teacher)
        size = self._batch_size(looks[0])
        self.training = self._batches(self.material.training, size)
        self.held_out = self._batches(self.material.held_out, size)

    # -------------------------------------------------------------- set-up

    @cached_property
    def outputs(self) -> list[str]:
        """Names of the outputs that are numbers of floating point."""
        return [
            value.name or ""
            for value in self.material.original.graph.outputs
            if value.dtype is None or value.dtype.is_floating_point()
        ]

    def _looks(self, teacher: Interpreter, count: int) -> Iterator[Tensors]:
        """A few samples from all over, with the state that the original has when it comes to them.

        At most so many, but that each roll-out has as many as others.
        """
        chosen = from_all_over(self.material.training, count)
        each = -(-count // len(chosen.sequences))
        for roll_out in self._batches(chosen, 1).once():
            apart = max(1, min(len(roll_out), AIM_LOOKS) // each)
            carried: Tensors = {}
            for number, (sample,) in enumerate(roll_out[: apart * each]):
                look = {**sample, **carried}
                if number % apart == 0:
                    yield look
                if self.material.state:
                    with torch.no_grad():
                        carried = self._carried(teacher.run(look, self._names([])))

    def _candidates(self) -> list[str]:
        """Values that layers read, and what outputs are made of."""
        readers = dict.fromkeys(weight.reader for weight in self.weights)
        makers = (value.producer() for value in self.optimized.graph.outputs)
        readers.update(dict.fromkeys(node for node in makers if node is not None))
        read = {value for node in readers for value in node.inputs if value is not None}
        made = [v for node in self.optimized.graph for v in node.outputs if v in read]
        return [v.name for v in made if v.name and not v.is_graph_output()]

    def _aims(self, teacher: Interpreter) -> dict[str, Aim]:
        """What is asked of each output, by its numbers on samples."""
        runs: list[Tensors] = []
        with torch.no_grad():
            for look in self._looks(teacher, AIM_LOOKS):
                runs.append(teacher.run(look, self.outputs))
                if sum(value.nbytes for value in runs[0].values()) * len(runs) > AIM_BYTES:
                    break
        return {name: aim_of([run[name] for run in runs]) for name in self.outputs}

    def _batch_size(self, sample: Tensors) -> int:
        """How many samples give gradients at once: as their number and the memory allow."""
        interpreter = self.student.interpreter
        with torch.no_grad():
            values = interpreter.run(sample, interpreter.computed())
        sample_bytes = sum(value.nbytes for value in values.values())
        many = len(self.material.training.sequences) // BATCHES_MINIMUM
        return max(1, min(BATCH_MAXIMUM, many, MEMORY_BYTES // max(sample_bytes, 1)))

    def _batches(self, samples: Samples, size: int) -> Batches:
        return Batches(samples, size, self.material.inputs, self.device, self.material.seed)

    # -------------------------------------------------------------- running both

    def _names(self, further: Sequence[str]) -> list[str]:
        """What is asked of a model: outputs, state and some values more, each once."""
        state = [output for output, _ in self.material.state]
        return list(dict.fromkeys([*self.outputs, *state, *further]))

    def _carried(self, values: Tensors) -> Tensors:
        """What the next step is given of the outputs of this one."""
        return {target: values[source].detach() for source, target in self.material.state}

    def _rounded(self, latent: Sequence[Tensor]) -> list[Tensor]:
        """As they can be stored."""
        return [
            w.nearest(numbers.detach()) for w, numbers in zip(self.weights, latent, strict=True)
        ]

    def _fed(self, latent: Sequence[Tensor], rounded: Sequence[Tensor]) -> Tensors:
        """The weights for the interpreter; gradients go through rounding as they are."""
        fed = {}
        for weight, free, stored in zip(self.weights, latent, rounded, strict=True):
            fed[weight.value.name or ""] = weight.fed(free + (stored - free).detach())
        return fed

    def _output_error(self, values: Tensors, targets: Tensors) -> Tensor:
        """The mean over the outputs."""
        errors = [aim.error(values[name], targets[name]) for name, aim in self.aims.items()]
        return torch.stack(errors).mean()

    def error(self, numbers: Sequence[Tensor]) -> float:
        """Of the outputs on the held-out samples, each rank looking at all of them."""
        total, count = 0.0, 0
        with torch.no_grad():
            fed = self._fed(numbers, self._rounded(numbers))
            for sequences in self.held_out.once():
                ours: Tensors = {}
                theirs: Tensors = {}
                for step in sequences:
                    feeds = self.teacher.joined(step)
                    targets = self.teacher({**feeds, **theirs}, self._names([]))
                    values = self.student({**feeds, **ours}, self._names([]), fed)
                    ours, theirs = self._carried(values), self._carried(targets)
                    total += float(self._output_error(values, targets)) * len(step)
                    count += len(step)
        # An error that is no number is none that another can be less than.
        return math.inf if math.isnan(total) else total / count

    # -------------------------------------------------------------- learning

    def run(self, budget: Budget) -> list[Tensor]:
        """Learn, and return the numbers of the last state, as they can be stored.

        Where this is no better than what was given, of the best state.
        """
        started = time.monotonic()
        latent, bounds = self._begin()
        coded = [i for i, weight in enumerate(self.weights) if _is_coded(weight)]
        settling = Settling(self.weights, coded)
        optimizer = _adam(self.weights, latent)
        best = self._stored(latent)
        lowest = self._check(best, started, 0)
        lost = math.sqrt(min(1.0, lowest / LOST_MUCH))
        before = 0.0
        for steps, (window, carried) in enumerate(self._windows()):
            share = self.ranks.agreed(budget.share(time.monotonic() - started, steps))
            if share * CHECKS >= len(self.curve) or share >= 1:
                error = self._check(latent, started, steps)
                if error <= lowest:
                    lowest, best = error, self._stored(latent)
            if share >= 1:
                break
            _set_rates(optimizer, share, before, lost)
            before = share
            rounded = self._rounded(latent)
            settling.watch(share, latent, rounded)
            optimizer.zero_grad()
            fed = self._fed(latent, rounded)
            self._learn(window, carried, fed, is_apart=share < APART_SHARE)
            self._take_gradients(latent)
            optimizer.step()
            with torch.no_grad():
                for i, (lower, upper) in bounds.items():
                    latent[i].clamp_(lower, upper)
        # Of states on the way the samples that judge, which are few, would like one by chance.
        is_better = self.curve[-1].error <= self.curve[0].error
        return self._stored(latent) if is_better else best

    def _check(self, numbers: Sequence[Tensor], started: float, steps: int) -> float:
        """The error on the held-out samples, which goes to the curve."""
        error = self.error(numbers)
        self.curve.append(Point((time.monotonic() - started) / 60, steps, error))
        if steps:
            self.progress(f"healing: error {self.curve[0].error:.3g}, now {error:.3g}")
        return error

    def _begin(self) -> tuple[list[Tensor], dict[int, tuple[Tensor, Tensor]]]:
        """What learns, and where it is rounded and the original known, its bounds by place."""
        latent: list[Tensor] = []
        bounds: dict[int, tuple[Tensor, Tensor]] = {}
        wanted = wanted_numbers(self.weights, self.student.interpreter, self.material.original)
        for i, (weight, aim) in enumerate(zip(self.weights, wanted, strict=True)):
            numbers = weight.numbers.clone()
            if aim is not None and _is_coded(weight):
                numbers += NEARER * (aim.clamp(*weight.cell()) - numbers)
                lower, upper = weight.around(aim)
                bounds[i] = lower.minimum(weight.numbers), upper.maximum(weight.numbers)
            latent.append(numbers.requires_grad_())
        return latent, bounds

    def _stored(self, latent: Sequence[Tensor]) -> list[Tensor]:
        return [numbers.clone() for numbers in self._rounded(latent)]

    def _windows(self) -> Iterator[tuple[Sequences, _Carried]]:
        """Some steps of several samples, and what both models carry into them and out again."""
        for sequences in self.training.epochs():
            carried = _Carried()
            for start in range(0, len(sequences), WINDOW):
                yield sequences[start : start + WINDOW], carried

    def _learn(self, window: Sequences, carried: _Carried, fed: Tensors, is_apart: bool) -> None:
        """The gradients of one batch, of this process."""
        cut = [f.name for f in self.features] if is_apart else []
        loss = torch.zeros((), device=self.device)
        share = self.ranks.share_of(len(window[0]))
        for step in window:
            samples = step[share]
            if not samples:
                continue
            feeds = self.teacher.joined(samples)
            with torch.no_grad():
                names = self._names([f.original for f in self.features])
                targets = self.teacher({**feeds, **carried.theirs}, names)
            names = self._names([f.name for f in self.features])
            values = self.student({**feeds, **carried.ours}, names, fed, cut)
            carried.ours, carried.theirs = self._carried(values), self._carried(targets)
            loss = loss + self._loss(values, targets) * len(samples) / len(step) / len(window)
        if loss.requires_grad:
            torch.autograd.backward(loss)

    def _take_gradients(self, latent: Sequence[Tensor]) -> None:
        """Let what still learns have those of all processes together."""
        learning = [numbers for numbers in latent if numbers.requires_grad]
        for numbers in learning:
            if numbers.grad is not None:
                # As of a square root at 0: one such number would spoil the weight for good.
                numbers.grad.nan_to_num_(0, 0, 0)
        self.ranks.add_gradients(learning)

    def _loss(self, values: Tensors, targets: Tensors) -> Tensor:
        loss = self._output_error(values, targets)
        if not self.features:
            return loss
        errors = [_feature_error(f, values, targets) for f in self.features]
        return loss + self._features_weight * torch.stack(errors).mean()

    @cached_property
    def _features_weight(self) -> float:
        samples = max(SAMPLES_FEW, min(SAMPLES_ENOUGH, len(self.material.training)))
        return FEATURES_WEIGHT * SAMPLES_ENOUGH / samples


@dataclass
class _Carried:
    """The state of both models between two windows of a roll-out."""

    ours: Tensors = field(default_factory=dict)
    theirs: Tensors = field(default_factory=dict)


def _feature_error(feature: Feature, values: Tensors, targets: Tensors) -> Tensor:
    return squares(values[feature.name], targets[feature.original]) / feature.variance


def _set_rates(optimizer: torch.optim.Adam, share: float, before: float, lost: float) -> None:
    """For the next step.

    Args:
        optimizer: see `_adam`.
        share: of the time that is over.
        before: the same at the step before.
        lost: by what part rates are smaller; see `LOST_MUCH`.
    """
    slow = min(1.0, share / WARM_UP_SHARE) * (1 + math.cos(math.pi * share)) / 2
    for group in optimizer.param_groups:
        # Half of all steps at the full rate would go as far as these do.
        rate = 2 * CODE_WAY * (share - before) if group["is_coded"] else lost * RATE
        group["lr"] = slow * group["size"] * rate


def _adam(weights: Sequence[StoredWeight], latent: Sequence[Tensor]) -> torch.optim.Adam:
    groups = [
        {"params": [numbers], "size": _size(weight), "is_coded": _is_coded(weight)}
        for weight, numbers in zip(weights, latent, strict=True)
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-16)


def _is_coded(weight: StoredWeight) -> bool:
    """Its numbers are few and far between. Those of a bias in integers lie close."""
    return weight.is_rounded and not weight.is_vector


def _size(weight: StoredWeight) -> float:
    """What a step is measured by: the distance between numbers that can be stored, on average.

    Where they lie close, the root mean square of those that are not zero.
    """
    if _is_coded(weight):
        lower, upper = weight.cell()
        widths = upper - lower
        widths = widths[widths.isfinite()]
        if widths.numel():
            return float(widths.mean())
    numbers = weight.numbers[weight.numbers != 0]
    size = float(numbers.square().mean().sqrt()) if numbers.numel() else 0.01
    return size * (VECTOR_SHARE if weight.is_vector else 1.0)


def _shapes(sample: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: array.shape for name, array in sample.items()}
