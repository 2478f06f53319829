"""Outputs of a model on samples, kept on disk and read back one sample at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.contract import Sample
from graphopt.errors import SampleError
from graphopt.runtime import INTERCHANGED_DTYPES, Session
from graphopt.sample_files import plain, read_npz, write_npz
from graphopt.samples import Samples
from graphopt.signature import Input, complete
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

    def run(self, session: Session, further: Iterable[Sample] | None = None) -> Iterator[Outputs]:
        """The outputs of every step, in order.

        Args:
            session: of the model.
            further: for each step, what other inputs get that the session has.
        """
        return (outputs for _, outputs in self.steps(session, further))

    def steps(
        self, session: Session, further: Iterable[Sample] | None = None
    ) -> Iterator[tuple[dict[str, np.ndarray], Outputs]]:
        """What the session got in every step, with carried state, and its outputs; see `run`."""
        others = repeat({}) if further is None else iter(further)
        for roll_out in self.samples.roll_outs():
            carried: Outputs = {}
            for sample in roll_out:
                feeds = {**self._step(sample, carried, session), **next(others)}
                outputs = _run(session, feeds)
                carried = {source: outputs[target] for target, source in self.state}
                yield feeds, outputs

    def _step(self, sample: Sample, carried: Outputs, session: Session) -> Sample:
        feeds = complete({**sample, **carried}, self.inputs)
        # A model that was given overridable inputs is compared with one where they are constant.
        return {name: array for name, array in feeds.items() if name in session.inputs}


def _run(session: Session, feeds: Sample) -> Outputs:
    try:
        return session.run(feeds)
    except SampleError as error:
        fed = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in feeds.items())
        raise SampleError(f"the model fails on a sample ({fed}): {error}") from None


@dataclass(frozen=True)
class Recording:
    """Outputs of one model, step by step, in a temporary folder."""

    count: int
    folder: tempfile.TemporaryDirectory[str] = field(repr=False)
    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Outputs]:
        for step in range(self.count):
            arrays = read_npz(Path(self.folder.name) / f"{step}.npz")
            # bfloat16 and the like are kept as bytes, without their type.
            yield {n: a.view(self.dtypes.get(n, a.dtype)) for n, a in arrays.items()}


def record(steps: Iterator[Outputs]) -> Recording:
    """Keep the outputs of every step."""
    folder = tempfile.TemporaryDirectory(prefix="graphopt-")
    dtypes: dict[str, np.dtype[Any]] = {}
    count = 0
    for outputs in steps:
        write_npz(Path(folder.name) / f"{count}.npz", outputs)
        dtypes.update({n: a.dtype for n, a in outputs.items() if a.dtype.kind not in "OU"})
        count += 1
    return Recording(count, folder, dtypes)


def compare(
    steps: Iterator[Outputs], references: Sequence[Recording]
) -> tuple[tuple[OutputError, ...], ...]:
    """The errors of the outputs of one run against each of some recordings of the same samples.

    Where one is float16 or bfloat16 and the other float32, they are compared as what was recorded.
    """
    comparisons = [Comparison() for _ in references]
    readers = [iter(r) for r in references]
    for outputs in steps:
        arrays = {name: plain(array) for name, array in outputs.items()}
        for comparison, reader in zip(comparisons, readers, strict=True):
            recorded = next(reader)
            comparison.add(recorded, {n: like(a, recorded.get(n)) for n, a in arrays.items()})
    return tuple(c.outputs() for c in comparisons)


def like(array: np.ndarray, recorded: np.ndarray | None) -> np.ndarray:
    """What is float16 or bfloat16 where another was recorded, or the reverse, as that one."""
    if recorded is None or not {array.dtype, recorded.dtype} <= INTERCHANGED_DTYPES:
        return array
    return array.astype(recorded.dtype, copy=False)
