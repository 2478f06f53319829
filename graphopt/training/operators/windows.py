"""Windows that move over the axes behind the first two: pads, sizes, and their contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Windows:
    """Where windows lie on an input; one number for each of its axes behind the first two.

    Attributes:
        sizes: elements of a window.
        strides: from one window to the next.
        dilations: from one element of a window to the next.
        begins: elements that are added before the input.
        ends: elements that are added behind it, for windows that all lie within.
        counts: how many windows there are.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def are_symmetric(self) -> bool:
        """As much is added before as behind."""
        return self.begins == self.ends


def windows_on(
    shape: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: bool = False,
) -> Windows:
    """The windows that the attributes of a convolution or of a pooling describe.

    Args:
        shape: of the input, without its first two axes.
        sizes: of a window.
        strides: 1 where not given.
        dilations: likewise.
        pads: all that is added before, then all that is added behind; where `auto_pad` is NOTSET.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
        ceil_mode: a last window may reach over the end, but not begin there.
    """
    rank = len(shape)
    strides = tuple(strides or [1] * rank)
    dilations = tuple(dilations or [1] * rank)
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(sizes, dilations, strict=True)]
    pads = [0] * (2 * rank) if pads is None or auto_pad != "NOTSET" else list(pads)
    if auto_pad.startswith("SAME"):
        missing = [
            max((-(-size // stride) - 1) * stride + span - size, 0)
            for size, stride, span in zip(shape, strides, spans, strict=True)
        ]
        lesser, greater = [m // 2 for m in missing], [m - m // 2 for m in missing]
        pads = lesser + greater if auto_pad == "SAME_UPPER" else greater + lesser
    begins, ends, counts = pads[:rank], pads[rank:], []
    for axis, (size, stride, span) in enumerate(zip(shape, strides, spans, strict=True)):
        room = size + begins[axis] + ends[axis] - span
        count = (-(-room // stride) if ceil_mode else room // stride) + 1
        if ceil_mode and (count - 1) * stride >= size + begins[axis]:
            count -= 1
        counts.append(count)
        if ceil_mode:
            ends[axis] = max((count - 1) * stride + span - size - begins[axis], ends[axis])
    return Windows(tuple(sizes), strides, dilations, tuple(begins), tuple(ends), tuple(counts))


def padded(x: Tensor, windows: Windows, value: float = 0) -> Tensor:
    """The input with what is added to it."""
    if not any(windows.begins) and not any(windows.ends):
        return x
    # torch wants the last axis first.
    sides = zip(reversed(windows.begins), reversed(windows.ends), strict=True)
    return functional.pad(x, [pad for side in sides for pad in side], value=value)


def contents(x: Tensor, windows: Windows) -> Tensor:
    """The elements of all windows: of shape [batch, channels, *counts, elements of a window].

    Args:
        x: the input with what is added to it.
        windows: over its axes behind the first two.
    """
    rank = len(windows.sizes)
    for axis in range(rank):
        starts = torch.arange(windows.counts[axis], device=x.device) * windows.strides[axis]
        steps = torch.arange(windows.sizes[axis], device=x.device) * windows.dilations[axis]
        places = (starts[:, None] + steps).reshape(-1)
        # Axes of windows stay in place, those of their elements go to the end.
        part = x.index_select(2 + axis, places)
        shape = part.shape
        part = part.reshape(
            *shape[: 2 + axis], windows.counts[axis], windows.sizes[axis], *shape[3 + axis :]
        )
        x = part.movedim(3 + axis, -1)
    return x.flatten(2 + rank)
