"""What a report shows of a run beyond what judges it: sizes and errors by layer, and kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.explain import Explanation, explain_model
from graphopt.layer_errors import LayerError, layer_errors
from graphopt.layer_sizes import LayerSize, layer_sizes
from graphopt.recording import Feed


@dataclass(frozen=True)
class Details:
    """What was looked at closely.

    Attributes:
        sizes: the constants of each layer, by label of the model ("original", "optimized").
        errors: of values inside the result against the original; empty when not compared.
        explanations: kernels and their time, by label of the model; empty when not timed.
        notes: what could not be looked at, and why.
    """

    sizes: Mapping[str, tuple[LayerSize, ...]]
    errors: tuple[LayerError, ...]
    explanations: Mapping[str, Explanation]
    notes: tuple[str, ...]


def look_closely(
    models: Mapping[str, ir.Model],
    feed: Feed | None,
    *,
    provider: str = "cpu",
    threads: int = 1,
    compares: bool = True,
    explains: bool = True,
) -> Details:
    """Look at a model and at what was made of it.

    What onnxruntime cannot do is told in the notes: a run that has gone well is not lost over it.

    Args:
        models: the reference, then the model compared with it, by label; not modified.
        feed: samples that fit both; None runs nothing.
        provider: "cpu" or "cuda".
        threads: intra-op threads where kernels are timed.
        compares: compare the values inside the models.
        explains: time the kernels of both.
    """
    notes = list[str]()
    errors: tuple[LayerError, ...] = ()
    explanations = {}
    first, second = models.values()
    if compares and feed is not None:
        try:
            errors = layer_errors(first, second, feed, provider)
            notes += [] if errors else ["no value is known to be the same in both models"]
        except GraphoptError as error:
            notes.append(f"errors by layer could not be measured: {error}")
    if explains and feed is not None:
        for label, model in models.items():
            try:
                explanations[label] = explain_model(
                    model, feed.samples, provider=provider, threads=threads
                )
            except GraphoptError as error:
                notes.append(f"the kernels of the {label} model could not be timed: {error}")
    sizes = {label: layer_sizes(model) for label, model in models.items()}
    return Details(sizes, errors, explanations, tuple(notes))
