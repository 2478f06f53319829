"""fuse-attention: one Attention for the products, Softmax and scale that compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.skeleton import known_shape
from graphopt_passes.fuse.fusing import Fused, Permuted, Rule, fuse_all
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.fuse.pattern import Any, Either, Match, Number, Op, Product

FIRST_OPSET = 23

Dims = tuple[int | str | None, ...]
"""Sizes or names of dimensions; None where neither is known."""

Q, V = Any("q"), Any("v")
K = Op("Transpose", Any("k"), name="transpose")
SCALED_Q = Either(Op("Mul", Q, Number("scale of q")), Q)
SCALED_K = Either(Op("Mul", K, Number("scale of k")), K)
SCORES = Product("scale", Op("MatMul", SCALED_Q, SCALED_K))
SHARES = Op("Softmax", Either(Op("Add", SCORES, Any("mask")), SCORES), name="softmax")
ATTENTION = Op("MatMul", SHARES, V)


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Compute scaled dot-product attention by one node, from opset 23 on.

        Attention(q, k, v, mask) = softmax(scale * q·kᵀ + mask)·v

    for q, k and v of four dimensions, with as many heads in each and a mask of the size of the
    scores. The scale may stand after the product, or before it on one side or both. In onnxruntime
    it takes 0.87 to 1.0 of the time and gives the same bits; where a mask leaves nothing of a row,
    it gives 0 and the nodes before gave NaN.
    """

    name: ClassVar[str] = "fuse-attention"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Softmax"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse providers other than the CPU's."""
        if context.provider != "cpu":
            return "that Attention is no slower was measured on the CPU only"
        return None

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fuse wherever the values in between are read by nothing else."""
        return fuse_all(model, context, FIRST_OPSET, Rule(ATTENTION, "Softmax", _attention))


def _attention(match: Match) -> Fused:
    _check_softmax(match)
    order = _order_of_keys(match)
    q, v = _dims(match, "q"), _dims(match, "v")
    unordered = _dims(match, "k")
    k = tuple(unordered[axis] for axis in order)
    if not (_are_alike(q[:2], k[:2]) and _are_alike(q[:2], v[:2])):
        raise Misfit("q, k and v are not known to be of one batch and as many heads")
    inputs: list[ir.Value | Permuted] = [match["q"], _keys(match, order), match["v"]]
    if "mask" in match.values:
        _check_mask(match, (*q[:3], k[2]))
        inputs.append(match["mask"])
    return Fused("Attention", inputs, {"scale": _scale(match)})


def _check_softmax(match: Match) -> None:
    if match.named["softmax"].attributes.get_int("axis", -1) not in (-1, 3):
        raise Misfit("its Softmax does not run along the keys")
    if match.rank > 4:
        raise Misfit(f"a constant of {match.rank} dimensions adds some to the result")


def _order_of_keys(match: Match) -> tuple[int, ...]:
    """Which axes of `k` are batch, heads, keys and features."""
    order = match.named["transpose"].attributes.get_ints("perm", (3, 2, 1, 0))
    if len(order) != 4:
        raise Misfit("k is not of four dimensions")
    batch, heads, features, keys = order
    return batch, heads, keys, features


def _keys(match: Match, order: tuple[int, ...]) -> ir.Value | Permuted:
    return match["k"] if order == (0, 1, 2, 3) else Permuted(match["k"], order)


def _dims(match: Match, name: str) -> Dims:
    value = match[name]
    if value.dtype is not ir.DataType.FLOAT:
        kind = "unknown" if value.dtype is None else value.dtype.name
        raise Misfit(f"it computes with numbers of type {kind}")
    shape = known_shape(value)
    if shape is None or (len(shape) != 4 and name != "mask"):
        raise Misfit(f"{name} is not known to be of four dimensions")
    return tuple(d if isinstance(d, int) else d.value for d in shape)


def _are_alike(first: Dims, second: Dims) -> bool:
    """The sizes are equal; those of one name are, as the nodes before broadcast them."""
    return None not in first and first == second


def _check_mask(match: Match, scores: Dims) -> None:
    """Raise Misfit unless onnxruntime takes the mask: it broadcasts batch and heads only."""
    mask = _dims(match, "mask")
    if not 2 <= len(mask) <= 4 or not _are_alike(mask[-2:], scores[-2:]):
        raise Misfit("its mask is not known to have the size of the scores")
    leading = zip(reversed(mask[:-2]), reversed(scores[:2]), strict=False)
    if any(size not in (1, whole) for size, whole in leading):
        raise Misfit("its mask may enlarge the scores")


def _scale(match: Match) -> float:
    scale = 1.0
    for number in match.numbers.values():
        scale *= number
    if scale <= 0:
        raise Misfit(f"Attention has no scale of {scale:g}")
    return scale
