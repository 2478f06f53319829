"""Weights of which some inputs are in few bits and the others stay as wide as they were.

Inputs differ in what an error in their numbers does to the outputs; the salient ones are kept wide
(BiLLM, arXiv 2402.04291, keeps some columns of a binary weight in two bases). What is kept can also
take errors back: with D what rounding changes in the coded inputs c, the best change of the kept
ones k is -D H_ck H_kk^-1, and what is left of the error is tr(D S D^T) with the Schur complement
S = H_cc - H_ck H_kk^-1 H_kc. So codes are fitted to S instead of H, and the kept numbers follow.
Half of the channels of a Conv of squeezenet then lose a quarter of what all of them would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from graphopt.contract import Context
from graphopt.encoding import NODES_BYTES, Encoding
from graphopt_passes.quantize.codebooks import Floats, damped
from graphopt_passes.quantize.narrow_weights import (
    Solution,
    Target,
    correct_bias,
    narrow_of,
    put,
)
from graphopt_passes.quantize.narrowing import Form, Problem

CHANNELS_MINIMUM = 8
"""Fewer input channels are not divided."""


@dataclass(frozen=True, eq=False)
class Mixed(Solution):
    """A weight in two parts.

    Attributes:
        coded: the inputs that are in codes, increasing.
        kept: the others, float32 of shape [rows, inputs].
    """

    coded: np.ndarray | None = None
    kept: Floats | None = None

    def numbers(self) -> np.ndarray:
        """The weight, float32 of shape [rows, inputs]."""
        assert self.coded is not None and self.kept is not None
        (part,) = self.parts
        return _assembled(part.numbers(), self.kept, self.coded)


@dataclass(frozen=True)
class Partly:
    """A form for a share of the input channels; the others stay float.

    Attributes:
        form: of what is in codes: one part, of rows with one scale.
        share: of the input channels.
    """

    form: Form
    share: float

    @property
    def label(self) -> str:
        """For the ledger."""
        return f"{self.form.label} for {self.share:.0%} of its inputs"

    def stored_bytes(self, target: Target) -> int:
        """Of codes, kept numbers and the order of channels."""
        channels = target.channels
        count = _count(channels, self.share)
        if not count:
            # More than as it is: so that it is never chosen.
            return 2 * target.stored_bytes
        narrow = self.form.stored_bytes(target) * count // channels
        kept = 4 * target.size * (channels - count) // channels
        return narrow + kept + channels + NODES_BYTES

    def solve(self, problem: Problem) -> Solution:
        """The weight in two parts; the channels of the least effect are in codes."""
        target, inputs = problem.target, problem.weight.shape[1]
        count = _count(target.channels, self.share)
        if not count:
            return self.form.solve(problem)
        coded = _inputs_of(_least(problem, count), inputs // target.channels)
        chosen = np.isin(np.arange(inputs), coded)
        weight, kept = problem.weight[:, chosen], problem.weight[:, ~chosen]
        gram, follows = _complement(problem.gram, chosen)
        part = replace(problem, weight=np.ascontiguousarray(weight), gram=gram, means=None)
        (rounded,) = self.form.solve(part).parts
        if follows is not None:
            kept = kept - (rounded.numbers() - weight) @ follows
        return Mixed((rounded,), writer=_write, coded=coded, kept=np.asarray(kept, np.float32))


def _count(channels: int, share: float) -> int:
    """How many channels are in codes; 0 where there are too few to divide."""
    return round(channels * share) if channels >= CHANNELS_MINIMUM else 0


def _least(problem: Problem, count: int) -> np.ndarray:
    """The channels whose numbers make least of the outputs, increasing."""
    squares = np.square(problem.weight) * problem.diagonal
    powers = squares.sum(0, dtype=np.float64).reshape(problem.target.channels, -1).sum(1)
    return np.sort(np.argsort(powers, kind="stable")[:count])


def _inputs_of(channels: np.ndarray, taps: int) -> np.ndarray:
    """The inputs that belong to channels, each of which has so many taps."""
    return np.asarray((channels[:, np.newaxis] * taps + np.arange(taps)).reshape(-1))


def _complement(gram: Floats | None, chosen: np.ndarray) -> tuple[Floats | None, Floats | None]:
    """The Schur complement of what is not chosen, and how that follows: H_ck H_kk^-1.

    Args:
        gram: of shape [inputs, inputs]; None, or one for each row, for no following.
        chosen: which inputs are, bool of shape [inputs].
    """
    if gram is None or gram.ndim == 3:
        return (None if gram is None else gram[:, chosen][:, :, chosen]), None
    whole = damped(gram)
    assert whole is not None
    wide = whole.astype(np.float64)
    cross = wide[np.ix_(chosen, ~chosen)]
    follows = np.linalg.solve(wide[np.ix_(~chosen, ~chosen)], cross.T).T
    left = wide[np.ix_(chosen, chosen)] - follows @ cross.T
    return np.asarray((left + left.T) / 2, np.float32), np.asarray(follows, np.float32)


def _assembled(coded: Floats, kept: Floats, inputs: np.ndarray) -> Floats:
    whole = np.empty((len(coded), coded.shape[1] + kept.shape[1]), np.float32)
    chosen = np.isin(np.arange(whole.shape[1]), inputs)
    whole[:, chosen], whole[:, ~chosen] = coded, kept
    return whole


def _write(target: Target, solution: Solution, encoding: Encoding, context: Context) -> None:
    """Put both parts into the graph, side by side, and their channels into order."""
    assert isinstance(solution, Mixed) and solution.coded is not None
    assert solution.kept is not None and target.channel_axis is not None
    (part,) = solution.parts
    taps = target.inputs // target.channels
    channels = solution.coded[::taps] // taps
    others = np.setdiff1d(np.arange(target.channels), channels)
    places = np.argsort(np.concatenate([channels, others]))
    narrow = narrow_of(target, part)
    kept = target.stored_channels(solution.kept)
    put(
        target,
        lambda dtype, name: encoding.interleaved(
            narrow, kept, places, target.channel_axis or 0, dtype, name
        ),
        encoding,
    )
    correct_bias(target, solution, encoding, context)
