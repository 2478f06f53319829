"""Weights in narrow number formats, which nodes widen when the model is loaded."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.encoding import Encoding, Narrow
from graphopt.rewriting import Names
from graphopt_passes.quantize.layers import numbers_of
from graphopt_passes.quantize.narrow_weights import Target, graph_of, targets_of, write_narrow
from graphopt_passes.quantize.number_formats import Format, encode

MIN_ELEMENTS = 1024
"""Smaller weights are not worth the nodes."""


def convert_weights(model: ir.Model, context: Context, format: Format) -> Change:
    """Store the float weights of a model in a number format, each number at the nearest one.

    Args:
        model: rewritten in place.
        context: keeps what is large.
        format: of the numbers, with its blocks and their scales.
    """
    change, names = Change(), Names(model)
    encodings: dict[ir.Graph, Encoding] = {}
    for target in targets_of(model, MIN_ELEMENTS, change):
        if target.is_integer:
            change.skip(target.value, "it is the weight of an integer kernel")
            continue
        graph = graph_of(target.value)
        if graph not in encodings:
            encodings[graph] = Encoding(graph, names, context.tensor)
        write_narrow(target, [_narrow(target, format)], encodings[graph])
        change.count(f"weight of {target.operator} stored as {format.name}")
    for encoding in encodings.values():
        encoding.close()
    return change


def _narrow(target: Target, format: Format) -> Narrow:
    """The weight in the format; one factor for all scales is the codebook's."""
    encoded = encode(numbers_of(target.value), format, target.shared)
    codebook = encoded.codebook
    if encoded.factor is not None:
        codebook = np.asarray(codebook * encoded.factor, np.float32)
    return Narrow(encoded.codes, codebook, encoded.scales)
