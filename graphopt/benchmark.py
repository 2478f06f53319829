"""Models timed against each other: latency, throughput, load time, memory and bytes.

The models take turns, run by run, so that what slows the machine down for a while slows all of
them down; each pair of turns goes there and back (A B, B A), so that a steady drift cancels out.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import runtime
from graphopt.contract import Sample
from graphopt.errors import GraphoptError, SampleError
from graphopt.loading import open_model
from graphopt.runtime import Session
from graphopt.sample_files import write_npz
from graphopt.signature import complete, signature

SAMPLES_MAXIMUM = 8
"""Samples that the runs cycle over; more would not fit the caches of a device that serves them."""

WARM_UP_RUNS = 3
"""Runs of each model before timing, at least; and one on each sample: shapes are prepared too."""


PERCENTILES = tuple(range(0, 101, 2))
"""Of the latencies, those that are kept: enough to draw, however many rounds there were."""


@dataclass(frozen=True)
class BenchmarkRow:
    """What was measured of one model.

    Attributes:
        model: its label.
        p50_ms: median latency of a run, milliseconds.
        p90_ms: 90th percentile of it.
        p99_ms: 99th percentile of it.
        ratio: latency over that of the first model: the median over the rounds of the ratio within
            each round, so that a slow moment of the machine, which slows the whole round, does not
            count. 1.0 for the first model.
        throughput_per_s: items per second at the batch size of the report, from the median run;
            None where the model cannot take that batch.
        load_ms: time to make a session, in a fresh process, milliseconds.
        peak_rss_bytes: peak resident set of a fresh process that loads the model and runs it once,
            interpreter and mapped pages included, bytes.
        stored_bytes: the .onnx file and the data files that it references, each once, bytes.
        rounds: timed runs of each model.
        percentiles_ms: the distribution of the latency: its percentiles at `PERCENTILES`, that is
            from the shortest run to the longest, milliseconds.
    """

    model: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    ratio: float
    throughput_per_s: float | None
    load_ms: float
    peak_rss_bytes: int
    stored_bytes: int
    rounds: int
    percentiles_ms: tuple[float, ...]


@dataclass(frozen=True)
class BenchmarkReport:
    """Rows measured together, and what they depend on.

    Attributes:
        rows: one for each model, in the order given.
        provider: "cpu" or "cuda".
        threads: intra-op threads.
        batch_size: items per run of the throughput; None for the samples as they are.
        cpu: name of the processor model.
        onnxruntime: version.
        onnx: version.
        python: version.
    """

    rows: tuple[BenchmarkRow, ...]
    provider: str
    threads: int
    batch_size: int | None
    cpu: str
    onnxruntime: str
    onnx: str
    python: str

    def _repr_html_(self) -> str:
        """The figures as tables, for notebooks."""
        from graphopt import html_sections

        return html_sections.benchmark(self)


def benchmark(
    models: Sequence[tuple[str, Path]],
    *,
    samples: Iterable[Sample],
    provider: str = "cpu",
    threads: int = 1,
    batch_size: int | None = None,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (20, 1000),
) -> BenchmarkReport:
    """Time models against the first of them, as deployed.

    Args:
        models: label and file of each; the first is what the others are compared with.
        samples: inputs; the runs cycle over the first 8. An input that a sample lacks (carried
            state) is zeros; its dynamic dimensions are as in the sample, or 1.
        provider: "cpu" or "cuda"; on CUDA the inputs lie on the device.
        threads: intra-op threads.
        batch_size: items per run for the throughput, which then takes runs of its own: a sample is
            repeated along the axes that hold its batch: the first dimension where it is dynamic,
            and others of the same name. None takes the samples as they are.
        seconds: how long to time, per model.
        rounds: the fewest and the most runs of each model, whatever the time.

    Raises:
        ModelError: a model cannot be read or loaded.
        SampleError: there are no samples, or a model does not run on one.
        RuntimeUnavailable: onnxruntime or the provider is not there.
    """
    runtime.check_provider(provider)
    chosen = list(islice(samples, SAMPLES_MAXIMUM))
    if not chosen:
        raise SampleError("a benchmark needs samples to run on, and there are none")
    subjects = [_Subject(label, path, provider, threads, chosen) for label, path in models]
    budget_s = seconds * len(subjects)
    latencies_ms = take_turns([s.bind_all() for s in subjects], budget_s, rounds)
    throughputs = _throughputs(subjects, latencies_ms, batch_size, budget_s, rounds)
    for subject in subjects:
        # The sessions would take memory and threads from the processes that measure the load.
        subject.session = None
    rows = tuple(
        _row(subject, latencies_ms[:, index], latencies_ms[:, 0], throughput)
        for index, (subject, throughput) in enumerate(zip(subjects, throughputs, strict=True))
    )
    return BenchmarkReport(
        rows=rows,
        provider=provider,
        threads=threads,
        batch_size=batch_size,
        cpu=cpu_name(),
        onnxruntime=runtime.version() or "none",
        onnx=onnx.__version__,
        python=platform.python_version(),
    )


class _Subject:
    """One model under test, with the samples as it takes them."""

    def __init__(
        self, label: str, path: Path, provider: str, threads: int, samples: Sequence[Sample]
    ) -> None:
        self.label, self.path, self.provider, self.threads = label, path, provider, threads
        source = open_model(path, drop_training_info=True)
        self.stored_bytes = source.stored_bytes
        self.session: Session | None = Session(path, provider=provider, threads=threads)
        names = set(self.session.inputs)
        self.inputs = [i for i in signature(source.model) if i.name in names]
        self.feeds = [self._feeds(sample) for sample in samples]

    def _feeds(self, sample: Sample) -> Sample:
        """An array for each input, and no others: defaults may have become constants."""
        given = {i.name: sample[i.name] for i in self.inputs if i.name in sample}
        return complete(given, self.inputs)

    def bind_all(self, feeds: Sequence[Sample] | None = None) -> list[Callable[[], None]]:
        """A run on each of the feeds (by default the samples), warmed up.

        Raises:
            SampleError: the model does not run on one of them.
        """
        assert self.session is not None
        return _warmed_up(self.session, self.feeds if feeds is None else feeds)

    def items(self, index: int) -> int:
        """Items in one sample: the size of the batch axis, 1 where there is none."""
        axes = self._batch_axes()
        if axes:
            name, (axis, *_) = next(iter(axes.items()))
            return int(self.feeds[index][name].shape[axis])
        shapes = [self.feeds[index][i.name].shape for i in self.inputs]
        return next((shape[0] for shape in shapes if shape), 1)

    def batches(self, batch_size: int) -> list[Sample] | None:
        """The samples at that batch size, or None where the model's own is fixed at another."""
        axes = self._batch_axes()
        if not axes:
            return self.feeds if self.items(0) == batch_size else None
        return [
            {name: _repeat(a, axes.get(name, ()), batch_size) for name, a in feed.items()}
            for feed in self.feeds
        ]

    def _batch_axes(self) -> dict[str, tuple[int, ...]]:
        """The axes of each input along which its batch lies; empty when the batch is fixed.

        They are the first axes that are dynamic. When the first of them has a name, they are all
        axes of that name instead: the state of an LSTM has its batch in the middle.
        """
        shapes = {i.name: i.shape for i in self.inputs if i.shape}
        first = {name: dims[0] for name, dims in shapes.items() if not isinstance(dims[0], int)}
        batch = next(iter(first.values()), None)
        if batch is None:
            return dict.fromkeys(first, (0,))
        axes = {n: tuple(a for a, d in enumerate(s) if d == batch) for n, s in shapes.items()}
        return {name: places for name, places in axes.items() if places}


def _warmed_up(session: Session, feeds: Sequence[Sample]) -> list[Callable[[], None]]:
    for feed in feeds:
        # The first run is `Session.run`, whose errors are messages for the user.
        session.run(feed)
    calls = [session.bind(feed) for feed in feeds]
    for index in range(max(WARM_UP_RUNS, len(calls))):
        calls[index % len(calls)]()
    return calls


def _repeat(array: np.ndarray, axes: Sequence[int], batch_size: int) -> np.ndarray:
    """What lies along these axes again and again, until there is `batch_size` of it."""
    for axis in axes:
        if array.shape[axis]:
            array = array.take(np.arange(batch_size) % array.shape[axis], axis)
    return array


# ------------------------------------------------------------------ timing


def take_turns(
    calls: Sequence[Sequence[Callable[[], None]]], budget_s: float, rounds: tuple[int, int]
) -> np.ndarray:
    """Latencies in milliseconds, of shape (rounds, models).

    Args:
        calls: for each model, a run on each sample.
        budget_s: stop after so many seconds.
        rounds: the fewest and the most rounds.
    """
    fewest, most = max(1, rounds[0]), max(1, *rounds)
    there = list(range(len(calls)))
    table: list[list[int]] = []
    start_s = time.perf_counter()
    while len(table) < fewest or (len(table) < most and time.perf_counter() - start_s < budget_s):
        number = len(table)
        row = [0] * len(calls)
        for model in there if number % 2 == 0 else there[::-1]:
            # Two rounds for each sample, there and back.
            call = calls[model][number // 2 % len(calls[model])]
            start_ns = time.perf_counter_ns()
            call()
            row[model] = time.perf_counter_ns() - start_ns
        table.append(row)
    return np.array(table, np.float64) / 1e6


def _throughputs(
    subjects: Sequence[_Subject],
    latencies_ms: np.ndarray,
    batch_size: int | None,
    budget_s: float,
    rounds: tuple[int, int],
) -> list[float | None]:
    """Items per second of each model."""
    if batch_size is None:
        return [_rate(s, latencies_ms[:, index]) for index, s in enumerate(subjects)]
    bound = {}
    for index, subject in enumerate(subjects):
        batches = subject.batches(batch_size)
        if batches is not None:
            bound[index] = _bind_batches(subject, batches)
    able = [index for index, calls in bound.items() if calls]
    if not able:
        return [None for _ in subjects]
    times_ms = take_turns([bound[index] for index in able], budget_s, rounds)
    medians_ms = dict(zip(able, np.median(times_ms, axis=0), strict=True))
    return [
        1e3 * batch_size / float(medians_ms[index]) if index in medians_ms else None
        for index in range(len(subjects))
    ]


def _bind_batches(subject: _Subject, batches: Sequence[Sample]) -> list[Callable[[], None]]:
    try:
        return subject.bind_all(batches)
    except SampleError:
        # A first dimension that is free to the checker may still not be a batch.
        return []


def _rate(subject: _Subject, latencies_ms: np.ndarray) -> float:
    counts = [subject.items(index) for index in range(len(subject.feeds))]
    rates = [
        1e3 * counts[number // 2 % len(counts)] / latency_ms
        for number, latency_ms in enumerate(latencies_ms)
    ]
    return float(np.median(rates))


def latency_ratio(
    first: ir.Model,
    second: ir.Model,
    samples: Iterable[Sample],
    provider: str = "cpu",
    *,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (10, 400),
) -> float:
    """Latency of the second model over that of the first, at one thread, as deployed.

    The models take turns on the first samples, and the median over the rounds of the ratio within
    a round counts.

    Args:
        first: not modified.
        second: not modified; takes the same inputs.
        samples: what to run them on. An input that a sample lacks is as for `benchmark`.
        provider: "cpu" or "cuda".
        seconds: how long to time, per model.
        rounds: the fewest and the most runs of each model.

    Raises:
        ModelError: onnxruntime does not load one of them.
        SampleError: there are no samples, or a model does not run on one.
    """
    chosen = list(islice(samples, SAMPLES_MAXIMUM))
    if not chosen:
        raise SampleError("models are timed on samples, and there are none")
    calls = []
    for model in (first, second):
        session = Session(model, provider=provider, threads=1)
        inputs = [i for i in signature(model) if i.name in session.inputs]
        feeds = [
            complete({i.name: s[i.name] for i in inputs if i.name in s}, inputs) for s in chosen
        ]
        calls.append(_warmed_up(session, feeds))
    table_ms = take_turns(calls, 2 * seconds, rounds)
    return float(np.median(table_ms[:, 1] / table_ms[:, 0]))


# ------------------------------------------------------------------ load


@dataclass(frozen=True)
class LoadFigures:
    """What loading a model once costs, in a fresh process.

    Attributes:
        load_ms: time to make the session, milliseconds.
        peak_rss_bytes: peak resident set of the whole process, mapped pages and the interpreter
            included, bytes.
    """

    load_ms: float
    peak_rss_bytes: int


def measure_load(
    model: Path,
    *,
    provider: str = "cpu",
    threads: int = 1,
    sample: Mapping[str, np.ndarray] | None = None,
) -> LoadFigures:
    """Load the model once in a fresh process, and run it once on the sample.

    Args:
        model: path of the file.
        provider: "cpu" or "cuda".
        threads: intra-op threads.
        sample: one array for each input; None leaves the model unrun.

    Raises:
        GraphoptError: the model does not load or run there; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        arguments = [str(model.resolve()), provider, str(threads)]
        if sample is not None:
            path = Path(folder) / "sample.npz"
            write_npz(path, sample)
            arguments.append(str(path))
        done = subprocess.run(
            [sys.executable, "-m", "graphopt.measure_load", *arguments],
            # Python looks for modules in the working directory first: it must not be the user's.
            cwd=Path(__file__).resolve().parent.parent,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise GraphoptError(f"cannot measure the load of {model}: {_last_words(done)}")
    return LoadFigures(**json.loads(done.stdout.splitlines()[-1]))


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    if lines:
        return lines[-1]
    if done.returncode < 0:
        return f"the process that loads it was ended by signal {-done.returncode} (out of memory?)"
    return f"the process that loads it ended with status {done.returncode}"


# ------------------------------------------------------------------ rows


def _row(
    subject: _Subject, own_ms: np.ndarray, first_ms: np.ndarray, throughput_per_s: float | None
) -> BenchmarkRow:
    p50_ms, p90_ms, p99_ms = (float(p) for p in np.percentile(own_ms, [50, 90, 99]))
    load = measure_load(
        subject.path, provider=subject.provider, threads=subject.threads, sample=subject.feeds[0]
    )
    return BenchmarkRow(
        model=subject.label,
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p99_ms=p99_ms,
        ratio=float(np.median(own_ms / first_ms)),
        throughput_per_s=throughput_per_s,
        load_ms=load.load_ms,
        peak_rss_bytes=load.peak_rss_bytes,
        stored_bytes=subject.stored_bytes,
        rounds=len(own_ms),
        percentiles_ms=tuple(float(p) for p in np.percentile(own_ms, PERCENTILES).round(6)),
    )


def cpu_name() -> str:
    """The processor model, for example `AMD EPYC 7B13`; the architecture if that is all."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
