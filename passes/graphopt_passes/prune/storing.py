"""What the passes that set weights to zero have in common: how the rest is stored."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.encoding import FIRST_OPSET
from graphopt_passes.share.zeros import packed_zeros
from graphopt_passes.simplify.chains import why_refused

Form = Literal["packed", "dense"]
"""Zeros take a bit or less each, or as many bytes as other numbers."""

Numbers = Literal["float32", "float16"]

TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def why_not_stored(model: ir.Model, form: Form) -> str | None:
    """Why weights cannot be stored in a form, or None."""
    return why_refused(model, FIRST_OPSET) if form == "packed" else None


def store(model: ir.Model, form: Form, context: Context, change: Change) -> None:
    """Store weights without their zeros, if that is asked for and takes fewer bytes."""
    if form == "packed":
        packed_zeros(model, context, change)
