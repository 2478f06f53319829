"""Patterns of nodes: what exporters write where ONNX has one operator for it.

A pattern says what a value is made of, from the last node upwards:

    X = Any("x")
    MISH = Product(1, X, Op("Tanh", Op("Softplus", X)))

The same `Any` stands for the same value wherever it occurs, and the same node may be met twice. The
operands of Add, Mul, Max and Min come in any order. A `Product` is any tree of Mul, Div, Neg, Pow
and Reciprocal with that result, wherever in it the numbers stand.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt.rewriting import constant_tensor
from graphopt.skeleton import known_shape
from graphopt_passes.fuse.affine import PRECISION
from graphopt_passes.fuse.misfit import Misfit

COMMUTATIVE = frozenset({"Add", "Max", "Min", "Mul"})

STEPS_MAXIMUM = 8
"""A product is looked for through at most so many nodes, so that long chains cost no more."""

ROUNDINGS = 2
"""A number that a pattern asks for may be off by so many times the precision of its constants.

Rounding costs each half of that, and a number is made of four at most.
"""

Factors = Iterator[tuple[float, "Match"]]


# ------------------------------------------------------------------ what was found


@dataclass(frozen=True)
class Match:
    """Where a pattern was found.

    Attributes:
        root: the node that makes the value that all is about.
        nodes: all nodes that the pattern covers, the root first; one may be in it twice.
        values: by the names that the pattern gives them.
        numbers: likewise.
        named: nodes, likewise.
        rank: the largest of a constant that was taken for a number.
        precision: the coarsest of those constants.
    """

    root: ir.Node
    nodes: tuple[ir.Node, ...] = ()
    values: Mapping[str, ir.Value] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    named: Mapping[str, ir.Node] = field(default_factory=dict)
    rank: int = 0
    precision: float = 2.0**-52

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]

    def maker(self, value: ir.Value | None) -> ir.Node | None:
        """The node of the same graph and of the standard domain that makes the value."""
        node = value.producer() if value is not None else None
        if node is None or node.graph is not self.root.graph or len(node.outputs) != 1:
            return None
        return node if is_onnx(node, node.op_type) else None

    def with_node(self, node: ir.Node, name: str | None = None) -> Match:
        """The match with one more node."""
        named = self.named if name is None else {**self.named, name: node}
        # As `replace`, which takes three times as long; this is done most often.
        nodes = (*self.nodes, node)
        return Match(self.root, nodes, self.values, self.numbers, named, self.rank, self.precision)

    def with_number(self, value: ir.Value | None) -> tuple[float, Match] | None:
        """The number that a constant of one element holds, and the match with its traits."""
        tensor = constant_tensor(value)
        if tensor is None or tensor.size != 1:
            return None
        array = tensor.numpy()
        if array.dtype.kind in "biu":
            precision = 0.0
        elif tensor.dtype in PRECISION:
            precision = PRECISION[tensor.dtype]
        else:
            return None
        number = float(array.reshape(-1)[0])
        if not math.isfinite(number):
            return None
        rank, precision = max(self.rank, array.ndim), max(self.precision, precision)
        return number, replace(self, rank=rank, precision=precision)

    def with_scale(self, wanted: float | str, found: float) -> Match | None:
        """The match, where a number that was found is the wanted one, or gets that name."""
        if isinstance(wanted, str):
            known = self.numbers.get(wanted)
            if known is None:
                return replace(self, numbers={**self.numbers, wanted: found})
            wanted = known
        return self if self.is_close(found, wanted) else None

    def is_close(self, found: float, wanted: float) -> bool:
        """The numbers are the same, but for the rounding of the constants that were met."""
        return abs(found - wanted) <= ROUNDINGS * self.precision * abs(wanted)

    def is_sound(self) -> bool:
        """No value that was named is made within: x + x is no x with something added to it."""
        return not any(value.producer() in self.nodes for value in self.values.values())

    def check_private(self) -> None:
        """Raise Misfit where something else needs a value that the fused node would not make."""
        inside = dict.fromkeys(self.nodes)
        for node in inside:
            if node is self.root:
                continue
            value = node.outputs[0]
            if value.is_graph_output():
                raise Misfit(f"{value.name}, which {node.op_type} makes within, is an output")
            if any(use.node not in inside for use in value.uses()):
                raise Misfit(f"other nodes read {value.name}, which {node.op_type} makes within")

    def check_elementwise(self, *dtypes: ir.DataType) -> None:
        """Raise Misfit unless the result has the shape of `x`, which is of one of these types."""
        value = self["x"]
        if value.dtype not in dtypes:
            kind = "unknown" if value.dtype is None else value.dtype.name
            raise Misfit(f"it computes with numbers of type {kind}")
        shape = known_shape(value)
        if self.rank and (shape is None or len(shape) < self.rank):
            raise Misfit(f"a constant of {self.rank} dimensions may add some to the result")


# ------------------------------------------------------------------ patterns


class Pattern(ABC):
    """What a value may be made of."""

    @abstractmethod
    def find(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        """The match with this value in it, in every way in which that works."""

    def roots(self) -> frozenset[str]:
        """The operators of which the last node can be; none where the pattern makes no root."""
        return frozenset()


@dataclass(frozen=True, eq=False)
class Any(Pattern):
    """Any value; the same one where the name was met before."""

    name: str

    def find(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        """Bind the name."""
        if value is None:
            return
        known = match.values.get(self.name)
        if known is None:
            yield replace(match, values={**match.values, self.name: value})
        elif known is value:
            yield match


@dataclass(frozen=True, eq=False)
class Number(Pattern):
    """A constant of one element: a certain number, or under a name any."""

    wanted: float | str

    def find(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        """Compare the number, as far as its type can hold it."""
        found = match.with_number(value)
        if found is None:
            return
        number, match = found
        scaled = match.with_scale(self.wanted, number)
        if scaled is not None:
            yield scaled


class Op(Pattern):
    """The result of a node.

    Args:
        kinds: the operator; several apart by "|".
        inputs: patterns of its inputs.
        name: under which the match has the node.
        more: the node may have further inputs, which are left to the pass.
    """

    def __init__(
        self, kinds: str, *inputs: Pattern, name: str | None = None, more: bool = False
    ) -> None:
        self.kinds = frozenset(kinds.split("|"))
        self.name, self.more = name, more
        indices = range(len(inputs))
        orders = [indices, reversed(indices)] if self.kinds <= COMMUTATIVE else [indices]
        # What any value fits comes last: it rules nothing out.
        self.orders = [
            sorted(zip(order, inputs, strict=True), key=lambda pair: isinstance(pair[1], Any))
            for order in orders
        ]

    def roots(self) -> frozenset[str]:
        """The operators themselves."""
        return self.kinds

    def find(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        """The node, with its operands in every order that works."""
        node = match.maker(value)
        if node is None or node.op_type not in self.kinds:
            return
        count = len(self.orders[0])
        if len(node.inputs) != count and not (self.more and len(node.inputs) > count):
            return
        for order in self.orders:
            yield from _find_all(node, order, match.with_node(node, self.name))


def _find_all(node: ir.Node, pairs: Sequence[tuple[int, Pattern]], match: Match) -> Iterator[Match]:
    if not pairs:
        yield match
        return
    (index, pattern), *rest = pairs
    for found in pattern.find(node.inputs[index], match):
        yield from _find_all(node, rest, found)


class Either(Pattern):
    """The first of several patterns that fits, and then the others."""

    def __init__(self, *choices: Pattern) -> None:
        self.choices = choices

    def roots(self) -> frozenset[str]:
        """Those of all."""
        return frozenset().union(*(choice.roots() for choice in self.choices))

    def find(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        """One after the other."""
        for choice in self.choices:
            yield from choice.find(value, match)


@dataclass(frozen=True, eq=False)
class Inverse(Pattern):
    """One over a value; in a product also a division by it."""

    of: Pattern

    def find(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        """A Reciprocal; the Div of a product is found there."""
        node = match.maker(value)
        if node is not None and node.op_type == "Reciprocal":
            yield from self.of.find(node.inputs[0], match.with_node(node))


class Product(Pattern):
    """A number times some factors, in any order and grouping.

    Args:
        scale: the number, or a name for it.
        factors: patterns.
    """

    def __init__(self, scale: float | str, *factors: Pattern) -> None:
        self.scale = scale
        self.factors = factors

    def roots(self) -> frozenset[str]:
        """The operators of products; for a single factor also its own."""
        own = self.factors[0].roots() if len(self.factors) == 1 else frozenset[str]()
        return own | _STEPS.keys()

    def find(self, value: ir.Value | None, match: Match) -> Iterator[Match]:
        """Every way to write the value as such a product."""
        for scale, found in _factors(value, self.factors, match, 0):
            scaled = found.with_scale(self.scale, scale)
            if scaled is not None:
                yield scaled


def _factors(
    value: ir.Value | None, wanted: tuple[Pattern, ...], match: Match, steps: int
) -> Factors:
    """Every way to write the value as a number times the wanted factors."""
    if len(wanted) == 1:
        for found in wanted[0].find(value, match):
            yield 1.0, found
    node = match.maker(value)
    if node is not None and node.op_type in _STEPS and steps < STEPS_MAXIMUM:
        yield from _STEPS[node.op_type](node, wanted, match.with_node(node), steps + 1)


def _of_mul(node: ir.Node, wanted: tuple[Pattern, ...], match: Match, steps: int) -> Factors:
    first, second = node.inputs
    for value, other in ((first, second), (second, first)):
        number = match.with_number(other)
        if number is not None:
            for scale, found in _factors(value, wanted, number[1], steps):
                yield scale * number[0], found
            return
    for choice in range(1, 2 ** len(wanted) - 1):
        left = tuple(w for index, w in enumerate(wanted) if choice >> index & 1)
        right = tuple(w for index, w in enumerate(wanted) if not choice >> index & 1)
        sides = [(first, left), (second, right)]
        # Again: what any value fits comes last.
        sides.sort(key=lambda side: all(isinstance(w, Any) for w in side[1]))
        for one, found in _factors(*sides[0], match, steps):
            for two, both in _factors(*sides[1], found, steps):
                yield one * two, both


def _of_div(node: ir.Node, wanted: tuple[Pattern, ...], match: Match, steps: int) -> Factors:
    top, bottom = node.inputs
    number = match.with_number(bottom)
    if number is not None and number[0]:
        for scale, found in _factors(top, wanted, number[1], steps):
            yield scale / number[0], found
    for index, inverse in enumerate(wanted):
        if not isinstance(inverse, Inverse):
            continue
        rest = wanted[:index] + wanted[index + 1 :]
        for found in inverse.of.find(bottom, match):
            number = found.with_number(top)
            if rest:
                yield from _factors(top, rest, found, steps)
            elif number is not None:
                yield number


def _of_pow(node: ir.Node, wanted: tuple[Pattern, ...], match: Match, steps: int) -> Factors:
    base, exponent = node.inputs
    number = match.with_number(exponent)
    if number is None or number[0] != len(wanted) or any(w is not wanted[0] for w in wanted):
        return
    for found in wanted[0].find(base, number[1]):
        yield 1.0, found


def _of_neg(node: ir.Node, wanted: tuple[Pattern, ...], match: Match, steps: int) -> Factors:
    for scale, found in _factors(node.inputs[0], wanted, match, steps):
        yield -scale, found


_STEPS: dict[str, Callable[[ir.Node, tuple[Pattern, ...], Match, int], Factors]] = {
    "Div": _of_div,
    "Mul": _of_mul,
    "Neg": _of_neg,
    "Pow": _of_pow,
}
"""How a product goes on through a node, by operator."""
