"""Where in a rewritten model the error of its outputs begins.

Every value that both models have is looked at twice: with all the error that reaches it, and alone,
in the rewritten model with each stretch between such values fed from the original. The second is
what the stretch itself adds, so what is inherited is told from what begins. A stretch is to blame
when the original's outputs leave the tolerance as soon as its value is put into the original in the
place of the right one: rounding that nothing comes of is not blamed (causal tracing by interchange,
as in Geiger et al., Causal abstractions of neural networks, 2021). And values that were taken for
the same by mistake are not: without them, what is computed behind them is right.
"""

from __future__ import annotations

import heapq
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.contract import Effect, Sample
from graphopt.cutting import Given, cut_out, given_like, stretch_to, values_of
from graphopt.matching import Pair, match
from graphopt.recording import Feed
from graphopt.runtime import INTERCHANGED_DTYPES, Reference, Session
from graphopt.sample_files import read_npz, write_npz
from graphopt.validation import Budget, Comparison, OutputError, why_over, worst

STEPS_MAXIMUM = 2
"""Values inside the models are compared on so many samples, those with the largest errors."""

WAVE_BYTES = 512 << 20
"""Values of one sample that are looked at together may take so much, in both models together."""

TRIED_MAXIMUM = 8
"""So many of the first suspects are tried, and so many of the worst."""

SUSPECT_SHARE = 0.01
"""Of the largest error that a stretch adds; what adds less is not among the first suspects."""

HEALED_SHARE = 0.01
"""Of the error of a value; where no more is left in what is made of it, it is another value."""

_BYTES_EACH = 12
"""An element in the original, in the other model, and in the other model fed from the original."""


@dataclass(frozen=True)
class Tolerance:
    """How far outputs may be from those of the original.

    Attributes:
        effect: EXACT, ROUNDING, or LOSSY within the budgets.
        budgets: for LOSSY.
        reference: how models are run.
        computed_in: see `why_over`.
    """

    effect: Effect
    budgets: tuple[Budget, ...] = ()
    reference: Reference = Reference.AS_WRITTEN
    computed_in: Mapping[str, str] = field(default_factory=dict)

    def why_over(self, outputs: Sequence[OutputError]) -> str | None:
        """Why outputs are too far off, or None."""
        return why_over(self.effect, outputs, self.budgets, self.computed_in)


@dataclass(frozen=True)
class Deviation:
    """How far a value is from what it is in the original, on the samples with the largest errors.

    Attributes:
        pair: its names.
        total: with the error that reaches it.
        own: what the stretch before it adds: computed from values of the original.
    """

    pair: Pair
    total: OutputError
    own: OutputError


@dataclass(frozen=True)
class Divergence:
    """Where the error of the outputs comes from.

    Attributes:
        deviations: of all values that both models have and that lead to a wrong output, in
            topological order of the rewritten model.
        culprit: the first whose own error alone makes outputs wrong; else the one that adds most.
            None where no stretch adds anything.
        begins: the own error of the culprit alone makes outputs wrong; False where errors of
            several values have to come together.
        values: of the original on the sample with the largest error, by name; on disk.
        pairs: of values that both models have.
    """

    deviations: tuple[Deviation, ...]
    culprit: Deviation | None
    begins: bool
    values: Values
    pairs: tuple[Pair, ...]


class Values(Mapping[str, np.ndarray]):
    """Arrays by name, each in a file of its own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        self._dtypes: dict[str, tuple[Path, np.dtype[Any]]] = {}

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays; those that are there already stay."""
        for name, array in arrays.items():
            if name not in self._dtypes:
                path = Path(self._folder.name) / f"{len(self._dtypes)}.npz"
                write_npz(path, {"value": array})
                self._dtypes[name] = path, array.dtype

    def __getitem__(self, name: str) -> np.ndarray:
        path, dtype = self._dtypes[name]
        array = read_npz(path)["value"]
        return array if dtype.kind in "OSU" else array.view(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)


def largest_errors(
    feed: Feed, first: Session, second: Session
) -> tuple[tuple[OutputError, ...], list[Sample]]:
    """The errors of all outputs, and the inputs on which they are largest, the worst first.

    Args:
        feed: the samples. Among the inputs, state is that of the first model.
        first: the original.
        second: the other model.

    Raises:
        SampleError: one of them does not run.
    """
    kept: list[tuple[tuple[float, bool, int], Sample]] = []
    comparison = Comparison()
    runs = zip(feed.steps(first), feed.run(second), strict=True)
    for number, ((feeds, right), wrong) in enumerate(runs):
        likened = {n: like(a, right[n]) if n in right else a for n, a in wrong.items()}
        comparison.add(right, likened)
        errors = compared([(right, likened)])
        rank = worst(errors), not all(error.identical for error in errors), -number
        heapq.heappush(kept, (rank, feeds))
        if len(kept) > STEPS_MAXIMUM:
            heapq.heappop(kept)
    steps = [feeds for _, feeds in sorted(kept, key=lambda item: item[0], reverse=True)]
    return comparison.outputs(), steps


def compared(
    runs: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
) -> tuple[OutputError, ...]:
    """The errors of arrays of one model against those of another, over some samples."""
    comparison = Comparison()
    for right, wrong in runs:
        likened = {n: like(a, right[n]) if n in right else a for n, a in wrong.items()}
        comparison.add(right, likened)
    return comparison.outputs()


def like(array: np.ndarray, other: np.ndarray | np.dtype[Any]) -> np.ndarray:
    """The array in the element type of the other, where one may stand for the other."""
    dtype = other if isinstance(other, np.dtype) else other.dtype
    if array.dtype == dtype or not {array.dtype, dtype} <= INTERCHANGED_DTYPES:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def record_values(
    values: Values,
    model: ir.Model,
    names: Sequence[str],
    feeds: Sample,
    session_of: Callable[[ir.Model, bool], Session],
    wave_bytes: int = WAVE_BYTES,
) -> None:
    """Keep values of a model on one sample, as many at a time as memory allows.

    Args:
        values: gets them.
        model: not modified.
        names: of values that nodes of the main graph make.
        feeds: its inputs.
        session_of: a session of a model; True has Shape nodes run first.
        wave_bytes: so much memory.
    """
    if not names:
        return
    sizes = _sizes(model, names, feeds, session_of)
    for wave in _waves(names, {name: 4 * size for name, size in sizes.items()}, wave_bytes):
        session = session_of(cut_out(model, {}, {name: name for name in wave}), False)
        values.add(session.run({n: feeds[n] for n in session.inputs if n in feeds}))


def _sizes(
    model: ir.Model,
    names: Sequence[str],
    feeds: Sample,
    session_of: Callable[[ir.Model, bool], Session],
) -> dict[str, int]:
    """How many elements values have; shapes are asked of onnxruntime, not the values themselves."""
    probed = cut_out(model, {}, {name: name for name in names})
    graph = probed.graph
    shapes = [ir.node("Shape", [value]) for value in graph.outputs]
    graph.outputs.clear()
    for number, node in enumerate(shapes):
        node.outputs[0].name = f"graphopt.shape.{number}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    session = session_of(probed, True)
    found = session.run({n: feeds[n] for n in session.inputs if n in feeds})
    return {n: int(np.prod(found[f"graphopt.shape.{i}"])) for i, n in enumerate(names)}


def _waves(
    names: Sequence[str], sizes_bytes: Mapping[str, int], wave_bytes: int
) -> Iterator[list[str]]:
    wave: list[str] = []
    total = 0
    for name in names:
        if wave and total + sizes_bytes[name] > wave_bytes:
            yield wave
            wave, total = [], 0
        wave.append(name)
        total += sizes_bytes[name]
    yield wave


def locate(
    before: ir.Model,
    after: ir.Model,
    steps: Sequence[Sample],
    tolerance: Tolerance,
    provider: str,
    wave_bytes: int = WAVE_BYTES,
) -> Divergence:
    """Find where the error of the outputs begins.

    Args:
        before: the original, types inferred.
        after: the rewritten model, types inferred.
        steps: inputs of the original, those with the largest errors first.
        tolerance: of the outputs.
        provider: "cpu" or "cuda".
        wave_bytes: values of one sample that are looked at together may take so much.

    Raises:
        GraphoptError: a part of a model does not run.
    """
    return _Search(before, after, steps, tolerance, provider, wave_bytes).run()


class _Search:
    def __init__(
        self,
        before: ir.Model,
        after: ir.Model,
        steps: Sequence[Sample],
        tolerance: Tolerance,
        provider: str,
        wave_bytes: int,
    ) -> None:
        self.before, self.after = before, after
        self.steps, self.tolerance, self.provider = steps, tolerance, provider
        self.wave_bytes = wave_bytes
        self.news = values_of(after.graph)
        self.outputs = [o.name for o in before.graph.outputs if o.name]
        self.ends = {o.name for o in after.graph.outputs}
        self.values = Values()
        self.values.add(steps[0])
        self.values.add(self._run(before, {}, self.outputs, steps[0]))
        self.pairs = {pair.after: pair for pair in match(before, after)}
        self.dtypes: dict[str, np.dtype[Any]] = {}

    def run(self) -> Divergence:
        self._keep_what_leads_to_wrong_outputs()
        found = self._compare_all()
        suspects = [one for one in found if not one.own.identical]
        culprit = next((one for one in _likeliest(suspects) if self._is_to_blame(one.pair)), None)
        worst_one = max(suspects, key=_own_size, default=None)
        pairs = tuple(self.pairs.values())
        begins = culprit is not None
        return Divergence(tuple(found), culprit or worst_one, begins, self.values, pairs)

    # -------------------------------------------------------------- running parts of models

    def _run(
        self,
        model: ir.Model,
        given: Mapping[str, np.ndarray],
        names: Sequence[str],
        feeds: Sample,
        dtypes: Mapping[str, np.dtype[Any]] | None = None,
    ) -> dict[str, np.ndarray]:
        """Values of a model, of which some others are given."""
        return self._runner(model, given, names, dtypes or {})(feeds, given)

    def _runner(
        self,
        model: ir.Model,
        given: Mapping[str, np.ndarray],
        names: Sequence[str],
        dtypes: Mapping[str, np.dtype[Any]],
    ) -> Callable[[Sample, Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        """What runs a part of a model; the arrays given here only say of what type they are."""
        put = {name: f"graphopt.given.{n}" for n, name in enumerate(given)}
        types = {n: like(a[:0] if a.ndim else a, dtypes.get(n, a.dtype)) for n, a in given.items()}
        faces = {n: Given(put[n], given_like(n, types[n]).dtype) for n in given}
        session = self._session(cut_out(model, faces, {name: name for name in names}))

        def run(feeds: Sample, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            fed = {name: feeds[name] for name in session.inputs if name in feeds}
            fed.update((put[n], like(arrays[n], types[n])) for n in put if put[n] in session.inputs)
            return session.run(fed)

        return run

    def _session(self, model: ir.Model, shapes_first: bool = False) -> Session:
        reference = self.tolerance.reference
        return Session(model, reference, provider=self.provider, shapes_first=shapes_first)

    # -------------------------------------------------------------- errors of all values

    def _keep_what_leads_to_wrong_outputs(self) -> None:
        wrong = self._run(
            self.after, {}, [n for n in self.outputs if n in self.ends], self.steps[0]
        )
        right = {name: self.values[name] for name in wrong}
        bad = [e.name for e in compared([(right, wrong)]) if not e.identical] or list(wrong)
        leading = stretch_to([self.news[name] for name in bad if name in self.news], ())
        self.pairs = {
            name: pair
            for name, pair in self.pairs.items()
            if self.news[name].producer() is None or self.news[name].producer() in leading.nodes
        }

    def _targets(self) -> list[str]:
        """The values to compare: all known ones but the inputs."""
        return [name for name in self.pairs if self.news[name].producer() is not None]

    def _stops(self, without: str | None = None) -> set[ir.Value]:
        return {self.news[name] for name in self.pairs if name != without}

    def _sources(self, targets: Iterable[str], stops: set[ir.Value] | None = None) -> list[str]:
        """The known values that the stretches to some values begin with."""
        stops = self._stops() if stops is None else stops
        stretch = stretch_to([self.news[name] for name in targets], stops)
        return [value.name for value in stretch.sources if value.name]

    def _compare_all(self) -> list[Deviation]:
        if not self._targets():
            return []
        olds = sorted({self.pairs[name].before for name in self._targets()})
        sizes = _sizes(self.before, olds, self.steps[0], self._session)
        taken_bytes = {n: _BYTES_EACH * sizes[self.pairs[n].before] for n in self._targets()}
        totals: dict[str, OutputError] = {}
        for wave in list(_waves(self._targets(), taken_bytes, self.wave_bytes)):
            totals.update(self._totals(wave))
        self._forget_healed(totals)
        owns: dict[str, OutputError] = {}
        for wave in list(_waves(self._targets(), taken_bytes, self.wave_bytes)):
            owns.update(self._owns(wave))
        return [Deviation(self.pairs[n], totals[n], owns[n]) for n in self._targets() if n in owns]

    def _totals(self, wave: Sequence[str]) -> dict[str, OutputError]:
        """The errors of values with all that reaches them; what cannot be compared is forgotten."""
        comparison = Comparison()
        for number, feeds in enumerate(self.steps):
            right = self._right(wave, feeds)
            wrong = self._run(self.after, {}, wave, feeds)
            for name in wave if number == 0 else ():
                if name in self.pairs and not _comparable(right.get(name), wrong.get(name)):
                    self._forget(name)
            if number == 0:
                self.dtypes.update((name, array.dtype) for name, array in wrong.items())
                kept = {
                    self.pairs[name].before: right[name] for name in right if name in self.pairs
                }
                self.values.add(kept)
            expected = {name: right[name] for name in wave if name in self.pairs}
            comparison.add(
                expected, {n: like(wrong[n], a) for n, a in expected.items() if n in wrong}
            )
        return {error.name: error for error in comparison.outputs()}

    def _owns(self, wave: Sequence[str]) -> dict[str, OutputError]:
        """The errors of values that the stretches before them make of the original's values."""
        sources = [n for n in self._sources(wave) if self.news[n].producer() is not None]
        comparison, run = Comparison(), None
        for feeds in self.steps:
            right = self._right(list(dict.fromkeys([*sources, *wave])), feeds)
            given = {name: right[name] for name in sources}
            run = run or self._runner(self.after, given, wave, self.dtypes)
            alone = run(feeds, given)
            expected = {name: right[name] for name in wave}
            comparison.add(expected, {n: like(a, right[n]) for n, a in alone.items()})
        return {error.name: error for error in comparison.outputs()}

    def _forget(self, name: str) -> None:
        if name not in self.ends:
            del self.pairs[name]

    def _forget_healed(self, totals: Mapping[str, OutputError]) -> None:
        """Forget values that are wrong while all behind them is right: they are other values."""
        stops = self._stops()
        readers: dict[str, list[str]] = {}
        for name in self._targets():
            for source in self._sources([name], stops):
                readers.setdefault(source, []).append(name)
        behind: dict[str, float] = {}
        for name in reversed(self._targets()):
            own = _size(totals[name])
            worst_behind = max((behind[reader] for reader in readers.get(name, ())), default=0.0)
            healed = name not in self.ends and worst_behind <= HEALED_SHARE * min(own, 1.0)
            behind[name] = worst_behind if healed and own else max(own, 0.0)
            if healed and own:
                self._forget(name)

    def _right(self, names: Sequence[str], feeds: Sample) -> dict[str, np.ndarray]:
        """Values of the original, by their names in the other model."""
        olds = {name: self.pairs[name].before for name in names}
        found = self._run(self.before, {}, list(dict.fromkeys(olds.values())), feeds)
        return {name: found[before] for name, before in olds.items() if before in found}

    # -------------------------------------------------------------- who is to blame

    def _is_to_blame(self, pair: Pair) -> bool:
        """The value alone makes outputs of the original wrong, and is what it is taken for."""
        if self._why_wrong_with(self._made_by([pair.after])) is None:
            return False
        if pair.after in self.ends:
            return True
        stops = self._stops()
        readers = [n for n in self._targets() if pair.after in self._sources([n], stops)]
        return self._why_wrong_with(self._made_by(readers, without=pair.after)) is not None

    def _made_by(self, targets: Sequence[str], without: str | None = None) -> dict[str, np.ndarray]:
        """What the stretches to some values make of values of the original.

        Args:
            targets: names in the rewritten model.
            without: a value that is not taken from the original.

        Returns:
            By the names in the original.
        """
        sources = [
            name
            for name in self._sources(targets, self._stops(without))
            if self.news[name].producer() is not None
        ]
        given = {name: self.values[self.pairs[name].before] for name in sources}
        made = self._run(self.after, given, targets, self.steps[0], self.dtypes)
        return {self.pairs[name].before: made[name] for name in targets if name in made}

    def _why_wrong_with(self, put: Mapping[str, np.ndarray]) -> str | None:
        """Why the outputs of the original are over the tolerance with other values put in."""
        put = {name: like(array, self.values[name]) for name, array in put.items()}
        rest = [name for name in self.outputs if name not in put]
        outputs = self._run(self.before, put, rest, self.steps[0]) if rest else {}
        outputs.update((name, put[name]) for name in self.outputs if name in put)
        right = {name: self.values[name] for name in outputs}
        return self.tolerance.why_over(compared([(right, outputs)]))


def _comparable(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None or first.shape != second.shape:
        return first is None and second is None
    return like(second, first).dtype == first.dtype


def _size(error: OutputError) -> float:
    return math.inf if error.mismatch is not None else error.rel_l2


def _own_size(one: Deviation) -> float:
    return _size(one.own)


def _likeliest(suspects: Sequence[Deviation]) -> list[Deviation]:
    """The first that add much, and those that add most, in topological order."""
    largest = max(map(_own_size, suspects), default=0.0)
    least = SUSPECT_SHARE * largest if math.isfinite(largest) else 0.0
    first = [one for one in suspects if _own_size(one) >= least][:TRIED_MAXIMUM]
    most = sorted(suspects, key=_own_size, reverse=True)[:TRIED_MAXIMUM]
    return [one for one in suspects if one in first or one in most]
