"""Which values of an optimized model are those of the original: what healing looks at on the way.

They are known by their content; see `graphopt.counterparts`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from graphopt.counterparts import (
    NUMBERS_MINIMUM,
    POSITIONS_MAXIMUM,
    Look,
    in_order,
    likenesses,
)
from graphopt.training.interpreter import Interpreter
from graphopt.training.sample_batches import Tensors

APART, NEAR = 10.0, 1e-3
"""What is lost on the way is seldom found again: a value that is this many times as far from the
original's as a later one, which is no nearer than `NEAR` for that, has other scales than it."""

FEATURES_MAXIMUM = 32


@dataclass(frozen=True)
class Feature:
    """A value that both models compute.

    Attributes:
        name: in the optimized model.
        original: in the original.
        variance: of its numbers in the original.
    """

    name: str
    original: str
    variance: float


def features(
    optimized: Interpreter,
    original: Interpreter,
    candidates: Sequence[str],
    samples: Sequence[Tensors],
) -> list[Feature]:
    """Values that both models compute, in order, at most `FEATURES_MAXIMUM` of them.

    Args:
        optimized: the model that is healed.
        original: the model whose values it is to give again.
        candidates: names of values of the optimized model, in the order of its nodes.
        samples: a few.
    """
    ours = _looks(optimized, candidates, samples)
    theirs = _looks(original, original.computed(), samples)
    found = _unscaled(in_order(likenesses(ours, theirs)), ours, theirs)
    step = max(1, -(-len(found) // FEATURES_MAXIMUM))
    # The last ones say most about the outputs.
    kept = reversed(found[::-1][::step])
    return [Feature(a, b, float(theirs[b][1].var()) or 1.0) for a, b in kept]


def counterparts(
    optimized: Interpreter,
    original: Interpreter,
    candidates: Sequence[str],
    samples: Sequence[Tensors],
) -> dict[str, str]:
    """Which value of the original each of some values of the optimized model is, if any.

    A value may be of few numbers, if there are enough on all samples.
    """
    ours = _looks(optimized, candidates, samples, 1)
    theirs = _looks(original, original.computed(), samples, 1)
    enough = {name: look for name, look in ours.items() if look[1].size >= NUMBERS_MINIMUM}
    return {pair.name: pair.twin for pair in likenesses(enough, theirs)}


def _looks(
    model: Interpreter,
    names: Sequence[str],
    samples: Sequence[Tensors],
    least: int = NUMBERS_MINIMUM,
) -> dict[str, Look]:
    """Of each value, the shape on the first sample and some of its numbers on all, float32 [n]."""
    looks: dict[str, list[np.ndarray]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for sample in samples:
        with torch.no_grad():
            values = model.run(sample, names)
        for name, value in values.items():
            if not value.is_floating_point() or value.numel() < least:
                continue
            shapes.setdefault(name, tuple(value.shape))
            flat = value.reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, min(POSITIONS_MAXIMUM, flat.numel()))
            looks[name].append(flat[places.long().to(flat.device)].float().cpu().numpy())
    return {name: (shapes[name], np.concatenate(parts)) for name, parts in looks.items()}


Looks = Mapping[str, Look]


def _unscaled(
    pairs: Sequence[tuple[str, str]], ours: Looks, theirs: Looks
) -> list[tuple[str, str]]:
    """The pairs without those whose channels a pass has scaled, and what reads them back again."""
    kept, least = [], np.inf
    for name, twin in reversed(pairs):
        numbers = theirs[twin][1]
        difference = np.nan_to_num(ours[name][1] - numbers, posinf=0, neginf=0)
        error = float(np.square(difference).mean()) / (float(numbers.var()) or 1.0)
        if error <= APART * least:
            kept.append((name, twin))
        least = min(least, max(error, NEAR))
    return kept[::-1]
