"""Weights as integers of few bits, a scale for each block: the forms that quantize-weights gives.

A row of K inputs is cut into blocks, and a number is its code's integer times the scale of its
block. The integers are those of two's complement, of which one more is below zero than above, and
scales have signs: the side of a block that needs it gets the one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np

from graphopt.encoding import SCALES_BYTES
from graphopt_passes.quantize.codebooks import REFITS, Floats, Rounded, fit, nearest
from graphopt_passes.quantize.hqq import half_quadratic_scales
from graphopt_passes.quantize.narrow_weights import Solution, Target
from graphopt_passes.quantize.narrowing import Form, Problem
from graphopt_passes.quantize.trained_grids import rounded_on_grid

Method = Literal["auto", "nearest", "hqq", "gptq"]

SHARES = tuple(1.1 - 0.05 * step for step in range(14))
"""Of the scale at which the largest number of a block gets the lowest integer: 1.1 to 0.45."""

ROOM = 2.0
"""Scales that are stored in 8 bits may grow by so much when they are refitted."""


@dataclass(frozen=True)
class Integers:
    """So many bits for each number of a weight.

    Attributes:
        bits: of a code.
        block: inputs that share a scale; 0 for all of a row. What does not divide the row becomes
            the next larger number that does.
        method: how scales and codes are chosen: "nearest" gives the largest number of a block the
            last integer; the others search for the scale of the least squared error. "hqq" then
            moves it so that a few large numbers count less, and "gptq" refits it in turn with codes
            that have feedback, by the Gram of the inputs. "auto" is "gptq" where there is a Gram,
            else "hqq".
        scale_type: of scales in the file, of which the largest number is known to `finfo`.
        pads: the last block of a row may have fewer inputs than the others.
    """

    bits: int
    block: int = 0
    method: Method = "auto"
    scale_type: Any = np.float16
    pads: bool = False

    @property
    def label(self) -> str:
        """For the ledger."""
        where = f"in blocks of {self.block}" if self.block else "with a scale for each row"
        return f"{self.bits}-bit integers {where}"

    @property
    def levels(self) -> Floats:
        """The integers, float32 of shape [2^bits]."""
        half = 1 << (self.bits - 1)
        return np.arange(-half, half, dtype=np.float32)

    def blocks_of(self, target: Target) -> int:
        """How many blocks a row has."""
        if self.pads:
            return -(-target.inputs // self.block)
        return target.blocks_of(0 if target.is_integer else block_of(target.inputs, self.block))

    def stored_bytes(self, target: Target) -> int:
        """Of codes, integers and scales."""
        codes = target.code_bytes(1 << self.bits)
        if target.is_integer:
            # Its scales are there already.
            return codes + (1 << self.bits)
        scales = target.rows * self.blocks_of(target)
        scale_bytes = SCALES_BYTES + scales * int(np.dtype(self.scale_type).itemsize)
        return codes + (4 << self.bits) + scale_bytes

    def solve(self, problem: Problem) -> Solution:
        """The weight in this form."""
        trained = self.trained(problem)
        if trained is not None:
            return Solution((trained,), as_trained=True)
        return Solution((self.rounded(problem),))

    def trained(self, problem: Problem) -> Rounded | None:
        """The weight in codes, if it lies on this grid already."""
        target = problem.target
        weight, _, _ = self._padded(problem.weight, None, problem.diagonal)
        kind = np.float32 if target.is_integer else self.scale_type
        found = rounded_on_grid(
            weight, self.blocks_of(target), self.levels, kind, signed=not target.is_integer
        )
        return None if found is None else replace(found, codes=found.codes[:, : target.inputs])

    def rounded(self, problem: Problem) -> Rounded:
        """The weight in codes."""
        method = self.method
        if problem.gram is None and method in ("auto", "gptq"):
            method = "hqq"
        gram = problem.gram if method in ("auto", "gptq") else None
        weight, gram, counted = self._padded(problem.weight, gram, problem.diagonal)
        start = self._start(weight, counted, problem.target, method)
        refits = 0 if gram is None else REFITS
        found = fit(weight, start, gram, learns_levels=False, keeps_zeros=True, refits=refits)
        return replace(found, codes=found.codes[:, : problem.target.inputs])

    def nearest_error(self, problem: Problem) -> float:
        """The squared error, by the diagonal of the Gram, of nearest codes at the best scales."""
        if self.trained(problem) is not None:
            return 0.0
        weight, _, counted = self._padded(problem.weight, None, problem.diagonal)
        start = self._start(weight, counted, problem.target, "gptq")
        change = fit(weight, start, None, False, False, refits=0).numbers() - weight
        return float(
            np.einsum("nk,nk,nk->", np.broadcast_to(counted, change.shape), change, change)
        )

    def _padded(
        self, weight: Floats, gram: Floats | None, counted: Floats
    ) -> tuple[Floats, Floats | None, Floats]:
        """With zeros for inputs that are not there, so that all blocks are whole."""
        missing = -weight.shape[1] % self.block if self.pads else 0
        if not missing:
            return weight, gram, counted
        after = ((0, 0), (0, missing))
        if gram is not None:
            gram = np.pad(gram, ((0, 0),) * (gram.ndim - 2) + ((0, missing),) * 2)
        counted = np.pad(np.broadcast_to(counted, (len(counted), weight.shape[1])), after)
        return np.pad(weight, after), gram, counted

    def _start(self, weight: Floats, counted: Floats, target: Target, method: Method) -> Rounded:
        """Scales to begin with; no codes yet."""
        blocks, levels = self.blocks_of(target), self.levels
        rows = weight.reshape(len(weight) * blocks, -1)
        scales = largest_scales(rows, levels)
        # Those of an integer kernel are positive.
        scales, signs = (np.abs(scales), (1,)) if target.is_integer else (scales, (1, -1))
        if method != "nearest":
            each = np.broadcast_to(counted, weight.shape).reshape(rows.shape)
            scales = searched_scales(rows, levels, scales, each, signs)
        if method == "hqq":
            scales = half_quadratic_scales(rows, levels, scales)
        scale_type = np.float32 if target.is_integer else self.scale_type
        stored, factor = stored_scales(scales.reshape(len(weight), blocks), scale_type)
        return Rounded(np.zeros(weight.shape, np.uint8), levels * np.float32(factor), stored)


def block_of(inputs: int, block: int) -> int:
    """The least number of inputs, no less than asked for, that divides a row; 0 for all of it."""
    if not block:
        return 0
    return next(size for size in range(min(block, inputs), inputs + 1) if not inputs % size)


def stored_scales(scales: Floats, scale_type: Any) -> tuple[Floats, float]:
    """Scales as the file holds them, none of them 0 or infinite, and a factor of all.

    That is 1 but for 8 bits, which do not reach far.
    """
    limits = ml_dtypes.finfo(scale_type)  # type: ignore[no-untyped-call]
    sizes, factor = np.abs(scales), 1.0
    if np.dtype(scale_type).itemsize == 1:
        factor = float(sizes.max()) * ROOM / float(limits.max)
    sizes = np.clip(sizes / factor, float(limits.tiny), float(limits.max))
    return np.asarray(np.where(scales < 0, -sizes, sizes).astype(scale_type)), factor


def largest_scales(rows: Floats, levels: Floats) -> Floats:
    """The scales at which the largest magnitude of each row gets the lowest level: [rows, 1]."""
    at = np.abs(rows).argmax(axis=1)[:, np.newaxis]
    scales = np.take_along_axis(rows, at, axis=1) / levels[0]
    return np.asarray(np.where(scales != 0, scales, 1.0), np.float32)


def searched_scales(
    rows: Floats, levels: Floats, whole: Floats, counted: Floats, signs: Sequence[int] = (1, -1)
) -> Floats:
    """The scales, of a few, at which the nearest levels are least wrong.

    Args:
        rows: float32 of shape [rows, inputs], one block each.
        levels: increasing, of shape [levels].
        whole: the scales of which shares are tried, [rows, 1].
        counted: what a squared error of each number counts, of the shape of the rows.
        signs: that are tried.

    Returns:
        float32 of shape [rows, 1].
    """
    best, least = whole, np.full(whole.shape, np.inf, np.float32)
    for share in (sign * share for sign in signs for share in SHARES):
        scales = whole * np.float32(share)
        change = levels[nearest(rows / scales, levels)] * scales - rows
        errors = np.einsum("nk,nk,nk->n", counted, change, change)[:, np.newaxis]
        best, least = np.where(errors < least, scales, best), np.minimum(errors, least)
    return np.asarray(best)


def estimates_of_integers(problem: Problem, forms: Sequence[Form]) -> list[float]:
    """The squared errors of numbers that go to the nearest integer, at the best scales."""
    return [form.nearest_error(problem) for form in forms if isinstance(form, Integers)]
