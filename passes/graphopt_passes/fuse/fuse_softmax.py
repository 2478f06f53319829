"""fuse-softmax: one Softmax or LogSoftmax for what computes it with Exp or Log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import stated_integers
from graphopt.skeleton import known_shape
from graphopt_passes.fuse.fusing import Fused, Rule, fuse_all
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.fuse.pattern import Any, Inverse, Match, Op, Pattern, Product

FIRST_OPSET = 13
"""Before it, Softmax runs over all axes from one on."""

X = Any("x")


def _share(power: Pattern) -> Pattern:
    """Each power's share of their sum."""
    return Product(1.0, power, Inverse(Op("ReduceSum", power, name="sum", more=True)))


SHIFTED = _share(Op("Exp", Op("Sub", X, Op("ReduceMax", X, name="max", more=True))))
PLAIN = _share(Op("Exp", X))
LOGARITHM = Op("Log", Op("Softmax", X, name="softmax"))


@dataclass(frozen=True)
class FuseSoftmax(Pass):
    """Compute Softmax and LogSoftmax by one node, where Exp or Log and their company compute them.

        Softmax(x) = exp(x - max(x)) / sum(exp(x - max(x))) = exp(x) / sum(exp(x))
        LogSoftmax(x) = log(Softmax(x))

    Two to seven times as fast. Rows with infinity or NaN come out as before. Where exp(x) is too
    large for its type, or a share too small for one, the fused node still knows the result while
    the nodes before gave NaN or minus infinity.
    """

    name: ClassVar[str] = "fuse-softmax"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Exp", "Softmax"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fuse wherever the values in between are read by nothing else."""
        return fuse_all(
            model,
            context,
            FIRST_OPSET,
            Rule(SHIFTED, "Exp", _softmax),
            Rule(PLAIN, "Exp", _softmax),
            Rule(LOGARITHM, "Softmax", _log_softmax),
        )


def _softmax(match: Match) -> Fused:
    _check_kernel(match)
    axis = _axis(match.named["sum"], match)
    if "max" in match.named and _axis(match.named["max"], match) != axis:
        raise Misfit("its sum runs along another axis than its maximum")
    return Fused("Softmax", [match["x"]], {"axis": axis})


def _log_softmax(match: Match) -> Fused:
    _check_kernel(match)
    axis = match.named["softmax"].attributes.get_int("axis", -1)
    return Fused("LogSoftmax", [match["x"]], {"axis": axis})


def _check_kernel(match: Match) -> None:
    match.check_elementwise(ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _axis(node: ir.Node, match: Match) -> int:
    """The one axis of a Reduce node, from the front where the rank is known."""
    axes = stated_integers(node, "axes", 1)
    if axes is None or len(axes) != 1:
        raise Misfit(f"{node.op_type} does not run along one constant axis")
    if not node.attributes.get_int("keepdims", 1):
        raise Misfit(f"{node.op_type} drops the axis")
    shape = known_shape(match["x"])
    return axes[0] if shape is None or axes[0] >= 0 else axes[0] + len(shape)
