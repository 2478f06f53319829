"""inline-functions: put the bodies of model-local functions where they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import unshadow


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Put the bodies of model-local functions where they are called.

    onnxruntime does the same at load. In the graph their nodes can be folded, fused and shared. A
    function that is called often takes more bytes in the file so.
    """

    name: ClassVar[str] = "inline-functions"
    effect: ClassVar[Effect] = Effect.EXACT

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Where a function counts on another version of the operators than the model."""
        for function in model.functions.values():
            for domain, version in function.opset_imports.items():
                other = model.opset_imports.get(domain, version)
                if other != version:
                    return (
                        f"function {function.name} is of opset {version}, the model of {other}"
                        + (f" (domain {domain})" if domain else "")
                    )
        return None

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Inline all calls, nested ones too, and drop the functions."""
        change = Change()
        if not model.functions:
            return change
        change.count("function inlined", len(model.functions))
        InlinePass()(model)
        # A body in a function may use a name that the caller has.
        unshadow(model)
        return change
