"""What packed weights take: in the file, in memory, and when they are widened. Nothing is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.kernel_operands import KernelWeight, kernel_weights
from graphopt.operators import is_onnx
from graphopt.packing import (
    FOLDED_BYTES_MAXIMUM,
    coded_values,
    constants_behind,
    has_shared_rows,
    is_constant,
    is_narrow,
    nodes_behind,
    packed_weights,
    placing_nodes,
    repeats_rows,
)
from graphopt.reasons import INTEGER, MOVEMENT, around_of
from graphopt.rewriting import constant_tensor, static_shape
from graphopt.weight_rules import WEIGHT_ONLY

AT_LOAD, BY_THE_KERNEL, IN_EVERY_RUN = "at load", "by the kernel", "in every run"

MOST_CODES_IN_A_BYTE = 8


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored narrow and widened by nodes.

    Attributes:
        name: of the value that the nodes make.
        dtype: element type that it is widened to, as ONNX calls it in lower case; of a weight that
            a kernel takes in integers, theirs.
        shape: dimensions.
        stored_bytes: of all constants that it hangs on; what several weights share is divided among
            them in proportion to their numbers.
        bits_per_weight: stored bits for each number.
        code_bits: of these, what the codes take; None where no codes can be told from the rest.
        levels: numbers in the codebook; None where there is none, or several.
        memory_bytes: while the model runs.
        zero_share: of its numbers, those that are not stored: zeros, or whatever number most are;
            None where all are.
        widened: "at load", by onnxruntime; "by the kernel", which takes the integers as they are;
            or "in every run", by nodes that onnxruntime does not fold.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int
    bits_per_weight: float
    code_bits: float | None
    levels: int | None
    memory_bytes: int
    widened: str
    zero_share: float | None = None

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Packed:
    """The packed weights of a model.

    Attributes:
        weights: in order.
        constants: all that they hang on.
    """

    weights: tuple[PackedWeight, ...]
    constants: frozenset[ir.Value]

    @property
    def constants_bytes(self) -> int:
        """As they are stored."""
        return sum(map(_nbytes, self.constants))


def find_packed(graphs: Iterable[ir.Graph]) -> Packed:
    """The packed weights of graphs whose shapes were inferred.

    A view of a packed weight, as the transposed table of a tied head, is no weight of its own.
    Neither is what has a shape that is not known, nor a bias of int32.
    """
    graphs = list(graphs)
    ends = dict.fromkeys(value for graph in graphs for value in packed_weights(graph))
    behind = {
        value: [c for c in constants_behind(value) or () if _nbytes(c)]
        for value in ends
        if _elements(value) and not _is_view(value, ends)
    }
    behind = {
        value: found
        for value, found in behind.items()
        if any(map(is_narrow, found)) or has_shared_rows(value) or placing_nodes(value)
    }
    kernels = {
        weight: [c for c in weight.constants() if _nbytes(c)] for weight in kernel_weights(graphs)
    }
    numbers: Counter[ir.Value] = Counter()
    for value, constants in behind.items():
        numbers.update(dict.fromkeys(constants, _elements(value)))
    for weight, constants in kernels.items():
        numbers.update(dict.fromkeys(constants, weight.elements))
    bits = {constant: 8 * _nbytes(constant) / count for constant, count in numbers.items()}
    weights = [
        _packed_weight(value, {constant: bits[constant] for constant in constants})
        for value, constants in behind.items()
    ]
    weights += [
        _kernel_weight(weight, {constant: bits[constant] for constant in constants})
        for weight, constants in kernels.items()
    ]
    return Packed(tuple(weights), frozenset(numbers))


def _is_view(value: ir.Value, ends: Container[ir.Value]) -> bool:
    """It hangs on another weight that is widened to the end."""
    before = (node for node in nodes_behind(value) or () if node is not value.producer())
    return any(output in ends for node in before for output in node.outputs)


def _packed_weight(value: ir.Value, bits: Mapping[ir.Value, float]) -> PackedWeight:
    """What is to be said of a weight.

    Args:
        value: the weight.
        bits: of the constants that it hangs on, for each of its numbers.
    """
    widened, elements = when_widened(value), _elements(value)
    stored_bytes = round(elements * math.fsum(bits.values()) / 8)
    codes = _codes(value)
    kept = coded_values(value)[0] if widened == BY_THE_KERNEL else value
    return PackedWeight(
        name=kept.name or "",
        dtype="undefined" if kept.dtype is None else kept.dtype.name.lower(),
        shape=static_shape(kept) or (),
        stored_bytes=stored_bytes,
        bits_per_weight=math.fsum(bits.values()),
        code_bits=math.fsum(bits[code] for code in codes) if codes else None,
        levels=_levels(value),
        memory_bytes=_memory_bytes(value, widened, stored_bytes),
        widened=widened,
        zero_share=_zero_share(value),
    )


def _kernel_weight(weight: KernelWeight, bits: Mapping[ir.Value, float]) -> PackedWeight:
    """As `_packed_weight`, of a weight that operators read in codes.

    Each product keeps a copy of the codes in an order of its own; all lookups share them.
    """
    copies = len(weight.products) + bool(weight.lookups)
    return PackedWeight(
        name=weight.codes.name or "",
        dtype=weight.dtype.name.lower(),
        shape=weight.shape,
        stored_bytes=round(weight.elements * math.fsum(bits.values()) / 8),
        bits_per_weight=math.fsum(bits.values()),
        code_bits=bits[weight.codes],
        levels=None,
        memory_bytes=copies * _nbytes(weight.codes),
        widened=BY_THE_KERNEL,
    )


def _zero_share(value: ir.Value) -> float | None:
    """The share of numbers that are not stored; None where all are."""
    numbers = _placed_numbers(value)
    if numbers is None:
        return None
    (node,) = placing_nodes(value)
    places = node.inputs[1 if is_onnx(node, "Gather") else 0]
    count = _elements(places) if places is not None else 0
    return 1 - _elements(numbers) / count if count else None


def _placed_numbers(value: ir.Value) -> ir.Value | None:
    """The numbers that are stored of a weight without its zeros; None of any other, and of sums."""
    nodes = placing_nodes(value)
    if len(nodes) != 1:
        return None
    if is_onnx(nodes[0], "ScatterElements"):
        return nodes[0].inputs[2]
    both = nodes[0].inputs[0]
    concat = both.producer() if both is not None else None
    # The zero is in front of them, in one constant or by a node.
    return concat.inputs[1] if concat is not None and is_onnx(concat, "Concat") else both


def _elements(value: ir.Value) -> int:
    """How many numbers; 0 where that is not known."""
    tensor = constant_tensor(value)
    shape = static_shape(value) if tensor is None else tuple(tensor.shape.numpy())
    return 0 if shape is None else math.prod(shape)


def _nbytes(value: ir.Value) -> int:
    tensor = constant_tensor(value)
    return 0 if tensor is None else tensor.nbytes


# ------------------------------------------------------------------ when


def when_widened(value: ir.Value) -> str:
    """When a packed weight is widened: at load, by the kernel, or in every run.

    Foretold by the rules of `explain`, which looks at what onnxruntime really does.
    """
    codes = coded_values(value)
    folded = [node for end in codes or [value] for node in nodes_behind(end) or ()]
    if any(_wide_bytes(o) > FOLDED_BYTES_MAXIMUM for node in folded for o in node.outputs):
        return IN_EVERY_RUN
    if not codes:
        return AT_LOAD
    readers = [use.node for use in value.uses()]
    return BY_THE_KERNEL if readers and all(map(_takes_integers, readers)) else IN_EVERY_RUN


def _takes_integers(node: ir.Node) -> bool:
    """A kernel of onnxruntime takes the weight of the node in integers."""
    around = around_of(node, (node.op_type,), False, {})
    if around.is_weight_only:
        return all(rule(around) is None for rule in WEIGHT_ONLY)
    return bool(around.activations) and around.operator in INTEGER | MOVEMENT


# ------------------------------------------------------------------ how much


def _wide_bytes(value: ir.Value) -> int:
    bits = 0 if value.dtype is None else value.dtype.bitwidth
    return -(-_elements(value) * bits // 8)


def _memory_bytes(value: ir.Value, widened: str, stored_bytes: int) -> int:
    """While the model runs: the wide weight, the integers of a kernel, or both."""
    codes = coded_values(value)
    integers = sum(map(_wide_bytes, codes)) if codes else stored_bytes
    wide = _wide_bytes(value)
    return {AT_LOAD: wide, BY_THE_KERNEL: integers, IN_EVERY_RUN: integers + wide}[widened]


def _codes(value: ir.Value) -> list[ir.Value]:
    """The constants that are the codes of a weight, rather than codebooks, scales or shapes."""
    whole = _placed_numbers(value) or value
    codes, waiting, seen = list[ir.Value](), [whole], set[ir.Value]()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if not is_constant(current):
            waiting += _towards_codes(current)
        elif is_narrow(current) and MOST_CODES_IN_A_BYTE * _elements(current) >= _elements(whole):
            # Scales may be narrow too, but there are few of them.
            codes.append(current)
    return codes


def _towards_codes(value: ir.Value) -> list[ir.Value]:
    """Inputs of the node that makes a value; not what is looked up in, and no scales of codes."""
    node = value.producer()
    if node is None:
        return []
    if repeats_rows(node):
        # Which row it is, is no code of a number.
        return []
    if is_onnx(node, "Gather"):
        return [v for v in node.inputs[1:] if v is not None]
    if is_onnx(node, "DequantizeLinear"):
        return [v for v in node.inputs[:1] if v is not None]
    return [v for v in node.inputs if v is not None]


def _levels(value: ir.Value) -> int | None:
    """How many numbers are in the codebook of a weight that has a single one.

    What most numbers are may be left out of it.
    """
    books, waiting, seen = set[ir.Value](), [_placed_numbers(value) or value], set[ir.Value]()
    while waiting:
        current = waiting.pop()
        node = current.producer()
        if current in seen or node is None or is_constant(current):
            continue
        seen.add(current)
        if is_onnx(node, "Gather"):
            book = _book_of(node)
            if book is None:
                return None
            books.add(book)
        else:
            waiting += [v for v in node.inputs if v is not None]
    return _elements(books.pop()) if len(books) == 1 else None


def _book_of(node: ir.Node) -> ir.Value | None:
    """What a Gather looks up in: a codebook, also one that is spread over bytes of several codes.

    None where it is none, or where an index counts from the beginning of one of several codebooks.
    Neither is a table of rows that a weight shares.
    """
    data, index = node.inputs
    if repeats_rows(node):
        return None
    maker = data.producer() if data is not None else None
    if maker is not None and is_onnx(maker, "Gather"):
        data = maker.inputs[0]
    adder = index.producer() if index is not None else None
    if adder is not None and is_onnx(adder, "Add") and any(map(is_constant, adder.inputs)):
        return None
    return data if data is not None and is_constant(data) else None
