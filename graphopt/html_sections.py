"""Results as HTML tables: for notebooks, and for the report, which has figures beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from graphopt import search_tables, tables
from graphopt.contract import Skip
from graphopt.explain import Explanation
from graphopt.layer_errors import LayerError
from graphopt.layer_sizes import LayerSize, bytes_by_name, dtype_totals
from graphopt.ledger import Run, Step
from graphopt.markup import Markup, element, joined
from graphopt.tables import TextTable
from graphopt.trade_offs import Candidate, Sensitivity

if TYPE_CHECKING:
    from graphopt.api import Validation
    from graphopt.benchmark import BenchmarkReport
    from graphopt.probing import Probe
    from graphopt.sensitivity import Sensitivity as LayerSensitivity
    from graphopt.tune import Tuning

SHOWN_ROWS = 300
"""Of a table by layer; what is below is counted."""

LONG = 40
"""Characters of a text that is read rather than looked up."""

SHOWN_NODES = 20
"""Of nodes that were left alone for one reason."""

SIGNS = {
    "kept": "✓",
    "unchanged": "·",
    "rolled back": "✗",
    "too slow": "◷",
    "refused": "⊘",
}
"""A verdict is told by its sign and its word; colours only repeat it."""


def run(found: Run) -> Markup:
    """The ledger, the numerics and the benchmark of a run."""
    parts = [ledger(found.steps), element("p", tables.sizes_text(found.original, found.optimized))]
    if found.numerics:
        parts.append(table(tables.numerics_table(found.numerics), "Outputs against the original"))
    if found.benchmark is not None:
        parts.append(benchmark(found.benchmark))
    return joined(*parts, remarks(found.notes, found.failures))


def validation(found: Validation) -> Markup:
    """The errors of all outputs, and the notes."""
    errors = table(tables.numerics_table(found.numerics), "Outputs of the second model")
    failures = [found.failure] if found.failure is not None else []
    return joined(errors, remarks(found.notes, failures))


def benchmark(found: BenchmarkReport) -> Markup:
    """The figures of each model, and how they were measured."""
    figures = table(tables.benchmark_table(found), "Latency, load time, memory and bytes")
    return joined(figures, element("p", tables.conditions_text(found), class_="quiet"))


def explanation(found: Explanation, caption: str = "Kernels that run, and their time") -> Markup:
    """Kernels, what they take, why, and what would change it."""
    parts = [
        table(tables.kernels_table(found), caption),
        element("p", tables.kernels_text(found)),
        element("p", tables.profile_text(found), class_="quiet"),
    ]
    changes = tables.what_would_change(found)
    if changes:
        parts += [element("p", "What would change it:"), _list(changes)]
    return joined(*parts, remarks(found.notes))


def remarks(notes: Iterable[str], failures: Iterable[str] = ()) -> Markup:
    """What else a user should know."""
    lines = [element("p", element("strong", "✗ Failed: "), text) for text in failures]
    lines += [element("p", element("strong", "Note: "), text) for text in notes]
    return joined(*lines)


def table(content: TextTable, caption: str, rows_maximum: int = SHOWN_ROWS) -> Markup:
    """A table that scrolls inside itself where it is too wide.

    Args:
        content: the first column is that of the headings of rows.
        caption: what it shows.
        rows_maximum: further rows are left out, and counted in the caption.
    """
    columns = zip(content.columns, *content.rows, strict=True)
    kinds = [_kind(title, cells) for title, *cells in columns]
    head = [
        element("th", title.removeprefix(">"), scope="col", **kind)
        for title, kind in zip(content.columns, kinds, strict=True)
    ]
    left_out = len(content.rows) - rows_maximum
    if left_out > 0:
        caption += f" (the first {rows_maximum:,} rows of {len(content.rows):,})"
    body = [element("tr", *_cells(row, kinds)) for row in content.rows[:rows_maximum]]
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", element("tr", *head)),
            element("tbody", *body),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def _cells(row: Sequence[str], kinds: Sequence[Mapping[str, str]]) -> list[Markup]:
    first, *others = zip(row, kinds, strict=True)
    cells = [element("td", text, **kind) for text, kind in others]
    return [element("th", first[0], scope="row", **first[1]), *cells]


def _kind(title: str, cells: Iterable[str]) -> dict[str, str]:
    """Of a column: numbers stand under each other, and long texts are given room."""
    if title.startswith(">"):
        return {"class_": "number"}
    return {"class_": "long"} if max(map(len, cells), default=0) > LONG else {}


def _list(items: Iterable[str]) -> Markup:
    return element("ul", *(element("li", item) for item in items))


# ------------------------------------------------------------------ the ledger


def ledger(steps: Sequence[Step]) -> Markup:
    """What acted, in a table, and under it each step, to be opened."""
    acted = [step for step in steps if step.verdict != "unchanged"]
    idle = [step.spec for step in steps if step.verdict == "unchanged"]
    parts = [element("p", "No pass acted.")]
    if acted:
        parts = [table(_with_signs(acted), "What each pass did")]
    told = [step for step in steps if step.verdict != "unchanged" or step.skips or step.notes]
    parts += map(_step, told)
    if idle:
        parts.append(element("p", f"Nothing to do: {', '.join(idle)}.", class_="quiet"))
    return joined(*parts)


def _with_signs(steps: Sequence[Step]) -> TextTable:
    """The ledger with the verdict where a narrow screen shows it."""
    content = tables.ledger_table(steps)
    name, *columns, verdict = content.columns
    rows = [
        (first, f"{SIGNS[step.verdict]}\N{NO-BREAK SPACE}{judged}", *cells)
        for step, (first, *cells, judged) in zip(steps, content.rows, strict=True)
    ]
    return TextTable((name, verdict, *columns), tuple(rows))


def _step(step: Step) -> Markup:
    left = f", {len(step.skips):,} left alone" if step.skips else ""
    summary = element(
        "summary",
        element("span", SIGNS[step.verdict], aria_hidden="true", class_="sign"),
        element("code", tables.step_name(step)),
        f" {tables.MARKS[step.verdict]}{left}",
    )
    facts = [
        ("effect", step.effect.name),
        ("nodes", f"{step.nodes_before:,} -> {step.nodes_after:,}"),
        ("bytes", f"{step.bytes_before:,} -> {step.bytes_after:,}"),
        ("seconds", f"{step.seconds:.2f}"),
        ("error budget", step.max_error),
        ("latency over that before", _ratio_text(step.latency_ratio)),
        ("why not kept", step.reason),
    ]
    parts = [definitions(facts)]
    if step.changes:
        did = [f"{count:,} × {what}" for what, count in step.changes.items()]
        parts += [element("p", "What it did:"), _list(did)]
    if step.notes:
        parts += [element("p", "Notes:"), _list(step.notes)]
    if step.skips:
        parts += [element("p", "What it left alone, and why:"), _list(_reasons(step.skips))]
    return element("details", summary, *parts)


def _ratio_text(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.3g}"


def _reasons(skips: Iterable[Skip]) -> list[Markup]:
    by_reason: dict[str, list[str]] = {}
    for skip in skips:
        by_reason.setdefault(skip.reason, []).append(skip.node)
    return [_reason(reason, nodes) for reason, nodes in by_reason.items()]


def _reason(reason: str, nodes: Sequence[str]) -> Markup:
    # A node in each of many rounds, or many nodes without a name of their own.
    counted = [(node, sum(1 for _ in group)) for node, group in groupby(sorted(nodes))]
    shown = [node if n == 1 else f"{node} ({n} times)" for node, n in counted[:SHOWN_NODES]]
    more = len(counted) - SHOWN_NODES
    names = ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
    return joined(f"{reason}: ", element("span", names, class_="names"))


def definitions(facts: Iterable[tuple[str, str | None]]) -> Markup:
    """Names and what they are; those that are not known are left out."""
    pairs = [(name, text) for name, text in facts if text is not None]
    return element(
        "dl", *(element("div", element("dt", n), element("dd", text)) for n, text in pairs)
    )


# ------------------------------------------------------------------ by layer


def layer_errors(errors: Sequence[LayerError]) -> Markup:
    """Every value that was compared, in the order of the model."""
    caption = "Values inside the model against their counterparts in the original"
    return table(tables.layer_errors_table(errors), caption)


def dtype_sizes(sizes: Mapping[str, Sequence[LayerSize]]) -> Markup:
    """The bytes of constants by element type, of each model."""
    totals = {label: dtype_totals(layers) for label, layers in sizes.items()}
    kinds = list(dict.fromkeys(kind for found in totals.values() for kind in found))
    rows = [(kind, *(f"{found.get(kind, 0):,}" for found in totals.values())) for kind in kinds]
    rows.append(("all", *(f"{sum(found.values()):,}" for found in totals.values())))
    columns = ("element type", *(f">{label}" for label in totals))
    return table(TextTable(columns, tuple(rows)), "Bytes of constants by element type")


def layer_sizes(sizes: Mapping[str, Sequence[LayerSize]]) -> Markup:
    """The bytes of constants by layer, of each model, and the element types of them."""
    by_name = [bytes_by_name(layers) for layers in sizes.values()]
    names = dict.fromkeys(name for found in by_name for name in found)
    rows = [
        (name, *(text for found in by_name for text in _size_cells(found.get(name))))
        for name in names
    ]
    columns = ["layer"]
    for label in sizes:
        columns += [f">{label} bytes", f"{label} element types"]
    caption = "Bytes of constants by layer, in the order of the models"
    return table(TextTable(tuple(columns), tuple(rows)), caption)


def _size_cells(dtype_bytes: Mapping[str, int] | None) -> tuple[str, str]:
    if dtype_bytes is None:
        return ("", "")
    return (f"{sum(dtype_bytes.values()):,}", ", ".join(dtype_bytes))


# ------------------------------------------------------------------ searches


def candidates(tried: Sequence[Candidate]) -> Markup:
    """Models that were tried, smallest first; the chosen one is marked."""
    rows = [
        (
            _candidate_text(one),
            f"{one.size_ratio:.3f}",
            "" if one.latency_ratio is None else f"{one.latency_ratio:.3f}",
            f"{one.drop:.3g}",
        )
        for one in sorted(tried, key=lambda one: (one.size_ratio, one.drop, one.name))
    ]
    columns = ("model", ">size", ">latency", ">drop")
    return table(TextTable(columns, tuple(rows)), "Models that were tried, over the original")


def _candidate_text(one: Candidate) -> str:
    if one.chosen:
        return f"★ {one.name} (chosen)"
    return f"{one.name} (expected, not built)" if one.expected else one.name


def tuning(found: Tuning) -> Markup:
    """What was asked for, what was built, what is proven, and the evidence of the run."""
    parts = [
        element("p", search_tables.asked_text(found)),
        element("p", search_tables.parts_text(found)),
        table(search_tables.points_table(found), "Models that were built, over the original"),
        element("p", search_tables.effort_text(found), class_="quiet"),
        *(element("p", line) for line in search_tables.certificate_lines(found)),
    ]
    return joined(*parts, remarks(found.notes), run(found.run))


def layer_options(found: Tuning) -> Markup:
    """What each layer got."""
    return table(search_tables.layer_options_table(found), "What each layer got")


def sensitivity(found: LayerSensitivity) -> Markup:
    """What options do to layers, the most sensitive first, and what cannot be given."""
    return joined(
        element("p", search_tables.bytes_text(found)),
        treatments(found),
        effects(found.probes, found.layers),
        remarks(found.notes),
    )


def treatments(found: LayerSensitivity) -> Markup:
    """What was tried, a line each."""
    return definitions(found.treatments.items())


def effects(probes: Sequence[Probe], layers: Sequence[str]) -> Markup:
    """What options do to layers, and which layers cannot be given them, and why.

    Args:
        probes: of all layers.
        layers: in the order that is shown.
    """
    caption = (
        "Divergence of the outputs (0 is none), then loss of agreement in points where it was "
        "measured; - where a layer cannot be given the option"
    )
    parts = [table(search_tables.effect_table(probes, layers, lambda _: True), caption)]
    refused = search_tables.refusals_table(probes)
    if refused.rows:
        parts.append(table(refused, "What layers cannot be given, and why"))
    return joined(*parts)


def sensitivities(found: Sensitivity) -> Markup:
    """A row for each layer, a column for each option."""
    rows = [
        (layer, *("" if drop is None else f"{drop:.3g}" for drop in drops))
        for layer, drops in zip(found.layers, found.drops, strict=True)
    ]
    columns = ("layer", *(f">{option}" for option in found.options))
    return table(TextTable(columns, tuple(rows)), f"Layer by layer: {found.measure}")
