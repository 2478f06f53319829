"""Convolutions, and what undoes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import ModelError
from graphopt.training.operators.operator_types import Table
from graphopt.training.operators.windows import padded, windows_on

_CONVOLUTIONS: Sequence[Callable[..., Tensor]] = (
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
)
_TRANSPOSED: Sequence[Callable[..., Tensor]] = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


def _of_rank(kernels: Sequence[Callable[..., Tensor]], x: Tensor) -> Callable[..., Tensor]:
    rank = x.ndim - 2
    if not 1 <= rank <= len(kernels):
        raise ModelError(f"a convolution over {rank} axes cannot be computed in torch")
    return kernels[rank - 1]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The operator Conv.

    Args:
        x: of shape [batch, channels, ...].
        weight: of shape [outputs, channels / group, ...].
        bias: of shape [outputs].
        auto_pad: as of ONNX, as are the others.
        dilations: between elements of the kernel.
        group: parts of the channels that do not see each other.
        kernel_shape: that of the weight.
        pads: before all axes, then behind them.
        strides: of the output on the input.

    Raises:
        ModelError: there are more than 3 axes behind the first two.
    """
    kernel = _of_rank(_CONVOLUTIONS, x)
    windows = windows_on(x.shape[2:], weight.shape[2:], strides, dilations, pads, auto_pad)
    stated = {"stride": windows.strides, "dilation": windows.dilations, "groups": group}
    if windows.are_symmetric:
        return kernel(x, weight, bias, padding=windows.begins, **stated)
    return kernel(padded(x, windows), weight, bias, **stated)


def _transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = x.ndim - 2
    strides = tuple(strides or [1] * rank)
    dilations = tuple(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    full = _of_rank(_TRANSPOSED, x)(x, weight, stride=strides, dilation=dilations, groups=group)
    wanted = list(output_shape[-rank:]) if output_shape else None
    if wanted is None and auto_pad.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        # What is left is cut at both sides; an odd one at the end, or with SAME_UPPER before it.
        cuts = [f + e - w for f, e, w in zip(full.shape[2:], extra, wanted, strict=True)]
        lesser, greater = [c // 2 for c in cuts], [c - c // 2 for c in cuts]
        pads = lesser + greater if auto_pad == "SAME_UPPER" else greater + lesser
    elif pads is None or auto_pad == "VALID":
        pads = [0] * (2 * rank)
    sides = [
        side
        for axis in reversed(range(rank))
        for side in (-pads[axis], extra[axis] - pads[rank + axis])
    ]
    out = functional.pad(full, sides) if any(sides) else full
    return out if bias is None else out + bias.reshape(-1, *[1] * rank)


def _columns_to_image(
    x: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Sums of blocks at their places: of shape [batch, channels, *image_shape]."""
    sizes, blocks = image_shape.tolist(), block_shape.tolist()
    windows = windows_on(sizes, blocks, strides, dilations, pads, "NOTSET")
    whole = [b + s + e for b, s, e in zip(windows.begins, sizes, windows.ends, strict=True)]
    # The place of each element of each block in the padded image, axis by axis.
    places = torch.zeros((), dtype=torch.int64, device=x.device)
    rank = len(sizes)
    for axis in range(rank):
        steps = torch.arange(blocks[axis], device=x.device) * windows.dilations[axis]
        starts = torch.arange(windows.counts[axis], device=x.device) * windows.strides[axis]
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = blocks[axis], windows.counts[axis]
        places = places * whole[axis] + (steps[:, None] + starts).reshape(shape)
    parts = x.reshape(x.shape[0], -1, places.numel())
    flat = x.new_zeros(parts.shape[0], parts.shape[1], torch.Size(whole).numel())
    image = flat.index_add(2, places.reshape(-1), parts)
    image = image.reshape(*flat.shape[:2], *whole)
    for axis, (begin, size) in enumerate(zip(windows.begins, sizes, strict=True)):
        image = image.narrow(2 + axis, begin, size)
    return image


OPERATORS: Table = {
    "Col2Im": _columns_to_image,
    "Conv": convolution,
    "ConvTranspose": _transposed,
}
"""Of the standard domain."""
