"""What the user requires of the result: `size<=0.3,latency<=0.9`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.errors import SpecError, did_you_mean
from graphopt.ledger import Run

FIGURES: dict[str, str] = {
    "size": "bytes on disk, optimized over original",
    "latency": "median latency, optimized over original",
    "nodes": "number of nodes, optimized over original",
    "error": "relative L2 error of the worst output, as deployed",
}
"""What can be required, and what each figure means."""

_FORM = re.compile(r"(?P<figure>[^\s<>=]*) ?(?P<sign>[<>=]*) ?(?P<limit>[^\s<>=]*)")
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Requirement:
    """An upper limit on one figure of the result.

    Attributes:
        figure: one of `FIGURES`.
        limit: the limit; a ratio, or for "error" a relative error.
        strict: the limit itself is too much (`<`, not `<=`).
    """

    figure: str
    limit: float
    strict: bool = False

    def __str__(self) -> str:
        return f"{self.figure}{'<' if self.strict else '<='}{self.limit!r}"

    def why_failed(self, figures: Mapping[str, float | None]) -> str | None:
        """Why the requirement does not hold, or None when it does.

        Args:
            figures: measured figures by name; None or missing where one was not measured.
        """
        value = figures.get(self.figure)
        if value is None:
            return f"{self} is required, and {self.figure} was not measured"
        if value < self.limit or (value == self.limit and not self.strict):
            return None
        return f"{self} is required, and {self.figure} is {value:.4g}"


def parse_requirements(text: str) -> tuple[Requirement, ...]:
    """Requirements from their text form, for example `size<=0.3,latency<0.9`.

    Raises:
        SpecError: the text is not of that form, or a figure is unknown.
    """
    return tuple(_parse(part.strip()) for part in text.split(","))


def _parse(part: str) -> Requirement:
    match = _FORM.fullmatch(part)
    if match is None or not (match["figure"] and match["sign"]):
        raise SpecError(
            f"{part!r} is not a requirement; write FIGURE<=LIMIT, for example size<=0.3"
        )
    if match["figure"] not in FIGURES:
        near = did_you_mean(match["figure"], FIGURES)
        raise SpecError(f"{part!r} requires an unknown figure {match['figure']!r}{near}")
    if match["sign"] not in ("<", "<="):
        raise SpecError(
            f"{part!r} compares by {match['sign']!r}; every figure is better when it is lower, so "
            "write <= or <"
        )
    if not _NUMBER.fullmatch(match["limit"]):
        raise SpecError(
            f"{part!r} has the limit {match['limit']!r}; it must be a number, as in 0.3"
        )
    return Requirement(match["figure"], float(match["limit"]), match["sign"] == "<")


def unmet(requirements: Sequence[Requirement], run: Run) -> tuple[str, ...]:
    """Why requirements do not hold for a run; nothing of those that do."""
    original, optimized = run.original, run.optimized
    figures: dict[str, float | None] = {
        "size": optimized.stored_bytes / original.stored_bytes,
        "nodes": optimized.nodes / original.nodes if original.nodes else None,
        "latency": run.benchmark.rows[-1].ratio if run.benchmark is not None else None,
        "error": max((o.rel_l2 for o in run.numerics.get("as deployed", ())), default=None),
    }
    reasons = (one.why_failed(figures) for one in requirements)
    return tuple(reason for reason in reasons if reason is not None)
