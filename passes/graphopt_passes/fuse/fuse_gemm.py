"""fuse-gemm: one Gemm for a MatMul of matrices with the Add after and a Transpose before it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.packing import is_constant
from graphopt.rewriting import input_of
from graphopt.skeleton import known_shape
from graphopt_passes.fuse.fusing import Fused, Rule, fuse_all
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.fuse.pattern import Any, Match, Op

FIRST_OPSET = 11
"""Gemm does without C from here on."""

DTYPES = (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""MatMul of integers is not Gemm of integers for onnxruntime."""

A, B = Any("a"), Any("b")
SIDES = tuple(product((Op("Transpose", A, name="a"), A), (Op("Transpose", B, name="b"), B)))
"""The operands, with as many Transpose before them as there are."""


@dataclass(frozen=True)
class FuseGemm(Pass):
    """Compute MatMul(a, b) + c by one Gemm, where a and b are matrices for certain.

    A Transpose of a, of b or of both goes into it too, and into a Gemm that is there. onnxruntime
    does the same when it loads a model. What is quantized stays.
    """

    name: ClassVar[str] = "fuse-gemm"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Gemm", "MatMul"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fuse wherever the values in between are read by nothing else."""
        return fuse_all(model, context, FIRST_OPSET, *_rules())


def _rules() -> list[Rule]:
    sums = [Op("Add", Op("MatMul", *pair), Any("c")) for pair in SIDES]
    products = [Op("MatMul", *pair) for pair in SIDES[:-1]]
    gemms = [Op("Gemm", *pair, more=True) for pair in SIDES[:-1]]
    rules = [Rule(pattern, "MatMul", _of_matmul) for pattern in (*sums, *products)]
    return rules + [Rule(pattern, "Gemm", _of_gemm) for pattern in gemms]


def _of_matmul(match: Match) -> Fused | None:
    shapes = [known_shape(match[side]) for side in ("a", "b")]
    if any(shape is not None and len(shape) != 2 for shape in shapes):
        return None
    if any(is_constant(match[side]) for side in match.named):
        # The Transpose is folded by another pass.
        return None
    if None in shapes:
        raise Misfit("the operands of MatMul are not known to be matrices")
    _check_operands(match)
    inputs = [match["a"], match["b"]]
    if "c" in match.values:
        _check_sum(match)
        inputs.append(match["c"])
    return Fused("Gemm", inputs, _transposed(match))


def _of_gemm(match: Match) -> Fused | None:
    if any(is_constant(match[side]) for side in match.named):
        return None
    _check_operands(match)
    gemm = match.root
    attributes: dict[str, ir.Attr | int] = {**gemm.attributes, **_transposed(match)}
    c = input_of(gemm, 2)
    return Fused("Gemm", [match["a"], match["b"], *([] if c is None else [c])], attributes)


def _transposed(match: Match) -> dict[str, int]:
    """What transA and transB become: turned over where a Transpose goes."""
    turned = {}
    for side, name in (("a", "transA"), ("b", "transB")):
        before = match.root.attributes.get_int(name, 0) if match.root.op_type == "Gemm" else 0
        after = int(bool(before) != (side in match.named))
        if after or before:
            turned[name] = after
    return turned


def _check_operands(match: Match) -> None:
    for side in ("a", "b"):
        value = match[side]
        if value.dtype not in DTYPES:
            kind = "unknown" if value.dtype is None else value.dtype.name
            raise Misfit(f"it multiplies numbers of type {kind}")
        maker = value.producer()
        if maker is not None and is_onnx(maker, "DequantizeLinear"):
            raise Misfit("its operands are quantized")
        transpose = match.named.get(side)
        if transpose is not None and tuple(transpose.attributes.get_ints("perm", (1, 0))) != (1, 0):
            raise Misfit("its Transpose moves nothing")


def _check_sum(match: Match) -> None:
    """Raise Misfit unless adding c to the product keeps the product's shape."""
    shape = known_shape(match["c"])
    if shape is None or len(shape) > 2:
        raise Misfit("what is added is not known to have two dimensions or less")
    rows = _size(match, "a", 0)
    columns = _size(match, "b", 1)
    sizes = [None, rows, columns][-len(shape) :] if len(shape) else []
    for size, whole in zip(shape, sizes, strict=True):
        if size != 1 and (not isinstance(size, int) or size != whole):
            raise Misfit(f"what is added has shape {shape}, which may enlarge the product")


def _size(match: Match, side: str, axis: int) -> int | None:
    """A dimension of an operand of MatMul, behind its Transpose."""
    shape = known_shape(match[side])
    assert shape is not None
    size = shape[1 - axis if side in match.named else axis]
    return size if isinstance(size, int) else None
