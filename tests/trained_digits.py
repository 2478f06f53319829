"""Comparisons of training with passes and passes alone, on scikit-learn's digits.

Four questions, each with the same models, data and steps on both sides: a small student with a
teacher and without; pruning with fine-tuning and alone; rounding of weights to few bits in training
and after it; and the same of weights and activations. Every model is exported and optimized, and
its accuracy is that of the ONNX file, run by onnxruntime on the test images. Images are noisy or
models narrow, or all would be near 100 %.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphopt
from graphopt.runtime import Session
from graphopt.training import config_of, train
from graphopt_models import digits
from graphopt_passes.recipes import BASIC

FOLDER = Path(__file__).parent
SAMPLES = 128
"""Training images that passes calibrate on."""

Table = dict[str, Any]


# ------------------------------------------------------------------ models and data


def convolutional(width: int, weights: str | None = None) -> nn.Module:
    """A classifier of two convolutions, with the weights of a file if there is one."""
    module = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )
    return _loaded(module, weights)


def deep(width: int, depth: int, weights: str | None = None) -> nn.Module:
    """A classifier of many narrow layers, in which errors add up."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return _loaded(nn.Sequential(*layers, nn.Linear(width, 10)), weights)


def _loaded(module: nn.Module, weights: str | None) -> nn.Module:
    if weights is not None:
        module.load_state_dict(torch.load(weights, weights_only=True))
    return module


def images(
    seed: int, noise: float, labels: int | None = None, unlabeled: bool = True
) -> tuple[digits.Samples, digits.Samples]:
    """Training and validation images; only so many of the former have a label.

    Args:
        seed: of the noise, and of which have.
        noise: its deviation; brightness is 0 to 1.
        labels: None for all.
        unlabeled: the others are there, with -100 as their label.
    """
    data = digits.load()
    targets = data.train.labels.copy()
    order = np.random.default_rng(seed).permutation(len(targets))
    count = len(order) if labels is None else labels
    targets[order[count:]] = -100
    chosen = order if unlabeled else order[:count]
    inputs = noisy(data.train, noise, 100 + seed)
    validation = digits.Samples(noisy(data.validation, noise, 200), data.validation.labels)
    return digits.Samples(inputs[chosen], targets[chosen]), validation


def noisy(split: digits.Split, noise: float, seed: int) -> np.ndarray:
    added = np.random.default_rng(seed).normal(0, noise, split.image.shape)
    return (split.image + added).astype(np.float32)


# ------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Bench:
    """Trains and optimizes by one seed.

    Attributes:
        folder: of all files.
        seed: of weights, order and noise.
        noise: of images.
    """

    folder: Path
    seed: int
    noise: float

    def run(self, name: str, factory: str, model: Table, epochs: int, **more: Any) -> Path:
        """Train and export; the state of the module lies beside the file."""
        data = {"seed": self.seed, "noise": self.noise, **more.pop("data", {})}
        table = {
            "model": {"factory": f"trained_digits:{factory}", "options": model},
            "data": {"factory": "trained_digits:images", "options": data, "batch_size": 32},
            "optimizer": {"learning_rate": more.pop("rate", 5e-3)},
            "schedule": {"name": "one-cycle"},
            "training": {"epochs": epochs, "seed": self.seed},
            "export": {"path": str(self.folder / f"{name}.onnx")},
            **more,
        }
        trained = train(config_of(table, FOLDER))
        assert trained.module is not None
        torch.save(trained.module.state_dict(), self.state(name))
        return self.folder / f"{name}.onnx"

    def state(self, name: str) -> str:
        return str(self.folder / f"{name}.pt")

    def optimized(self, source: Path, passes: str) -> float:
        """The accuracy, in percent, of what basic and passes make of a file."""
        return self.accuracy(self.passed(source, passes))

    def passed(self, source: Path, passes: str) -> Path:
        """The file that basic and passes make of another, whatever it loses."""
        inputs, _ = images(self.seed, self.noise)
        run = graphopt.optimize(
            source,
            passes=f"{BASIC.passes},{passes}",
            samples=[{"input": image[np.newaxis]} for image in inputs.inputs[:SAMPLES]],
            max_error=["100"],
            benchmark=False,
        )
        target = source.with_suffix(".optimized.onnx")
        run.save(target)
        return target

    def accuracy(self, model: Path) -> float:
        """On the test images, in percent."""
        test = digits.load().test
        session = Session(model)
        (logits,) = session.run({session.inputs[0]: noisy(test, self.noise, 300)}).values()
        return float((logits.argmax(1) == test.labels).mean() * 100)


Row = tuple[str, float]


def distilled(bench: Bench) -> Iterator[Row]:
    """A small student: alone, and with what a larger teacher says of all images."""
    bench.run("teacher", "convolutional", {"width": 32}, 20)
    teacher = {
        "teacher": "trained_digits:convolutional",
        "options": {"width": 32},
        "weights": bench.state("teacher"),
    }
    for labels, ways in LESSONS.items():
        known = {"labels": labels, "unlabeled": False}
        # As many steps, where images are fewer.
        epochs = 20 if labels is None else 20 * 1077 // labels
        alone = bench.run("alone", "convolutional", {"width": 2}, epochs, data=known, rate=1e-2)
        yield f"{labels or 'all'} labels, alone", bench.optimized(alone, "pack-constants")
        for way, options in ways.items():
            student = bench.run(
                "student",
                "convolutional",
                {"width": 2},
                20,
                data={"labels": labels},
                distill=teacher | options,
                rate=1e-2,
            )
            yield f"{labels or 'all'} labels, {way}", bench.optimized(student, "pack-constants")


WAYS: dict[str, Table] = {
    "hinton": {},
    "standardized": {"standardize": True, "temperature": 2.0},
    "features too": {"features": {"3": "3"}, "feature_weight": 0.1},
}
LESSONS: dict[int | None, dict[str, Table]] = {
    200: WAYS,
    None: {**WAYS, "dkd": {"loss": "dkd", "label_weight": 1.0, "other_weight": 2.0}},
}


def pruned(bench: Bench) -> Iterator[Row]:
    """Pruning by a pass alone, and with training of what it leaves, or in place of it."""
    bench.run("start", "convolutional", {"width": 8}, 20)
    start = {"width": 8, "weights": bench.state("start")}
    # What is pruned alone is trained for as long.
    dense = bench.run("dense", "convolutional", start, 20)
    yield "dense", bench.optimized(dense, "pack-constants")
    for sparsity in (0.8, 0.9):
        passes = f"prune-importance{{sparsity={sparsity},min-elements=64,form=dense}}"
        yield f"{sparsity:.0%} zeros, alone", bench.optimized(dense, passes)
        cut = bench.passed(bench.folder / "start.onnx", passes)
        model = {"width": 8, "weights": _state_of(cut, bench.state("start"))}
        ways: dict[str, tuple[Table, Table]] = {
            "then fine-tuned": (model, {"name": "masks"}),
            "growing in training": (
                start,
                {"name": "sparsity", "sparsity": sparsity, "end": 0.5},
            ),
        }
        for way, (made, options) in ways.items():
            prepare = [{"min_elements": 64, **options}]
            tuned = bench.run("tuned", "convolutional", made, 20, prepare=prepare)
            yield f"{sparsity:.0%} zeros, {way}", bench.optimized(tuned, "pack-zeros")


def _state_of(model: Path, like: str) -> str:
    """The weights and biases of an ONNX file as a state that a module can load, beside it."""
    state = torch.load(like, weights_only=True)
    for node in graphopt.load(model).graph:
        weight = node.inputs[1] if len(node.inputs) == 3 else None
        if weight is None or weight.name not in state:
            continue
        # Passes give a bias that they change another name.
        bias = weight.name.replace("weight", "bias")
        for name, value in ((weight.name, weight), (bias, node.inputs[2])):
            assert value is not None and value.const_value is not None
            numbers = torch.from_numpy(value.const_value.numpy().copy())
            state[name] = numbers.view_as(state[name])
    path = model.with_suffix(".pt")
    torch.save(state, path)
    return str(path)


def quantized(bench: Bench) -> Iterator[Row]:
    """Few bits after training, and in its second half."""
    shape = {"width": 16, "depth": 8}
    bench.run("start", "deep", shape, 40)
    start = {**shape, "weights": bench.state("start")}
    # What is rounded after training is trained for as long.
    dense = bench.run("dense", "deep", start, 20, rate=2e-3)
    yield "float", bench.optimized(dense, "pack-constants")
    for bits in (4, 3, 2):
        passes = f"quantize-weights{{bits={bits},min-elements=64}}"
        yield f"{bits} bits, after training", bench.optimized(dense, passes)
        prepare = [{"name": "quantized", "bits": bits, "min_elements": 64}]
        tuned = bench.run("tuned", "deep", start, 20, rate=2e-3, prepare=prepare)
        yield f"{bits} bits, in training", bench.optimized(tuned, passes)


def integers(bench: Bench) -> Iterator[Row]:
    """Integer kernels after training, and rounding of all that they read in its second half."""
    shape = {"width": 16, "depth": 4}
    bench.run("start", "deep", shape, 20)
    start = {**shape, "weights": bench.state("start")}
    dense = bench.run("dense", "deep", start, 10, rate=2e-3)
    yield "float", bench.optimized(dense, "pack-constants")
    yield "8 bits, after training", bench.optimized(dense, "quantize-static{error=1.0}")
    for bits in (8, 4, 3):
        options = {"name": "quantized", "activations": bits, "min_elements": 1}
        if bits < 8:
            # quantize-static chooses 8 bits alone: ranges are watched, and nothing is trained.
            seen = {**shape, "weights": bench.state("dense")}
            prepare = [{**options, "scales": "largest"}]
            found = bench.run("seen", "deep", seen, 2, rate=0.0, prepare=prepare)
            yield f"{bits} bits, after training", bench.optimized(found, "quantize-static")
        tuned = bench.run("tuned", "deep", start, 10, rate=2e-3, prepare=[options])
        yield f"{bits} bits, in training", bench.optimized(tuned, "quantize-static")


# ------------------------------------------------------------------ over seeds


@dataclass(frozen=True)
class Question:
    """What is compared.

    Attributes:
        rows: names of models with their accuracies, by one seed.
        noise: of the images.
        pairs: rows of which the second is to be better than the first.
    """

    rows: Callable[[Bench], Iterator[Row]]
    noise: float
    pairs: tuple[tuple[str, str], ...]


def _pairs(subject: str, first: str, *others: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{subject}, {first}", f"{subject}, {other}") for other in others)


QUESTIONS: dict[str, Question] = {
    "distilled": Question(
        distilled,
        0.35,
        _pairs("200 labels", "alone", *WAYS) + _pairs("all labels", "alone", *LESSONS[None]),
    ),
    "pruned": Question(
        pruned,
        0.25,
        _pairs("80% zeros", "alone", "then fine-tuned", "growing in training")
        + _pairs("90% zeros", "alone", "then fine-tuned", "growing in training"),
    ),
    "quantized": Question(
        quantized,
        0.0,
        tuple(
            pair
            for bits in (4, 3, 2)
            for pair in _pairs(f"{bits} bits", "after training", "in training")
        ),
    ),
    "integers": Question(
        integers,
        0.25,
        tuple(
            pair
            for bits in (8, 4, 3)
            for pair in _pairs(f"{bits} bits", "after training", "in training")
        ),
    ),
}


def measured(question: Question, seeds: Sequence[int], folder: Path) -> dict[str, np.ndarray]:
    """The accuracies of each model, in percent, by seed."""
    found = defaultdict(list)
    for seed in seeds:
        inside = folder / str(seed)
        inside.mkdir()
        for name, value in question.rows(Bench(inside, seed, question.noise)):
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}
