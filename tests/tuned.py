"""Small models for tests of the search, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import saving
from graphopt.executors import Workers
from graphopt.preparing import lossless
from graphopt.recording import Feed
from graphopt.subject import Subject, open_subject
from graphopt.testing import parse
from graphopt.trial import scales_of, write_trial

FOLDER = Path(__file__).parent.parent / "models" / "graphopt_models"
DIGITS, IMAGES = FOLDER / "digits_cnn.onnx", FOLDER / "digits_cnn_samples.npz"
"""A classifier of digits, and 300 images of which none is twice."""

LAYERS = {"w1": (16, 48), "w2": (48, 48), "w3": (48, 10)}
"""The weights of `classifier`, and their shapes."""


def classifier(names: dict[str, str] | None = None) -> ir.Model:
    """Three products that tell ten classes of 16 numbers apart.

    Args:
        names: of weights, by those in `LAYERS`, where others are wanted.
    """
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.standard_normal(shape) * (1.4 / shape[0]) ** 0.5).astype(np.float32)
        for name, shape in LAYERS.items()
    }
    model = parse(
        """
        agraph (float[N, 16] x, float[16, 48] w1, float[48, 48] w2, float[48, 10] w3)
            => (float[N, 10] y) {
            a = MatMul(x, w1)
            b = Relu(a)
            c = MatMul(b, w2)
            d = Relu(c)
            y = MatMul(d, w3)
        }""",
        **weights,
    )
    for name, other in (names or {}).items():
        model.graph.initializers[name].name = other
    return model


def vectors(count: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of `classifier`."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"x": rng.standard_normal((1, 16)).astype(np.float32)}


def images(count: int) -> list[dict[str, np.ndarray]]:
    """The first of the images of digits."""
    with np.load(IMAGES) as found:
        return [{"image": image} for image in found["image"][:count]]


def written(path: Path, model: ir.Model | None = None, external_data: bool = False) -> Path:
    """A model in a file."""
    saving.save(model or classifier(), path, external_data=external_data)
    return path


def feeds(subject: Subject, count: int = 24, samples: object = None) -> tuple[Feed, Feed]:
    """Samples to fit by, and as many others to judge by."""
    feed = subject.feed(samples or list(vectors(2 * count)), None, ())
    half = len(feed.samples.sequences) // 2
    parts = range(half), range(half, 2 * half)
    return tuple(Feed(feed.samples.select(list(p)), feed.inputs, feed.state) for p in parts)  # type: ignore[return-value]


def trial_in(folder: Path, model: object = None, count: int = 24, samples: object = None) -> Path:
    """The folder of a trial on a model, by default the classifier."""
    folder.mkdir()
    subject = open_subject(model or classifier(), "cpu", True, True, lambda _: None)  # type: ignore[arg-type]
    base, _ = lossless(subject, lambda _: None)
    fitted, judged = feeds(subject, count, samples)
    external = subject.source.external_data()
    original = subject.source.model
    scales = scales_of(original, subject.given, judged, "cpu")
    return write_trial(
        folder, original, subject.given, base, fitted, judged, "cpu", external, scales
    )


class Counting(Executor):
    """Does work at once, in the thread that asks for it, and counts it.

    Args:
        stop_after: how much of it is done; all else is lost, like that of a worker that was killed.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self.done: list[tuple[str, tuple[Any, ...]]] = []
        self.stop_after = stop_after

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.stop_after is not None and len(self.done) >= self.stop_after:
            future.set_exception(ConnectionResetError("the worker is gone"))
            return future
        self.done.append((work.__name__, args))
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def count(self, name: str) -> int:
        """How often a function was called."""
        return sum(done == name for done, _ in self.done)


def at_once(executor: Executor | None = None) -> Workers:
    """Workers of this process."""
    return Workers(executor or Counting(), 1, str, shares_disk=True)
