"""Arithmetic in half precision: where it is used, and gradients that would underflow in it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import torch

from graphopt.training.config import Precision

DTYPES: Final[dict[Precision, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

FIRST_SCALE: Final = 2.0**16
GROWTH_STEPS: Final = 2000
"""Those of `torch.amp.GradScaler`."""


def casts(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Within, torch computes what gains from it in the precision (`torch.autocast`)."""
    enabled = precision != "float32"
    dtype = DTYPES[precision] if enabled else None
    # Without its cache, weights are cast in each forward: those of FSDP come and go.
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


@dataclass
class LossScale:
    """The factor that keeps gradients of float16 above its smallest numbers.

    As `torch.amp.GradScaler` chooses it (Micikevicius et al., arXiv:1710.03740): halved when a
    gradient is not finite, doubled after `GROWTH_STEPS` steps without. That one judges the
    gradients of its own process, and processes with different parameters would disagree on
    whether to take a step; here the norm over all of them decides.

    Attributes:
        factor: of the loss, and so of the gradients.
        good_steps: since it changed last.
        enabled: float16 is in use.
    """

    factor: float = 1.0
    good_steps: int = 0
    enabled: bool = False

    @classmethod
    def of(cls, precision: Precision) -> LossScale:
        """The scale to start from."""
        return cls(FIRST_SCALE, 0, True) if precision == "float16" else cls()

    def update(self, norm: float) -> bool:
        """Learn the norm of all gradients, and say whether the step may be taken."""
        if not self.enabled:
            return True
        if not math.isfinite(norm):
            self.factor, self.good_steps = self.factor / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == GROWTH_STEPS:
            self.factor, self.good_steps = self.factor * 2, 0
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint holds of it."""
        return {"factor": self.factor, "good_steps": float(self.good_steps)}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what a checkpoint holds."""
        self.factor, self.good_steps = state["factor"], int(state["good_steps"])
