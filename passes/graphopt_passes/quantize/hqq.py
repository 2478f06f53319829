"""Scales for codes that a few large weights do not spoil, without data.

Half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog). What counts
is not the squared error of the numbers but the sum of |error|^p with p < 1, which lets a few be far
off for the sake of all others. It is minimised in turns: an estimate e of the errors,

    e = shrink(W - Wq),     shrink(x) = sign(x) relu(|x| - |x|^(p-1) / beta)

which is 0 but where errors are large, and the scale that fits W - e best by squares, while beta
grows. The blog fits an offset to each block in the place of the scale. At the same bits, offsets
were worse here than half the inputs in a block.
"""

from __future__ import annotations

import numpy as np

from graphopt_passes.quantize.codebooks import Floats, nearest

POWER = 0.7
"""Of the error that is summed."""

BETA, GROWTH = 10.0, 1.01
"""The weight of the squares at first, for numbers of `DEVIATION`, and its growth in a step."""

STEPS = 20

DEVIATION = 0.02
"""Of the weights of a transformer, for which the other constants were chosen."""


def shrink(errors: Floats, beta: float, power: float = POWER) -> Floats:
    """The numbers e that minimise |e|^power + beta / 2 (e - error)^2, about; see above.

    Args:
        errors: of any shape.
        beta: positive.
        power: more than 0, at most 1.
    """
    sizes = np.abs(errors)
    less = np.power(np.maximum(sizes, 1e-12), power - 1) / beta
    return np.asarray(np.sign(errors) * np.maximum(sizes - less, 0))


def half_quadratic_scales(rows: Floats, levels: Floats, scales: Floats) -> Floats:
    """The scales of rows, each with one, for nearest levels.

    Args:
        rows: float32 of shape [rows, inputs].
        levels: increasing, float32 of shape [levels].
        scales: to begin with, of shape [rows, 1], none of them 0.

    Returns:
        Of all steps, for each row the one of the least sum of |error|^power; of the sign it had.
    """
    unit = DEVIATION / (float(np.std(rows)) or 1.0)
    numbers, scales, beta = rows * unit, scales * unit, BETA
    best, least = scales, np.full(scales.shape, np.inf)
    for _ in range(STEPS + 1):
        units = levels[nearest(numbers / scales, levels)]
        errors = numbers - units * scales
        sums = np.power(np.abs(errors), POWER).sum(axis=1, keepdims=True)
        best, least = np.where(sums < least, scales, best), np.minimum(sums, least)
        power = np.square(units).sum(axis=1, keepdims=True)
        product = (units * (numbers - shrink(errors, beta))).sum(axis=1, keepdims=True)
        found = np.divide(product, power, out=np.zeros_like(scales), where=power > 0)
        scales = np.where(found * scales > 0, found, scales)
        beta *= GROWTH
    return np.asarray(best / unit)
