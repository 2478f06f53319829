"""What the original has in the place of weights that are rounded: where they would be, if not.

A pass chose each code for the inputs of its layer alone. Where the original's number lies near the
border to the next code, this one would do nearly as well, and learning begins near that border; and
a third code, which the number does not lie beside, is a matter of chance (Nagel et al. 2020, "Up or
Down? Adaptive Rounding for Post-Training Quantization").

The original's weight is known by its content: a constant of the same shape that is alike, but for a
factor for each row, which a pass may have folded into it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.content import read_array
from graphopt.rewriting import node_tensor
from graphopt.training.interpreter import Interpreter
from graphopt.training.stored_weights import StoredWeight

NUMBERS_MINIMUM = 32
"""In a constant of fewer, likeness may be chance."""

APART_MAXIMUM = 0.6
"""How far a weight may be from the one that it was made of, as a share of its norm: with three
values it is about 0.45."""

AS_IT_IS = 0.9
"""By so much factors for the rows have to bring them nearer: they are fitted to what is rounded."""


def wanted_numbers(
    weights: Sequence[StoredWeight], optimized: Interpreter, original: ir.Model
) -> list[Tensor | None]:
    """The numbers with which each weight would be that of the original.

    Args:
        weights: of the optimized model.
        optimized: the model that they are of.
        original: the model that it was made of.

    Returns:
        For each weight a tensor like its numbers, but not rounded; None where what learns is not
        rounded, or the original has no weight like it.
    """
    constants = _constants(original)
    return [_wanted(w, optimized, constants) if w.is_rounded else None for w in weights]


def _constants(original: ir.Model) -> dict[torch.Size, list[Tensor]]:
    """The constants of the main graph by shape, matrices also transposed.

    An initializer that is an input, too, is what the original was trained with.
    """
    stored = (value.const_value for value in original.graph.initializers.values())
    found: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for tensor in (*stored, *map(node_tensor, original.graph)):
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < NUMBERS_MINIMUM:
            continue
        constant = torch.from_numpy(read_array(tensor).astype(np.float32))
        for one in (constant, constant.T) if constant.ndim == 2 else (constant,):
            found[one.shape].append(one)
    return found


def _wanted(
    weight: StoredWeight, optimized: Interpreter, constants: dict[torch.Size, list[Tensor]]
) -> Tensor | None:
    def whole(numbers: Tensor) -> Tensor:
        name = weight.operand.value.name or ""
        return optimized.run({weight.value.name or "": weight.fed(numbers)}, [name])[name].float()

    numbers = weight.numbers.clone().requires_grad_()
    made = whole(numbers)
    alike = _alike(made.detach(), constants.get(made.shape, ()))
    if alike is None or not made.requires_grad:
        return None
    # The weight is A numbers + b, where A scales and places: A'A is diagonal, and A'(weight - b)
    # over its diagonal A'A 1 gives the numbers again.
    with torch.no_grad():
        offset, ones = whole(torch.zeros_like(numbers)), whole(torch.ones_like(numbers))
    (projected,) = torch.autograd.grad(made, numbers, alike - offset, retain_graph=True)
    (scale,) = torch.autograd.grad(made, numbers, ones - offset)
    return torch.where(scale > 0, projected / scale, weight.numbers)


def _alike(weight: Tensor, constants: Sequence[Tensor]) -> Tensor | None:
    """The nearest of some constants, perhaps with factors for its rows; None if none is near."""
    found = [one for constant in constants for one in _views(constant.to(weight.device), weight)]
    if not found:
        return None
    apart, nearest = min(found, key=lambda one: one[0])
    return nearest if apart <= APART_MAXIMUM * float(weight.norm()) else None


def _views(constant: Tensor, weight: Tensor) -> Iterator[tuple[float, Tensor]]:
    """A constant as it is, and with the factors that bring its rows nearest, with the distances."""
    yield AS_IT_IS * float((constant - weight).norm()), constant
    for axis in {0, weight.ndim - 1}:
        along = [other for other in range(weight.ndim) if other != axis]
        squares = constant.square().sum(along, keepdim=True)
        factors = (constant * weight).sum(along, keepdim=True) / squares.clamp_min(1e-30)
        yield float((constant * factors - weight).norm()), constant * factors
