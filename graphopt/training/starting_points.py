"""Where rounded weights begin to learn: at the original's numbers, as near as their codes allow.

A code says only in which cell of a grid a number is. Begun at the middle of the cell, a number has
the same way to go to either side, and where the original's was near a border no step says so. The
original still has the numbers; passes may have transposed them or scaled their rows (a
BatchNormalization that went into a Conv), so they are known by their content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.content import read_array
from graphopt.operators import all_graphs
from graphopt.rewriting import node_tensor
from graphopt.training.interpreter import Interpreter
from graphopt.training.stored_weights import StoredWeight

CORRELATION_MINIMUM = 0.8
"""Of weights that were the same before they were rounded; few levels are less like them."""


def starting_points(
    weights: Sequence[StoredWeight], optimized: Interpreter, original: ir.Model
) -> list[Tensor]:
    """For each weight, numbers that are rounded to those that are stored.

    Args:
        weights: of the optimized model.
        optimized: runs it.
        original: in which the numbers were not rounded yet.
    """
    known = _by_size(original)
    return [_start(weight, optimized, known) for weight in weights]


def _by_size(model: ir.Model) -> dict[int, list[ir.TensorProtocol]]:
    found: dict[int, list[ir.TensorProtocol]] = {}
    for tensor in _tensors(model):
        if tensor.dtype.is_floating_point() and len(tensor.shape) > 1:
            found.setdefault(tensor.size, []).append(tensor)
    return found


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            tensor = node_tensor(node)
            if tensor is not None:
                yield tensor


def _start(
    weight: StoredWeight, optimized: Interpreter, known: dict[int, list[ir.TensorProtocol]]
) -> Tensor:
    numbers = weight.numbers
    if weight.is_vector or not weight.is_rounded:
        return numbers
    name, whole = weight.value.name or "", weight.operand.value.name or ""
    fed = weight.fed(numbers).detach().requires_grad_()
    made = optimized.run({name: fed}, [whole])[whole]
    if made.grad_fn is None:
        return numbers
    wanted = _like(made.detach(), known.get(made.numel(), []))
    if wanted is None:
        return numbers
    # Every number w of the weight is s v + b of one number v: its slope s is the gradient, and the
    # way to go in v is that in w divided by s.
    (slopes,) = torch.autograd.grad(made, fed, torch.ones_like(made), retain_graph=True)
    (ways,) = torch.autograd.grad(made, fed, wanted - made.detach())
    step = torch.where(slopes != 0, ways / slopes.square(), 0)
    return numbers + step.float().nan_to_num()


def _like(made: Tensor, known: Sequence[ir.TensorProtocol]) -> Tensor | None:
    """The original's weight in the shape and the scale of ours; None if there is none."""
    best, alike = None, CORRELATION_MINIMUM
    for tensor in known:
        array = torch.from_numpy(read_array(tensor).astype(np.float32)).to(made.device)
        for candidate in _views(array, made.shape):
            scaled = _rows_scaled(candidate, made)
            likeness = float(
                torch.nn.functional.cosine_similarity(scaled.flatten(), made.flatten(), 0)
            )
            if likeness > alike:
                best, alike = scaled, likeness
    return best


def _views(array: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    if array.shape == shape:
        yield array
    if array.ndim == 2 and array.T.shape == shape:
        yield array.T
    if array.shape != shape and array.shape[::-1] != shape:
        yield array.reshape(shape)


def _rows_scaled(array: Tensor, made: Tensor) -> Tensor:
    """Rows, or columns, each at the scale at which it is nearest to ours."""
    best = array
    for axis in {0, made.ndim - 1}:
        others = [a for a in range(made.ndim) if a != axis]
        products = (array * made).sum(others, keepdim=True)
        squares = array.square().sum(others, keepdim=True).clamp_min(1e-30)
        scaled = array * products / squares
        if (scaled - made).square().sum() < (best - made).square().sum():
            best = scaled
    return best
