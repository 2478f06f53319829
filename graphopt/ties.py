"""Whether two models that round activations differ by how ties between codes are broken alone.

They do where all of this holds: the same maps round them, to the bit; without rounding, which makes
them smooth, their outputs agree as those of other models must; and with it, they are no farther
from each other than rounding moves the one and the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from graphopt.contract import Effect
from graphopt.operators import opset_of
from graphopt.recording import Recording, compare
from graphopt.roundings import CLIP_OPSET, roundings_of, why_other_maps, without_rounding
from graphopt.validation import OutputError, why_over


@dataclass
class Rounded:
    """A model that rounds activations, and what it gives.

    Attributes:
        model: is not modified.
        outputs: of it.
        run: gives the outputs of another model on the same samples.
    """

    model: ir.Model
    outputs: Recording
    run: Callable[[ir.Model], Recording]

    @cached_property
    def smooth(self) -> Recording:
        """The outputs where activations are not rounded."""
        return self.run(without_rounding(self.model))

    @cached_property
    def moved(self) -> tuple[OutputError, ...]:
        """By what rounding moves the outputs."""
        (errors,) = compare(iter(self.outputs), [self.smooth])
        return errors


def rounded_of(
    model: ir.Model, outputs: Recording, run: Callable[[ir.Model], Recording]
) -> Rounded | None:
    """A clone of a model, if it rounds activations; None where ties cannot be told apart.

    The arguments are as of `Rounded`.
    """
    rounds = next(roundings_of(model), None) is not None
    if not rounds or opset_of(model) < CLIP_OPSET:
        return None
    return Rounded(model.clone(), outputs, run)


def why_not_ties(
    before: Rounded, after: Rounded, effect: Effect, computed_in: Mapping[str, str]
) -> str | None:
    """What ties do not explain; None where nothing is left.

    Args:
        before: the model that is compared with.
        after: the other one.
        effect: that is allowed, EXACT or ROUNDING.
        computed_in: see `why_over`.
    """
    reason = why_other_maps(before.model, after.model)
    if reason is not None:
        return reason
    (errors,) = compare(iter(after.smooth), [before.smooth])
    reason = why_over(effect, errors, computed_in=computed_in)
    if reason is not None:
        return f"{reason}, and that without rounding of activations"
    (changes,) = compare(iter(after.outputs), [before.outputs])
    for change, *moved in zip(changes, before.moved, after.moved, strict=True):
        most = sum(error.rel_l2 for error in moved)
        if change.mismatch is not None or not change.rel_l2 <= most:
            return (
                f"output {change.name!r} {change.mismatch or f'moves by {change.rel_l2:.3g}'}; "
                f"rounding of activations moves it by {most:.3g} at most"
            )
    return None
