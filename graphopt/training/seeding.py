"""The global generators of random numbers: torch's, numpy's and Python's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Let all of them begin anew."""
    torch.manual_seed(seed)
    _seed_others(seed)


def seed_loading(seed: int) -> None:
    """Let those of the CPU begin anew: what loads samples draws from them."""
    torch.default_generator.manual_seed(seed)
    _seed_others(seed)


def _seed_others(seed: int) -> None:
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def set_apart() -> Iterator[None]:
    """Within, what is drawn on the CPU and what is seeded is of no effect outside."""
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
