"""Metrics in text form: `agreement`, `accuracy[+1][:OUTPUT]`, `FILE.py:FUNCTION`."""

from __future__ import annotations

from pathlib import Path

from graphopt.accuracy import LABELS, Accuracy
from graphopt.agreement import Agreement
from graphopt.errors import SpecError, did_you_mean
from graphopt.scores import Metric
from graphopt.user_metric import UserMetric

FORMS = ("agreement", "accuracy[+1][:OUTPUT]", "FILE.py:FUNCTION")
"""With `accuracy+1` the first class is a background, which the labels leave out."""


def parse_metric(
    text: str | None, samples: str | Path | None, labels: str | Path | None = None
) -> Metric:
    """A metric from its text form.

    Args:
        text: one of `FORMS`. None takes accuracy where there are labels, else agreement.
        samples: folder or file of the samples; None where they are no files.
        labels: path of a file of labels; by default labels.json in the folder of the samples.

    Raises:
        SpecError: there is no such metric, or accuracy has no labels.
    """
    found = _labels(samples, labels)
    if text is None:
        return Agreement() if found is None else Accuracy(found)
    word, mark, rest = text.strip().partition(":")
    if word == "agreement" and not mark:
        return Agreement()
    if word in ("accuracy", "accuracy+1") and (rest or not mark):
        if found is None:
            where = "beside the samples" if samples is None else f"in {_folder(Path(samples))}"
            raise SpecError(
                f"metric {text!r} needs labels, and there is no {LABELS} {where}; without labels "
                "there is --metric agreement"
            )
        return Accuracy(found, rest or None, background=word.endswith("+1"))
    file, mark, function = text.strip().rpartition(":")
    if mark and file.endswith(".py") and function:
        return UserMetric(Path(file), function)
    if text.strip().endswith(".py"):
        raise SpecError(f"metric {text!r} names no function; write {text.strip()}:FUNCTION")
    near = did_you_mean(word, ("agreement", "accuracy"))
    if "mean" not in near:
        near = f"; there is {', '.join(FORMS)}"
    raise SpecError(f"there is no metric {text!r}{near}")


def _labels(samples: str | Path | None, labels: str | Path | None) -> Path | None:
    if labels is not None:
        return Path(labels)
    if samples is None:
        return None
    beside = _folder(Path(samples)) / LABELS
    return beside if beside.is_file() else None


def _folder(samples: Path) -> Path:
    return samples if samples.is_dir() else samples.parent
