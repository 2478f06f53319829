"""The demonstration: the digits classifier that comes with graphopt, optimized and scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from graphopt.api import optimize
from graphopt.ledger import Run
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.saving import check_target
from graphopt.signature import signature

MODELS_PACKAGE = "graphopt_models"


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration shows.

    Attributes:
        run: of `optimize` with the recipe basic.
        path: of the optimized model.
        count: labelled images that the models were scored on.
        accuracy_before: share of them that the original classifies right.
        accuracy_after: the same of the optimized model, read back from its file.
    """

    run: Run
    path: Path
    count: int
    accuracy_before: float
    accuracy_after: float


def demonstrate(path: Path, progress: Callable[[str], None]) -> Demonstration:
    """Optimize the digits classifier, write it, and score both on labelled images.

    Args:
        path: where to write the result.
        progress: called with a few words on what goes on.

    Raises:
        ModelError: the path cannot be written.
    """
    check_target(path)
    folder = files(MODELS_PACKAGE)
    with (
        as_file(folder / "digits_cnn.onnx") as model,
        as_file(folder / "digits_cnn_samples.npz") as samples,
        as_file(folder / "digits_cnn_labels.npy") as labels,
    ):
        run = optimize(model, samples=samples, progress=progress).save(path)
        truth = np.load(labels)
        before, after = _accuracy(model, run, samples, truth), _accuracy(path, run, samples, truth)
    return Demonstration(run, path, len(truth), before, after)


def _accuracy(model: Path, run: Run, samples: Path, labels: np.ndarray) -> float:
    session = Session(model)
    images = read_samples(samples, signature(run.model))
    guesses = [next(iter(session.run(image).values())).argmax() for image in images]
    return float(np.mean(np.array(guesses) == labels))
