"""In which kernels onnxruntime really runs a model, what they take, and why it is not less."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import runtime
from graphopt.benchmark import cpu_name
from graphopt.contract import Sample
from graphopt.kernels import find_reasons
from graphopt.operators import all_graphs
from graphopt.origins import Fates, Marked, mark, operator_of, trace_back
from graphopt.profiling import Trace, traced
from graphopt.reasons import Reason
from graphopt.signature import signature


@dataclass(frozen=True)
class Kernel:
    """A node of the graph that onnxruntime runs.

    Attributes:
        operator: what it is there, `domain.Op` outside the standard domain.
        element_type: of its first input; None when it was not run.
        operators: of the model, that it computes; () where onnxruntime inserted it.
        nodes: the names of these nodes of the model.
        us_per_run: microseconds in a run of the model; None when it was not run.
        provider: short name of the provider that ran it, or None.
        reason: why time is lost here, or None.
    """

    operator: str
    element_type: str | None
    operators: tuple[str, ...]
    nodes: tuple[str, ...]
    us_per_run: float | None
    provider: str | None
    reason: Reason | None


@dataclass(frozen=True)
class Fate:
    """What became of a node of the model.

    Attributes:
        node: its name.
        operator: its operator.
        how: "runs"; "fused" into another node; "folded": computed at load, or not needed.
        kernel: the operator that runs it; None where it is folded.
    """

    node: str
    operator: str
    how: str
    kernel: str | None


@dataclass(frozen=True)
class Row:
    """Kernels of the same operators, kernel and reason.

    Attributes:
        operators: of the model, that each computes.
        kernel: the operator that runs them.
        element_type: of the first input.
        count: how many.
        us_per_run: microseconds of all of them in a run of the model.
        share: of the time of all nodes.
        reason: why time is lost here, or None.
    """

    operators: tuple[str, ...]
    kernel: str
    element_type: str | None
    count: int
    us_per_run: float
    share: float
    reason: Reason | None


@dataclass(frozen=True)
class Explanation:
    """In which kernels a model runs, and why.

    Attributes:
        rows: what takes time for a reason first, most time first; then the rest.
        kernels: all nodes that onnxruntime runs, in order.
        fates: of all nodes of the model but Constant.
        us_per_run: microseconds of all nodes in a run of the model.
        runs: how many runs were profiled.
        provider: "cpu" or "cuda".
        threads: intra-op threads.
        onnxruntime: version.
        cpu: name of the processor model.
        notes: what else a user should know.
    """

    rows: tuple[Row, ...]
    kernels: tuple[Kernel, ...]
    fates: tuple[Fate, ...]
    us_per_run: float
    runs: int
    provider: str
    threads: int
    onnxruntime: str
    cpu: str
    notes: tuple[str, ...]

    @property
    def lost_us(self) -> float:
        """Microseconds per run in nodes that have a reason."""
        return sum(row.us_per_run for row in self.rows if row.reason is not None)

    def _repr_html_(self) -> str:
        """The kernels as a table, for notebooks."""
        from graphopt import html_sections

        return html_sections.explanation(self)


def explain_model(
    model: ir.Model,
    samples: Iterable[Sample],
    *,
    provider: str = "cpu",
    threads: int = 1,
    notes: tuple[str, ...] = (),
) -> Explanation:
    """Run a model as deployed, and explain what runs.

    Args:
        model: not modified.
        samples: inputs; the runs cycle over the first 8. State that they lack is zeros.
        provider: "cpu" or "cuda".
        threads: intra-op threads.
        notes: to pass on.

    Raises:
        ModelError: onnxruntime does not load the model.
        SampleError: the model does not run on a sample.
        RuntimeUnavailable: onnxruntime or the provider is not there.
    """
    marked = mark(model)
    inputs = signature(model)
    with traced(marked.model, samples, inputs, provider=provider, threads=threads) as trace:
        fates = trace_back(marked, trace.model)
        operators = {node: _operators(marked, found) for node, found in fates.sources.items()}
        reasons = find_reasons(trace.model, operators, trace.timings, provider)
        kernels = tuple(
            _kernel(node, trace, marked, fates.sources.get(node, ()), reasons)
            for graph in all_graphs(trace.model)
            for node in graph
        )
        runs = trace.runs
    total_us = sum(kernel.us_per_run or 0.0 for kernel in kernels)
    return Explanation(
        rows=_rows(kernels, total_us),
        kernels=kernels,
        fates=_fates(marked, fates),
        us_per_run=total_us,
        runs=runs,
        provider=provider,
        threads=threads,
        onnxruntime=runtime.version() or "none",
        cpu=cpu_name(),
        notes=notes,
    )


_QUANTIZATION = ("DequantizeLinear", "QuantizeLinear")


def _shown(marked: Marked, indices: tuple[int, ...]) -> tuple[int, ...]:
    """Without the QuantizeLinear and DequantizeLinear of an integer kernel: they say nothing."""
    # By the bare operator: onnxruntime has both in a domain of its own, too.
    others = tuple(i for i in indices if marked.nodes[i].op_type not in _QUANTIZATION)
    return others or indices


def _operators(marked: Marked, indices: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(marked.origins[index].operator for index in _shown(marked, indices))


def _kernel(
    node: ir.Node,
    trace: Trace,
    marked: Marked,
    indices: tuple[int, ...],
    reasons: Mapping[ir.Node, Reason],
) -> Kernel:
    timing = trace.timings.get(node)
    return Kernel(
        operator=operator_of(node),
        element_type=timing.inputs[0] if timing is not None and timing.inputs else None,
        operators=_operators(marked, indices),
        nodes=tuple(marked.origins[index].name for index in indices),
        us_per_run=round(timing.us_per_run, 3) if timing is not None else None,
        provider=timing.provider if timing is not None else None,
        reason=reasons.get(node),
    )


def _rows(kernels: Iterable[Kernel], total_us: float) -> tuple[Row, ...]:
    groups: dict[tuple[object, ...], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        key = kernel.operators, kernel.operator, kernel.element_type, kernel.reason
        groups[key].append(kernel)
    rows = [_row(group, total_us) for group in groups.values()]
    return tuple(sorted(rows, key=lambda row: (row.reason is None, -row.us_per_run)))


def _row(group: list[Kernel], total_us: float) -> Row:
    us_per_run = sum(kernel.us_per_run or 0.0 for kernel in group)
    return Row(
        operators=group[0].operators,
        kernel=group[0].operator,
        element_type=group[0].element_type,
        count=len(group),
        us_per_run=us_per_run,
        share=us_per_run / total_us if total_us else 0.0,
        reason=group[0].reason,
    )


def _fates(marked: Marked, fates: Fates) -> tuple[Fate, ...]:
    found = []
    for index, origin in enumerate(marked.origins):
        if origin.operator == "Constant":
            continue
        kernel = fates.kernels.get(index)
        how = "folded" if kernel is None else "runs" if index in fates.own else "fused"
        name = operator_of(kernel) if kernel is not None else None
        found.append(Fate(origin.name, origin.operator, how, name))
    return tuple(found)
