"""convert-numbers: compute in float16 or bfloat16, or store weights in narrower formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.encoding import FIRST_OPSET
from graphopt.errors import ModelError
from graphopt.operators import opset_of
from graphopt.rewriting import why_too_old
from graphopt_passes.quantize.half_places import Floats
from graphopt_passes.quantize.half_ranges import Shown, look
from graphopt_passes.quantize.half_reasons import SENSITIVE, why_wide
from graphopt_passes.quantize.half_regions import cheapest
from graphopt_passes.quantize.halves import BFLOAT16, FLOAT16
from graphopt_passes.quantize.halving import Halving
from graphopt_passes.quantize.number_formats import FORMATS
from graphopt_passes.quantize.number_weights import convert_weights
from graphopt_passes.quantize.retyping import types_of
from graphopt_passes.share.zeros import unpacked_zeros
from graphopt_passes.simplify.chains import why_refused

BFLOAT16_ERROR, NARROW_ERROR = 0.06, 0.25
"""Relative L2 errors that are allowed where no budget is stated."""

HALVES = {"bfloat16": BFLOAT16, "float16": FLOAT16}


@dataclass(frozen=True)
class ConvertNumbers(Pass):
    """Compute in 16 bits what a model computes in float32, or store its weights in fewer.

    With float16 and bfloat16, every value, constant and body is converted but where that would
    break something, and there Casts go around. What stays float32:

    - what samples show beyond half of the largest number that the format holds, or so small that
      few digits are left, or too large to make a Softmax of it; and all nodes that read or make it;
    - nodes of which a constant would be lost, as an epsilon of 1e-12 (and the norm around it) or a
      factor of 1e-6; what computes with integers, as positions and sizes; what adds up over the
      rounds of a Loop or Scan;
    - what has no such form: NonMaxSuppression, the scales of a Resize, codes of a quantized model
      and what is beside them, sequences, random numbers, and operators that `block` names;
    - nodes between such, where Casts would cost more than they save.

    Masks that are too large, as -1e9 and the lowest float32, become the lowest number of the
    format; infinity stays, as the format has it. A large weight that is read in float32 is stored
    in 16 bits all the same, with a Cast that onnxruntime computes when it loads the model.

    On a GPU float16 is faster. onnxruntime's CPU provider computes it in float32, with Casts around
    nearly every node: there files are half as large and nothing is faster. `weights-only` stores
    weights in 16 bits and computes in float32: as small, more exact, and at the speed of before.

    Other formats are of weights only, each number at the nearest one: nodes widen them when
    onnxruntime loads the model. float8e4m3fn, float8e5m2, log2 (powers of two) and int8 have a
    scale for each output; the microscaling formats of the OCP (mxfp8, mxfp6, mxfp4) one of 8 bits
    for 32 numbers, int4 and int2 one of float32, nvfp4 one of 8 bits for 16, nf4 one for 64.

    Unless `--max-error` says otherwise, the relative L2 error of the outputs may be 0.01 in
    float16, 0.06 in bfloat16 and 0.25 in formats of weights.

    Attributes:
        format: of the numbers.
        io: keep the element types of the model's inputs and outputs, or convert them too.
        block: operators that stay in float32.
        weights_only: store weights in the format, and compute in float32.
    """

    format: Literal[
        "float16",
        "bfloat16",
        "float8e4m3fn",
        "float8e5m2",
        "mxfp8",
        "mxfp8e5m2",
        "mxfp6",
        "mxfp6e3m2",
        "mxfp4",
        "mxint8",
        "nvfp4",
        "nf4",
        "log2",
        "int8",
        "int4",
        "int2",
    ] = "float16"
    io: Literal["keep", "convert"] = "keep"
    block: tuple[str, ...] = ()
    weights_only: bool = False

    name: ClassVar[str] = "convert-numbers"
    effect: ClassVar[Effect] = Effect.LOSSY
    max_error: ClassVar[float] = 0.01

    @property
    def error_budget(self) -> float:
        """Other formats have fewer bits than float16."""
        if self.format in FORMATS:
            return NARROW_ERROR
        return BFLOAT16_ERROR if self.format == "bfloat16" else self.max_error

    @property
    def converts_interface(self) -> bool:
        """As `io` says."""
        return self.io == "convert"

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """bfloat16 does not run on the CPU."""
        if self.format in FORMATS:
            return why_refused(model, FIRST_OPSET)
        if model.functions:
            return "functions are not looked into; run inline-functions first"
        if self.format == "bfloat16" and context.provider == "cpu" and not self.weights_only:
            return (
                "onnxruntime's CPU provider has no kernels for bfloat16 and puts no Casts around "
                "it, so that not even a MatMul would load; use float16, or weights-only"
            )
        return why_too_old(model, HALVES[self.format].first_opset)

    def narrow(self) -> ConvertNumbers | None:
        """Keep norms, powers and sums in float32, then everything but the weights."""
        if self.weights_only or self.format in FORMATS:
            return None
        missing = tuple(op for op in SENSITIVE if op not in self.block)
        if missing:
            return replace(self, block=self.block + missing)
        return replace(self, block=(), weights_only=True)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Convert all graphs."""
        with unpacked_zeros(model, context):
            return self._applied(model, context)

    def _applied(self, model: ir.Model, context: Context) -> Change:
        if self.format in FORMATS:
            return convert_weights(model, context, FORMATS[self.format])
        change = Change()
        half, graphs = HALVES[self.format], context.index_of(model).graphs
        floats = Floats(model, graphs, types_of(graphs, opset_of(model)), half)
        if self.weights_only:
            wide: Mapping[ir.Node, str] = dict.fromkeys(floats.nodes, "only weights are converted")
            Halving(model, floats, {}, wide, Shown(), self.io == "convert").write(context, change)
            return change
        shown = Shown()
        if context.observer is not None:
            try:
                shown = look(model, floats, context)
            except ModelError as error:
                # Seen of onnxruntime 1.32, which takes some values away before it looks at them.
                change.note(f"values cannot be looked at, and are taken to be in range: {error}")
        idle = dict.fromkeys(shown.idle, "no sample takes this branch")
        wide = {**why_wide(floats, self.block, shown.ranges), **idle}
        for node, reason in wide.items():
            change.skip(node, reason)
        nodes = cheapest(floats, wide)
        plan = Halving(model, floats, nodes, wide, shown, self.io == "convert")
        plan.write(context, change)
        return change
