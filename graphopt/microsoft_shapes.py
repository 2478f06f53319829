"""The shapes that operators of onnxruntime's own make, which onnx's inference knows nothing of.

Those that its transformer tools and builders of language models write, by the text of
`docs/ContribOperators.md` of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import onnx_ir as ir

from graphopt.multiply_accumulates import states_types
from graphopt.rewriting import input_of
from graphopt.shape_facts import OtherRule, ShapeFacts
from graphopt.shape_rules import Fact
from graphopt.shape_rules import matmul as product_shape


def _as_input(facts: ShapeFacts, node: ir.Node, index: int, outputs: tuple[int, ...]) -> Fact:
    """These outputs have the shape of the first input."""
    return Fact(facts.shape(input_of(node, 0)) if index in outputs else None)


def _coded_product(facts: ShapeFacts, node: ir.Node, index: int) -> Fact:
    shape = facts.shape(input_of(node, 0))
    if index or not shape or not states_types(node):
        return Fact()
    return Fact((*shape[:-1], node.attributes.get_int("N", 0)))


def _product(facts: ShapeFacts, node: ir.Node, index: int) -> Fact | None:
    return product_shape(facts, node) if index == 0 else None


def _attention(facts: ShapeFacts, node: ir.Node, index: int) -> Fact:
    """Of queries, keys and values [batch, steps, size]: the size of the values."""
    query, value = facts.shape(input_of(node, 0)), facts.shape(input_of(node, 2))
    if index or query is None or value is None or len(query) != 3 or len(value) != 3:
        return Fact()
    return Fact((*query[:2], value[2]))


def _grouped_attention(facts: ShapeFacts, node: ir.Node, index: int) -> Fact:
    """As the queries, where these are not packed with keys and values."""
    return _as_input(facts, node, index, (0,)) if input_of(node, 1) is not None else Fact()


_SAME = partial(_as_input, outputs=(0,))
_WITH_SUM = partial(_as_input, outputs=(0, 3))
"""Besides the normalized values, the last output is the sum that was normalized."""

_BY_NAME: Mapping[str, OtherRule] = {
    "BiasGelu": _SAME,
    "DynamicQuantizeMatMul": _product,
    "FastGelu": _SAME,
    "Gelu": _SAME,
    "GroupQueryAttention": _grouped_attention,
    "MatMulIntegerToFloat": _product,
    "MatMulNBits": _coded_product,
    "MultiHeadAttention": _attention,
    "QuickGelu": _SAME,
    "RotaryEmbedding": _SAME,
    "SimplifiedLayerNormalization": _SAME,
    "SkipLayerNormalization": _WITH_SUM,
    "SkipSimplifiedLayerNormalization": _WITH_SUM,
}

RULES: Mapping[tuple[str, str], OtherRule] = {
    # onnxruntime has it among the standard operators, and onnx has not.
    ("", "SimplifiedLayerNormalization"): _SAME,
    **{("com.microsoft", op_type): rule for op_type, rule in _BY_NAME.items()},
}
"""By domain and operator: what is known of the output at an index."""
