"""What is known of shapes, and of the small integer tensors that are computed from them.

onnx infers shapes too, and those are the start; but it loses a dimension as soon as a node computes
with it. Here dimensions that are not known are symbols (see `graphopt.sizes`), and the values of
shape arithmetic are followed element by element. Each node is looked at by itself: where nothing is
known of an operator, what onnx inferred stays, and what it did not is a symbol of its own.

Dimensions of two inputs are never taken to be equal because they carry the same name: exporters
leave these names to users. Only where an operator broadcasts the two against each other, so that
one must be the other or 1, are they taken to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir as ir

from graphopt import shape_arithmetic, shape_rules
from graphopt.operators import ONNX_DOMAINS, is_onnx, subgraphs
from graphopt.rewriting import small_array
from graphopt.shape_rules import FOLLOWED, LARGEST_CONTENT, Fact, Shape, part
from graphopt.sizes import Algebra, Polynomial, Size, may_overflow
from graphopt.skeleton import known_shape

OtherRule = Callable[["ShapeFacts", ir.Node, int], Fact | None]
"""What is known of the output of a node at an index; None where nothing is."""

_NO_OTHERS: Mapping[tuple[str, str], OtherRule] = MappingProxyType({})
_RULES = {**shape_rules.RULES, **shape_arithmetic.RULES}


class ShapeFacts:
    """The facts about all values of a model, its subgraphs included.

    Args:
        model: its shapes were inferred.
        others: rules for operators that ONNX does not define, by domain and name.
    """

    def __init__(
        self, model: ir.Model, others: Mapping[tuple[str, str], OtherRule] = _NO_OTHERS
    ) -> None:
        self._others = others
        self.algebra = Algebra()
        self._facts: dict[ir.Value, Fact] = {}
        self._names: dict[Polynomial, str] = {}
        for value in model.graph.inputs:
            self._name_dimensions(value)
        self._follow(model.graph)

    def of(self, value: ir.Value | None) -> Fact:
        """The fact about a value."""
        if value is None:
            return Fact()
        known = self._facts.get(value)
        if known is None:
            known = self._facts[value] = self._about_given(value)
        return known

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value; None where not even its rank is known."""
        return self.of(value).shape

    def content(self, value: ir.Value | None) -> Shape | None:
        """The elements of a small tensor of integers or booleans, if it is followed."""
        return self.of(value).content

    # -------------------------------------------------------------- the walk

    def _follow(self, graph: ir.Graph) -> None:
        for node in graph:
            for body in subgraphs(node):
                self._follow(body)
            if is_onnx(node, "Split"):
                for index, value in enumerate(node.outputs):
                    self._facts[value] = self._completed(value, part(self, node, index))
                continue
            other = self._others.get((node.domain, node.op_type))
            if other is not None:
                for index, value in enumerate(node.outputs):
                    self._facts[value] = self._completed(value, other(self, node, index))
                continue
            rule = _RULES.get(node.op_type) if node.domain in ONNX_DOMAINS else None
            found = rule(self, node) if rule is not None else None
            for value in node.outputs:
                self._facts[value] = self._completed(value, found)
                found = None

    def _completed(self, value: ir.Value, found: Fact | None) -> Fact:
        """What a rule found, and where it did not, what onnx inferred."""
        if found is not None and found.shape is not None:
            shape: Shape | None = _agreed(found.shape, known_shape(value))
        else:
            shape = self.inferred(value)
        content = found.content if found is not None else None
        if value.dtype not in FOLLOWED:
            return Fact(shape, None)
        if content is None:
            content = self._unknown_content(value, shape)
        if content is not None and len(content) > LARGEST_CONTENT:
            content = None
        if content is not None and any(may_overflow(s, value.dtype.bitwidth) for s in content):
            # Then it is another number at run time.
            content = self._unknown_content(value, shape)
        return Fact(shape, content)

    def _unknown_content(self, value: ir.Value, shape: Shape | None) -> Shape | None:
        if shape is None or len(shape) > 1 or value.dtype is ir.DataType.BOOL:
            return None
        count = shape[0] if shape else 1
        if not isinstance(count, int) or count > LARGEST_CONTENT:
            return None
        return tuple(self.algebra.atom(("element", value, i)) for i in range(count))

    def inferred(self, value: ir.Value) -> Shape | None:
        """The shape that onnx inferred, with symbols for what it did not."""
        shape = known_shape(value)
        if shape is None:
            return None
        dims = enumerate(shape.dims)
        return tuple([d if isinstance(d, int) else self.unknown(value, i) for i, d in dims])

    def unknown(self, value: ir.Value, axis: int) -> Size:
        """The symbol for a dimension that is not known."""
        return self.algebra.atom((value, axis), is_dimension=True)

    def _name_dimensions(self, value: ir.Value) -> None:
        for axis, dim in enumerate(known_shape(value) or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                atom = self.unknown(value, axis)
                assert isinstance(atom, Polynomial)
                self._names[atom] = dim.value

    def are_named_alike(self, first: Size, second: Size) -> bool:
        """Two dimensions of inputs carry one name."""
        if not isinstance(first, Polynomial) or not isinstance(second, Polynomial):
            return False
        return first in self._names and self._names[first] == self._names.get(second)

    def _about_given(self, value: ir.Value) -> Fact:
        """Of an input, an initializer or a value of a function."""
        shape = self.inferred(value)
        if value.dtype not in FOLLOWED:
            return Fact(shape)
        array = small_array(value, LARGEST_CONTENT)
        if array is None or array.ndim > 1:
            return self._completed(value, Fact(shape))
        return Fact(shape, tuple(int(number) for number in array.reshape(-1)))


def _agreed(found: Shape, known: ir.Shape | None) -> Shape:
    """Of two correct shapes, the integers of both."""
    if known is None or len(found) != len(known.dims):
        return found
    pairs = zip(found, known.dims, strict=True)
    return tuple([k if isinstance(k, int) else f for f, k in pairs])
