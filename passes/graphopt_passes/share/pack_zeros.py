"""pack-zeros: store weights without their zeros, without loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.encoding import FIRST_OPSET
from graphopt_passes.share.zeros import MIN_ELEMENTS, marked_zeros, packed_zeros
from graphopt_passes.simplify.chains import why_refused


@dataclass(frozen=True)
class PackZeros(Pass):
    """Store weights without their zeros, bit for bit, where that takes fewer bytes.

    A mask says which numbers are zero, in one bit for each, or where few are not, the steps from
    one of these to the next in 4, 8 or 16 bits. Nodes put the numbers where they belong, which
    onnxruntime computes when it loads the model: as deployed, it runs as it did before, no faster,
    and gives the same bits; integer kernels stay. (As written, products do not know ahead that a
    weight is constant, and may add up in another order.) What becomes smaller is the file, of
    weights of which a part was pruned.

    Float numbers that are float16 or bfloat16 as such are stored in these. -0.0 is a number like
    any other.

    Passes that quantize, cluster or convert weights have them dense for a while; what is zero then
    is not stored again. Fusions that would change a weight leave it, and come before this.

    Attributes:
        min_elements: smaller weights stay.
        form: "packed" is that. "sparse-initializer" leaves the graph as it is, and the file holds
            the weights of the main graph as ONNX's SparseTensorProto: an index of 1 to 3 bytes (in
            a large weight up to 5) for each number, in place of a bit for each zero too. So it is
            larger, but where nearly all is zero, and read by fewer tools: onnxruntime loads it, and
            onnx's own shape inference rejects it. A weight that a later pass changes is written
            dense, and so is all of a file that is optimized once more.
    """

    name: ClassVar[str] = "pack-zeros"
    effect: ClassVar[Effect] = Effect.ROUNDING

    min_elements: Annotated[int, Bounds(1)] = MIN_ELEMENTS
    form: Literal["packed", "sparse-initializer"] = "packed"

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before that of the nodes that are written."""
        return why_refused(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Pack what takes fewer bytes packed."""
        change = Change()
        if self.form == "packed":
            packed_zeros(model, context, change, self.min_elements)
        else:
            marked_zeros(model, context, change, self.min_elements)
        return change
