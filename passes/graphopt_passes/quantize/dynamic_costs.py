"""What products and LSTMs take in float and on integers whose activations are quantized per run.

Sums of terms, fitted to onnxruntime 1.32 on one thread of a CPU with AVX512-VNNI: processor time of
2 to 8 layers in a row, each with weights of its own, so that these come from where they lie in a
model. Products: 16, 64, 256 rows, also one, with 64 to 3072 inputs and outputs. Of these 198 the
rule at a gain of 1.1 puts none on integers that is faster in float, and leaves fourteen in float
that would gain more than 1.2, all small: integers cost accuracy, so that it errs on this side.
LSTMs: 16 to 512 hidden, 16 to 512 inputs, 1, 10, 50 steps. Measured, float against integers:

    rows, inputs, outputs   gain        hidden, inputs, steps   gain
    1, 64, 64               0.3         32, 32, 50              0.4
    1, 256, 256             1.8         64, 64, 10              0.7
    1, 1024, 1024           3.6         128, 128, 1             0.9
    16, 64, 64              0.7         128, 256, 10            1.2
    16, 256, 1024           3.3         256, 256, 1             2.3
    64, 512, 512            4.0         256, 256, 50            1.3
    256, 64, 256            1.0         512, 512, 1             4.6
    256, 512, 3072          6.3         512, 512, 50            7.3

Only the ratio of two times is used. All times are in nanoseconds.
"""

from __future__ import annotations

# ------------------------------------------------------------------ products

FLOAT_NODE_NS = 400.0
FLOAT_OUTPUT_NS = 0.15
FLOAT_MULTIPLY_NS = 0.0142
FLOAT_NEAR_WEIGHT_NS = 0.09
FLOAT_FAR_WEIGHT_NS = 0.18
"""A weight in the second cache, and farther away."""

NEAR_BYTES = 256 << 10
"""A layer with so many bytes of weights does not find them in the second cache (2 MiB) again."""

DYNAMIC_NODE_NS = 1500.0
DYNAMIC_COLUMN_NS = 7.5
DYNAMIC_OUTPUT_NS = 0.8
DYNAMIC_MULTIPLY_NS = 0.0014
DYNAMIC_WEIGHT_NS = 0.053
QUANTIZE_NS = 0.4
"""Of one activation: its share in the range, and its code."""

# ------------------------------------------------------------------ LSTM

FLOAT_LSTM_NS, DYNAMIC_LSTM_NS = 6900.0, 8700.0
FLOAT_STEP_NS, DYNAMIC_STEP_NS = 120.0, 840.0
FLOAT_COLD_WEIGHT_NS, DYNAMIC_COLD_WEIGHT_NS = 0.147, 0.036
"""A weight when it is first read, where all of them take a mebibyte or more."""

FLOAT_STATE_NS, FLOAT_FAR_STATE_NS, DYNAMIC_STATE_NS = 0.058, 0.18, 0.044
"""A weight of the state in every step; where those take more than a mebibyte, from farther away."""

FLOAT_INPUT_NS, DYNAMIC_INPUT_NS = 0.020, 0.0074
"""A weight of the input in every step."""

FAR_BYTES = 1 << 20


def float_ns(rows: float, inputs: int, outputs: int) -> float:
    """A MatMul of float32 with a constant weight."""
    weights = inputs * outputs
    weight_ns = FLOAT_FAR_WEIGHT_NS if 4 * weights >= NEAR_BYTES else FLOAT_NEAR_WEIGHT_NS
    return (
        FLOAT_NODE_NS
        + FLOAT_OUTPUT_NS * rows * outputs
        + weight_ns * weights
        + FLOAT_MULTIPLY_NS * rows * weights
    )


def product_ns(rows: float, inputs: int, outputs: int) -> float:
    """MatMulIntegerToFloat: the same on codes."""
    weights = inputs * outputs
    return (
        DYNAMIC_NODE_NS
        + DYNAMIC_COLUMN_NS * outputs
        + DYNAMIC_OUTPUT_NS * rows * outputs
        + DYNAMIC_WEIGHT_NS * weights
        + DYNAMIC_MULTIPLY_NS * rows * weights
    )


def quantize_ns(rows: float, inputs: int) -> float:
    """What DynamicQuantizeLinear adds, once for all products of its codes."""
    return QUANTIZE_NS * rows * inputs


def dynamic_ns(rows: float, inputs: int, outputs: int) -> float:
    """DynamicQuantizeMatMul: both."""
    return quantize_ns(rows, inputs) + product_ns(rows, inputs, outputs)


def float_lstm_ns(steps: float, batch: float, inputs: int, hidden: int) -> float:
    """An LSTM of float32, one direction.

    More than one sequence was not measured: each more is taken to cost what a row more costs a
    product.
    """
    weights, state = 4 * hidden * (inputs + hidden), 4 * hidden * hidden
    state_ns = FLOAT_FAR_STATE_NS if 4 * state > FAR_BYTES else FLOAT_STATE_NS
    cold_ns = FLOAT_COLD_WEIGHT_NS if 4 * weights > FAR_BYTES else 0.0
    step = FLOAT_STEP_NS + state * (state_ns + FLOAT_MULTIPLY_NS * (batch - 1))
    inputs_ns = FLOAT_INPUT_NS * 4 * hidden * inputs * batch
    return FLOAT_LSTM_NS + cold_ns * weights + steps * (step + inputs_ns)


def dynamic_lstm_ns(steps: float, batch: float, inputs: int, hidden: int) -> float:
    """DynamicQuantizeLSTM, one direction; see `float_lstm_ns`."""
    weights, state = 4 * hidden * (inputs + hidden), 4 * hidden * hidden
    step = DYNAMIC_STEP_NS * batch
    step += state * (DYNAMIC_STATE_NS + DYNAMIC_MULTIPLY_NS * (batch - 1))
    inputs_ns = DYNAMIC_INPUT_NS * 4 * hidden * inputs * batch
    return DYNAMIC_LSTM_NS + DYNAMIC_COLD_WEIGHT_NS * weights + steps * (step + inputs_ns)
