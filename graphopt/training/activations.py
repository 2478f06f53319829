"""Activations that are rounded to codes in training, as `quantize-static` has them.

What a Linear or Conv reads, and what is averaged, is rounded where it is read: to codes of 8 bits
or fewer, without sign, with one scale and one zero point for a tensor, so that 0 is a code. A
Relu, MaxPool or Reshape before that passes codes on as they are, so that what made the value makes
codes too. Ranges are those that were seen, a moving average of the extremes of batches. After a
tenth of training the scale may go on as a learned step size (Esser et al. 2020, arXiv:1902.08153),
for the zero point that it then has.

In the end each rounding is a QuantizeLinear and a DequantizeLinear of the export, with a Clip
before it where codes have fewer than 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphopt.errors import ConfigError
from graphopt.training.grids import Quantized, gradient_factor
from graphopt.training.prepared_weights import matching_layers, straight_through

NAME: Final = "input_rounding"
"""Of the rounding, within the module whose input it rounds."""

RATE: Final = 0.05
"""By which a range follows the extremes of a batch."""

WATCHED: Final = 0.1
"""Of all steps, in which ranges follow what is seen, before scales are learned."""

AVERAGES: Final = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
"""Modules that are no products, and yet their input must be in codes for what made it to make such;
after a Relu or MaxPool it is."""

SMALLEST: Final = torch.finfo(torch.float32).tiny
"""Of scales."""


class InputRounding(nn.Module):
    """Rounds the input of a module to codes whose range is being found.

    Args:
        bits: of a code.
        learns: the scale is trained, once the range was watched.

    Attributes:
        watches: the range follows what is seen.
        seen: lowest and highest number since the range followed last; None if there were none.
    """

    low: Tensor
    high: Tensor
    start: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, learns: bool) -> None:
        super().__init__()
        self.levels = (1 << bits) - 1
        self.learns = learns
        self.watches = True
        self.seen: tuple[Tensor, Tensor] | None = None
        # A scale of 0: nothing was seen yet, and nothing is rounded. Processes that divide a
        # module want parameters of one dimension.
        for name in ("low", "high", "start", "zero_point"):
            self.register_buffer(name, torch.zeros(1))
        # The scale is start * exp(growth), as that of a weight.
        self.growth = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        """The rounded input, float32."""
        numbers = inputs.float()
        if self.training and self.watches:
            self._see(numbers.detach())
        is_known = self.start > 0
        scale = torch.where(is_known, self.start, 1.0) * self.growth.exp()
        if scale.requires_grad:
            is_learned = self.learns and not self.watches
            factor = gradient_factor(numbers[0].numel(), self.levels) if is_learned else 0.0
            scale = straight_through(scale, scale * factor)
        codes = (numbers / scale).clamp(-self.zero_point, self.levels - self.zero_point)
        return torch.where(is_known, straight_through(codes.round(), codes) * scale, numbers)

    def _see(self, numbers: Tensor) -> None:
        low, high = torch.aminmax(numbers)
        if self.seen is not None:
            low, high = torch.minimum(low, self.seen[0]), torch.maximum(high, self.seen[1])
        self.seen = low, high

    def follow(self, low: float, high: float) -> None:
        """Let the range follow the extremes of a batch."""
        if self.start > 0:
            low = float(self.low) + RATE * (low - float(self.low))
            high = float(self.high) + RATE * (high - float(self.high))
        scale, zero_point = code_map(low, high, self.levels)
        for buffer, value in (
            (self.low, low),
            (self.high, high),
            (self.start, scale),
            (self.zero_point, zero_point),
        ):
            buffer.fill_(value)

    def fixed(self) -> FixedRounding | None:
        """The same in its last state; None where no number was ever seen."""
        if not self.start > 0:
            return None
        scale = (self.start * self.growth.exp()).detach().clamp(min=SMALLEST)
        return FixedRounding(scale, int(self.zero_point), self.levels)


def code_map(low: float, high: float, levels: int) -> tuple[float, int]:
    """The scale and zero point with which codes from 0 to `levels` hold a range and 0.

    The same numbers as `quantize-static` chooses.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / levels
    if not scale >= SMALLEST:
        return 1.0, 0
    return scale, min(max(round(-low / scale), 0), levels)


class FixedRounding(nn.Module):
    """Rounds to codes, as QuantizeLinear and DequantizeLinear do.

    Args:
        scale: of one element.
        zero_point: the code of 0.
        levels: the highest code.

    Attributes:
        limits: the numbers of the lowest and the highest code.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("scale", scale.detach().float().reshape(()).clone())
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.uint8))
        ends = torch.tensor([0.0, levels]) - zero_point
        lowest, highest = (ends * self.scale.cpu()).tolist()
        self.limits: tuple[float, float] = (lowest, highest)

    def forward(self, inputs: Tensor) -> Tensor:
        """The rounded input."""
        if torch.onnx.is_in_onnx_export():
            return self._exported(inputs)
        return self.numbers(self.codes(inputs))

    def places(self, inputs: Tensor) -> Tensor:
        """Where numbers lie among the codes, before they are rounded."""
        return inputs / self.scale + self.zero_point

    def codes(self, inputs: Tensor) -> Tensor:
        """The codes of numbers, as float32."""
        return ((inputs / self.scale).round() + self.zero_point).clamp(0, self.levels)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return (codes - self.zero_point) * self.scale

    def _exported(self, inputs: Tensor) -> Tensor:
        if self.levels < 255:
            inputs = inputs.clamp(*self.limits)
        constants = self.scale, self.zero_point
        codes = _node("QuantizeLinear", (inputs, *constants), torch.uint8)
        return _node("DequantizeLinear", (codes, *constants), torch.float32)


def _node(operator: str, inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    shape = inputs[0].shape
    found: Tensor = torch.onnx.ops.symbolic(operator, inputs, dtype=dtype, shape=shape)
    return found


class RoundedActivations:
    """Activations that are rounded in training; see `graphopt.training.preparation.Preparation`."""

    def __init__(self, options: Quantized) -> None:
        self.options = options
        self._placed: dict[str, InputRounding] = {}

    def attach(self, module: nn.Module) -> None:
        """Let the inputs of the chosen modules be rounded.

        Raises:
            ConfigError: there are none, or another preparation rounds one already.
        """
        assert self.options.activations is not None
        learns = self.options.scales == "learned"
        for name, reader in self._readers(module).items():
            rounding = InputRounding(self.options.activations, learns)
            reader.add_module(NAME, rounding)
            reader.register_forward_pre_hook(_round_input)
            self._placed[name] = rounding

    def _readers(self, module: nn.Module) -> dict[str, nn.Module]:
        """The modules whose inputs are rounded, by name: also those of small weights."""
        layers = matching_layers(module, self.options)
        readers = {n: layer for n, layer in layers.items() if not isinstance(layer, nn.Embedding)}
        if not readers:
            raise ConfigError(
                "prepare.activations of 'quantized' rounds what Linear and Conv read, and layers "
                "and skip leave none of them"
            )
        for name, reader in readers.items():
            if hasattr(reader, NAME):
                raise ConfigError(
                    f"[[prepare]]: two 'quantized' with activations have {name!r} among their "
                    "layers; name it in skip of one"
                )
        averages = {n: m for n, m in module.named_modules() if isinstance(m, AVERAGES)}
        return readers | {n: m for n, m in averages.items() if not hasattr(m, NAME)}

    def advance(self, step: int, steps: int) -> None:
        """See `Preparation`."""
        watches = self.options.scales != "learned" or step < math.ceil(WATCHED * steps)
        for rounding in self._placed.values():
            rounding.watches = watches

    def gather(self) -> None:
        """Let ranges follow the extremes of a batch, of all processes together.

        An extreme of extremes is that of the whole batch, however it was divided, so that ranges
        are the same numbers on all processes, and those of a single one.
        """
        found = list(self._placed.values())
        if not any(rounding.watches for rounding in found):
            return
        extremes = torch.stack([_ends(rounding) for rounding in found])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
        for rounding, (negated, high) in zip(found, extremes.tolist(), strict=True):
            rounding.seen = None
            if math.isfinite(negated) and math.isfinite(high):
                rounding.follow(-negated, high)

    def is_settled(self, step: int, steps: int) -> bool:
        """See `Preparation`."""
        return True

    def finish(self, module: nn.Module) -> None:
        """Fix scales and zero points; a module that was never called loses its rounding."""
        for name in self._placed:
            reader = module.get_submodule(name)
            rounding = reader.get_submodule(NAME)
            assert isinstance(rounding, InputRounding)
            fixed = rounding.fixed()
            delattr(reader, NAME)
            if fixed is not None:
                reader.add_module(NAME, fixed)


def _ends(rounding: InputRounding) -> Tensor:
    """What was seen, the lowest number negated; of nothing, what changes no maximum."""
    if rounding.seen is None:
        return rounding.start.new_full((2,), -math.inf)
    low, high = rounding.seen
    return torch.stack([-low, high])


def _round_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook that copies of a module can share: the rounding is the module's own."""
    rounding = getattr(module, NAME, None)
    if rounding is None or not arguments:
        return arguments
    return rounding(arguments[0]), *arguments[1:]
