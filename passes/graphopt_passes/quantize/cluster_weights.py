"""cluster-weights: let weights share few numbers, and store which instead of the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.code_fields import fields_of
from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.encoding import FIELD_BYTES, FIRST_OPSET, SCALES_BYTES
from graphopt.errors import SpecError
from graphopt.folded_nodes import CUT_BYTES
from graphopt.saving import stored_bytes
from graphopt_passes.quantize.codebooks import Rounded, fit, stored_scales
from graphopt_passes.quantize.each import parse_each, skip_others
from graphopt_passes.quantize.granularity import WEIGHTS
from graphopt_passes.quantize.kmeans import level_curve, nearest_levels, optimal_levels
from graphopt_passes.quantize.narrow_weights import (
    LEVEL_MAXIMUM,
    Solution,
    Target,
    narrow_scales,
    targets_of,
)
from graphopt_passes.quantize.narrowing import Budget, Form, Narrowing, Problem
from graphopt_passes.quantize.trained_grids import codebook_of, grid_of
from graphopt_passes.share.zeros import unpacked_zeros
from graphopt_passes.simplify.chains import why_refused

CLUSTERS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
"""What is chosen from: 1.6 to 8 bits."""

PROBED_CLUSTERS = 8

SIZE_STEP = 0.02
"""A bit more for each number of a float model."""

ESTIMATED_BINS = 2048
"""Of the histogram by which clusters are only compared."""

SCALED_INPUTS_MINIMUM = 16
"""Rows of fewer numbers have no scale of their own."""


@dataclass(frozen=True)
class ClusterWeights(Pass):
    """Let the numbers of a weight share few values, and store codes into a codebook of them.

    Rows (the numbers of one output) are brought to one scale, and their values are clustered by the
    optimal one-dimensional k-means, weighted by how much the layer's inputs make of an error. Then
    codes, values and scales are fitted in turn to change the layer's outputs least (feedback of
    errors as in GPTQ, coordinate descent, values and scales in closed form), and the bias takes
    back what changed in the means. Without samples, numbers go to the nearest value.

    Codes are packed in 1 to 8 bits, and nodes widen them, which onnxruntime computes when it loads
    the model: it runs as fast, and needs as much memory, as it did before. Behind quantize-static,
    they are widened to int8, and the integer kernels stay.

    Attributes:
        clusters: of every weight; 0 chooses for each.
        bits: for each number on average, codebook and scales included, which the choice may take;
            0 lets `size` or `error` limit it.
        size: of the whole file, as a share of that of the model as it was given; 0 lets `error`
            limit it.
        error: relative L2 error of the worst output that may be added, in its square, on the
            calibration samples. Without samples, of the weights.
        min_elements: smaller weights stay.
        keep_zeros: what is exactly zero stays so, as after pruning.
        each: clusters of single weights, `NAME:COUNT`; all others stay.

    Raises:
        SpecError: one cluster is asked for, or more than one of clusters, bits, size and each.
    """

    name: ClassVar[str] = "cluster-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    max_error: ClassVar[float] = 0.25
    max_latency: ClassVar[float | None] = 1.03

    clusters: Annotated[int, Bounds(0, 256)] = 0
    bits: Annotated[float, Bounds(0.0, 8.0)] = 0.0
    size: Annotated[float, Bounds(0.0, 1.0)] = 0.0
    error: Annotated[float, Bounds(0.0, None)] = 0.1
    min_elements: Annotated[int, Bounds(1)] = 1024
    keep_zeros: bool = False
    each: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters == 1:
            raise SpecError("'cluster-weights' takes 2 clusters or more; 0 lets it choose")
        if sum(map(bool, (self.clusters, self.bits, self.size, self.each))) > 1:
            raise SpecError("'cluster-weights' takes one of clusters, bits, size and each")
        if not all(2 <= count <= CLUSTERS[-1] for count in self._each.values()):
            raise SpecError(f"'cluster-weights' gives each weight 2 to {CLUSTERS[-1]} clusters")

    @property
    def _each(self) -> dict[str, int]:
        return parse_each(self.name, self.each, int, f"of clusters, 2 to {CLUSTERS[-1]}")

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before that of the nodes that are written."""
        return why_refused(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Cluster all weights, or as many and as coarsely as the budget allows."""
        with unpacked_zeros(model, context):
            return self._applied(model, context)

    def _applied(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        counts = (self.clusters,) if self.clusters else CLUSTERS
        forms = [Clusters(count, self.keep_zeros) for count in counts]
        targets = targets_of(model, 1 if self.each else self.min_elements, change)
        probe = Clusters(PROBED_CLUSTERS, self.keep_zeros)
        if not targets:
            return change
        compare = estimates_of_clusters
        narrowing = Narrowing(model, context, forms, probe, compare, change, targets)
        if self.each:
            self._rewrite_each(narrowing)
        else:
            narrowing.run(self._budget(context))
        return change

    def _rewrite_each(self, narrowing: Narrowing) -> None:
        """Cluster the weights that are named, each as it is said."""
        each, names = self._each, [target.name for target in narrowing.targets]
        skip_others(each, names, narrowing.change)
        narrowing.targets = [t for t in narrowing.targets if t.name in each]
        narrowing.rewrite([Clusters(each[t.name], self.keep_zeros) for t in narrowing.targets])

    def _budget(self, context: Context) -> Budget:
        file_bytes = self.size * stored_bytes(context.original) if self.size else None
        return Budget(self.bits or None, self.error, file_bytes)

    def narrow(self) -> ClusterWeights | None:
        """Twice the clusters, a bit more, a larger file, or half the error."""
        if self.each:
            wider = tuple(f"{n}:{min(2 * c, CLUSTERS[-1])}" for n, c in self._each.items())
            return replace(self, each=wider) if wider != self.each else None
        if self.clusters:
            more = replace(self, clusters=min(2 * self.clusters, 256))
            return more if more.clusters > self.clusters else None
        if self.bits:
            return replace(self, bits=self.bits + 1) if self.bits <= 7 else None
        if self.size:
            return replace(self, size=self.size + SIZE_STEP) if self.size <= 0.25 else None
        return replace(self, error=self.error / 2) if self.error >= 0.01 else None


@dataclass(frozen=True)
class Clusters:
    """So many values for all numbers of a weight.

    Attributes:
        count: of clusters.
        keep_zeros: one of them is 0, and what is 0 stays.
    """

    count: int
    keep_zeros: bool = False

    @property
    def label(self) -> str:
        """For the ledger."""
        return f"{self.count} clusters"

    def stored_bytes(self, target: Target) -> int:
        """Of codes, values and scales."""
        fields = fields_of(self.count)
        codes = target.code_bytes(self.count, self.keep_zeros)
        codes += (len(fields) - 1) * FIELD_BYTES
        codes += sum(target.size % field.digits > 0 for field in fields) * CUT_BYTES
        if target.is_integer:
            return codes + self.count
        scales = 2 * target.rows + SCALES_BYTES if _is_scaled(target) else 0
        return codes + 4 * self.count + scales

    def solve(self, problem: Problem) -> Solution:
        """The weight in clusters."""
        trained = _trained(problem, self.count)
        if trained is not None:
            return Solution((trained,), as_trained=True)
        rows = min(_scaled_rows(problem), key=lambda rows: rows.errors([self.count])[self.count])
        found = fit(
            problem.weight,
            rows.start(self.count, self.keep_zeros),
            problem.gram,
            # Those of integers are on a grid, and stay there.
            learns_levels=not problem.target.is_integer,
            learns_scales=_is_scaled(problem.target),
            keeps_zeros=self.keep_zeros,
        )
        return Solution((found,))


def estimates_of_clusters(problem: Problem, forms: Sequence[Form]) -> list[float]:
    """The squared errors of numbers that go to the nearest value."""
    trained = _trained(problem, max(form.count for form in forms if isinstance(form, Clusters)))
    counts = [form.count for form in forms if isinstance(form, Clusters)]
    tried = [rows.errors(counts) for rows in _scaled_rows(problem)]
    return [
        0.0
        if trained is not None and len(trained.levels) <= count
        else min(errors[count] for errors in tried)
        for count in counts
    ]


def _trained(problem: Problem, count: int) -> Rounded | None:
    """The weight in so many values at most, if it has no more already."""
    if not problem.target.is_integer:
        return codebook_of(problem.weight, count)
    found = grid_of(problem.weight, -LEVEL_MAXIMUM, LEVEL_MAXIMUM, signed=False)
    if found is None or len(levels := np.unique(found[0])) > count:
        return None
    codes = np.searchsorted(levels, found[0]).astype(np.uint8)
    return Rounded(codes, levels.astype(np.float32), narrow_scales(found[1]))


def _is_scaled(target: Target) -> bool:
    """Each row has a scale of its own."""
    return target.is_integer or target.inputs >= SCALED_INPUTS_MINIMUM


@dataclass(frozen=True, eq=False)
class _ScaledRows:
    """The rows of a weight, brought to one scale.

    Attributes:
        numbers: over their scales, [rows, inputs].
        scales: as they are stored, [rows, 1].
        counted: what a squared error of each number counts, broadcastable to them.
        on_grid: levels are integers from -127 to 127, of which a scale makes the numbers.
    """

    numbers: np.ndarray
    scales: np.ndarray
    counted: np.ndarray
    on_grid: bool

    def start(self, count: int, keeps_zeros: bool) -> Rounded:
        """So many levels at most, the best for numbers that go to the nearest; without codes."""
        levels, step = self._placed(optimal_levels(self.numbers, self.counted, count, keeps_zeros))
        scales = narrow_scales(self.scales * step) if self.on_grid else self.scales
        codes = np.zeros(self.numbers.shape, np.uint8)
        return Rounded(codes, levels.astype(np.float32), scales)

    def errors(self, counts: Sequence[int]) -> dict[int, float]:
        """The squared errors of so many levels, about."""
        curve = level_curve(self.numbers, self.counted, counts, bins=ESTIMATED_BINS)
        placed = {count: self._placed(levels) for count, levels in curve.items()}
        return {count: self._error(levels * step) for count, (levels, step) in placed.items()}

    def _placed(self, levels: np.ndarray) -> tuple[np.ndarray, float]:
        """Levels as they are stored, and the numbers that one of them is."""
        if not self.on_grid:
            return levels, 1.0
        step = float(np.abs(levels).max()) / LEVEL_MAXIMUM or 1.0
        return np.unique(np.rint(levels / step)), step

    def _error(self, levels: np.ndarray) -> float:
        change = self.numbers - levels[nearest_levels(self.numbers, levels)]
        return float(np.einsum("nk,nk,nk->", self.counted, change, change))


def _scaled_rows(problem: Problem) -> list[_ScaledRows]:
    """The rows brought to the same largest number, and to the same root mean square.

    The one leaves no value that only few rows have numbers near; where values are few, these are
    better spent where most of the numbers are.
    """
    weight = problem.weight
    power = np.mean(np.square(weight, dtype=np.float64), axis=1, keepdims=True)
    if not _is_scaled(problem.target):
        of_rows = [np.full_like(power, np.sqrt(np.mean(power)))]
    else:
        of_rows = [np.abs(weight).max(axis=1, keepdims=True), np.sqrt(power)]
    return [_scaled(problem, np.where(scales > 0, scales, 1.0)) for scales in of_rows]


def _scaled(problem: Problem, scales: np.ndarray) -> _ScaledRows:
    on_grid = problem.target.is_integer
    halves = not on_grid and _is_scaled(problem.target)
    stored = stored_scales(scales) if halves else scales.astype(np.float32)
    wide = np.asarray(stored, np.float32)
    counted = np.broadcast_to(problem.diagonal * np.square(wide), problem.weight.shape)
    return _ScaledRows(problem.weight / wide, stored, counted, on_grid)
