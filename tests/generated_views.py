"""Steps of generated graphs for merge-views: large weights that are there in two forms."""

from __future__ import annotations

import numpy as np
from generated import Builder, Step

WIDTH, HEIGHT = 144, 128
"""A matrix of that many floats is worth a node."""


def two_forms(b: Builder) -> None:
    """Products and sums of one matrix, stored again as one of its views."""
    value = b.any(4)
    if value is None or np.prod(b.shapes[value][1:]) != WIDTH:
        return
    batch = b.shapes[value][0]
    flat = b.add("Flatten", [value], (batch, WIDTH))
    weight = b.random.standard_normal((WIDTH, HEIGHT)).astype(np.float32)
    first = b.add("MatMul", [flat, b.constant(weight)], (batch, HEIGHT))
    form = str(b.random.choice(["transposed", "product", "reshaped", "rows"]))
    if form == "transposed":
        b.add("Gemm", [flat, b.constant(weight.T.copy())], (batch, HEIGHT), transB=1)
    elif form == "product":
        b.add("MatMul", [first, b.constant(weight.T.copy())], (batch, WIDTH))
    elif form == "reshaped":
        b.add("MatMul", [first, b.constant(weight.reshape(HEIGHT, WIDTH))], (batch, WIDTH))
    else:
        b.add("MatMul", [first, b.constant(weight[9 : 9 + HEIGHT].copy())], (batch, HEIGHT))


FOCUS: dict[str, tuple[Step, ...]] = {"merge-views": (two_forms,)}
