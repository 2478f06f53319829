"""Operators that make tensors out of few numbers, or of none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.training.operators.arguments import integer, integers
from graphopt.training.operators.element_types import cast, torch_type
from graphopt.training.operators.operator_types import Operator, Table

_FLOAT = 1


def _constant_of_shape(
    shape: Tensor, *, device: torch.device, value: Tensor | None = None
) -> Tensor:
    filled = torch.zeros((), device=device) if value is None else value.reshape(())
    return filled.expand(integers(shape)).clone()


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    # arange counts in the type of its result: start + i * delta.
    first, last, step = (part.reshape(-1).tolist()[0] for part in (start, limit, delta))
    count = max(math.ceil((last - first) / step), 0)
    steps = torch.arange(count, dtype=start.dtype, device=start.device)
    return start.reshape(()) + steps * delta.reshape(())


def _eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    rows, columns = x.shape
    places = torch.arange(columns, device=x.device) - torch.arange(rows, device=x.device)[:, None]
    return (places == k).to(x.dtype if dtype is None else torch_type(dtype))


def _generator(seed: float | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return None
    return torch.Generator(device).manual_seed(int(seed))


def _normal(
    *,
    shape: Sequence[int],
    device: torch.device,
    dtype: int = _FLOAT,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> Tensor:
    numbers = torch.randn(
        *shape, generator=_generator(seed, device), dtype=torch_type(dtype), device=device
    )
    return numbers * scale + mean


def _uniform(
    *,
    shape: Sequence[int],
    device: torch.device,
    dtype: int = _FLOAT,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
) -> Tensor:
    numbers = torch.rand(
        *shape, generator=_generator(seed, device), dtype=torch_type(dtype), device=device
    )
    return numbers * (high - low) + low


def _normal_like(
    x: Tensor,
    *,
    dtype: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> Tensor:
    kind = x.dtype if dtype is None else torch_type(dtype)
    generator = _generator(seed, x.device)
    return torch.randn(x.shape, generator=generator, dtype=kind, device=x.device) * scale + mean


def _uniform_like(
    x: Tensor,
    *,
    dtype: int | None = None,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
) -> Tensor:
    kind = x.dtype if dtype is None else torch_type(dtype)
    numbers = torch.rand(x.shape, generator=_generator(seed, x.device), dtype=kind, device=x.device)
    return numbers * (high - low) + low


def _bernoulli(x: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    drawn = torch.bernoulli(x, generator=_generator(seed, x.device))
    return drawn if dtype is None else cast(drawn, dtype)


def _multinomial(
    x: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None
) -> Tensor:
    drawn = torch.multinomial(
        x.softmax(-1), sample_size, replacement=True, generator=_generator(seed, x.device)
    )
    return drawn.to(torch_type(dtype))


def _window(coefficients: Sequence[float]) -> Operator:
    """A window of a signal: a sum of cosines of multiples of the place in it."""

    def window(size: Tensor, *, output_datatype: int = _FLOAT, periodic: int = 1) -> Tensor:
        count = integer(size)
        places = torch.arange(count, dtype=torch.float64, device=size.device)
        angles = 2 * math.pi * places / (count if periodic else count - 1)
        terms = (c * torch.cos(order * angles) for order, c in enumerate(coefficients))
        return sum(terms, torch.zeros_like(angles)).to(torch_type(output_datatype))

    return window


OPERATORS: Table = {
    "Bernoulli": _bernoulli,
    "BlackmanWindow": _window((0.42, -0.5, 0.08)),
    "ConstantOfShape": _constant_of_shape,
    "EyeLike": _eye_like,
    "HammingWindow": _window((25 / 46, -21 / 46)),
    "HannWindow": _window((0.5, -0.5)),
    "Multinomial": _multinomial,
    "RandomNormal": _normal,
    "RandomNormalLike": _normal_like,
    "RandomUniform": _uniform,
    "RandomUniformLike": _uniform_like,
    "Range": _range,
}
"""Of the standard domain."""
