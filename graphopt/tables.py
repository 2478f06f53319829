"""Results as tables of text, for the terminal and for HTML alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphopt.benchmark import BenchmarkReport
from graphopt.explain import Explanation, Row
from graphopt.layer_errors import LayerError
from graphopt.ledger import Size, Step
from graphopt.validation import OutputError

SHOWN_OPERATORS = 4
SHOWN_SHARE = 0.005
"""Of the time; what takes less, and for no reason that is known, is shown together."""

MARKS = {
    "kept": "kept",
    "unchanged": "nothing to do",
    "rolled back": "ROLLED BACK",
    "too slow": "TOO SLOW",
    "refused": "refused",
}


@dataclass(frozen=True)
class TextTable:
    """Cells as they are to be read.

    Attributes:
        columns: titles; a column whose title begins with `>` is of numbers.
        rows: a text for each column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def ledger_table(steps: Iterable[Step]) -> TextTable:
    """A row for each step; the verdict is last."""
    columns = ("pass", "effect", "what it did", ">nodes", ">bytes", ">seconds", "verdict")
    return TextTable(columns, tuple(map(_ledger_row, steps)))


def _ledger_row(step: Step) -> tuple[str, ...]:
    return (
        step_name(step),
        step.effect.name,
        what_it_did(step),
        f"{step.nodes_after - step.nodes_before:+d}" if step.kept else "",
        f"{step.bytes_after - step.bytes_before:+,d}" if step.kept else "",
        f"{step.seconds:.2f}",
        MARKS[step.verdict],
    )


def step_name(step: Step) -> str:
    """The pass of a step, with the round unless it was the first."""
    return step.spec if step.round == 1 else f"{step.spec} (round {step.round})"


def what_it_did(step: Step) -> str:
    """The changes of a step, what the pass says of them, and why they were not kept."""
    changed = ", ".join(f"{count} × {what}" for what, count in step.changes.items())
    did = "; ".join((*([changed] if changed else []), *step.notes))
    if step.kept and step.latency_ratio is not None:
        did += f" ({step.latency_ratio:.3g} of the latency before)"
    return did if step.reason is None else f"{did + ': ' if did else ''}{step.reason}"


def sizes_text(original: Size, optimized: Size) -> str:
    """Nodes, bytes and opset before and after, in a line."""
    others = f", of these {optimized.other_nodes} of operators that ONNX does not define"
    return (
        f"nodes {original.nodes} -> {optimized.nodes}{others if optimized.other_nodes else ''}, "
        f"bytes {original.stored_bytes:,} -> {optimized.stored_bytes:,} "
        f"({optimized.stored_bytes / original.stored_bytes:.3f}x), "
        f"opset {original.opset} -> {optimized.opset}"
    )


ERROR_COLUMNS = (
    ">max abs",
    ">mean abs",
    ">rel L2",
    ">SQNR dB",
    ">cosine",
    ">same arg-max",
)


def numerics_table(numerics: Mapping[str, Sequence[OutputError]]) -> TextTable:
    """A row for each output and reference."""
    rows = [
        (error.name, reference, *_figures(error))
        for reference, errors in numerics.items()
        for error in errors
    ]
    return TextTable(("output", "reference", *ERROR_COLUMNS), tuple(rows))


def _figures(error: OutputError) -> tuple[str, ...]:
    if error.mismatch is not None:
        return (error.mismatch, "", "", "", "", "")
    agreement = "" if error.disagreement is None else f"{1 - error.disagreement:.2%}"
    if error.identical:
        return ("identical", "0", "0", "inf", "1", agreement)
    return (
        f"{error.max_abs:.2e}",
        f"{error.mean_abs:.2e}",
        f"{error.rel_l2:.2e}",
        f"{error.sqnr_db:.1f}",
        f"{error.cosine:.6f}",
        agreement,
    )


def layer_errors_table(errors: Iterable[LayerError]) -> TextTable:
    """A row for each value, in the order of the model."""
    rows = [(e.error.name, e.operator, e.counterpart, *_figures(e.error)[:5]) for e in errors]
    return TextTable(("value", "made by", "in the original", *ERROR_COLUMNS[:5]), tuple(rows))


def benchmark_table(report: BenchmarkReport) -> TextTable:
    """A row for each model."""
    columns = (
        "model",
        ">p50 ms",
        ">p90 ms",
        ">p99 ms",
        ">ratio",
        ">per second",
        ">load ms",
        ">peak MB",
        ">bytes",
    )
    rows = [
        (
            row.model,
            f"{row.p50_ms:.3f}",
            f"{row.p90_ms:.3f}",
            f"{row.p99_ms:.3f}",
            f"{row.ratio:.3f}",
            "fixed batch" if row.throughput_per_s is None else f"{row.throughput_per_s:,.0f}",
            f"{row.load_ms:.1f}",
            f"{row.peak_rss_bytes / 1e6:.0f}",
            f"{row.stored_bytes:,}",
        )
        for row in report.rows
    ]
    return TextTable(columns, tuple(rows))


def conditions_text(report: BenchmarkReport) -> str:
    """Where and how a benchmark was taken, in a line."""
    rounds = min(row.rounds for row in report.rows)
    threads = _threads(report.threads)
    batch = "" if report.batch_size is None else f"per second at batch {report.batch_size}, "
    return (
        f"{report.provider}, {threads}, {batch}{rounds} interleaved rounds, onnxruntime "
        f"{report.onnxruntime}, {report.cpu}"
    )


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def profile_text(found: Explanation) -> str:
    """Where and how kernels were timed, in a line."""
    return (
        f"{found.provider}, {_threads(found.threads)}, {found.runs} runs, onnxruntime "
        f"{found.onnxruntime}, {found.cpu}"
    )


def kernels_table(found: Explanation) -> TextTable:
    """A row for each kind of kernel; those that take next to nothing are one row together."""
    columns = ("operators", ">count", "kernel", ">us", ">share", "why")
    small = [row for row in found.rows if row.reason is None and row.share < SHOWN_SHARE]
    rows = [_kernel_row(row) for row in found.rows if row not in small]
    if small:
        us = sum(row.us_per_run for row in small)
        count = sum(row.count for row in small)
        share = sum(row.share for row in small)
        rows.append(("others", str(count), "", us_text(us), f"{share:.1%}", ""))
    return TextTable(columns, tuple(rows))


def _kernel_row(row: Row) -> tuple[str, ...]:
    kernel = row.kernel.removeprefix("com.microsoft.")
    return (
        operators_text(row.operators),
        str(row.count),
        kernel if row.element_type is None else f"{kernel} {row.element_type}",
        us_text(row.us_per_run),
        f"{row.share:.1%}",
        row.reason.why if row.reason is not None else "",
    )


def us_text(us: float) -> str:
    """Microseconds, to what can be told apart."""
    return f"{us:,.0f}" if us >= 10 else f"{us:.1f}"


def operators_text(operators: Sequence[str]) -> str:
    """The operators of a kernel, the first few by name."""
    if not operators:
        return "(inserted)"
    more = len(operators) - SHOWN_OPERATORS
    shown = (name.removeprefix("com.microsoft.") for name in operators[:SHOWN_OPERATORS])
    return "+".join(shown) + (f"+{more} more" if more > 0 else "")


def kernels_text(found: Explanation) -> str:
    """What became of the nodes of a model, and the time of a run, in a line."""
    fates = [fate.how for fate in found.fates]
    lost = f"{found.lost_us / found.us_per_run:.0%}" if found.us_per_run else "none"
    return (
        f"nodes {len(fates)} -> {len(found.kernels)} ({fates.count('fused')} fused, "
        f"{fates.count('folded')} folded), {found.us_per_run:,.0f} us per run, {lost} of it in "
        "nodes with a reason"
    )


def what_would_change(found: Explanation) -> list[str]:
    """For each reason why time is lost, what would change it."""
    reasons = dict.fromkeys(row.reason for row in found.rows if row.reason is not None)
    return [f"{reason.why}: {reason.change}" for reason in reasons]
