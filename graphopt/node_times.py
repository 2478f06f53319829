"""What each node of a model takes when the model runs as deployed."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graphopt.contract import Sample
from graphopt.operators import graphs_and_functions
from graphopt.origins import mark, trace_back
from graphopt.profiling import traced
from graphopt.signature import signature


def node_times(
    model: ir.Model, samples: Iterable[Sample], provider: str = "cpu", *, threads: int = 1
) -> dict[ir.Node, float]:
    """Microseconds in a run of the model, by node.

    What onnxruntime runs as one is counted for the first of its nodes, which is the product where
    activations are fused into it. What it computes at load takes no time.

    Args:
        model: not modified.
        samples: inputs; the runs cycle over the first 8.
        provider: "cpu" or "cuda".
        threads: intra-op threads.

    Raises:
        ModelError: onnxruntime does not load the model.
        SampleError: the model does not run on a sample.
    """
    marked, nodes = mark(model), [n for graph in graphs_and_functions(model) for n in graph]
    times_us = dict.fromkeys(nodes, 0.0)
    with traced(
        marked.model, samples, signature(model), provider=provider, threads=threads
    ) as trace:
        sources = trace_back(marked, trace.model).sources
        for kernel, timing in trace.timings.items():
            for index in sources.get(kernel, ())[:1]:
                times_us[nodes[index]] += timing.us_per_run
    return times_us
