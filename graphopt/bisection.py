"""What was found out about a model that came out wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from graphopt.contract import Effect
from graphopt.deviations import Deviation
from graphopt.reproducer import Reproducer
from graphopt.validation import OutputError

TrialVerdict = Literal["within", "over", "adds up", "unchanged", "refused"]


@dataclass(frozen=True)
class Trial:
    """What one pass did to the outputs.

    Attributes:
        spec: the pass in text form.
        effect: what it may do to the outputs.
        verdict: within its tolerance; over it; adds up: over it only together with what passes
            before it did; unchanged (it found nothing to do); or refused (by the pass).
        reason: for over, adds up and refused.
        changes: how often each kind of rewrite was done.
        round: see `graphopt.ledger.Step`.
    """

    spec: str
    effect: Effect
    verdict: TrialVerdict
    reason: str | None = None
    changes: Mapping[str, int] = field(default_factory=dict)
    round: int = 1


@dataclass(frozen=True)
class Origin:
    """Where the error begins.

    Attributes:
        node: of the wrong model; its name, or that of its first output.
        operator: `Op`, or `domain.Op` outside the standard domain.
        value: what it makes.
        value_before: the same in the original.
        reads: the last values before it that are compared, by their names in the original.
        nodes: of the wrong model between those and the value, in order.
        begins: the error that these nodes add makes the outputs wrong by itself; False where errors
            of several places have to come together, and this is the largest.
        total: error of the value, with what reaches it, on the samples with the largest errors.
        own: the same where the nodes are given the values of the original.
        causes: what is wrong with them, as far as it can be told.
    """

    node: str
    operator: str
    value: str
    value_before: str
    reads: tuple[str, ...]
    nodes: tuple[str, ...]
    begins: bool
    total: OutputError
    own: OutputError
    causes: tuple[str, ...]


@dataclass(frozen=True)
class Bisection:
    """What was found out about a model that came out wrong.

    Attributes:
        reason: why the outputs are over their tolerance, or None where nothing is wrong.
        guilty: the pass that is to blame, in text form; None where no single one is, or where two
            models were compared.
        trials: the passes, in order, up to the one that is to blame.
        tolerance: what the outputs were judged by, in words.
        numerics: errors of the outputs over all samples, by reference.
        origin: where the error begins; None where outputs cannot be compared, or no value inside
            the models shows it.
        deviations: of values inside, in topological order.
        reproducer: the smallest models that show it; None where it could not be cut out.
        notes: what else a user should know.
    """

    reason: str | None
    guilty: str | None
    trials: tuple[Trial, ...]
    tolerance: str
    numerics: Mapping[str, tuple[OutputError, ...]]
    origin: Origin | None
    deviations: tuple[Deviation, ...]
    reproducer: Reproducer | None
    notes: tuple[str, ...]

    @property
    def found(self) -> bool:
        """Something is wrong."""
        return self.reason is not None

    def save(self, folder: str | Path) -> None:
        """Write the reproducer; see `Reproducer.save`. Does nothing where there is none.

        Raises:
            ModelError: the folder cannot be made or written to.
        """
        if self.reproducer is not None:
            self.reproducer.save(Path(folder))
