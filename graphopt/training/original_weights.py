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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.content import read_array, read_block
from graphopt.rewriting import node_tensor
from graphopt.training.interpreter import Interpreter
from graphopt.training.weight_forms import StoredWeight

NUMBERS_MINIMUM = 32
"""In a constant of fewer, likeness may be chance."""

APART_MAXIMUM = 0.6
"""How far a weight may be from the one that it was made of, as a share of its norm: with three
values it is about 0.45."""

AS_IT_IS = 0.9
"""By so much factors for the rows have to bring them nearer: they are fitted to what is rounded."""

CORNER, TRIED_MAXIMUM = 32, 4
"""How long a side of the corner is by which the constants of a shape are put in order, and how many
of them are then looked at as a whole: blocks of a transformer have many of one shape."""


@dataclass(frozen=True)
class _Constant:
    """A constant of the original, read when it is looked at.

    Attributes:
        tensor: of floating point.
        is_transposed: it stands for the matrix with its axes exchanged.
    """

    tensor: ir.TensorProtocol
    is_transposed: bool

    def whole(self) -> Tensor:
        """All of it, float32."""
        return self._as_read(read_array(self.tensor))

    def corner(self) -> Tensor:
        """The first numbers along all axes, float32."""
        block = [slice(0, min(size, CORNER)) for size in self.tensor.shape.numpy()]
        return self._as_read(read_block(self.tensor, block).view(self.tensor.dtype.numpy()))

    def _as_read(self, array: np.ndarray) -> Tensor:
        numbers = torch.from_numpy(array.astype(np.float32))
        return numbers.T if self.is_transposed else numbers


_Constants = Mapping[tuple[int, ...], Sequence[_Constant]]
"""By shape."""


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


def _constants(original: ir.Model) -> _Constants:
    """The constants of the main graph, matrices also transposed.

    An initializer that is an input, too, is what the original was trained with.
    """
    stored = (value.const_value for value in original.graph.initializers.values())
    found: dict[tuple[int, ...], list[_Constant]] = defaultdict(list)
    for tensor in (*stored, *map(node_tensor, original.graph)):
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < NUMBERS_MINIMUM:
            continue
        shape = tuple(tensor.shape.numpy())
        found[shape].append(_Constant(tensor, is_transposed=False))
        if len(shape) == 2:
            found[shape[::-1]].append(_Constant(tensor, is_transposed=True))
    return found


def _wanted(weight: StoredWeight, optimized: Interpreter, constants: _Constants) -> Tensor | None:
    def whole(numbers: Tensor) -> Tensor:
        name = weight.operand.value.name or ""
        return optimized.run({weight.value.name or "": weight.fed(numbers)}, [name])[name].float()

    numbers = weight.numbers.clone().requires_grad_()
    made = whole(numbers)
    alike = _alike(made.detach(), constants.get(tuple(made.shape), ()))
    if alike is None or not made.requires_grad:
        return None
    # The weight is A numbers + b, where A scales and places: A'A is diagonal, and A'(weight - b)
    # over its diagonal A'A 1 gives the numbers again.
    with torch.no_grad():
        offset, ones = whole(torch.zeros_like(numbers)), whole(torch.ones_like(numbers))
    (projected,) = torch.autograd.grad(made, numbers, alike - offset, retain_graph=True)
    (scale,) = torch.autograd.grad(made, numbers, ones - offset)
    return torch.where(scale > 0, projected / scale, weight.numbers)


def _alike(weight: Tensor, constants: Sequence[_Constant]) -> Tensor | None:
    """One of some constants that is near, perhaps with factors for its rows; None if none is."""
    corner = weight[tuple(slice(0, CORNER) for _ in weight.shape)]
    nearest = sorted(constants, key=lambda constant: _nearest(constant.corner(), corner)[0])
    for constant in nearest[:TRIED_MAXIMUM]:
        apart, numbers = _nearest(constant.whole(), weight)
        if apart <= APART_MAXIMUM * float(weight.norm()):
            return numbers
    return None


def _nearest(constant: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    """A constant as it is or with factors for its rows, whichever is nearer, and how far it is."""
    return min(_views(constant.to(weight.device), weight), key=lambda view: view[0])


def _views(constant: Tensor, weight: Tensor) -> Iterator[tuple[float, Tensor]]:
    yield AS_IT_IS * float((constant - weight).norm()), constant
    for axis in {0, weight.ndim - 1}:
        along = [other for other in range(weight.ndim) if other != axis]
        squares = constant.square().sum(along, keepdim=True)
        factors = (constant * weight).sum(along, keepdim=True) / squares.clamp_min(1e-30)
        scaled = constant * factors
        yield float((scaled - weight).norm()), scaled
