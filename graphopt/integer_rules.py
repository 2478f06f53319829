"""Rules about quantized activations: what keeps a node between them from an integer kernel.

Checked on the CPU provider of onnxruntime 1.32. The first rule that fits gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphopt.reasons import (
    CLIPS,
    INTEGER,
    MOVEMENT,
    Around,
    Reason,
    block_of,
    joined,
    parameters_of,
    scale_of,
    text_of,
)
from graphopt.rewriting import constant_tensor, input_of
from graphopt.weight_rules import (
    not_constant,
    quantized_bias,
    scaled_gemm,
    vector_scale,
    weight_axis,
    weight_type,
)

_DATA_INPUTS = {"Conv": (0, 1), "Gemm": (0, 1), "MatMul": (0, 1), "Where": (1, 2)}


_EIGHT_BITS = ("int8", "uint8")


_SCALE_TOLERANCE = 0.01
"""Relative; scales that agree within it are the same to onnxruntime."""


def _activation_type(around: Around) -> Reason | None:
    other = next((t for t in around.types if t not in _EIGHT_BITS), None)
    if other is None:
        return None
    return Reason(
        "activation-type",
        f"activations are {other}; integer kernels take 8 bits",
        "quantize activations to uint8 or int8, or leave them in float",
    )


def _differing_quantization(around: Around) -> Reason | None:
    if around.operator not in MOVEMENT or not around.activations or not around.quantizers:
        return None
    if around.operator == "Resize" and text_of(around.node, "mode", "nearest") != "nearest":
        return None
    sides = [parameters_of(n) for n in (*around.activations.values(), *around.quantizers)]
    if None in sides or len(set(sides)) == 1:
        return None
    return Reason(
        "differing-quantization",
        f"scale, zero point or type before {around.operator} and behind it differ",
        f"use those of its input behind {around.operator} too",
    )


def _no_integer_kernel(around: Around) -> Reason | None:
    # An operator without a float kernel either is computed by several nodes, such as Mul.
    names = (around.operator, *around.operators)
    if all(_may_be_integer(name) for name in names):
        return None
    if len(around.operators) > 1 and INTEGER.issuperset(around.operators):
        return Reason(
            "fused-in-float",
            f"{joined(around)} became {around.operator}, which has no integer kernel",
            "put QuantizeLinear and DequantizeLinear between them",
        )
    change = "leave all of the float part unquantized, or use operators that have one"
    if "BatchNormalization" in around.operators:
        change = "fold it into the Conv before it (graphopt optimize does), then quantize"
    return Reason("no-integer-kernel", f"{joined(around)} has no integer kernel", change)


def _may_be_integer(operator: str) -> bool:
    return operator in INTEGER or operator in CLIPS or operator in MOVEMENT - {"Resize"}


def _input_in_float(around: Around) -> Reason | None:
    wanted = _DATA_INPUTS.get(around.operator, range(len(around.node.inputs)))
    missing = [index for index in wanted if index in around.plain]
    if around.operator not in INTEGER or not missing:
        return None
    if len(missing) == len(wanted):
        why = f"{around.operator} has inputs in float"
    elif constant_tensor(around.node.inputs[missing[0]]) is not None:
        why = f"a constant input of {around.operator} is in float"
    else:
        why = f"only one input of {around.operator} is quantized"
    return Reason(
        "input-in-float", why, "quantize all of its inputs, or leave all and the output in float"
    )


def _bias_scale(around: Around) -> Reason | None:
    sides = (around.activations.get(0), around.weights.get(1), around.weights.get(2))
    if around.operator != "Conv" or None in sides:
        return None
    of_input, of_weight, of_bias = (scale_of(side) for side in sides)
    if of_input is None or of_weight is None or of_bias is None:
        return None
    if np.allclose(of_bias, of_input * of_weight, rtol=_SCALE_TOLERANCE, atol=0):
        return None
    return Reason(
        "bias-scale",
        "the scale of the bias of Conv is not that of its input times that of its weight",
        "quantize the bias with that product as scale, or keep it in float",
    )


def _no_weight_zero_point(around: Around) -> Reason | None:
    weight = around.weights.get(1)
    if around.operator != "Gemm" or weight is None or input_of(weight, 2) is not None:
        return None
    return Reason(
        "no-weight-zero-point",
        "the DequantizeLinear of the weight of Gemm states no zero point",
        "give it a zero point of 0",
    )


def _blocks_and_activations(around: Around) -> Reason | None:
    if not block_of(around):
        return None
    return Reason(
        "blocks-and-activations",
        f"the weight of {around.operator} has blocks, and its input is quantized too",
        "one scale for each column, or leave the input and output in float",
    )


def _clip_behind(around: Around) -> Reason | None:
    """Relu and Clip are gone only where the QuantizeLinear behind them clips as they do."""
    if around.operator in CLIPS:
        clip, quantizers = around.operator, around.quantizers
    elif text_of(around.node, "activation") in CLIPS:
        clip, quantizers = text_of(around.node, "activation"), around.quantizers
    else:
        clips = [r for r in around.node.outputs[0].consumers() if r.op_type in CLIPS]
        readers = [r for c in clips for r in c.outputs[0].consumers()]
        clip = clips[0].op_type if clips else ""
        quantizers = tuple(r for r in readers if r.op_type == "QuantizeLinear")
    if not clip or not quantizers:
        return None
    tensor = constant_tensor(input_of(quantizers[0], 2))
    zero_point = int(tensor.numpy().reshape(-1)[0]) if tensor is not None else 0
    if clip == "Relu":
        if tensor is None or zero_point == np.iinfo(tensor.numpy().dtype).min:
            return None
        return Reason(
            "clip-zero-point",
            f"the zero point behind Relu is {zero_point}, not the minimum of its type",
            "calibrate the output of Relu from 0, so that the zero point is the minimum",
        )
    return Reason(
        "clip-zero-point",
        f"scale and zero point behind Clip reach beyond its limits (zero point {zero_point})",
        "choose them so that the integers hold what Clip lets through, and no more",
    )


def _no_output_quantize(around: Around) -> Reason | None:
    if around.operator not in INTEGER:
        return None
    activation = text_of(around.node, "activation")
    if activation:
        return Reason(
            "no-output-quantize",
            f"there is no QuantizeLinear between {around.operator} and {activation}",
            f"put QuantizeLinear and DequantizeLinear between {around.operator} and {activation}",
        )
    if around.quantizers:
        return None
    if around.operator == "Gemm" and input_of(around.node, 2) is not None:
        return Reason(
            "no-output-quantize",
            f"{joined(around)} has a float bias, and no QuantizeLinear behind it",
            "put QuantizeLinear and DequantizeLinear behind it, or make the bias int32",
        )
    return Reason(
        "no-output-quantize",
        f"there is no QuantizeLinear behind {around.operator}",
        f"put QuantizeLinear and DequantizeLinear behind {around.operator}",
    )


def _output_read_in_float(around: Around) -> Reason | None:
    if around.is_read and around.quantizers:
        return Reason(
            "output-read-in-float",
            f"the output of {around.operator} is read in float too, beside its QuantizeLinear",
            "let all readers, and the outputs of the model, take what DequantizeLinear gives back",
        )
    if len({parameters_of(q) for q in around.quantizers}) > 1:
        return Reason(
            "output-read-in-float",
            f"the output of {around.operator} is quantized in two ways",
            "use one scale and zero point for all readers",
        )
    return None


QUANTIZED: tuple[Callable[[Around], Reason | None], ...] = (
    not_constant,
    _activation_type,
    _differing_quantization,
    _no_integer_kernel,
    _input_in_float,
    quantized_bias,
    _bias_scale,
    vector_scale,
    scaled_gemm,
    weight_type,
    _blocks_and_activations,
    weight_axis,
    _no_weight_zero_point,
    _clip_behind,
    _output_read_in_float,
    _no_output_quantize,
)
"""The first rule that fits gives the reason."""
