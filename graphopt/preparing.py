"""The model that a search begins with: what lossless passes make of it."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.contract import Context
from graphopt.gate import Gate, interface_of
from graphopt.ledger import Step, size_as_given
from graphopt.pipeline import Pipeline
from graphopt.recipes import plan
from graphopt.subject import Progress, Subject


def lossless(subject: Subject, progress: Progress) -> tuple[ir.Model, tuple[Step, ...]]:
    """What the recipe basic makes of a model, judged on structure alone, and the ledger.

    What comes of it is judged by its outputs, as a whole and against the model as it was given.
    """
    progress("basic")
    working = subject.working_copy(False, True)
    context = Context(
        read_original=lambda: subject.source.model,
        provider=subject.provider,
        progress=progress,
    )
    gate = Gate(
        interface=interface_of(working),
        given=subject.given,
        feed=None,
        loads=False,
        checks=subject.source.invalid is None,
        provider=subject.provider,
    )
    pipeline = Pipeline(
        working,
        size_as_given(subject.source),
        subject.source.external_data(),
        gate,
        context,
        lambda: subject.working_copy(False, True),
    )
    pipeline.run(plan("basic", None, None))
    return pipeline.model, tuple(pipeline.steps)
