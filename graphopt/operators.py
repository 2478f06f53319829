"""Facts about operators that no schema states, and walks over a model's graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx_ir as ir

ONNX_DOMAINS = ("", "ai.onnx")

STANDARD_DOMAINS = (*ONNX_DOMAINS, "ai.onnx.ml", "ai.onnx.preview.training")
"""Of the operators that ONNX itself defines."""

RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)

RECURRENT = ("GRU", "LSTM", "RNN")

BROADCASTING = frozenset(
    {
        "Add",
        "And",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Mul",
        "Or",
        "Sub",
        "Where",
        "Xor",
    }
)
"""Operators that work on all inputs element by element, each rounding once at most.

They give the same bits for an operand that is enlarged and for one that is not, but for Where of
floating point, which gives 0.0 for -0.0 in one of them. For Pow, Max and Min, onnxruntime has other
code for a single number than for many.
"""


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators that the model uses; 0 when it states none."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def is_onnx(node: ir.Node, *op_types: str) -> bool:
    """The node is one of these operators of the standard domain."""
    # In this order: most nodes are of another operator.
    return node.op_type in op_types and node.domain in ONNX_DOMAINS


def is_random(node: ir.Node) -> bool:
    """Two runs of the node, or two copies of it, may give different results.

    Operators outside the standard domain are taken at their name: those that onnxruntime adds
    begin with "Random" or are dropouts.
    """
    if node.op_type in RANDOM or node.op_type.startswith(("Random", "Sampling")):
        return True
    if "Dropout" in node.op_type:
        return not dropout_is_off(node)
    return False


def dropout_is_off(node: ir.Node) -> bool:
    """The Dropout node passes its input through: it is in inference mode for certain."""
    if not is_onnx(node, "Dropout"):
        return False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return "is_test" not in node.attributes or node.attributes["is_test"].as_int() == 1
    mode = node.inputs[2]
    if mode.is_graph_input() or mode.const_value is None:
        return False
    return not mode.const_value.numpy().any()


def attributes_of(node: ir.Node) -> Collection[ir.Attr]:
    """The node's attributes, in order.

    The same as `node.attributes.values()`, which takes several times as long, as the mapping is
    a UserDict. Not to be modified.
    """
    return node.attributes.data.values()


WITH_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""The standard operators that have graphs in their attributes."""

_NO_GRAPHS: tuple[ir.Graph, ...] = ()


def subgraphs(node: ir.Node) -> Sequence[ir.Graph]:
    """The graphs in the node's attributes (bodies of If, Loop, Scan, ...)."""
    if not node.attributes.data:
        return _NO_GRAPHS
    if node.op_type not in WITH_BODIES and node.domain in ONNX_DOMAINS:
        return _NO_GRAPHS
    found = []
    for attribute in attributes_of(node):
        if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
            found.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS and not attribute.is_ref():
            found += attribute.as_graphs()
    return found


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, then every graph nested in it, outer before inner; functions are left out."""
    yield from _nested(model.graph)


def graphs_and_functions(model: ir.Model) -> Iterator[ir.Graph]:
    """As `all_graphs`, then the bodies of the model's functions and what is nested in them."""
    yield from _nested(model.graph)
    for function in model.functions.values():
        yield from _nested(function.graph)


def nodes_within(node: ir.Node) -> Iterator[ir.Node]:
    """The node itself, and those of its subgraphs."""
    yield node
    for body in subgraphs(node):
        for graph in _nested(body):
            yield from graph


def _nested(graph: ir.Graph) -> Iterator[ir.Graph]:
    waiting = [graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph:
            if node.attributes.data:
                waiting += subgraphs(node)


Census = Mapping[tuple[str, str], int]
"""How many nodes there are of each domain and operator."""


def census(model: ir.Model) -> Census:
    """The nodes of the graph and its subgraphs, by domain and operator; functions are left out."""
    counts: dict[tuple[str, str], int] = {}
    for graph in all_graphs(model):
        for node in graph:
            key = node.domain, node.op_type
            counts[key] = counts.get(key, 0) + 1
    return counts


class NodeIndex:
    """All nodes of a model by operator, in subgraphs too, as they are when it is made.

    Most passes look for few operators, and a walk over a graph of many nodes costs more than what
    they find. Nodes that are removed, added or given another operator later are not noticed.

    Attributes:
        model: what it is about.
        graphs: as `all_graphs`.
        counts: how many nodes there are of each domain and operator.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graphs: list[ir.Graph] = []
        self._nodes: list[ir.Node] = []
        self._places: dict[tuple[str, str], list[int]] = {}
        waiting = [model.graph]
        while waiting:
            graph = waiting.pop()
            self.graphs.append(graph)
            for node in graph:
                key = node.domain, node.op_type
                if key not in self._places:
                    self._places[key] = []
                self._places[key].append(len(self._nodes))
                self._nodes.append(node)
                if node.attributes.data:
                    waiting += subgraphs(node)
        self.counts: Census = {key: len(places) for key, places in self._places.items()}

    def of(self, *op_types: str) -> list[ir.Node]:
        """The nodes of these standard operators, each graph from its inputs onwards."""
        keys = [(domain, op_type) for domain in ONNX_DOMAINS for op_type in op_types]
        places = sorted(place for key in keys for place in self._places.get(key, ()))
        return [self._nodes[place] for place in places]

    def by_graph(self, *op_types: str) -> dict[ir.Graph, list[ir.Node]]:
        """The same, apart by the graphs that they are in."""
        found: dict[ir.Graph, list[ir.Node]] = {}
        for node in self.of(*op_types):
            assert isinstance(node.graph, ir.Graph)
            found.setdefault(node.graph, []).append(node)
        return found


def other_operators(model: ir.Model, counts: Census | None = None) -> Counter[str]:
    """Nodes of operators that ONNX does not define, by domain and name; functions are looked into.

    Calls of the model's own functions are none of them.

    Args:
        model: not modified.
        counts: the census of all its graphs, if there is one.
    """
    if not model.functions:
        return Counter(
            {
                f"{domain}.{op_type}": count
                for (domain, op_type), count in (counts or census(model)).items()
                if domain not in STANDARD_DOMAINS
            }
        )
    return Counter(
        f"{node.domain}.{node.op_type}"
        for graph in graphs_and_functions(model)
        for node in graph
        if node.domain not in STANDARD_DOMAINS and node.op_identifier() not in model.functions
    )


def node_count(model: ir.Model, counts: Census | None = None) -> int:
    """Nodes in the graph and its subgraphs; Constant nodes do not count.

    A call of a model-local function counts as the nodes of the function, which is what runs.

    Args:
        model: not modified.
        counts: the census of all its graphs, if there is one.
    """
    if not model.functions:
        counts = counts or census(model)
        constants = sum(counts.get((domain, "Constant"), 0) for domain in ONNX_DOMAINS)
        return sum(counts.values()) - constants
    return _count_nodes(model.graph, model, {})


def _count_nodes(graph: ir.Graph, model: ir.Model, known: dict[ir.OperatorIdentifier, int]) -> int:
    total = 0
    for node in graph:
        key = node.op_identifier()
        if key in model.functions:
            if key not in known:
                known[key] = _count_nodes(model.functions[key].graph, model, known)
            total += known[key]
        else:
            total += not is_onnx(node, "Constant")
        total += sum(_count_nodes(inner, model, known) for inner in subgraphs(node))
    return total
