"""Samples in batches: the same global batches in the same order, whatever the strategy.

The order of an epoch depends on seed and epoch alone. Each global batch is cut into parts for
accumulation, and each part into shares, one for each data-parallel process; shares may be unequal.
A process whose share of a part is empty computes a sample of weight 0 instead, because the others
wait for it in collectives.

The global generators of random numbers begin anew for each sample, by seed, epoch and its number:
what is random in a data set is the same whatever the strategy, in workers, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from graphopt.errors import ConfigError, GraphoptError, TrainingFailed
from graphopt.training.config import Data
from graphopt.training.importing import described, made_by
from graphopt.training.seeding import seed_loading, set_apart


class Samples(Protocol):
    """A data set: items are `(inputs, target)`, as `graphopt.training.config.Data` says."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Splits:
    """The data of a run.

    Attributes:
        train: to learn from, one sample or more.
        validation: to measure with; None if there is none.
    """

    train: Samples
    validation: Samples | None


@dataclass(frozen=True)
class Part:
    """Samples that are computed at once in one process.

    Attributes:
        inputs: each [samples, ...].
        targets: [samples, ...], or None.
        count: samples that count: all, or 0 where a stand-in is computed.
        weight: of their mean in that over the global batch.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None
    count: int
    weight: float


@dataclass(frozen=True)
class Share:
    """Where the part of a batch that a process computes lies among the samples it loads.

    Attributes:
        indices: of the samples in the data set.
        count: those that count.
        weight: of their mean in that over the global batch.
    """

    indices: tuple[int, ...]
    count: int
    weight: float


def splits_of(config: Data) -> Splits:
    """The data sets that a configuration names.

    Raises:
        ConfigError: they cannot be made, or are not data sets.
    """
    where = "data.factory"
    made = made_by(config.factory, config.options, where)
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise ConfigError(
            f"{where}: {config.factory} returned {type(made).__name__}; it must return a pair, "
            "(train, validation)"
        )
    train, validation = made
    for name, samples in (("train", train), ("validation", validation)):
        if samples is None and name == "validation":
            continue
        if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            raise ConfigError(
                f"{where}: the {name} samples are {type(samples).__name__}; they must have a "
                "length, and items by number"
            )
        if not len(samples):
            raise ConfigError(f"{where}: there are no {name} samples")
        try:
            item = samples[0]
        except Exception as error:
            raise ConfigError(
                f"{where}: item 0 of the {name} samples raised {described(error)}"
            ) from error
        _check_item(item, f"{where}: item 0 of the {name} samples")
    return Splits(train, validation)


def _check_item(item: Any, where: str) -> None:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ConfigError(f"{where} is {type(item).__name__}; it must be a pair, (inputs, target)")
    try:
        inputs, targets = _collated([item])
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"{where} cannot be put into a batch: {error}") from error
    wrong = [type(tensor).__name__ for tensor in inputs if not isinstance(tensor, Tensor)]
    if wrong:
        raise ConfigError(
            f"{where} has inputs of {wrong[0]}; they must be arrays or tensors, several as a tuple "
            "in the order of the arguments of the module's forward"
        )
    if not isinstance(targets, Tensor | None):
        raise ConfigError(
            f"{where} has a target of {type(item[1]).__name__}; it must be a number, an array, a "
            "tensor or None"
        )


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """The numbers of all samples in the order of an epoch.

    Args:
        count: of samples.
        seed: of the run.
        epoch: from 0.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for an epoch, from 0, of a run: far from those of its neighbours and of other runs."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(2**62, (epoch + 1,), generator=generator)[epoch])


def shares_of(batch: Sequence[int], parts: int, rank: int, ranks: int) -> tuple[Share, ...]:
    """What one process computes of a global batch.

    Args:
        batch: numbers of samples, one or more.
        parts: how many parts the batch is computed in; less where it has fewer samples.
        rank: of the process among those that divide the data.
        ranks: how many these are.

    Returns:
        One share of each part, as many on every process.
    """
    return tuple(
        _share(part, rank, ranks, len(batch)) for part in _cut(batch, min(parts, len(batch)))
    )


def _share(part: Sequence[int], rank: int, ranks: int, whole: int) -> Share:
    own = _cut(part, ranks)[rank]
    return Share(tuple(own or part[:1]), len(own), len(own) / whole)


def _cut(items: Sequence[int], pieces: int) -> list[Sequence[int]]:
    """Pieces of neighbours whose lengths differ by one at most, the longer ones first."""
    length, longer = divmod(len(items), pieces)
    starts = [piece * length + min(piece, longer) for piece in range(pieces + 1)]
    return [items[a:b] for a, b in pairwise(starts)]


def load(
    samples: Samples,
    batches: Sequence[tuple[Share, ...]],
    device: torch.device,
    workers: int = 0,
    seed: int = 0,
) -> Iterator[tuple[Part, ...]]:
    """Load the shares of batches, one batch after the other.

    Args:
        samples: the data set.
        batches: the shares of each.
        device: where the tensors go.
        workers: processes that load ahead.
        seed: of what is random in the samples.

    Raises:
        TrainingFailed: a sample cannot be loaded.
    """
    loader = DataLoader(
        _Batched(samples, batches, seed),
        batch_size=None,
        num_workers=workers,
        # Without one of its own it would draw from the global generator.
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_unchanged,
    )
    for shares, loaded in zip(batches, loader, strict=True):
        if isinstance(loaded, GraphoptError):
            raise loaded
        yield tuple(
            Part(
                tuple(tensor.to(device) for tensor in inputs),
                None if targets is None else targets.to(device),
                share.count,
                share.weight,
            )
            for share, (inputs, targets) in zip(shares, loaded, strict=True)
        )


Collated = tuple[tuple[Tensor, ...], Tensor | None]
"""Inputs and targets of samples, each stacked along a new first axis."""


def _unchanged(item: Any) -> Any:
    return item


class _Batched(torch.utils.data.Dataset[tuple[Collated, ...] | GraphoptError]):
    """A data set whose items are whole batches, or why one is not there: from workers, too."""

    def __init__(self, samples: Samples, batches: Sequence[tuple[Share, ...]], seed: int) -> None:
        self.samples = samples
        self.batches = batches
        self.seed = seed

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Collated, ...] | GraphoptError:
        if number >= len(self.batches):
            raise IndexError(number)
        try:
            return tuple(
                _batch(self.samples, share.indices, self.seed) for share in self.batches[number]
            )
        except GraphoptError as error:
            return error


def _batch(samples: Samples, indices: Sequence[int], seed: int) -> Collated:
    """Samples by their numbers, as a batch."""
    items = []
    with set_apart():
        for index in indices:
            seed_loading((seed + index) % 2**62)
            try:
                items.append(samples[index])
            except Exception as error:
                raise TrainingFailed(f"sample {index} raised {described(error)}") from error
    try:
        return _collated(items)
    except (TypeError, RuntimeError) as error:
        numbers = ", ".join(map(str, indices))
        raise TrainingFailed(f"samples {numbers} cannot be put into a batch: {error}") from error


def _collated(items: Sequence[Any]) -> Collated:
    inputs = default_collate([item[0] for item in items])
    targets = None if items[0][1] is None else default_collate([item[1] for item in items])
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), targets


def first_of(samples: Samples, count: int, device: torch.device | None = None) -> Collated:
    """Inputs and targets of the first samples, each [samples, ...], on the CPU by default."""
    inputs, targets = _batch(samples, range(min(count, len(samples))), 0)
    moved = tuple(tensor.to(device) for tensor in inputs)
    return moved, None if targets is None else targets.to(device)
