"""Statistics of values inside a model, over all samples.

The model is run as deployed with the values as further outputs. They are taken in and let go sample
by sample, and where one sample's values would fill the memory, the samples are run again for some
of the values at a time: memory depends neither on the number of samples nor on the depth of the
model.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphopt.chunked import Chunks
from graphopt.content import digest
from graphopt.errors import GraphoptError
from graphopt.frontier import Frontier
from graphopt.operators import all_graphs, subgraphs
from graphopt.recording import Feed, Recording, compare, record
from graphopt.regression import Regression
from graphopt.runtime import Session
from graphopt.samples import SHARED_BELOW
from graphopt.serializing import nothing, stubbed
from graphopt.statistics import Gram, Patches, Reservoir, Rows, Spread
from graphopt.validation import OutputError
from graphopt.variations import varied

WAVE_BYTES = 512 << 20
"""Values of one sample that are looked at together may take so much."""

Statistics = Spread | Gram | Rows | Reservoir | Regression | Chunks

ABOUT = ("spread", "gram", "rows", "reservoir", "regression", "chunks")

SIZED_SAMPLES = 4
"""What values take in memory is looked up on so many samples."""

FLOATS = (np.float16, np.float32, np.float64)


@dataclass(frozen=True)
class Question:
    """What is asked of a value.

    Attributes:
        value: its name, in the main graph of the model.
        about: "spread", "gram", "rows", "reservoir", "regression" or "chunks".
        axis: of the channels, for a spread by channel.
        patches: for what is asked of the rows of a Conv.
        aim: for a regression, the name of the value that a layer should give.

    Raises:
        ValueError: there is no such kind of question.
    """

    value: str
    about: str = "spread"
    axis: int | None = None
    patches: Patches | None = None
    aim: str | None = None

    def __post_init__(self) -> None:
        if self.about not in ABOUT:
            raise ValueError(f"a question is about one of {', '.join(ABOUT)}; not {self.about!r}")
        if (self.about == "regression") != (self.aim is not None):
            raise ValueError("a regression has an aim, and nothing else has")

    @property
    def values(self) -> tuple[str, ...]:
        """The names of all values that it is about."""
        return (self.value,) if self.aim is None else (self.value, self.aim)

    def start(self) -> Statistics:
        """Statistics of nothing yet."""
        kind = _OF_ROWS.get(self.about)
        if kind is not None:
            return kind(self.patches)
        return Reservoir() if self.about == "reservoir" else Spread(self.axis)


_OF_ROWS: Mapping[str, Callable[[Patches | None], Statistics]] = {
    "chunks": Chunks,
    "gram": Gram,
    "regression": Regression,
    "rows": Rows,
}
"""Of the rows that a layer multiplies with its weight."""

Answers = Mapping[Question, Statistics]


@dataclass
class Observer:
    """Answers questions on the values of models, and remembers the answers.

    Answers are kept by the content of the model, weights included, and by what was asked, so that a
    rewritten model is looked at anew and an equal one is not.

    Attributes:
        feed: the samples, and how state is carried from one to the next.
        provider: "cpu" or "cuda".
        wave_bytes: values of one sample that are looked at together may take so much.
        threads: intra-op threads; None leaves onnxruntime's default.
    """

    feed: Feed
    provider: str = "cpu"
    wave_bytes: int = WAVE_BYTES
    threads: int | None = None
    _known: dict[str, dict[Question, Statistics]] = field(default_factory=dict)
    _recordings: dict[str, Recording] = field(default_factory=dict)
    _apart: tuple[Observer, Observer] | None = None
    _frontier: Frontier = field(default_factory=Frontier)

    def __call__(
        self, model: ir.Model, questions: Iterable[Question], remembers: bool = True
    ) -> Answers:
        """The statistics asked for, over all samples.

        Args:
            model: not modified. Its nodes and values may be named as the caller likes.
            questions: on values of the main graph: outputs of nodes, or inputs.
            remembers: the answers, until the run ends. Else the model is looked at anew, from where
                the last such look ended as far as nothing before has changed.

        Raises:
            GraphoptError: the main graph has no such value, or it is no tensor; or onnxruntime does
                not run the model.
        """
        asked = list(dict.fromkeys(questions))
        known = self._known.setdefault(content_key(model), {}) if remembers else {}
        open_questions = [q for q in asked if q not in known]
        resumes = not remembers and not self.feed.state
        for wave in self._waves(model, open_questions, resumes):
            known.update(self._observe(model, wave, resumes))
        return {q: known[q] for q in asked}

    def key_of(self, model: ir.Model) -> str:
        """A hash of all that answers on a model depend on."""
        state = hashlib.sha256(content_key(model).encode())
        for part in (self.provider, repr(self.feed.state), *self.feed.samples.digests):
            state.update(part.encode())
        return state.hexdigest()

    def waves(self, model: ir.Model, names: Iterable[str]) -> Iterator[list[str]]:
        """The names of values in groups that fit into memory together, for `values`.

        Raises:
            GraphoptError: as when it is called.
        """
        for wave in self._waves(model, [Question(name) for name in names], resumes=False):
            yield [question.value for question in wave]

    def values(self, model: ir.Model, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """The values themselves, sample by sample.

        Raises:
            GraphoptError: as when it is called.
        """
        return self._run(model, names, self.feed, resumes=False)

    def apart(self) -> tuple[Observer, Observer]:
        """Observers of two thirds of the samples and of the others: to fit by, and to judge by.

        Twice this one where there are fewer than 8.
        """
        if self._apart is None:
            sequences = len(self.feed.samples.sequences)
            count = sequences // 3 if sequences >= SHARED_BELOW else None
            fitted, judged = self.feed.split(count)
            few = fitted is judged
            self._apart = (self, self) if few else (self._of(fitted), self._of(judged))
        return self._apart

    def varied(self) -> Observer | None:
        """One that sees images also mirrored and magnified; None where that says no more."""
        samples = None if self.feed.state else varied(self.feed.samples)
        return None if samples is None else self._of(replace(self.feed, samples=samples))

    def _of(self, feed: Feed) -> Observer:
        return replace(
            self,
            feed=feed,
            _known={},
            _recordings={},
            _apart=None,
            _frontier=Frontier(),
        )

    def compare(
        self, first: ir.Model, second: ir.Model, samples_maximum: int
    ) -> tuple[OutputError, ...]:
        """The errors of the outputs of one model against those of another, as deployed.

        Args:
            first: the reference, whose outputs are recorded once.
            second: the model that is compared with it.
            samples_maximum: compare on so many samples at most.

        Raises:
            GraphoptError: onnxruntime does not run one of them.
        """
        return self.against(first, samples_maximum)(second)

    def against(
        self, first: ir.Model, samples_maximum: int
    ) -> Callable[[ir.Model], tuple[OutputError, ...]]:
        """What compares models with one reference, which is looked at only here; see `compare`."""
        few = replace(self.feed, samples=self.feed.samples.first(samples_maximum))
        key = f"{content_key(first)} {samples_maximum}"
        if key not in self._recordings:
            self._recordings[key] = record(few.run(self._session(first)))

        def compare_with(second: ir.Model) -> tuple[OutputError, ...]:
            steps = few.run(self._session(second))
            (found,) = compare(steps, [self._recordings[key]])
            return found

        return compare_with

    def _session(self, model: ir.Model, shapes_first: bool = False) -> Session:
        return Session(
            model, provider=self.provider, threads=self.threads, shapes_first=shapes_first
        )

    def _observe(
        self, model: ir.Model, questions: Sequence[Question], resumes: bool
    ) -> dict[Question, Statistics]:
        found = {q: q.start() for q in questions}
        names = list(dict.fromkeys(name for q in questions for name in q.values))
        for outputs in self._run(model, names, self.feed, resumes=resumes, keeps=resumes):
            for question, statistics in found.items():
                arrays = [outputs[name] for name in question.values]
                if all(array.dtype.type in FLOATS for array in arrays):
                    statistics.add(*arrays)
        return found

    def _waves(
        self, model: ir.Model, questions: Sequence[Question], resumes: bool
    ) -> Iterator[list[Question]]:
        """The questions in groups whose values fit into memory together, each value in one."""
        if not questions:
            return
        by_value: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            by_value[question.value].append(question)
        if resumes and len(by_value) == 1:
            yield list(questions)
            return
        sizes = self._sizes_bytes(model, {name for q in questions for name in q.values}, resumes)
        wave: list[Question] = []
        total = 0
        for asked in by_value.values():
            taken = sum(sizes[name] for name in {name for q in asked for name in q.values})
            if wave and total + taken > self.wave_bytes:
                yield wave
                wave, total = [], 0
            wave += asked
            total += taken
        yield wave

    def _sizes_bytes(self, model: ir.Model, names: set[str], resumes: bool) -> dict[str, int]:
        """What each value takes in the largest of the first few samples, bytes.

        Shapes are asked of onnxruntime, so that no value has to leave it for that.
        """
        few = replace(self.feed, samples=self.feed.samples.first(SIZED_SAMPLES))
        sizes = dict.fromkeys(names, 0)
        for shapes in self._run(model, sorted(names), few, "Shape", resumes=resumes):
            for name in names:
                sizes[name] = max(sizes[name], 4 * int(np.prod(shapes[name])))
        return sizes

    def _run(
        self,
        model: ir.Model,
        names: Sequence[str],
        feed: Feed,
        op_type: str = "Identity",
        *,
        resumes: bool,
        keeps: bool = False,
    ) -> Iterator[dict[str, np.ndarray]]:
        """What an operator makes of these values, for each sample."""
        probed, probes = _with_probes(model, names, op_type, {o for o, _ in feed.state})
        cut = self._frontier.cut(probed, keeps) if resumes else None
        _keep_what_leads_to_outputs(probed.graph)
        session = self._session(probed, shapes_first=op_type == "Shape")
        further = None if cut is None else self._frontier.read(cut, len(feed.samples))
        steps = feed.run(session, further)
        if cut is not None and keeps:
            steps = self._frontier.keep(cut, steps)
        for outputs in steps:
            yield {name: outputs[probes[name]] for name in names}


def _with_probes(
    model: ir.Model, names: Sequence[str], op_type: str, carried: set[str]
) -> tuple[ir.Model, dict[str, str]]:
    """A clone that outputs what `op_type` makes of the values, and those outputs' names."""
    probed = model.clone()
    graph = probed.graph
    values = {v.name: v for v in graph.inputs}
    values.update((o.name, o) for node in graph for o in node.outputs if o.name)
    kept = [o for o in graph.outputs if o.name in carried]
    graph.outputs.clear()
    graph.outputs.extend(kept)
    taken = {v.name for g in all_graphs(probed) for v in _named(g)}
    probes = {}
    for number, name in enumerate(names):
        if name not in values:
            raise GraphoptError(f"the main graph has no value {name!r} to observe")
        if not isinstance(values[name].type, ir.TensorType | None):
            raise GraphoptError(f"value {name!r} is no tensor; only tensors can be observed")
        probe = f"graphopt.probe.{number}"
        while probe in taken:
            probe += "_"
        node = ir.node(op_type, [values[name]], outputs=[ir.Value(name=probe)])
        if op_type == "Shape":
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        else:
            node.outputs[0].type = values[name].type
        graph.append(node)
        graph.outputs.append(node.outputs[0])
        probes[name] = probe
    return probed, probes


def _keep_what_leads_to_outputs(graph: ir.Graph) -> None:
    """Remove what is behind the outputs: onnxruntime would run it, too.

    Graphs with If, Loop or Scan stay whole: onnxruntime 1.32 takes the branch of a known condition
    into the graph, and then misses values that nothing else in the graph reads.
    """
    if any(subgraphs(node) for node in graph):
        return
    needed: set[ir.Node] = set()
    read = set[ir.Value | None](graph.inputs)
    waiting: list[ir.Value | None] = list(graph.outputs)
    while waiting:
        value = waiting.pop()
        read.add(value)
        node = None if value is None else value.producer()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += node.inputs
    for node in reversed([node for node in graph if node not in needed]):
        graph.remove(node)
    for name in [name for name, value in graph.initializers.items() if value not in read]:
        del graph.initializers[name]


def _named(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def content_key(model: ir.Model) -> str:
    """A hash of all that the outputs of a model depend on: graph, attributes and weights."""
    proto, tensors = stubbed(model, nothing)
    state = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for name in sorted(tensors):
        state.update(name.encode() + b"\0" + digest(tensors[name]))
    return state.hexdigest()
