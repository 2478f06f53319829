"""Which values of two models are the same: one was rewritten from the other.

A value is known again, in this order, by how it is computed, by what becomes of it, by its name, as
what DequantizeLinear makes of the codes of a value that is known, and by its place among the values
that nodes of the same operator make. Only what follows from the inputs is
matched, and only in the main graphs.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.content import digest
from graphopt.cutting import depend_on_inputs, reads, values_of
from graphopt.operators import attributes_of, is_onnx
from graphopt.rewriting import constant_tensor
from graphopt.serializing import attribute_proto
from graphopt.skeleton import known_shape

HASHED_BYTES_MAXIMUM = 16 << 20
"""Larger constants are told apart by type and dimensions alone."""

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""Element types of values that are compared with one another."""

Key = bytes | None


@dataclass(frozen=True)
class Pair:
    """A value of one model, and what it is in the other.

    Attributes:
        before: its name in the first model.
        after: its name in the second.
        how: it was known again: "input", "structure", "name", "dequantized", "use" or "place".
    """

    before: str
    after: str
    how: str


def match(before: ir.Model, after: ir.Model) -> tuple[Pair, ...]:
    """The values of the second model that the first has too, in topological order of the second.

    A value of the first may be in several pairs, one of the second is in one.

    Args:
        before: with types inferred; not modified.
        after: likewise.
    """
    return _Matching(before.graph, after.graph).run()


class _Matching:
    def __init__(self, before: ir.Graph, after: ir.Graph) -> None:
        self.before, self.after = before, after
        moving = depend_on_inputs(before), depend_on_inputs(after)
        self.olds = {n: v for n, v in values_of(before).items() if _is_matched(v, moving[0])}
        self.news = {n: v for n, v in values_of(after).items() if _is_matched(v, moving[1])}
        self.pairs: dict[str, Pair] = {}

    def run(self) -> tuple[Pair, ...]:
        ends = {output.name: output for output in self.before.outputs}
        for new in self.after.outputs:
            self._add(ends.get(new.name), new, "name")
        for name in [n for n, v in self.news.items() if v.is_graph_input() and n in self.olds]:
            self.pairs[name] = Pair(name, name, "input")
        self._add_equal(_structure_keys, "structure")
        # Before names: a fused node often goes on under the name of its first.
        self._add_equal(_use_keys, "use")
        self._add_in_place_of_lost()
        for name in [name for name in self.news if name in self.olds]:
            self._add(self.olds[name], self.news[name], "name")
        self._add_dequantized()
        self._add_by_place()
        return tuple(self.pairs[name] for name in self.news if name in self.pairs)

    def _add(self, old: ir.Value | None, new: ir.Value | None, how: str) -> None:
        if old is None or new is None or old.name not in self.olds or new.name not in self.news:
            return
        if new.name in self.pairs or not _may_be_same(old, new):
            return
        self.pairs[new.name] = Pair(old.name, new.name, how)

    def _add_equal(self, keys_of: Callable[[ir.Graph], Mapping[ir.Value, Key]], how: str) -> None:
        """Pair the values whose keys are equal, and are of no other value of either model."""
        olds, news = (
            _by_key(keys_of(graph), values)
            for graph, values in ((self.before, self.olds), (self.after, self.news))
        )
        for key, found in news.items():
            others = olds.get(key, [])
            if len(found) == len(others) == 1:
                self._add(others[0], found[0], how)

    def _add_in_place_of_lost(self) -> None:
        """Where a node is still there, what it reads instead of a value that is gone is that."""
        for name in [name for name in self.news if name in self.olds]:
            was, now = self.olds[name].producer(), self.news[name].producer()
            if was is None or now is None or was.op_identifier() != now.op_identifier():
                continue
            for old, new in zip(was.inputs, now.inputs, strict=False):
                if old is not None and old.name not in self.news:
                    self._add(old, new, "use")

    def _add_dequantized(self) -> None:
        for node in self.after:
            code = node.inputs[0] if is_onnx(node, "DequantizeLinear") else None
            made = code.producer() if code is not None else None
            if made is None or not is_onnx(made, "QuantizeLinear") or made.inputs[0] is None:
                continue
            known = self.pairs.get(made.inputs[0].name or "")
            if known is not None:
                self._add(self.olds[known.before], node.outputs[0], "dequantized")

    def _add_by_place(self) -> None:
        """Pair the n-th node of an operator with the n-th, where there are as many of them."""
        olds, news = _by_operator(self.olds.values()), _by_operator(self.news.values())
        for operator, found in news.items():
            others = olds.get(operator, [])
            if len(found) == len(others):
                for old, new in zip(others, found, strict=True):
                    self._add(old, new, "place")


def _is_matched(value: ir.Value, moving: set[ir.Value]) -> bool:
    """The value is a tensor of numbers that follows from the inputs, or an output."""
    if not isinstance(value.type, ir.TensorType | None) or value.dtype == ir.DataType.STRING:
        return False
    return value in moving


def _may_be_same(old: ir.Value, new: ir.Value) -> bool:
    types = {old.dtype, new.dtype} - {None}
    if len(types) > 1 and not types <= _FLOATS:
        return False
    was, now = known_shape(old), known_shape(new)
    if was is None or now is None:
        return True
    dims = zip(was, now, strict=False)
    return len(was) == len(now) and all(
        a == b for a, b in dims if isinstance(a, int) and isinstance(b, int)
    )


def _by_key(
    keys: Mapping[ir.Value, Key], values: Mapping[str, ir.Value]
) -> dict[Key, list[ir.Value]]:
    found: dict[Key, list[ir.Value]] = defaultdict(list)
    for value in values.values():
        if keys.get(value) is not None:
            found[keys[value]].append(value)
    return found


def _by_operator(values: Iterable[ir.Value]) -> dict[Hashable, list[ir.Value]]:
    found: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in values:
        node = value.producer()
        if node is not None:
            found[node.domain, node.op_type, value.index()].append(value)
    return found


def _hash(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _structure_keys(graph: ir.Graph) -> Mapping[ir.Value, Key]:
    """A hash of how each value is computed, from the inputs and constants on."""
    keys: dict[ir.Value, Key] = {v: _hash("input", v.name) for v in graph.inputs}
    keys.update((v, _constant_key(v)) for v in graph.initializers.values())
    for node in graph:
        constant = constant_tensor(node.outputs[0]) if is_onnx(node, "Constant") else None
        if constant is not None:
            keys[node.outputs[0]] = _constant_key(node.outputs[0])
            continue
        whole = [keys.get(v) if v is not None else None for v in node.inputs]
        captured = [keys.get(v) for v in reads(node)]
        key = _hash(node.domain, node.op_type, _attributes_key(node), whole, captured)
        keys.update((output, _hash(key, n)) for n, output in enumerate(node.outputs))
    return keys


def _constant_key(value: ir.Value) -> Key:
    tensor = constant_tensor(value)
    if tensor is None:
        return _hash("open", value.name)
    large = tensor.dtype != ir.DataType.STRING and tensor.nbytes > HASHED_BYTES_MAXIMUM
    return _hash(tensor.dtype, tuple(tensor.shape), None if large else digest(tensor))


def _attributes_key(node: ir.Node) -> list[bytes]:
    return sorted(_attribute_key(attribute) for attribute in attributes_of(node))


def _attribute_key(attribute: ir.Attr) -> bytes:
    # Bodies change, and `attribute_proto` remembers what it has seen.
    has_body = attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    write = ir.serde.serialize_attribute if has_body else attribute_proto
    return write(attribute).SerializeToString(deterministic=True)


def _use_keys(graph: ir.Graph) -> Mapping[ir.Value, Key]:
    """A hash of what becomes of each value, up to the outputs; None where nothing does."""
    keys: dict[ir.Value, Key] = {}
    outputs = {value: value.name for value in graph.outputs}
    uses: dict[ir.Value, list[bytes]] = defaultdict(list)

    def settle(value: ir.Value) -> None:
        own = [_hash("output", outputs[value])] if value in outputs else []
        found = sorted([*own, *uses[value]])
        keys[value] = _hash(found) if found else None

    for node in reversed(list(graph)):
        for output in node.outputs:
            settle(output)
        made = [keys[output] for output in node.outputs]
        if not any(made):
            continue
        key = _hash(node.domain, node.op_type, _attributes_key(node), made)
        for value, places in _places(node):
            uses[value].append(_hash(key, places))
    return keys


def _places(node: ir.Node) -> Iterator[tuple[ir.Value, object]]:
    """What a node reads, and at which inputs; how often, from within its bodies."""
    direct: dict[ir.Value, list[int]] = defaultdict(list)
    for index, value in enumerate(node.inputs):
        if value is not None:
            direct[value].append(index)
    yield from direct.items()
    inner = Counter(v for v in reads(node) if v not in direct)
    yield from ((value, "body") for value in inner)
