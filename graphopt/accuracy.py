"""How often a model is right, by labels that the user has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.class_outputs import has_classes, rows_of, why_no_classes
from graphopt.errors import SampleError, did_you_mean
from graphopt.recording import Feed, Outputs
from graphopt.runtime import Session
from graphopt.scores import Judge, Scores, mean_by_item
from graphopt.skeleton import infer_shapes

LABELS = "labels.json"
"""In the folder of the samples."""

BACKGROUND_RATIO, BACKGROUND_POINTS = 2.0, 10.0
"""By so much more labels that are one more must be right, for it to be no accident."""

Labels = Sequence[object] | Mapping[str, object]


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers: the arg-max of an output is the label (top-1).

    Attributes:
        labels: a file of JSON: a list in the order of the samples, or an object of the names of
            samples (stems of their files) and their labels. A label is the number of a class from
            0, or for an output of several rows a list of these.
        output: which output answers; None takes the only one that has classes.
        background: the first class of the output is none of those that are labelled, so that label
            0 is the second.
    """

    labels: Path
    output: str | None = None
    background: bool = False

    @property
    def name(self) -> str:
        """As the user writes it."""
        word = "accuracy+1" if self.background else "accuracy"
        return f"{word}:{self.output}" if self.output else word

    def judges(
        self, original: ir.Model, session: Session, feed: Feed, parts: Sequence[Feed]
    ) -> tuple[Judge, ...]:
        """See `graphopt.scores.Metric`.

        Raises:
            SampleError: the labels cannot be read, or do not fit the samples or the outputs.
        """
        known = next(Feed(feed.samples.first(1), feed.inputs, feed.state).run(session))
        output = self.output or _only_class_output(original, known)
        if output not in known:
            near = did_you_mean(output, known)
            raise SampleError(f"metric {self.name}: the model has no output {output!r}{near}")
        answers = labels_of(self.labels, feed.samples.names)
        shifted = {name: labels + 1 for name, labels in answers.items()}
        if self.background:
            return tuple(_Judge(part, shifted, output, self.labels) for part in parts)
        judges = tuple(_Judge(part, answers, output, self.labels) for part in parts)
        if judges and _highest(answers) + 1 < rows_of(known[output]).shape[-1]:
            other = _Judge(parts[0], shifted, output, self.labels)
            value, better = judges[0](session).value, other(session).value
            if better > BACKGROUND_RATIO * value and better > value + BACKGROUND_POINTS:
                word = self.name.replace("accuracy", "accuracy+1", 1)
                raise BackgroundClass(
                    f"by {self.labels} the original has an accuracy of {value:.1f} %, and of "
                    f"{better:.1f} % if every label is one more: if its first class is a "
                    f"background, which the labels leave out, say so with --metric {word}"
                )
        return judges

    def suited(self, original: ir.Model, session: Session, feed: Feed) -> Accuracy:
        """The same, with a background class where labels make no sense without.

        Raises:
            SampleError: as `judges`.
        """
        try:
            self.judges(original, session, feed, [feed])
        except BackgroundClass:
            return replace(self, background=True)
        return self


class BackgroundClass(SampleError):
    """By their labels, the first class is none of those that are labelled."""


@dataclass(frozen=True)
class _Judge:
    """Counts what a model gets right in a part of the samples."""

    part: Feed
    answers: Mapping[str, np.ndarray]
    output: str
    labels: Path

    def __call__(self, session: Session) -> Scores:
        names = (self.part.samples.names[i] for s in self.part.samples.sequences for i in s)
        steps = zip(names, self.part.run(session), strict=True)
        per_item = 100 * mean_by_item([self._hits(n, outputs) for n, outputs in steps], self.part)
        return Scores(float(per_item.mean()), per_item, 0.0, 100.0, "%")

    def _hits(self, name: str, outputs: Outputs) -> float:
        """The share of the sample's rows that are right; NaN answers nothing."""
        rows = rows_of(outputs[self.output])
        wanted = self.answers[name]
        if len(wanted) != len(rows):
            raise SampleError(
                f"{self.labels}: sample {name!r} has {_counted(len(wanted), 'label')}, and output "
                f"{self.output!r} {_counted(len(rows), 'row')}; give one for each"
            )
        classes = rows.shape[-1]
        if int(wanted.max(initial=0)) >= classes:
            raise SampleError(
                f"{self.labels}: sample {name!r} has the label {wanted.max()}, and output "
                f"{self.output!r} has {classes} classes, 0 to {classes - 1}"
            )
        valid = ~np.isnan(rows.astype(np.float64)).any(-1)
        return float((valid & (rows.argmax(-1) == wanted)).mean())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _highest(answers: Mapping[str, np.ndarray]) -> int:
    return max((int(labels.max(initial=0)) for labels in answers.values()), default=0)


def _only_class_output(original: ir.Model, outputs: Outputs) -> str:
    inferred = original.clone()
    infer_shapes(inferred)
    values = {value.name: value for value in inferred.graph.outputs}
    found, reasons = [], []
    for name, array in outputs.items():
        reason = _why_no_answer(values.get(name), array)
        if reason is None:
            found.append(name)
        else:
            reasons.append(f"{name!r} {reason}")
    if not found:
        raise SampleError(
            f"accuracy needs an output that has classes, and there is none: {'; '.join(reasons)}; "
            "name one with --metric accuracy:OUTPUT"
        )
    if len(found) > 1:
        raise SampleError(
            f"accuracy needs one output that has classes, and there are {len(found)}: "
            f"{', '.join(map(repr, found))}; name one with --metric accuracy:OUTPUT"
        )
    return found[0]


def _why_no_answer(value: ir.Value | None, array: np.ndarray) -> str | None:
    if array.dtype.kind in "OUSb":
        return f"is {array.dtype}"
    if not has_classes(array):
        return f"has shape {list(array.shape)}"
    reason = None if value is None else why_no_classes(value)
    return reason and f"is none ({reason})"


# ------------------------------------------------------------------ labels


def labels_of(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The labels of samples, by name, each of shape [rows].

    Args:
        path: of a file of JSON, as described at `Accuracy`.
        names: of all samples, in order.

    Raises:
        SampleError: the file is not of that form, or has not one label for each sample.
    """
    found = _read(path)
    again = [name for name, count in _counts(names).items() if count > 1]
    if again:
        raise SampleError(f"{path}: two samples are named {again[0]!r}, and share a label")
    if isinstance(found, Mapping):
        missing = [name for name in names if name not in found]
        if missing:
            near = did_you_mean(missing[0], found) if len(found) < 20 else ""
            raise SampleError(
                f"{path}: {len(missing)} of {len(names)} samples have no label, the first of them "
                f"{missing[0]!r}{near}"
            )
        return {name: _label(found[name], name, path) for name in names}
    if len(found) != len(names):
        raise SampleError(
            f"{path} has {_counted(len(found), 'label')}, and there are {len(names)} samples; a "
            "list has one for each in the order of their names, an object has them by name"
        )
    return {name: _label(one, name, path) for name, one in zip(names, found, strict=True)}


def _counts(names: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _read(path: Path) -> Labels:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SampleError(f"accuracy needs labels, and there is no file {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SampleError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, list | dict):
        raise SampleError(
            f"{path} is a {type(found).__name__}; labels are a list, or an object by name of sample"
        )
    return found


def _label(given: object, name: str, path: Path) -> np.ndarray:
    several = given if isinstance(given, list) else [given]
    for one in several:
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise SampleError(
                f"{path}: sample {name!r} has the label {one!r}; a label is the number of a class, "
                "from 0"
            )
    return np.array(several, np.int64)
