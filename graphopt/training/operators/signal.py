"""Fourier transforms of signals."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.training.operators.arguments import integer
from graphopt.training.operators.operator_types import Table

_AXIS_IS_AN_INPUT_OPSET = 20
"""From it on, of DFT."""


def _dft(
    x: Tensor,
    length: Tensor | None = None,
    axis_input: Tensor | None = None,
    *,
    opset: int,
    axis: int = 1,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    if opset >= _AXIS_IS_AN_INPUT_OPSET:
        axis = -2 if axis_input is None else integer(axis_input)
    # The last axis is of real numbers, or of pairs of a real and an imaginary one.
    axis = axis % x.ndim
    count = None if length is None else integer(length)
    if inverse and onesided:
        y: Tensor = torch.fft.irfft(torch.view_as_complex(x.contiguous()), count, axis)
        return y.unsqueeze(-1)
    if onesided:
        return torch.view_as_real(torch.fft.rfft(x[..., 0], count, axis))
    signal = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0]
    transform = torch.fft.ifft if inverse else torch.fft.fft
    return torch.view_as_real(transform(signal, count, axis))


def _stft(
    x: Tensor,
    step: Tensor,
    window: Tensor | None = None,
    length: Tensor | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    size = window.shape[0] if window is not None else integer(length) if length is not None else 0
    if x.ndim == 3:
        x = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0]
    frames = x.unfold(1, size, integer(step))
    frames = frames if window is None else frames * window
    is_half = bool(onesided) and not x.is_complex()
    return torch.view_as_real(torch.fft.rfft(frames) if is_half else torch.fft.fft(frames))


OPERATORS: Table = {"DFT": _dft, "STFT": _stft}
"""Of the standard domain."""
