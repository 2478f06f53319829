"""The demonstration: the digits classifier that comes with graphopt, optimized and scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from graphopt.accuracy import LABELS
from graphopt.api import optimize
from graphopt.errors import ModelError
from graphopt.ledger import Run
from graphopt.runtime import Session
from graphopt.sample_files import write_npz
from graphopt.samples import read_samples
from graphopt.saving import check_target, why_not_written
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


@dataclass(frozen=True)
class DemoFiles:
    """The digits classifier as files, to try commands on.

    Attributes:
        model: the .onnx file.
        samples: the folder of samples, one .npz file each, and their labels.json.
        count: of samples.
    """

    model: Path
    samples: Path
    count: int


def write_files(folder: Path) -> DemoFiles:
    """Write the digits classifier, its samples and their labels into a folder.

    Args:
        folder: made where it is not there; files of the same names in it are replaced.

    Raises:
        ModelError: it cannot be written.
    """
    given, into = files(MODELS_PACKAGE), folder / "samples"
    try:
        into.mkdir(parents=True, exist_ok=True)
        model = folder / "digits_cnn.onnx"
        model.write_bytes((given / "digits_cnn.onnx").read_bytes())
        with as_file(given / "digits_cnn_samples.npz") as path, np.load(path) as arrays:
            images = arrays["image"]
        with as_file(given / "digits_cnn_labels.npy") as path:
            digits = np.load(path)
        names = [f"{number:03d}" for number in range(len(images))]
        for name, image in zip(names, images, strict=True):
            write_npz(into / f"{name}.npz", {"image": image})
        labels = {name: int(digit) for name, digit in zip(names, digits, strict=True)}
        (into / LABELS).write_text(json.dumps(labels))
    except OSError as error:
        raise ModelError(why_not_written(folder, error)) from error
    return DemoFiles(model, into, len(names))


def _accuracy(model: Path, run: Run, samples: Path, labels: np.ndarray) -> float:
    session = Session(model)
    images = read_samples(samples, signature(run.model))
    guesses = [next(iter(session.run(image).values())).argmax() for image in images]
    return float(np.mean(np.array(guesses) == labels))
