"""How far the values inside a model are from their counterparts in another.

Both are run on the same few samples, as deployed but for the values that are looked at: where a
kernel would compute over several nodes, those between are computed one by one, from the same
weights, codes and scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.contract import describe
from graphopt.counterparts import (
    NUMBERS_MINIMUM,
    POSITIONS_MAXIMUM,
    Look,
    in_order,
    likenesses,
)
from graphopt.observe import Observer
from graphopt.packing import is_constant
from graphopt.recording import Feed, like
from graphopt.skeleton import infer_shapes
from graphopt.validation import Comparison, OutputError

SAMPLES_MAXIMUM = 8
"""So many samples say where an error comes from; how large it is, the gate says, by more."""

LOOKED_AT = 2
"""Samples on which counterparts are looked for."""

WAVE_BYTES = 128 << 20
"""Values of one sample and one model that are looked at together may take so much."""


VALUES_MAXIMUM = 400
"""Of the second model, evenly; more would tell no more."""


@dataclass(frozen=True)
class LayerError:
    """The error of one value.

    Attributes:
        node: the name of the node that makes it in the second model.
        operator: of that node, without its domain.
        counterpart: the name of the value in the first model.
        error: how far the value is from its counterpart; `error.name` is its name in the second.
    """

    node: str
    operator: str
    counterpart: str
    error: OutputError


def layer_errors(
    first: ir.Model, second: ir.Model, feed: Feed, provider: str = "cpu"
) -> tuple[LayerError, ...]:
    """The errors of the floating-point values of main graphs that both models compute.

    Counterparts are known by what they hold (see `graphopt.counterparts`), not by their names. A
    pass may move a factor from one layer to the next, or round what nothing reads but one layer: an
    error in the middle is no error of the outputs. What constants alone make is left out.

    Args:
        first: the reference; not modified.
        second: the model compared with it; not modified.
        feed: samples that fit both; the first 8 are run, in memory that does not grow with them.
        provider: "cpu" or "cuda".

    Returns:
        In the order of the second model.

    Raises:
        GraphoptError: onnxruntime does not run one of the models with its values as outputs.
    """
    makers = _floats(second)
    names = list(makers)[:: -(-len(makers) // VALUES_MAXIMUM) or 1]
    looking = _observer(feed, LOOKED_AT, provider)
    ours, theirs = _looks(looking, second, names), _looks(looking, first, list(_floats(first)))
    twins = dict(in_order(likenesses(ours, theirs, nearest=True)))
    observer, comparison = _observer(feed, SAMPLES_MAXIMUM, provider), Comparison()
    for wave in observer.waves(second, twins):
        originals = list(dict.fromkeys(twins[name] for name in wave))
        steps = observer.values(first, originals), observer.values(second, wave)
        for recorded, values in zip(*steps, strict=True):
            wanted = {name: recorded[twins[name]] for name in wave}
            comparison.add(wanted, {n: like(a, wanted[n]) for n, a in values.items()})
    return tuple(
        LayerError(describe(makers[e.name]), makers[e.name].op_type, twins[e.name], e)
        for e in comparison.outputs()
    )


def _observer(feed: Feed, samples_maximum: int, provider: str) -> Observer:
    few = replace(feed, samples=feed.samples.first(samples_maximum))
    return Observer(few, provider, WAVE_BYTES)


def _looks(observer: Observer, model: ir.Model, names: Sequence[str]) -> dict[str, Look]:
    """Of each value, the shape on the first sample and some of its numbers on all."""
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    for wave in observer.waves(model, names):
        for values in observer.values(model, wave):
            for name, array in values.items():
                if array.size < NUMBERS_MINIMUM:
                    continue
                shapes.setdefault(name, array.shape)
                count = min(POSITIONS_MAXIMUM, array.size)
                places = np.linspace(0, array.size - 1, count).astype(np.int64)
                parts[name].append(array.reshape(-1)[places].astype(np.float32))
    return {name: (shapes[name], np.concatenate(found)) for name, found in parts.items()}


def _floats(model: ir.Model) -> dict[str, ir.Node]:
    """The values of the main graph that depend on inputs, and the nodes that make them."""
    inferred = model.clone()
    infer_shapes(inferred)
    made = set[ir.Value | None]((None,))
    found = dict[str, ir.Node]()
    for node in inferred.graph:
        if node.inputs and all(v in made or is_constant(v) for v in node.inputs):
            made.update(node.outputs)
            continue
        found.update(dict.fromkeys(_named_floats(node), node))
    return found


def _named_floats(node: ir.Node) -> Iterator[str]:
    for value in node.outputs:
        is_tensor = isinstance(value.type, ir.TensorType)
        if value.name and is_tensor and value.dtype is not None and value.dtype.is_floating_point():
            yield value.name
