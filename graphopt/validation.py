"""Outputs of two models on the same samples, compared.

Statistics are accumulated sample by sample, so memory does not grow with their number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from graphopt.contract import Effect
from graphopt.errors import SpecError, did_you_mean

Metric = Literal["rel-l2", "max-abs", "disagreement"]
METRICS: tuple[Metric, ...] = get_args(Metric)

ROUNDING_LIMITS: dict[str, tuple[float, float]] = {
    "float64": (1e-5, 1e-4),
    "float32": (1e-5, 1e-4),
    "float16": (2e-3, 1e-2),
    "bfloat16": (1.6e-2, 8e-2),
}
"""For ROUNDING, by element type: relative L2 error, and largest error over largest magnitude."""


@dataclass(frozen=True)
class OutputError:
    """How far an output of one model is from the same output of another, over all samples.

    Attributes:
        name: of the output.
        dtype: element type of the first model's output.
        count: elements compared.
        identical: every element has the same bits.
        max_abs: the largest absolute difference.
        mean_abs: the mean absolute difference, of finite elements.
        max_magnitude: the largest finite magnitude in the first model's output.
        rel_l2: norm of the difference over norm of the first output; infinite when only the
            latter is 0.
        sqnr_db: the same as a signal to quantization noise ratio, in dB.
        cosine: cosine of the angle between the two outputs.
        disagreement: share of arg-max over the last axis that differs; None unless the output is
            class-like (floating point, last axis of 2 or more, one row or more).
        mismatch: why the outputs cannot be compared number by number, or None: other shapes, NaN
            or infinity in other places, an output missing.
    """

    name: str
    dtype: str
    count: int
    identical: bool
    max_abs: float
    mean_abs: float
    max_magnitude: float
    rel_l2: float
    sqnr_db: float
    cosine: float
    disagreement: float | None
    mismatch: str | None = None


class _Sums:
    """Running sums over one output."""

    def __init__(self, name: str, dtype: np.dtype[Any]) -> None:
        self.name = name
        self.dtype = dtype
        self.count = self.finite = 0
        self.identical = True
        self.max_abs = self.sum_abs = self.max_magnitude = 0.0
        self.square_difference = self.square_first = self.square_second = self.product = 0.0
        self.rows = self.disagreeing = 0
        self.class_like = dtype.kind not in "biuOSU"
        self.mismatch: str | None = None

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        if self.mismatch is not None:
            return
        if first.shape != second.shape or first.dtype != second.dtype:
            self.identical = False
            self.mismatch = (
                f"is {second.dtype}{list(second.shape)}, was {first.dtype}{list(first.shape)}"
            )
            return
        self.count += first.size
        if first.dtype.kind in "OSU":
            self._add_text(first, second)
            return
        same = _same_bits(first, second)
        self.identical = self.identical and same
        if same:
            # Large models agree in most values, which are looked at once then.
            second = first
        self._add_classes(first, second)
        self._add_numbers(first, second)

    def _add_text(self, first: np.ndarray, second: np.ndarray) -> None:
        if not np.array_equal(first, second):
            self.identical, self.mismatch = False, "has other strings"

    def _add_classes(self, first: np.ndarray, second: np.ndarray) -> None:
        self.class_like = self.class_like and first.ndim >= 2 and first.shape[-1] >= 2
        if not self.class_like or not first.size:
            return
        best = first.argmax(-1)
        same = best == (best if second is first else second.argmax(-1))
        self.rows += same.size
        self.disagreeing += int((~same).sum())

    def _add_numbers(self, first: np.ndarray, second: np.ndarray) -> None:
        a = _wide(first)
        if second is first:
            self._add_equal(a[np.isfinite(a)])
            return
        b = _wide(second)
        finite = np.isfinite(a)
        if not finite.all() or not np.isfinite(b).all():
            if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.array_equal(
                finite, np.isfinite(b)
            ):
                self.mismatch = "has NaN or infinity in other places"
                return
            a, b = a[finite], b[finite]
        if not a.size:
            return
        self.finite += a.size
        difference = np.abs(a - b)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.max_magnitude = max(self.max_magnitude, float(np.abs(a).max()))
        self.sum_abs += float(difference.sum())
        self.square_difference += float(np.vdot(difference, difference).real)
        self.square_first += float(np.vdot(a, a).real)
        self.square_second += float(np.vdot(b, b).real)
        self.product += float(np.vdot(a, b).real)

    def _add_equal(self, a: np.ndarray) -> None:
        self.finite += a.size
        square = float(np.vdot(a, a).real)
        self.max_magnitude = max(self.max_magnitude, float(np.abs(a).max(initial=0.0)))
        self.square_first += square
        self.square_second += square
        self.product += square

    def result(self) -> OutputError:
        noise, signal = math.sqrt(self.square_difference), math.sqrt(self.square_first)
        rel_l2 = noise / signal if signal else (math.inf if noise else 0.0)
        norms = signal * math.sqrt(self.square_second)
        return OutputError(
            name=self.name,
            dtype=str(self.dtype),
            count=self.count,
            identical=self.identical,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / self.finite if self.finite else 0.0,
            max_magnitude=self.max_magnitude,
            rel_l2=rel_l2,
            sqnr_db=_decibels(rel_l2),
            cosine=min(1.0, self.product / norms) if norms else float(noise == 0),
            disagreement=self.disagreeing / self.rows if self.class_like and self.rows else None,
            mismatch=self.mismatch,
        )


def _decibels(rel_l2: float) -> float:
    if rel_l2 == 0:
        return math.inf
    return -20 * math.log10(rel_l2) if rel_l2 < math.inf else -math.inf


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Every element has the same bits; NaN equals NaN whatever its payload."""
    if first.tobytes() == second.tobytes():
        return True
    if first.dtype.kind in "biu":
        return False
    unequal = first.reshape(-1, 1).view(np.uint8) != second.reshape(-1, 1).view(np.uint8)
    rows = unequal.any(axis=1)
    a, b = first.reshape(-1)[rows], second.reshape(-1)[rows]
    return bool(np.isnan(a).all() and np.isnan(b).all())


def _wide(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "c":
        return array.astype(np.complex128).reshape(-1)
    return array.astype(np.float64).reshape(-1)


class Comparison:
    """Accumulates the differences between two models' outputs."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def add(self, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
        """Compare the outputs of both models on one sample."""
        for name, array in first.items():
            sums = self._sums.setdefault(name, _Sums(name, array.dtype))
            if name in second:
                sums.add(array, second[name])
            else:
                sums.identical, sums.mismatch = False, "is missing"
        for name in second.keys() - first.keys():
            sums = self._sums.setdefault(name, _Sums(name, second[name].dtype))
            sums.identical, sums.mismatch = False, "was not there before"

    def outputs(self) -> tuple[OutputError, ...]:
        """The result for every output, in order."""
        return tuple(sums.result() for sums in self._sums.values())


def worst(outputs: Iterable[OutputError]) -> float:
    """The largest relative L2 error; infinite where outputs cannot be compared."""
    errors = [math.inf if output.mismatch is not None else output.rel_l2 for output in outputs]
    return max(errors, default=0.0)


# ------------------------------------------------------------------ verdicts


@dataclass(frozen=True)
class Budget:
    """How much error a lossy run may make: `[OUTPUT:]X[METRIC]`.

    Attributes:
        limit: the largest error allowed.
        metric: of the error. An output of norm 0 is judged by its largest difference instead.
        output: the output that the budget is for; None for every output.
    """

    limit: float
    metric: Metric = "rel-l2"
    output: str | None = None

    def __str__(self) -> str:
        metric = "" if self.metric == "rel-l2" else self.metric
        short = f"{self.limit:g}"
        limit = short if float(short) == self.limit else repr(self.limit)
        return (f"{self.output}:" if self.output else "") + f"{limit}{metric}"


_BUDGET = re.compile(
    r"(?:(?P<output>.+):)?(?P<limit>\d*\.?\d+(?:[eE][+-]?\d+)?) ?"
    r"(?P<metric>rel-l2|max-abs|disagreement)?"
)


def parse_budget(text: str) -> Budget:
    """A budget from its text form, for example `0.01`, `logits:0.02max-abs`, `0.01disagreement`.

    Raises:
        SpecError: the text is not of that form.
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            f"{text!r} is not an error budget; write [OUTPUT:]X[METRIC] with METRIC one of rel-l2, "
            "max-abs, disagreement, for example 0.01 or logits:0.5max-abs"
        )
    metric: Metric = next((m for m in METRICS if m == match["metric"]), "rel-l2")
    return Budget(float(match["limit"]), metric, match["output"])


def why_over(
    effect: Effect,
    outputs: Sequence[OutputError],
    budgets: Sequence[Budget] = (),
    computed_in: Mapping[str, str] | None = None,
) -> str | None:
    """Why the outputs differ more than the effect allows, or None when they do not.

    Args:
        effect: EXACT asks for identical bits, ROUNDING for `ROUNDING_LIMITS`, LOSSY for `budgets`.
        outputs: the comparison.
        budgets: for LOSSY; one that names an output takes precedence there.
        computed_in: for ROUNDING, a coarser element type that an output was computed in, by name;
            its limits count.
    """
    for output in outputs:
        reason = output.mismatch or _why_one_over(effect, output, budgets, computed_in or {})
        if reason is not None:
            return f"output {output.name!r} {reason}"
    return _why_unmeasured(outputs, budgets) if effect is Effect.LOSSY else None


def _why_unmeasured(outputs: Sequence[OutputError], budgets: Sequence[Budget]) -> str | None:
    """Which budget judges nothing: it would be passed whatever the error."""
    names = [output.name for output in outputs]
    for budget in budgets:
        if budget.output is not None and budget.output not in names:
            near = did_you_mean(budget.output, names)
            return f"the budget {budget} is for an output that is not there{near}"
        judged = [o for o in outputs if budget.output in (None, o.name) and not o.identical]
        if budget.metric != "disagreement" or not judged:
            continue
        if all(o.disagreement is None for o in judged):
            return (
                f"the budget {budget} is on arg-max, and no output that it judges has classes "
                "(floating point, last axis of 2 or more)"
            )
    return None


def _why_one_over(
    effect: Effect, output: OutputError, budgets: Sequence[Budget], computed_in: Mapping[str, str]
) -> str | None:
    if effect is Effect.LOSSY:
        return _why_over_budget(output, budgets)
    if effect is Effect.EXACT:
        return _why_not_exact(output)
    # An element of an output that is a sequence or map is called `name[key]`.
    whole = output.name.partition("[")[0]
    return _why_not_rounding(output, computed_in.get(output.name, computed_in.get(whole)))


def _why_not_exact(output: OutputError) -> str | None:
    if output.identical:
        return None
    return f"is not bit-identical (largest difference {output.max_abs:.3g})"


def _why_not_rounding(output: OutputError, computed_in: str | None) -> str | None:
    if output.identical:
        return None
    if output.dtype not in ROUNDING_LIMITS:
        # Not by the differences alone: in float64, neighbouring int64 may be equal.
        whole = output.dtype.startswith(("int", "uint", "bool"))
        return "has other values" if whole or output.max_abs else None
    rel_l2, max_abs = max(ROUNDING_LIMITS[kind] for kind in (output.dtype, computed_in) if kind)
    if not output.rel_l2 <= rel_l2:
        return f"has relative L2 error {output.rel_l2:.3g}, over {rel_l2:g} for rounding"
    if not output.max_abs <= max_abs * output.max_magnitude:
        return (
            f"has largest difference {output.max_abs:.3g}, over {max_abs:g} of its largest "
            f"magnitude {output.max_magnitude:.3g}"
        )
    return None


def _why_over_budget(output: OutputError, budgets: Sequence[Budget]) -> str | None:
    own = [b for b in budgets if b.output == output.name]
    for budget in own or [b for b in budgets if b.output is None]:
        metric, error = _measure(output, budget.metric)
        if error is not None and not error <= budget.limit:
            return f"has {metric} error {error:.3g}, over the budget {budget}"
    return None


def _measure(output: OutputError, metric: Metric) -> tuple[Metric, float | None]:
    if metric == "disagreement":
        return metric, output.disagreement
    if metric == "max-abs" or math.isinf(output.rel_l2):
        return "max-abs", output.max_abs
    return metric, output.rel_l2
