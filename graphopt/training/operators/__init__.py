"""The operators of ONNX as functions of torch tensors; see `operator_types`."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.training.operators import (
    arithmetic,
    control_flow,
    convolution,
    elementwise,
    generators,
    movement,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resampling,
)
from graphopt.training.operators.operator_types import Operator, Table

_STANDARD: tuple[Table, ...] = (
    arithmetic.OPERATORS,
    control_flow.OPERATORS,
    convolution.OPERATORS,
    elementwise.OPERATORS,
    generators.OPERATORS,
    movement.OPERATORS,
    normalization.OPERATORS,
    pooling.OPERATORS,
    quantization.OPERATORS,
    recurrent.OPERATORS,
    reduction.OPERATORS,
    resampling.OPERATORS,
)

OPERATORS: Mapping[tuple[str, str], Operator] = {
    ("", op_type): operator for table in _STANDARD for op_type, operator in table.items()
}
"""By domain and operator; ai.onnx is the empty domain."""
