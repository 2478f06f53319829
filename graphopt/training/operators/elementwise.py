"""Operators of one number each: functions, activations, and the softmaxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.training.operators.arguments import to_matrix
from graphopt.training.operators.operator_types import Operator, Table

_PER_AXIS_OPSET = 13
"""From it on softmaxes are along one axis; before, over all axes from one on."""

_SELU_ALPHA, _SELU_GAMMA = 1.6732631921768188, 1.0507010221481323
_ELU_ALPHA, _LEAK = 1.0, 0.01
_HARD_ALPHA, _HARD_BETA = 0.2, 0.5


def leaky_relu(x: Tensor, *, alpha: float = _LEAK) -> Tensor:
    """`x`, or `alpha x` below 0."""
    return functional.leaky_relu(x, alpha)


def elu(x: Tensor, *, alpha: float = _ELU_ALPHA) -> Tensor:
    """`x`, or `alpha (exp(x) - 1)` below 0."""
    return functional.elu(x, alpha)


def _selu(x: Tensor, *, alpha: float = _SELU_ALPHA, gamma: float = _SELU_GAMMA) -> Tensor:
    return gamma * functional.elu(x, alpha)


def _celu(x: Tensor, *, alpha: float = _ELU_ALPHA) -> Tensor:
    return functional.celu(x, alpha)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x` above `alpha`, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def hard_sigmoid(x: Tensor, *, alpha: float = _HARD_ALPHA, beta: float = _HARD_BETA) -> Tensor:
    """`alpha x + beta`, between 0 and 1."""
    return (alpha * x + beta).clamp(0.0, 1.0)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`."""
    # The softplus of torch takes x itself for large ones.
    return torch.logaddexp(x, torch.zeros_like(x))


def softsign(x: Tensor) -> Tensor:
    """`x / (1 + |x|)`."""
    return functional.softsign(x)


def _hard_swish(x: Tensor) -> Tensor:
    return x * hard_sigmoid(x, alpha=1 / 6)


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(softplus(x))


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit; with "tanh" the approximation by it."""
    return functional.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x sigmoid(alpha x)`."""
    return x * torch.sigmoid(alpha * x)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    inner = torch.where(x > lambd, x - bias, torch.zeros_like(x)).to(x.dtype)
    return torch.where(x < -lambd, x + bias, inner).to(x.dtype)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is None and high is None:
        return x
    limits = (None if limit is None else limit.reshape(()) for limit in (low, high))
    return torch.clamp(x, *limits)


def _is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    wide = x.to(torch.float32) if x.is_floating_point() and x.itemsize == 1 else x
    if detect_negative and detect_positive:
        return torch.isinf(wide)
    if detect_negative:
        return torch.isneginf(wide)
    return torch.isposinf(wide) if detect_positive else torch.zeros_like(x, dtype=torch.bool)


def _is_nan(x: Tensor) -> Tensor:
    return torch.isnan(x.to(torch.float32) if x.itemsize == 1 else x)


def softmax(x: Tensor, *, opset: int, axis: int | None = None) -> Tensor:
    """Shares that add up to 1 along an axis, or before opset 13 over this and all behind it."""
    if opset >= _PER_AXIS_OPSET:
        return functional.softmax(x, -1 if axis is None else axis)
    return functional.softmax(to_matrix(x, 1 if axis is None else axis), 1).reshape(x.shape)


def _log_softmax(x: Tensor, *, opset: int, axis: int | None = None) -> Tensor:
    if opset >= _PER_AXIS_OPSET:
        return functional.log_softmax(x, -1 if axis is None else axis)
    return functional.log_softmax(to_matrix(x, 1 if axis is None else axis), 1).reshape(x.shape)


def _hardmax(x: Tensor, *, opset: int, axis: int | None = None) -> Tensor:
    if opset < _PER_AXIS_OPSET:
        rows = to_matrix(x, 1 if axis is None else axis)
        return _hardmax(rows, opset=_PER_AXIS_OPSET, axis=1).reshape(x.shape)
    axis = (-1 if axis is None else axis) % x.ndim
    first = x.argmax(axis, keepdim=True)
    places = torch.arange(x.shape[axis], device=x.device)
    shape = [-1 if place == axis else 1 for place in range(x.ndim)]
    return (places.reshape(shape) == first).to(x.dtype)


def _dropout(
    x: Tensor,
    ratio: Tensor | None = None,
    training: Tensor | None = None,
    *,
    opset: int,
    output_count: int,
    seed: int = 0,
    is_test: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    share = 0.5 if ratio is None else float(ratio)
    if training is None or not bool(training) or share == 0:
        mask = torch.ones_like(x, dtype=torch.bool)
        return x if output_count == 1 else (x, mask)
    mask = torch.rand_like(x) >= share
    return x * mask / (1 - share), mask


def _identity(x: Tensor) -> Tensor:
    return x


def _sign(x: Tensor) -> Tensor:
    return torch.sign(x)


ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {
    "Elu": elu,
    "HardSigmoid": hard_sigmoid,
    "LeakyRelu": leaky_relu,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Softplus": softplus,
    "Softsign": softsign,
    "Tanh": torch.tanh,
    "ThresholdedRelu": thresholded_relu,
}
"""Those that recurrent operators can have too."""

_OF_TORCH: dict[str, Operator] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}

OPERATORS: Table = {
    **_OF_TORCH,
    **ACTIVATIONS,
    "Celu": _celu,
    "Clip": _clip,
    "Dropout": _dropout,
    "Gelu": gelu,
    "HardSwish": _hard_swish,
    "Hardmax": _hardmax,
    "Identity": _identity,
    "IsInf": _is_inf,
    "IsNaN": _is_nan,
    "LogSoftmax": _log_softmax,
    "Mish": _mish,
    "PRelu": _prelu,
    "Selu": _selu,
    "Shrink": _shrink,
    "Sign": _sign,
    "Softmax": softmax,
    "Swish": swish,
}
"""Of the standard domain."""
