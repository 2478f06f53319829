"""Which nodes of a model compute in 16 bits, so that they save most and Casts cost least.

Some must stay in float32. Where the border runs between these and the others, a minimum cut finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from graphopt.operators import is_onnx
from graphopt.rewriting import SMALL_ELEMENTS, constant_tensor
from graphopt_passes.quantize.half_places import Floats
from graphopt_passes.quantize.half_reasons import PRODUCTS

CAST_COST = 2
"""A Cast costs what so many nodes save by computing in 16 bits."""

PRODUCT_GAIN = 100
"""A product, or a node with a weight, saves as much as so many other nodes."""

_VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that take no time."""

_NEVER = 1 << 24

_HALF, _WIDE = 0, 1
"""The ends between which the cut goes: what is left with the first computes in 16 bits."""

Edge = tuple[int, int, int]
"""From one point to another, and what it costs to cut it when only the first is in 16 bits."""


def cheapest(floats: Floats, reasons: Mapping[ir.Node, str]) -> dict[ir.Node, None]:
    """The nodes, in order, that compute in 16 bits, so that they save most and Casts cost least.

    What goes into the model, a body or out of one is cast for free: it does not decide.

    Args:
        floats: the model.
        reasons: the nodes that stay float32.
    """
    nodes = [n for n in floats.nodes if floats.comes(n) or any(o in floats for o in n.outputs)]
    points = {node: place for place, node in enumerate(nodes, start=2)}
    edges: list[Edge] = []
    for node, point in points.items():
        if node in reasons or floats.widens(node):
            edges.append((point, _WIDE, _NEVER))
        else:
            edges.append((_HALF, point, _gain(node, floats)))
    free = len(nodes) + 2
    for node, point in points.items():
        for output in node.outputs if not floats.widens(node) else ():
            edges += _casts(point, _readers(output, floats, points), free)
            free += 2
    half = _side_of_source(edges, free)
    return dict.fromkeys(
        node
        for node, point in points.items()
        if point in half and node not in reasons and not floats.is_indifferent(node)
    )


def _casts(maker: int, readers: Iterable[int], free: int) -> Iterator[Edge]:
    """What a Cast behind a value costs, however many nodes read it.

    With the maker in float32, one is cut for all readers in 16 bits, and the other way round: a
    point for each stands between, which no reader can be cut off from.

    Args:
        maker: of the value.
        readers: of the value.
        free: this point and the next one stand for nothing yet.
    """
    to_half, to_wide = free, free + 1
    yield to_half, maker, CAST_COST
    yield maker, to_wide, CAST_COST
    for reader in readers:
        yield reader, to_half, _NEVER
        yield to_wide, reader, _NEVER


def _gain(node: ir.Node, floats: Floats) -> int:
    if is_onnx(node, *PRODUCTS):
        return PRODUCT_GAIN
    tensors = filter(None, (constant_tensor(v) for v in node.inputs if v in floats))
    if any(tensor.size > SMALL_ELEMENTS for tensor in tensors):
        return PRODUCT_GAIN
    return 0 if is_onnx(node, *_VIEWS) else 1


def _readers(value: ir.Value, floats: Floats, points: Mapping[ir.Node, int]) -> dict[int, None]:
    """The points of nodes that need the value in their own type."""
    found: dict[int, None] = {}
    for use in value.uses() if value in floats else ():
        if use.node in points and not floats.is_indifferent(use.node):
            takes = use.idx in floats.takes(use.node)
            found[points[use.node] if takes else _WIDE] = None
    return found


def _side_of_source(edges: Sequence[Edge], count: int) -> set[int]:
    """The points on the source's side of a minimum cut."""
    rows, columns, capacities = np.array(edges, np.int32).reshape(-1, 3).T
    graph = csr_array(coo_array((capacities, (rows, columns)), shape=(count, count)))
    left = csr_array(graph - maximum_flow(graph, _HALF, _WIDE).flow)
    left.eliminate_zeros()
    order = breadth_first_order(left, _HALF, return_predecessors=False)
    return set(order.tolist())
