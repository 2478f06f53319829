"""Samples in batches, seen otherwise each time, and models run on several at once.

An exported model often has a batch of 1 in its graph. Where it gives for samples side by side along
the first axis what it gives for each, they are run so; else as many models side by side
(`torch.func.vmap`); else one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.samples import Samples
from graphopt.signature import Input, complete
from graphopt.training.interpreter import Interpreter
from graphopt.variations import COLORS, image_axes

Tensors = dict[str, Tensor]

NEAREST = 0.5
"""The least share of a side that is cut out of an image and magnified."""

SHIFT = 0.125
"""Of a side, by how much an image is shifted at most."""

TONED_SHARE, TONE = 0.5, 0.2
"""Of images, those that get another brightness, contrast and colour; and by how much, about: as a
share of contrast, and of the standard deviation."""

PASTED_SHARE = 0.5
"""Of batches, those in which a part of every image is that of another; in the rest they blend."""

SAME = 1e-3
"""A relative difference up to which outputs are the same, in whatever order sums are added up."""


class Way(Enum):
    """How a model is run on several samples."""

    TOGETHER = "along the first axis"
    BESIDE = "side by side"
    EACH = "one by one"


@dataclass(frozen=True)
class Runner:
    """Runs a model on samples of equal shapes.

    Attributes:
        interpreter: of the model.
        way: in which it runs several.
    """

    interpreter: Interpreter
    way: Way

    def joined(self, samples: Sequence[Tensors]) -> Tensors:
        """What the model is given for samples: [samples * n, ...], or else [samples, ...]."""
        join = torch.cat if self.way is Way.TOGETHER else torch.stack
        return {name: join([sample[name] for sample in samples]) for name in samples[0]}

    def __call__(
        self,
        feeds: Tensors,
        wanted: Sequence[str],
        weights: Mapping[str, Tensor] | None = None,
        cut: Sequence[str] = (),
    ) -> Tensors:
        """Values of the model, joined as what it is given.

        Args:
            feeds: of several samples; see `joined`.
            wanted: names of values.
            weights: what takes the place of values of the model, by name.
            cut: names of values through which no gradient goes back.
        """
        given = dict(weights or {})

        def run(one: Tensors) -> Tensors:
            return self.interpreter.run({**one, **given}, wanted, cut)

        if self.way is Way.TOGETHER:
            return run(feeds)
        if self.way is Way.BESIDE:
            values: Tensors = torch.func.vmap(run)(feeds)
            return values
        count = len(next(iter(feeds.values())))
        each = [run({name: array[i] for name, array in feeds.items()}) for i in range(count)]
        return {name: torch.stack([values[name] for values in each]) for name in wanted}


def way_of(models: Sequence[Interpreter], pair: Sequence[Tensors]) -> Way:
    """The fastest way in which all models give for samples what they give for each of them.

    Args:
        models: of the same inputs.
        pair: two samples or more of equal shapes.
    """
    for way in (Way.TOGETHER, Way.BESIDE):
        if all(_is_same(model, way, pair) for model in models):
            return way
    return Way.EACH


def _is_same(model: Interpreter, way: Way, pair: Sequence[Tensors]) -> bool:
    with torch.no_grad():
        each = [model.run(sample) for sample in pair]
    if way is Way.TOGETHER and any(not t.ndim for one in (*pair, *each) for t in one.values()):
        return False
    runner, names = Runner(model, way), list(each[0])
    with torch.no_grad():
        try:
            values = runner(runner.joined(pair), names)
        except (GraphoptError, RuntimeError, ValueError, IndexError):
            # A shape that the graph states is of one sample, or data decides what is run.
            return False
    expected = runner.joined(each)
    return all(_near(values[name], expected[name]) for name in names)


def _near(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    first, second = first.double().nan_to_num(), second.double().nan_to_num()
    return float((first - second).norm()) <= SAME * float(second.norm())


Sequences = list[list[Tensors]]
"""For each step of several roll-outs of equal lengths, one sample of each."""


def from_all_over(samples: Samples, count: int) -> Samples:
    """So many sequences at most, from the first to the last: samples often lie sorted by class."""
    total = len(samples.sequences)
    return samples.select(range(0, total, -(-total // count)))


@dataclass(frozen=True)
class Batches:
    """Samples in an order of chance, in batches of equal shapes.

    Attributes:
        samples: each standing alone, or sequences that carry state.
        size: of a batch, at most.
        inputs: of the model; what a sample lacks of state is zeros.
        device: where the tensors are.
        seed: of the order and of the views.
    """

    samples: Samples
    size: int
    inputs: tuple[Input, ...]
    device: torch.device
    seed: int = 0

    @cached_property
    def _shapes(self) -> list[Hashable]:
        """Of each sequence; read once."""
        shapes = [
            tuple((name, array.shape) for name, array in sample.items()) for sample in self.samples
        ]
        return [tuple(shapes[i] for i in sequence) for sequence in self.samples.sequences]

    def epochs(self) -> Iterator[Sequences]:
        """Batches without an end, each sample once in every epoch, seen otherwise each time."""
        generator = np.random.default_rng(self.seed)
        while True:
            batches = self._cut(generator.permutation(len(self._shapes)).tolist())
            for place in generator.permutation(len(batches)):
                yield self._varied(self._read(batches[place]), generator)

    def once(self) -> Iterator[Sequences]:
        """All samples once, as they are."""
        for chosen in self._cut(range(len(self._shapes))):
            yield self._read(chosen)

    def _cut(self, order: Iterable[int]) -> list[list[int]]:
        groups = defaultdict(list)
        for number in order:
            groups[self._shapes[number]].append(number)
        return [
            group[start : start + self.size]
            for group in groups.values()
            for start in range(0, len(group), self.size)
        ]

    def _read(self, chosen: Sequence[int]) -> Sequences:
        rows = [self.samples.sequences[number] for number in chosen]
        return [[self._sample(index) for index in step] for step in zip(*rows, strict=True)]

    def _sample(self, index: int) -> Tensors:
        arrays = complete(self.samples.loaders[index](), self.inputs)
        numbers = {n: np.array(a) for n, a in arrays.items() if a.dtype.kind not in "OSU"}
        return {n: torch.from_numpy(a).to(self.device) for n, a in numbers.items()}

    def _varied(self, batch: Sequences, generator: np.random.Generator) -> Sequences:
        if len(batch) > 1:
            # What comes in turn is left alone.
            return batch
        samples = [_toned(_seen_otherwise(s, generator), generator) for s in batch[0]]
        return [_mixed(samples, generator) if len(samples) > 1 else samples]


def _axes(array: Tensor) -> tuple[int, int] | None:
    """The axes of rows and columns, if it is an image: floating point, or bytes."""
    is_numbers = array.is_floating_point() or array.dtype == torch.uint8
    return image_axes(array.shape) if is_numbers else None


def _seen_otherwise(sample: Tensors, generator: np.random.Generator) -> Tensors:
    """All images of a sample shifted, or cut out and magnified, perhaps mirrored; each alike."""
    is_shifted, is_mirrored = generator.random(2) < 0.5
    share = 1.0 if is_shifted else generator.uniform(NEAREST, 1)
    reach = SHIFT if is_shifted else (1 - share) / 2
    shifts = generator.uniform(-reach, reach, 2)

    def view(array: Tensor) -> Tensor:
        axes = _axes(array)
        if axes is None:
            return array
        for axis, shift in zip(axes, shifts, strict=True):
            size = array.shape[axis]
            places = (torch.arange(size) + 0.5) * share + ((1 - share) / 2 + shift) * size
            # Beyond the border is what is at the border.
            places = places.floor().long().clamp(0, size - 1)
            array = array.index_select(axis, places.to(array.device))
        return array.flip(axes[1]) if is_mirrored else array

    return {name: view(array) for name, array in sample.items()}


def _toned(sample: Tensors, generator: np.random.Generator) -> Tensors:
    """All images of a sample in another light: contrast and brightness, half as much by colour.

    No number is beyond those of the image, which may be all that a model can take.
    """
    if generator.random() >= TONED_SHARE:
        return sample
    common, of_colours = generator.normal(size=(2, 1)), generator.normal(size=(2, COLORS))
    amounts = TONE * torch.from_numpy((common + of_colours / 2).astype(np.float32))

    def tone(array: Tensor) -> Tensor:
        axes = _axes(array)
        if axes is None:
            return array
        shape = [1 if axis in axes else size for axis, size in enumerate(array.shape[1:], 1)]
        contrast, brightness = amounts.to(array.device).reshape(2, 1, *shape)
        numbers = array.float()
        mean, deviation = numbers.mean(axes, keepdim=True), numbers.std()
        numbers = (numbers - mean) * contrast.exp() + mean + brightness * deviation
        return _as_before(numbers.clamp(array.min(), array.max()), array)

    return {name: tone(array) for name, array in sample.items()}


def _as_before(numbers: Tensor, array: Tensor) -> Tensor:
    """In the type of the array."""
    return (numbers if array.is_floating_point() else numbers.round()).to(array.dtype)


def _mixed(batch: list[Tensors], generator: np.random.Generator) -> list[Tensors]:
    """Every image blended with that of the next sample, or with a part of it pasted in.

    These are mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019). The original says what it
    gives for a mixture, so that no label need be mixed; there are many more mixtures than samples,
    and what is fitted to mixtures is less fitted to the few samples.
    """
    is_pasted = generator.random() < PASTED_SHARE
    share, *centre = generator.random(3).tolist()

    def mix(first: Tensor, second: Tensor) -> Tensor:
        axes = _axes(first)
        if axes is None:
            return first
        if is_pasted:
            return _pasted(first, second, axes, share, centre)
        return _as_before(first * share + second * (1 - share), first)

    return [
        {name: mix(array, batch[i - 1][name]) for name, array in sample.items()}
        for i, sample in enumerate(batch)
    ]


def _pasted(
    first: Tensor, second: Tensor, axes: Sequence[int], share: float, centre: Sequence[float]
) -> Tensor:
    """The first with a window of the second: a share of the image, cut off at its border."""
    inside = torch.ones((), dtype=torch.bool, device=first.device)
    for axis, at in zip(axes, centre, strict=True):
        size = first.shape[axis]
        distance = (torch.arange(size, device=first.device) - at * size).abs()
        shape = [size if i == axis else 1 for i in range(first.ndim)]
        inside = inside & (distance <= share**0.5 * size / 2).reshape(shape)
    return torch.where(inside, second, first)
