"""The graph that onnxruntime runs for a model as deployed, and what each of its nodes takes."""

from __future__ import annotations

import json
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.contract import Sample
from graphopt.errors import ModelError
from graphopt.operators import all_graphs, subgraphs
from graphopt.runtime import OPTIMIZED, Session
from graphopt.signature import Input, complete

SAMPLES_MAXIMUM = 8
"""Samples that the runs cycle over, as in a benchmark."""

WARM_UP_RUNS = 3
PROFILED_RUNS = 20
SECONDS_MAXIMUM = 10.0
"""Of a slow model fewer runs are profiled."""

COUNTED_SHARE = 0.75
"""Of the runs of a node, the fastest; a busy machine slows the others down."""

_KERNEL_TIME = "_kernel_time"


@dataclass(frozen=True)
class Timing:
    """What was seen of one node.

    Attributes:
        us_per_run: microseconds that it takes in a run of the model, without the nodes of its
            bodies; the mean over the fastest three quarters of the runs.
        provider: short name of the provider that ran it, for example "CPU".
        inputs: element types of its inputs, as onnxruntime calls them ("float", "uint8").
        outputs: element types of its outputs.
    """

    us_per_run: float
    provider: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """The graph that onnxruntime runs, and what its nodes take.

    Attributes:
        model: as onnxruntime optimized it; its large weights go with the trace.
        timings: of the nodes that were run.
        runs: how many were profiled.
    """

    model: ir.Model
    timings: Mapping[ir.Node, Timing]
    runs: int


@contextmanager
def traced(
    model: ir.Model,
    samples: Iterable[Sample],
    inputs: Sequence[Input],
    *,
    provider: str,
    threads: int,
) -> Iterator[Trace]:
    """Run a model as deployed, with a profile of its nodes.

    Args:
        model: not modified.
        samples: inputs; the runs cycle over the first 8. State that they lack is zeros.
        inputs: the signature of the model.
        provider: "cpu" or "cuda".
        threads: intra-op threads.

    Raises:
        ModelError: onnxruntime does not load the model, or does not write what it made of it.
        SampleError: the model does not run on a sample.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folder = Path(name)
        session = Session(model, provider=provider, threads=threads, trace=folder)
        uncounted = _run(session, list(islice(samples, SAMPLES_MAXIMUM)), inputs)
        events = json.loads(session.end_trace().read_text(encoding="utf-8"))
        # The session is of no more use, and a large model is in memory once less.
        del session
        try:
            optimized = ir.load(folder / OPTIMIZED)
        except Exception as error:  # onnx-ir raises what protobuf and the system do
            raise ModelError(f"cannot read the graph that onnxruntime runs: {error}") from error
        runs = _runs(events)[uncounted:]
        yield Trace(optimized, _timings(optimized, events, runs), len(runs))


def _run(session: Session, samples: Sequence[Sample], inputs: Sequence[Input]) -> int:
    """Run the model again and again; how many of the runs, the first ones, do not count."""
    feeds = [
        {n: a for n, a in complete(sample, inputs).items() if n in session.inputs}
        for sample in samples
    ]
    for feed in feeds:
        # Its errors are messages for the user, and shapes are prepared.
        session.run(feed)
    calls = [session.bind(feed) for feed in feeds]
    for index in range(WARM_UP_RUNS):
        calls[index % len(calls)]()
    start_s = time.perf_counter()
    for index in range(PROFILED_RUNS):
        calls[index % len(calls)]()
        if time.perf_counter() - start_s > SECONDS_MAXIMUM:
            break
    return len(feeds) + WARM_UP_RUNS


# ------------------------------------------------------------------ events


def _runs(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """When each run of the model began, microseconds."""
    return sorted(e["ts"] for e in events if e["cat"] == "Session" and e["name"] == "model_run")


def _timings(
    optimized: ir.Model, events: Sequence[Mapping[str, Any]], runs: Sequence[int]
) -> dict[ir.Node, Timing]:
    shown: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in sorted(events, key=lambda e: e.get("ts", 0)):
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL_TIME):
            shown[event["name"].removesuffix(_KERNEL_TIME)].append(event)
    named = _named(optimized, shown)
    spent_us = {node: _by_run(events_of, runs) for node, events_of in named.items()}
    timings = {}
    for node, events_of in named.items():
        own_us = _without_bodies(node, spent_us)
        counted = sorted(own_us)[: max(1, round(COUNTED_SHARE * len(own_us)))]
        arguments = events_of[0]["args"]
        timings[node] = Timing(
            us_per_run=sum(counted) / len(counted) if counted else 0.0,
            provider=arguments.get("provider", "").removesuffix("ExecutionProvider"),
            inputs=_types(arguments.get("input_type_shape", ())),
            outputs=_types(arguments.get("output_type_shape", ())),
        )
    return timings


def _named(
    optimized: ir.Model, shown: Mapping[str, list[Mapping[str, Any]]]
) -> dict[ir.Node, list[Mapping[str, Any]]]:
    """The events of each node.

    A node without a name is called after its operator and a number that the file does not tell, but
    both the file and the events have the nodes in the order in which they run.
    """
    nodes = [node for graph in all_graphs(optimized) for node in graph]
    named = {node: shown[node.name] for node in nodes if node.name and node.name in shown}
    known = {node.name for node in nodes if node.name}
    rest: dict[str, list[list[Mapping[str, Any]]]] = defaultdict(list)
    for name, events_of in shown.items():
        if name not in known:
            rest[events_of[0]["args"].get("op_name", "")].append(events_of)
    for op_type, groups in rest.items():
        nameless = [node for node in nodes if not node.name and node.op_type == op_type]
        if len(nameless) == len(groups):
            named.update(zip(nameless, groups, strict=True))
    return named


def _by_run(events_of: Iterable[Mapping[str, Any]], runs: Sequence[int]) -> list[float]:
    """Microseconds in each of the runs; a node in the body of a loop adds up."""
    spent_us = [0.0] * len(runs)
    for event in events_of:
        index = bisect_right(runs, event["ts"]) - 1
        if index >= 0:
            spent_us[index] += event["dur"]
    return spent_us


def _without_bodies(node: ir.Node, spent_us: Mapping[ir.Node, list[float]]) -> list[float]:
    """What is left of the time of an If, a Loop or a Scan when its nodes are taken off."""
    own_us = list(spent_us[node])
    for inner in (inner for body in subgraphs(node) for inner in body):
        for index, us in enumerate(spent_us.get(inner, ())):
            own_us[index] -= us
    return [max(0.0, us) for us in own_us]


def _types(shapes: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(next(iter(shape), "") for shape in shapes)
