"""Outputs of a model on samples, kept on disk and read back one sample at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from graphopt.contract import Sample
from graphopt.errors import SampleError
from graphopt.runtime import Session
from graphopt.samples import Input, Samples
from graphopt.validation import Comparison, OutputError

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Feed:
    """What a model is run on.

    Attributes:
        samples: the inputs.
        inputs: the signature of the model.
        state: pairs of output and input; within a sequence of samples, the output of one step is
            the input of the next. The first step takes the sample's own value, or zeros.
    """

    samples: Samples
    inputs: tuple[Input, ...]
    state: tuple[tuple[str, str], ...] = ()

    def split(self, gate_count: int | None = None) -> tuple[Feed, Feed]:
        """For the passes and for the gate; the same object twice where there are too few."""
        calibration, gate = self.samples.split(gate_count)
        if calibration is gate:
            return self, self
        return replace(self, samples=calibration), replace(self, samples=gate)

    def run(self, session: Session) -> Iterator[Outputs]:
        """The outputs of every step, in order."""
        for roll_out in self.samples.roll_outs():
            carried: Outputs = {}
            for sample in roll_out:
                outputs = _run(session, self._step(sample, carried, session))
                carried = {source: outputs[target] for target, source in self.state}
                yield outputs

    def _step(self, sample: Sample, carried: Outputs, session: Session) -> Sample:
        feeds = {**sample, **carried}
        for _, name in self.state:
            if name not in feeds:
                feeds[name] = _zeros(next(i for i in self.inputs if i.name == name))
        # A model that was given overridable inputs is compared with one where they are constant.
        return {name: array for name, array in feeds.items() if name in session.inputs}


def _run(session: Session, feeds: Sample) -> Outputs:
    try:
        return session.run(feeds)
    except SampleError as error:
        fed = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in feeds.items())
        raise SampleError(f"the model fails on a sample ({fed}): {error}") from None


def _zeros(expected: Input) -> np.ndarray:
    if expected.shape is None:
        raise SampleError(
            f"the first value of state {expected.name!r} must be in the samples: its rank is free"
        )
    return np.zeros([d if isinstance(d, int) else 1 for d in expected.shape], expected.dtype)


@dataclass(frozen=True)
class Recording:
    """Outputs of one model, step by step, in a temporary folder."""

    count: int
    names: tuple[str, ...]
    folder: tempfile.TemporaryDirectory[str] = field(repr=False)

    def __iter__(self) -> Iterator[Outputs]:
        for step in range(self.count):
            with np.load(Path(self.folder.name) / f"{step}.npz", allow_pickle=False) as arrays:
                kept = dict(arrays)
            yield {self.names[int(key[1:])]: array for key, array in kept.items()}


def record(steps: Iterator[Outputs]) -> Recording:
    """Keep the outputs of every step."""
    folder = tempfile.TemporaryDirectory(prefix="graphopt-")
    names: dict[str, str] = {}
    count = 0
    for outputs in steps:
        keys = {name: names.setdefault(name, f"o{len(names)}") for name in outputs}
        arrays = {keys[name]: _plain(array) for name, array in outputs.items()}
        np.savez(Path(folder.name) / f"{count}.npz", **arrays)  # type: ignore[arg-type]
        count += 1
    return Recording(count, tuple(names), folder)


def _plain(array: np.ndarray) -> np.ndarray:
    """Strings as numpy's own string type, which needs no pickle."""
    return array.astype(np.str_) if array.dtype == object else array


def compare(
    steps: Iterator[Outputs], references: Sequence[Recording]
) -> tuple[tuple[OutputError, ...], ...]:
    """The errors of the outputs of one run against each of some recordings of the same samples."""
    comparisons = [Comparison() for _ in references]
    readers = [iter(r) for r in references]
    for outputs in steps:
        plain = {name: _plain(array) for name, array in outputs.items()}
        for comparison, reader in zip(comparisons, readers, strict=True):
            comparison.add(next(reader), plain)
    return tuple(c.outputs() for c in comparisons)
