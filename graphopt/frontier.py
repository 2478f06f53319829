"""Values that a look into a model computed on the way, so that the next look goes on from there.

A pass that rewrites one layer after the other looks at what each reads, and what is before that
layer has not changed since the last look. A value is known again by a hash of all that it depends
on: inputs, weights, operators and attributes. What one look computed and something behind it still
reads stays on disk until the next look; everything else is forgotten.
"""

from __future__ import annotations

import hashlib
import tempfile
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
"""Values of all samples may take so much on disk; where they take more, none is kept."""

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
        live = _live(graph, needed, reached, keys) if keeps else []
        known = {value.name or "": keys[value] for value in reached}
        graph.outputs.extend(value for value in live if keys[value] not in self._kept)
        for value in reached:
            self._begin_with(value, keys[value], graph)
        return Cut(
            known,
            {value.name or "": keys[value] for value in live if keys[value] not in self._kept},
            frozenset(keys[value] for value in live if keys[value] in self._kept),
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

    def _begin_with(self, value: ir.Value, key: str, graph: ir.Graph) -> None:
        kept, name = self._kept[key], value.name
        value.name = f"{name}.recomputed"
        given = ir.Value(
            name=name, type=ir.TensorType(kept.dtype), shape=ir.Shape([None] * kept.rank)
        )
        value.replace_all_uses_with(given)
        graph.inputs.append(given)

    def read(self, cut: Cut, count: int) -> Iterator[Sample]:
        """What the further inputs are, for each of so many samples."""
        for step in range(count):
            yield {name: np.load(self._path(key, step)) for name, key in cut.known.items()}

    def keep(self, cut: Cut, steps: Iterator[Outputs], count: int) -> Iterator[Outputs]:
        """What a model gives for each of so many samples, keeping what is live.

        What was kept before and is not live is forgotten, once all samples have been seen.
        """
        new: dict[str, str] = {}
        found: dict[str, _Kept] = {}
        for step, outputs in enumerate(steps):
            if not step:
                new = _worth_keeping(cut, outputs, count)
                found = {key: _kept(outputs[name]) for name, key in new.items()}
            for name, key in new.items():
                np.save(self._path(key, step), outputs[name])
            yield outputs
        stays = {key: kept for key, kept in self._kept.items() if key in cut.stays}
        for key in self._kept.keys() - stays.keys() - found.keys():
            for step in range(count):
                self._path(key, step).unlink()
        self._kept = stays | found

    def _path(self, key: str, step: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        return Path(self._folder.name) / f"{key}.{step}.npy"


def _worth_keeping(cut: Cut, outputs: Outputs, count: int) -> dict[str, str]:
    """Of what is live, by name: arrays of plain numbers, if all together fit."""
    arrays = {name: outputs[name] for name in cut.live if name in outputs}
    if sum(array.nbytes for array in arrays.values()) * count > FRONTIER_BYTES:
        return {}
    return {n: cut.live[n] for n, array in arrays.items() if array.dtype.kind in "biuf"}


def _kept(array: np.ndarray) -> _Kept:
    return _Kept(ir.DataType.from_numpy(array.dtype), array.ndim)


def _live(
    graph: ir.Graph,
    needed: set[ir.Node],
    reached: list[ir.Value],
    keys: Mapping[ir.Value, str],
) -> list[ir.Value]:
    """What is computed or known, and read by a node that is not run."""
    computed = [output for node in graph if node in needed for output in node.outputs]
    return [
        value
        for value in (*computed, *reached)
        if value in keys
        and isinstance(value.type, ir.TensorType | None)
        and any(use.node not in needed for use in value.uses())
    ]


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
