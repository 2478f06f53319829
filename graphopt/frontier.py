"""Values that a look into a model computed on the way, so that the next look goes on from there.

A pass that rewrites one layer after the other looks at what each reads, and what is before that
layer has not changed since the last look. A value is known again by a hash of all that it depends
on: inputs, weights, operators and attributes. What one look computed and something behind it still
reads stays on disk until the next look; everything else is forgotten.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.content import digest
from graphopt.contract import Sample
from graphopt.operators import attributes_of, subgraphs
from graphopt.rewriting import constant_tensor

FRONTIER_BYTES = 1 << 30
"""What is kept of all samples may take so much on disk; what would take more is not kept."""

Outputs = dict[str, np.ndarray]

_PLAIN = frozenset(
    {
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)
"""Attributes whose text says all."""


@dataclass(frozen=True)
class Cut:
    """How a model goes on from values that are known.

    Attributes:
        known: the names of its further inputs, and what they are known by.
        live: the names of its further outputs, and what these will be known by.
        stays: what is known, and still read by something that is not run.
    """

    known: Mapping[str, str]
    live: Mapping[str, str]
    stays: frozenset[str]


@dataclass(frozen=True)
class _Kept:
    """What is kept of a value, for each sample."""

    dtype: ir.DataType
    rank: int


class Frontier:
    """The values of one set of samples."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._kept: dict[str, _Kept] = {}
        self._bytes = Counter[str]()

    def cut(self, model: ir.Model, keeps: bool) -> Cut | None:
        """Let a model begin with what is known; None where nothing can be said of its values.

        Args:
            model: rewritten in place: it gets further inputs and, to keep what is computed, further
                outputs. Nodes that no output needs any more are left in it.
            keeps: what is computed is to be kept.
        """
        graph = model.graph
        if model.functions or any(subgraphs(node) for node in graph):
            # What a body or a function reads, the inputs of nodes do not say.
            return None
        keys = _keys(model)
        needed, reached = self._needed(graph, keys)
        live = _live(graph, needed, reached, keys) if keeps else {}
        new = {key: value for key, value in live.items() if key not in self._kept}
        graph.outputs.extend(new.values())
        return Cut(
            self._begin_with(reached, keys, graph),
            {value.name or "": key for key, value in new.items()},
            frozenset(live.keys() - new.keys()),
        )

    def _needed(
        self, graph: ir.Graph, keys: Mapping[ir.Value, str]
    ) -> tuple[set[ir.Node], list[ir.Value]]:
        """The nodes to run for the outputs, and the known values that these begin with."""
        needed: set[ir.Node] = set()
        reached: dict[ir.Value, ir.Node] = {}
        waiting = list(graph.outputs)
        while waiting:
            value = waiting.pop()
            node = value.producer()
            if node is None or node in needed:
                continue
            if keys.get(value) in self._kept:
                reached[value] = node
                continue
            needed.add(node)
            waiting += [one for one in node.inputs if one is not None]
        # What a node makes that is run for another of its outputs is not read from disk.
        return needed, [value for value, node in reached.items() if node not in needed]

    def _begin_with(
        self, reached: list[ir.Value], keys: Mapping[ir.Value, str], graph: ir.Graph
    ) -> dict[str, str]:
        """Put inputs into the place of values; what these inputs are known by, by their names."""
        given: dict[str, ir.Value] = {}
        for value in reached:
            key = keys[value]
            kept = self._kept[key]
            if key not in given:
                dtype, shape = ir.TensorType(kept.dtype), ir.Shape([None] * kept.rank)
                given[key] = ir.Value(name=value.name, type=dtype, shape=shape)
                graph.inputs.append(given[key])
            # The node that made it is not run, so that nothing else is called so.
            value.name = f"{value.name}.recomputed"
            value.replace_all_uses_with(given[key])
        return {value.name or "": key for key, value in given.items()}

    def read(self, cut: Cut, count: int) -> Iterator[Sample]:
        """What the further inputs are, for each of so many samples."""
        for step in range(count):
            yield {name: np.load(self._path(key, step)) for name, key in cut.known.items()}

    def keep(self, cut: Cut, steps: Iterator[Outputs]) -> Iterator[Outputs]:
        """What a model gives for each sample, keeping what is live.

        What was kept before and is not live is forgotten, once all samples have been seen.
        """
        kept = {key: self._kept[key] for key in cut.stays}
        taken = sum(self._bytes[key] for key in kept)
        names, found, sizes = dict(cut.live), dict[str, _Kept](), Counter[str]()
        for step, outputs in enumerate(steps):
            self._save(names, outputs, step, found, sizes)
            if taken + sizes.total() > FRONTIER_BYTES:
                names.clear()
            yield outputs
        kept.update((key, found[key]) for key in names.values())
        self._bytes = Counter({key: self._bytes[key] or sizes[key] for key in kept})
        self._kept = kept
        for path in Path(self._folder.name).iterdir() if self._folder is not None else ():
            if path.name.rsplit(".", 2)[0] not in kept:
                path.unlink()

    def _save(
        self,
        names: dict[str, str],
        outputs: Outputs,
        step: int,
        found: dict[str, _Kept],
        sizes: Counter[str],
    ) -> None:
        """Keep what is called so, of one sample; what cannot be is struck off."""
        for name, key in list(names.items()):
            array = outputs.get(name)
            if array is None or array.dtype.kind not in "biuf":
                # A sequence, text, or a type that numpy does not write.
                del names[name]
                continue
            alike = _Kept(ir.DataType.from_numpy(array.dtype), array.ndim)
            if found.setdefault(key, alike) != alike:
                del names[name]
                continue
            np.save(self._path(key, step), array)
            sizes[key] += array.nbytes

    def _path(self, key: str, step: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        return Path(self._folder.name) / f"{key}.{step}.npy"


def _live(
    graph: ir.Graph,
    needed: set[ir.Node],
    reached: list[ir.Value],
    keys: Mapping[ir.Value, str],
) -> dict[str, ir.Value]:
    """What is computed or known, and read by a node that is not run; by what it is known by."""
    computed = [output for node in graph if node in needed for output in node.outputs]
    return {
        keys[value]: value
        for value in (*computed, *reached)
        if value in keys
        and isinstance(value.type, ir.TensorType | None)
        and any(use.node not in needed for use in value.uses())
    }


def _keys(model: ir.Model) -> dict[ir.Value, str]:
    """What each value that depends on an input is known by."""
    keys = {value: f"input {value.name}" for value in model.graph.inputs}
    seed = repr(sorted(model.opset_imports.items()))
    constants: dict[ir.Value, str] = {}
    for node in model.graph:
        state = hashlib.sha256(f"{seed} {node.op_identifier()}".encode())
        for attribute in sorted(attributes_of(node), key=lambda one: one.name):
            state.update(_content(attribute))
        varies = False
        for value in node.inputs:
            if value in keys:
                varies = True
                state.update(keys[value].encode())
                continue
            if value is not None and value not in constants:
                constants[value] = _constant_key(value)
            state.update(constants[value].encode() if value is not None else b"none")
        into = keys if varies else constants
        for number, output in enumerate(node.outputs):
            if output.name:
                into[output] = f"{state.hexdigest()}.{number}"
    return {value: key for value, key in keys.items() if value.producer() is not None}


def _content(attribute: ir.Attr) -> bytes:
    if attribute.type is ir.AttributeType.TENSOR:
        return f"{attribute.name} {_tensor_key(attribute.as_tensor())}".encode()
    if attribute.type in _PLAIN:
        return f"{attribute.name} {attribute.type} {attribute.value!r}".encode()
    return bytes(ir.to_proto(attribute).SerializeToString(deterministic=True))


def _constant_key(value: ir.Value) -> str:
    tensor = constant_tensor(value)
    if tensor is None:
        return f"unknown {value.name}"
    return _tensor_key(tensor)


def _tensor_key(tensor: ir.TensorProtocol) -> str:
    return f"{tensor.dtype} {list(tensor.shape.numpy())} {digest(tensor).hex()}"
