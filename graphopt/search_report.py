"""What `tune` and `sensitivity` found, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt import search_tables
from graphopt.ledger import Step
from graphopt.report import new_table, render_benchmark, render_ledger, render_numerics
from graphopt.sensitivity import Sensitivity
from graphopt.tables import TextTable
from graphopt.tune import Tuning

SHOWN_LAYERS = 20

SHOWN_CHARACTERS = 60
"""Of a pass in text form; it may name every layer."""

SHOWN_PIPELINE = 300
"""Characters of all passes."""


def render_tuning(found: Tuning) -> RenderableType:
    """What was asked for, what was built, what was taken, and the evidence."""
    run = found.run
    parts: list[RenderableType] = [
        Text(search_tables.asked_text(found), style="bold"),
        Text(search_tables.parts_text(found)),
        "",
        *_points(found),
        "",
        render_ledger([_shortened(step) for step in run.steps if step.verdict != "unchanged"]),
        "",
        render_numerics(run.numerics),
    ]
    if run.benchmark is not None:
        parts += ["", render_benchmark(run.benchmark)]
    parts += ["", *_outcome(found)]
    parts += [Text(f"note: {note}", style="dim") for note in (*run.notes, *found.notes)]
    parts += [Text(f"failed: {failure}", style="bold red") for failure in run.failures]
    return Group(*parts)


def _points(found: Tuning) -> Iterator[RenderableType]:
    """What was built, and what layers got in the model that was taken."""
    built = search_tables.points_table(found)
    if built.rows:
        yield _table(built)
    expected = sum(1 for one in found.points if not one.built)
    more = f"; {expected} more points of the front were expected (--json)" if expected else ""
    yield Text(f"{search_tables.effort_text(found)}{more}", style="dim")
    counts = search_tables.option_counts(found)
    if counts:
        yield Text(f"layers: {', '.join(counts)}")


def _outcome(found: Tuning) -> Iterator[RenderableType]:
    """What is proven, what repeats it, and what it comes to."""
    style = "green" if found.certificate.certified else "yellow"
    lines = search_tables.certificate_lines(found)
    yield from (Text(line, style=style) for line in lines[:1])
    yield from map(Text, lines[1:])
    if found.chosen is not None:
        passes = _clipped(found.chosen.passes, SHOWN_PIPELINE)
        yield Text(f"passes after basic: {passes}")
    yield Text(_ratios(found), style="bold")


def _ratios(found: Tuning) -> str:
    original, optimized, report = found.run.original, found.run.optimized, found.run.benchmark
    text = (
        f"bytes {original.stored_bytes:,} -> {optimized.stored_bytes:,} "
        f"({optimized.stored_bytes / original.stored_bytes:.3f}x)"
    )
    if report is not None:
        before, after = report.rows[0], report.rows[-1]
        text += f", latency {before.p50_ms:.3f} -> {after.p50_ms:.3f} ms ({after.ratio:.3f}x)"
    return text if found.chosen is None else f"{text}, {search_tables.metric_text(found)}"


def _shortened(step: Step) -> Step:
    return replace(step, spec=_clipped(step.spec, SHOWN_CHARACTERS))


def _clipped(text: str, maximum: int) -> str:
    return text if len(text) <= maximum else f"{text[:maximum]}… (--json has all)"


def render_sensitivity(found: Sensitivity) -> RenderableType:
    """The most sensitive layers first, what each option does, and what cannot be given."""
    names = found.layers
    shown = search_tables.is_shown(found.probes)
    parts: list[RenderableType] = [
        Text(search_tables.bytes_text(found)),
        *(Text(f"{name}: {summary}", style="dim") for name, summary in found.treatments.items()),
        "",
    ]
    if not names:
        parts.append(Text("no layer of the model can be treated", style="bold"))
    else:
        parts += _effects(search_tables.effect_table(found.probes, names[:SHOWN_LAYERS], shown))
    if len(names) > SHOWN_LAYERS:
        parts.append(Text(f"and {len(names) - SHOWN_LAYERS} layers more (--json)", style="dim"))
    refused = search_tables.refusals_table(found.probes)
    if refused.rows:
        parts += ["", _table(refused)]
    return Group(*parts, *(Text(f"note: {note}", style="dim") for note in found.notes))


def _effects(content: TextTable) -> Sequence[RenderableType]:
    legend = (
        "of an option, given to one layer alone: divergence of the outputs (0 is none), then loss "
        "of agreement in points; - where it cannot be given"
    )
    table = new_table("layer")
    for title in content.columns[2:]:
        # A narrow terminal wraps between the two numbers, and folds the titles.
        treatment, _, option = title.removeprefix(">").rpartition(" ")
        table.add_column(f"{treatment}\n{option}", justify="right", overflow="fold", min_width=5)
    for layer, _, *effects in content.rows:
        table.add_row(layer, *effects)
    return [table, Text(legend, style="dim")]


def _table(content: TextTable) -> Table:
    table = new_table(*content.columns)
    for row in content.rows:
        table.add_row(*row)
    return table
