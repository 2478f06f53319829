"""How near a model comes to the original, without labels, as a loss from 0 to 1 for each item.

An output that answers by the largest of a row loses, in each row whose answer changed,

    p[a] - p[b],

with the original's probabilities p, its answer a and the new answer b: what a calibrated original
expects this change to cost in accuracy (the regret). It is near 0 where the original was torn
between both, and near 1 where it was sure. Rows that are no probabilities become such by a softmax;
where the original would be unsure of everything then, they are scores of another scale, which is
mended by a temperature. A sample loses the mean over its rows. Where nearly all rows have the same
answer (a detector's: nothing here), it loses the sum over its rows, in terms of how many rows of a
sample have another answer, or all that matters would be lost in a mean over what does not. Of other
sequences of rows (a language model's) the probabilities themselves are used, too: they lose half of
the relative entropy, where that is more, so that one point is two per cent of perplexity.

Other outputs of floating point lose the share of their variance that is no longer explained
(1 - R^2: the squared difference over the squared distance from their mean). Not the squared
relative L2 error: scores of a detector lie on a floor that says nothing, and would make the error
look small. Integers and strings lose the share of them that differ. What cannot be compared
(another shape, NaN) loses 1. State that is carried on is judged by the outputs that come of it.

A sample loses the mean over its outputs of a kind (the scales of a detector, the heads of a
classifier say parts of one thing), and of the kinds what the worst does: so neither do the many
states of a language model hide its scores, nor has one of many scales all the say. The largest of
the means over samples would be less, and no mean over samples: nothing could be proven by it.

Beside the loss there is the divergence (`graphopt.output_distance`), a mean over outputs, too. Both
grow with the square of a small change, but a loss only where an answer changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from scipy.special import softmax

from graphopt.class_outputs import has_classes, is_score, rows_of, why_no_classes
from graphopt.operators import is_onnx
from graphopt.output_distance import PROBABILITY_MINIMUM, relative_entropy, square_share
from graphopt.recording import Feed, Outputs, Recording, record
from graphopt.runtime import Session
from graphopt.sample_files import plain
from graphopt.scores import Judge, Scores, mean_by_item
from graphopt.skeleton import infer_shapes

SURE_MINIMUM = 0.5
"""Originals are taken to be sure of at least so much: the mean of the largest probability."""

KEPT_MAXIMUM = 1 << 20
"""So many numbers of an output are kept at most, to find its temperature."""

SUM_TOLERANCE = 1e-2
"""Rows that are not negative and add up to 1 within this are probabilities, in float16 too."""

CONSTANT_SHARE = 1e-4
"""Numbers whose variance is less than this share of their mean square are constant: what varies of
them is taken to be so much, as it may be noise."""

DOMINANT_SHARE = 0.95
"""An answer that so many rows have, where samples have several, says that nothing is there: of the
places that detectors look at. Of the words of a text hardly nine in ten have the same label."""

SHARPNESS_MAXIMUM = 2.0**20

_BISECTIONS = 40

Kind = Literal["classes", "numbers", "symbols"]


@dataclass(frozen=True)
class Scale:
    """How the losses of an output are measured, as learnt from the original.

    Attributes:
        kind: "classes" lose regret, "numbers" the share of their variance, "symbols" the share of
            them that differ.
        sharpness: one over the temperature by which classes become probabilities; None where they
            are probabilities.
        telling_rows: of classes, how many rows of a sample have another answer than that of nearly
            all, in the mean; None where there is no such answer.
        variation: of numbers, the sum of squared distances from their mean; the mean over samples.
        in_logs: classes are probabilities, to which the temperature is given by their logarithms.
        sampled: rows of classes follow one another, of which the probabilities count.
    """

    kind: Kind
    sharpness: float | None = None
    telling_rows: float | None = None
    variation: float = 0.0
    in_logs: bool = False
    sampled: bool = False

    def rows(self, array: np.ndarray) -> np.ndarray:
        """Classes as rows, [rows, classes], of which the sharpness makes probabilities."""
        rows = rows_of(array)
        return np.log(np.maximum(rows, PROBABILITY_MINIMUM)) if self.in_logs else rows


@dataclass(frozen=True)
class Agreement:
    """The metric that needs no labels.

    Attributes:
        sureness: the mean of the largest probability that the original is taken to give, where it
            is known how often it is right; None where it is not.
    """

    name: ClassVar[str] = "agreement"

    sureness: float | None = None

    def judges(
        self, original: ir.Model, session: Session, feed: Feed, parts: Sequence[Feed]
    ) -> tuple[Judge, ...]:
        """See `graphopt.scores.Metric`: the original's outputs are recorded, once for each part."""
        if not parts:
            return ()
        recordings = [record(part.run(session)) for part in parts]
        carried = {name for name, _ in feed.state}
        scales = learn_scales(original, recordings[0], carried, self.sureness)
        return tuple(
            _Judge(part, recording, scales)
            for part, recording in zip(parts, recordings, strict=True)
        )


def judge_by(scales: Mapping[str, Scale], session: Session, part: Feed) -> Judge:
    """Gives the agreement of models with the original on samples, by scales that are known.

    Args:
        scales: see `learn_scales`.
        session: of the original.
        part: the samples.
    """
    return _Judge(part, record(part.run(session)), scales)


@dataclass(frozen=True)
class _Judge:
    """Compares models with what the original gave for a part of the samples."""

    part: Feed
    recording: Recording
    scales: Mapping[str, Scale]

    def __call__(self, session: Session) -> Scores:
        losses, divergences, changed = [], [], _Changed()
        for old, new in zip(self.recording, self.part.run(session), strict=True):
            losses.append(self._loss(old, new, changed))
            divergences.append(self._divergence(old, new))
        per_item = 100 * (1 - mean_by_item(losses, self.part))
        return Scores(
            value=float(per_item.mean()),
            per_item=per_item,
            low=0.0,
            high=100.0,
            unit="%",
            below_original=True,
            disagreement=changed.share(),
            divergences=np.array(divergences),
        )

    def _divergence(self, old: Outputs, new: Outputs) -> float:
        found = [
            _divergence(scale, old[name], plain(new[name]))
            if name in new and new[name].shape == old[name].shape
            else math.inf
            for name, scale in self.scales.items()
            if name in old
        ]
        return float(np.mean(found)) if found else 0.0

    def _loss(self, old: Outputs, new: Outputs, changed: _Changed) -> float:
        by_kind: dict[Kind, list[float]] = {}
        for name, scale in self.scales.items():
            by_kind.setdefault(scale.kind, []).append(self._of_output(name, old, new, changed))
        return max(float(np.mean(losses)) for losses in by_kind.values()) if by_kind else 0.0

    def _of_output(self, name: str, old: Outputs, new: Outputs, changed: _Changed) -> float:
        array = old.get(name)
        if array is None:
            # An element of a sequence, of which there are not as many for each sample.
            return float(name in new)
        if name not in new or new[name].shape != array.shape:
            changed.add(name, 1, 1)
            return 1.0
        return _loss(self.scales[name], array, plain(new[name]), name, changed)


@dataclass
class _Changed:
    """How many rows, by output, have another arg-max."""

    rows: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, rows: int, changed: int) -> None:
        self.rows[name] = self.rows.get(name, 0) + rows
        self.changed[name] = self.changed.get(name, 0) + changed

    def share(self) -> float | None:
        return max((self.changed[n] / self.rows[n] for n in self.rows), default=None)


# ------------------------------------------------------------------ losses of one sample


def _loss(scale: Scale, old: np.ndarray, new: np.ndarray, name: str, changed: _Changed) -> float:
    """From 0 to 1, of arrays of the same shape."""
    if not old.size:
        return 0.0
    if scale.kind == "symbols":
        return float((old != new).mean())
    if new.dtype.kind in "OUS":
        return 1.0
    first, second = old.astype(np.float64), new.astype(np.float64)
    if (np.isnan(second) & ~np.isnan(first)).any():
        return 1.0
    if scale.kind == "numbers":
        return _unexplained(first, second, scale.variation)
    rows, others = scale.rows(first), scale.rows(second)
    lost, count = _regret(rows, others, scale.sharpness)
    changed.add(name, len(rows), count)
    share = lost / (scale.telling_rows or len(rows))
    if scale.sampled and np.isfinite(rows).all():
        share = max(share, relative_entropy(rows, others, scale.sharpness) / 2)
    return min(1.0, share)


def _divergence(scale: Scale, old: np.ndarray, new: np.ndarray) -> float:
    """From 0 to infinity, of arrays of the same shape."""
    if not old.size:
        return 0.0
    if scale.kind == "symbols" or new.dtype.kind in "OUS":
        return float((old != new).mean())
    first, second = old.astype(np.float64), new.astype(np.float64)
    if scale.kind == "classes" and np.isfinite(first).all():
        return relative_entropy(scale.rows(first), scale.rows(second), scale.sharpness)
    return square_share(first, second, scale.variation)


def _unexplained(old: np.ndarray, new: np.ndarray, variation: float) -> float:
    """The share of the variance that is lost, at most 1; what is not finite must be the same."""
    finite = np.isfinite(old)
    if not np.array_equal(finite, np.isfinite(new)):
        return 1.0
    if not np.array_equal(old[~finite], new[~finite], equal_nan=True):
        return 1.0
    square = float(((new[finite] - old[finite]) ** 2).sum())
    if not square:
        return 0.0
    return min(1.0, square / variation) if variation else 1.0


def _regret(old: np.ndarray, new: np.ndarray, sharpness: float | None) -> tuple[float, int]:
    """The sum of the regrets of the rows, and how many of them have another answer.

    Args:
        old: the original's, [rows, classes].
        new: of the same shape.
        sharpness: as in `Scale`.
    """
    answers, others = old.argmax(-1), new.argmax(-1)
    changed = np.flatnonzero(answers != others)
    if not changed.size:
        return 0.0, 0
    probable = probabilities(old[changed], sharpness)
    which = np.arange(changed.size)
    regret = probable[which, answers[changed]] - probable[which, others[changed]]
    # NaN or infinity in the original leaves no probabilities: nothing can be said for such a row.
    return float(np.clip(np.nan_to_num(regret), 0, 1).sum()), int(changed.size)


def probabilities(rows: np.ndarray, sharpness: float | None) -> np.ndarray:
    """What rows of classes say of each class, [rows, classes].

    Args:
        rows: of floating point, [rows, classes].
        sharpness: None for rows that are probabilities already.
    """
    if sharpness is None:
        return rows
    with np.errstate(invalid="ignore"):
        found: np.ndarray = softmax(rows * sharpness, axis=-1)
    return found


# ------------------------------------------------------------------ what is learnt of the original


def learn_scales(
    original: ir.Model,
    outputs: Iterable[Outputs],
    carried: Collection[str] = (),
    sureness: float | None = None,
) -> dict[str, Scale]:
    """How the losses of each output are measured.

    Args:
        original: says which outputs hold classes; see `graphopt.class_outputs`.
        outputs: of the original, sample by sample; gone through once, in memory that does not grow
            with their number.
        carried: outputs that are state, left out where there are others.
        sureness: see `Agreement`.
    """
    inferred = original.clone()
    infer_shapes(inferred)
    values = {value.name or "": value for value in inferred.graph.outputs}
    seen: dict[str, _Seen] = {}
    for step in outputs:
        for name, array in step.items():
            seen.setdefault(name, _Seen(values.get(name))).add(array)
    judged = [name for name in seen if name not in carried] or list(seen)
    chances = {seen[name].leading for name in judged if seen[name].are_chances()}
    return {name: seen[name].scale(chances, sureness) for name in judged}


class _Seen:
    """What an output of the original was like so far.

    Args:
        value: in the graph; None for an element of a sequence or map.
    """

    def __init__(self, value: ir.Value | None) -> None:
        self.scores = value is not None and is_score(value)
        self.classes = not self.scores and (value is None or why_no_classes(value) is None)
        self.codes = value is not None and _is_code(value)
        self.numbers = self.probabilities = True
        self.leading: tuple[int, ...] = ()
        self.sum = self.square_sum = 0.0
        self.steps = self.count = 0
        self.kept: list[np.ndarray] = []
        self.every, self.rows, self.size = 1, 0, 0
        self.answers: Counter[int] = Counter()

    def add(self, array: np.ndarray) -> None:
        if array.dtype.kind in "OUSb" or (array.dtype.kind in "iu" and not self.codes):
            self.numbers = self.classes = False
            return
        self.classes = self.classes and not self.codes and has_classes(array)
        self.leading = array.shape[:-1]
        wide = array.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        self.steps += 1
        self.count += finite.size
        self.sum += float(finite.sum())
        self.square_sum += float((finite**2).sum())
        if self.classes:
            self._keep(rows_of(wide))

    def _keep(self, rows: np.ndarray) -> None:
        """Every n-th row, n doubled whenever they become too many."""
        near = (rows >= 0).all() and (np.abs(rows.sum(-1) - 1) <= SUM_TOLERANCE).all()
        self.probabilities = self.probabilities and bool(near)
        found, counts = np.unique(rows.argmax(-1), return_counts=True)
        self.answers.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
        chosen = rows[(-self.rows) % self.every :: self.every]
        self.rows += len(rows)
        usable = chosen[~np.isnan(chosen).any(-1) & ~np.isposinf(chosen).any(-1)]
        self.kept.append(usable)
        self.size += usable.size
        while self.size > KEPT_MAXIMUM and sum(map(len, self.kept)) > 1:
            self.kept = _halved(self.kept)
            self.size = sum(rows.size for rows in self.kept)
            self.every *= 2

    def are_chances(self) -> bool:
        """Scores or probabilities, in many rows: of what may be in many places."""
        many = math.prod(self.leading) > 1
        return self.numbers and many and (self.scores or (self.classes and self.probabilities))

    def scale(self, chances: Container[tuple[int, ...]], sureness: float | None) -> Scale:
        """How losses are measured.

        Args:
            chances: in which rows there are scores or probabilities. What another output says of
                the same rows, no probabilities, are quantities: where things are, and how large.
            sureness: see `Agreement`.
        """
        if not self.numbers:
            return Scale("symbols")
        if self.classes and (self.probabilities or self.leading not in chances):
            return self._of_classes(sureness)
        variation = self.square_sum - self.sum**2 / max(self.count, 1)
        variation = max(variation, CONSTANT_SHARE * self.square_sum)
        return Scale("numbers", variation=variation / max(self.steps, 1))

    def _of_classes(self, sureness: float | None) -> Scale:
        telling_rows = self._telling_rows()
        sampled = telling_rows is None and math.prod(self.leading[1:]) > 1
        if self.probabilities and sureness is None:
            return Scale("classes", None, telling_rows, sampled=sampled)
        kept = self.kept
        if self.probabilities:
            kept = [np.log(np.maximum(rows, PROBABILITY_MINIMUM)) for rows in kept]
        sharpness = sharpness_of(kept, sureness)
        in_logs = self.probabilities
        return Scale("classes", sharpness, telling_rows, in_logs=in_logs, sampled=sampled)

    def _telling_rows(self) -> float | None:
        others = self.rows - max(self.answers.values(), default=0)
        dominated = self.rows > self.steps and others <= (1 - DOMINANT_SHARE) * self.rows
        return others / self.steps if dominated and others else None


def _halved(kept: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every other row of them all, one array after the other."""
    starts = np.cumsum([0, *map(len, kept)])
    halves = (rows[start % 2 :: 2] for rows, start in zip(kept, starts, strict=False))
    return [rows for rows in halves if len(rows)]


def _is_code(value: ir.Value) -> bool:
    """Integers that stand for numbers, by a scale."""
    node = value.producer()
    return node is not None and is_onnx(node, "QuantizeLinear")


def sharpness_of(kept: Sequence[np.ndarray], wanted: float | None = None) -> float:
    """One over the temperature at which the mean of the largest probability is as wanted.

    Where it is not known what that should be, it is to be `SURE_MINIMUM` or more: 1 where it is
    that without a temperature.

    Args:
        kept: rows of classes that are no probabilities, [rows, classes] each.
        wanted: from 0 to 1, or None.
    """
    lengths = {rows.shape[-1] for rows in kept}
    groups = [np.concatenate([r for r in kept if r.shape[-1] == n]) for n in sorted(lengths)]
    count = sum(map(len, groups))

    def sureness(sharpness: float) -> float:
        largest = [probabilities(rows, sharpness).max(-1).sum() for rows in groups if len(rows)]
        return float(sum(largest)) / count if count else 1.0

    low, high = 1.0, SHARPNESS_MAXIMUM
    if wanted is None:
        wanted = SURE_MINIMUM
        if sureness(low) >= wanted:
            return 1.0
    else:
        low = 1 / SHARPNESS_MAXIMUM
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if sureness(middle) >= wanted else (middle, high)
    return high
