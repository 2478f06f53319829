"""share-rows: store rows of a weight that are nearly multiples of each other once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from scipy.linalg import cholesky

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.encoding import FIRST_OPSET, NODES_BYTES, Encoding, Rows
from graphopt.packing import repeats_rows
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.quantize.codebooks import damped
from graphopt_passes.quantize.granularity import WEIGHTS
from graphopt_passes.quantize.narrow_weights import (
    Solution,
    Target,
    correct_bias,
    put,
    targets_of,
    write,
)
from graphopt_passes.quantize.narrowing import Problem, problem_of
from graphopt_passes.share.near_rows import distinct_rows, fit_rows, leaders_of
from graphopt_passes.simplify.chains import why_refused

SIMILARITY_STEP = 1e-3
"""Nearer to 1, only equal rows and multiples are left to try."""


@dataclass(frozen=True)
class ShareRows(Pass):
    """Store rows of a weight that are nearly multiples of each other once.

    A row is the numbers of one output of a Conv, Gemm or MatMul, or of one entry of a table. Where
    the |cosine| of two is at least `similarity`, both become multiples of one row: which row each
    is, and its factor, are stored in their place, as Gather and Mul, which onnxruntime computes
    when it loads the model. Only the file becomes smaller. With samples, the cosine is that of the
    layer's outputs, the shared row and the factors are those that change these least, and the bias
    takes back what changed in the means.

    Rows join leaders, whose multiples they are but for sqrt(1 - similarity^2) of their outputs at
    most; the row that a group shares in the end is the best for all of them. Equal rows lose
    nothing. Of trained weights few rows are so near, but for tables with entries that training
    never met, layers with dead outputs, and filters of few numbers.

    Attributes:
        similarity: the smallest |cosine| of rows that become one; 1 stands for equal rows and
            multiples.
        min_elements: smaller weights stay.
    """

    name: ClassVar[str] = "share-rows"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    max_error: ClassVar[float] = 0.25
    max_latency: ClassVar[float | None] = 1.03

    similarity: Annotated[float, Bounds(0.5, 1.0)] = 0.98
    min_elements: Annotated[int, Bounds(1)] = 1024

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before that of the nodes that are written."""
        return why_refused(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Share rows in each weight where that takes fewer bytes."""
        change = Change()
        targets = [t for t in targets_of(model, self.min_elements, change) if _is_open(t, change)]
        asked = [question for target in targets for question in target.asked]
        answers = context.observe(model, asked) if asked and context.observer is not None else {}
        solutions, before, after = {}, 0, 0
        for index, target in enumerate(targets):
            context.progress(f"comparing rows of weight {index + 1} of {len(targets)}")
            problem = problem_of(target, answers)
            try:
                rows = self._rows(problem, context)
            except Misfit as reason:
                change.skip(target.value, str(reason))
                continue
            solutions[index] = _solution(problem, rows)
            before, after = before + target.rows, after + rows.table.shape[rows.axis]
            change.count(f"weight of {target.operator} stored as shared rows")
        write(model, targets, solutions, context)
        if solutions:
            change.note(f"{before:,} rows stored as {after:,}")
        return change

    def narrow(self) -> ShareRows | None:
        """Half as far from 1, and equal rows and multiples in the end."""
        if self.similarity == 1:
            return None
        distance = (1 - self.similarity) / 2
        return replace(
            self, similarity=round(1 - distance, 6) if distance > SIMILARITY_STEP else 1.0
        )

    def _rows(self, problem: Problem, context: Context) -> Rows:
        """The smallest form of the weight: with near rows shared, or equal ones alone.

        Raises:
            Misfit: neither takes fewer bytes.
        """
        target, gram = problem.target, problem.gram
        own = target.matrix(target.dtype.numpy().type)
        first, kind = distinct_rows(own)
        equal = _stored(target, own[first], kind, None)
        distinct = problem.weight[first]
        seen = distinct if gram is None else distinct @ _root(gram)
        generator = context.generator(f"share-rows {target.name}")
        leader = leaders_of(seen, self.similarity, generator)
        table, group, factors = fit_rows(own[first], seen, np.bincount(kind), leader)
        if len(table) == len(own):
            raise Misfit("no two of its rows are alike")
        near = _stored(target, table, group[kind], factors[kind])
        sized = [(equal, equal.stored_bytes), (near, near.stored_bytes + _bias_bytes(problem))]
        best, stored_bytes = min(sized, key=lambda pair: pair[1])
        if stored_bytes + NODES_BYTES >= target.stored_bytes:
            spared = len(own) - len(table)
            raise Misfit(f"{spared} of its {len(own)} rows could go, which saves no bytes")
        return best


def _is_open(target: Target, change: Change) -> bool:
    """Rows of the weight can be shared; if not, the reason is told."""
    reason = _why_not(target)
    if reason is not None:
        change.skip(target.value, reason)
    return reason is None


def _why_not(target: Target) -> str | None:
    if target.value.producer() is not None:
        return "it is stored narrow already"
    if any(repeats_rows(use.node) for use in target.value.uses()):
        return "it holds shared rows"
    if target.row_axis is None:
        return "its rows lie along no single axis"
    return None


def _root(gram: np.ndarray) -> np.ndarray:
    """R with R R^T the Gram matrix, damped; of those of several groups of channels, their mean."""
    known = damped(gram if gram.ndim == 2 else gram.mean(axis=0))
    return np.asarray(cholesky(known, lower=True), np.float32)


def _bias_bytes(problem: Problem) -> int:
    """Of the bias that a layer gets which had none."""
    layer = problem.target.layer
    has_none = problem.means is not None and layer is not None and layer.bias() is None
    return 4 * problem.target.rows if has_none else 0


def _stored(
    target: Target, table: np.ndarray, index: np.ndarray, factors: np.ndarray | None
) -> Rows:
    """Shared rows as the weight lies, without factors where all are 1."""
    assert target.row_axis is not None
    if factors is not None and (factors == 1).all():
        factors = None
    return Rows(target.stored_rows(table), index, target.row_axis, factors)


def _solution(problem: Problem, rows: Rows) -> Solution:
    """Shared rows in the place of a weight, and what the bias has to make good for."""

    def put_rows(target: Target, solution: Solution, encoding: Encoding, context: Context) -> None:
        put(target, partial(encoding.repeated, rows), encoding)
        correct_bias(target, solution, encoding, context)

    return Solution((), problem.shift(problem.target.rows_of(rows.numbers())), put_rows)
