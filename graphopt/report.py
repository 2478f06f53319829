"""Results as text for a terminal."""

from __future__ import annotations

import inspect
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt import tables
from graphopt.api import Validation
from graphopt.benchmark import BenchmarkReport
from graphopt.contract import Effect, Pass
from graphopt.demo import DemoFiles, Demonstration
from graphopt.explain import Explanation
from graphopt.inspection import Inspection, Port, Weight
from graphopt.json_report import share_of, summary
from graphopt.layer_costs import LayerCost, zero_share_of
from graphopt.ledger import Run, Size, Step
from graphopt.packed_sizes import PackedWeight
from graphopt.recipes import Recipe
from graphopt.scenarios import Scenario
from graphopt.sharing import Sharing
from graphopt.spec import describe_type, options_of
from graphopt.tables import TextTable
from graphopt.treatments import Treatment
from graphopt.validation import OutputError

if TYPE_CHECKING:
    from graphopt.training.heal import Healed

SHOWN_DUPLICATES = 8
SHOWN_NAMES = 3
SHOWN_PACKED = 10
SHOWN_LAYERS = 10
SHOWN_SIZES = 6


_STYLES = {"kept": "green", "rolled back": "red", "too slow": "yellow", "refused": "yellow"}


def render_run(run: Run) -> RenderableType:
    """The ledger, the numerics, the benchmark and the notes of a run."""
    parts: list[RenderableType] = [render_ledger(run.steps)]
    if run.numerics:
        parts += ["", render_numerics(run.numerics)]
    if run.benchmark is not None:
        parts += ["", render_benchmark(run.benchmark)]
    parts += ["", _sizes_line(run.original, run.optimized)]
    parts += [Text(f"note: {note}", style="dim") for note in run.notes]
    parts += [Text(f"failed: {failure}", style="bold red") for failure in run.failures]
    return Group(*parts)


def _sizes_line(original: Size, optimized: Size) -> Text:
    return Text(tables.sizes_text(original, optimized), style="bold")


def render_ledger(steps: Sequence[Step]) -> RenderableType:
    """One row per step that acted, and the names of the others."""
    acted = [step for step in steps if step.verdict != "unchanged"]
    idle = [step.spec for step in steps if step.verdict == "unchanged"]
    rest = Text(f"nothing to do: {', '.join(idle)}", style="dim")
    table = tables.ledger_table(acted)
    filled = new_table(*table.columns)
    for step, (*cells, verdict) in zip(acted, table.rows, strict=True):
        filled.add_row(*cells, Text(verdict, style=_STYLES[step.verdict]))
    return Group(*([filled] if acted else []), *([rest] if idle else []))


def render_numerics(numerics: Mapping[str, Sequence[OutputError]]) -> Table:
    """One row per output and reference."""
    return _filled(tables.numerics_table(numerics))


def render_benchmark(report: BenchmarkReport) -> RenderableType:
    """One row per model, and how it was measured."""
    conditions = Text(tables.conditions_text(report), style="dim")
    return Group(_filled(tables.benchmark_table(report)), conditions)


def render_validation(found: Validation) -> RenderableType:
    """The errors of all outputs, and the notes."""
    notes = [Text(f"note: {note}", style="dim") for note in found.notes]
    return Group(render_numerics(found.numerics), *notes)


def render_healed(found: Healed) -> RenderableType:
    """What learnt, the error over the minutes, and the outputs before and after."""
    curve = new_table(">minutes", ">steps", ">error of held-out outputs")
    for point in found.curve:
        curve.add_row(f"{point.minutes:.1f}", f"{point.steps:,}", f"{point.error:.3g}")
    forms = ", ".join(f"{count} {form}" for form, count in found.weights.items())
    learnt, judged = found.samples
    lines = [
        f"{sum(found.weights.values())} weights of {found.elements:,} numbers learnt ({forms}), "
        f"from {learnt} samples and {found.features} values that both models compute",
        f"judged by {judged} samples; nodes, formats and bytes of weights are as they were",
    ]
    numerics = render_numerics({"before": found.before, "healed": found.after})
    notes = [Text(f"note: {note}", style="dim") for note in found.notes]
    return Group(curve, "", numerics, "", *(Text(line) for line in lines), *notes)


def render_sharing(found: Sharing) -> RenderableType:
    """One row per model, and what they take together."""
    table = new_table("model", ">bytes before", ">graph", ">weights", ">of these shared")
    for model in found.models:
        table.add_row(
            str(model.path),
            f"{model.bytes_before:,}",
            f"{model.graph_bytes:,}",
            f"{model.weight_bytes:,}",
            f"{model.shared_bytes:,}",
        )
    lines = [
        f"bytes {found.bytes_before:,} -> {found.bytes_after:,} "
        f"({found.bytes_after / found.bytes_before:.3f}x)"
    ]
    if found.data is not None:
        lines.append(
            f"all read {found.data}: {found.data_bytes:,} bytes, distinct tensors "
            f"{found.distinct_bytes:,}"
        )
    notes = [Text(f"note: {note}", style="dim") for note in found.notes]
    return Group(table, "", *(Text(line, style="bold") for line in lines), *notes)


def render_inspection(found: Inspection, tried: Run, groups: bool = False) -> RenderableType:
    """What is in a model, and what `basic` would do to it; with `groups`, what goes together."""
    facts = new_table("", "")
    facts.show_header = False
    for port in found.inputs:
        facts.add_row("input", _port_text(port))
    for port in found.outputs:
        facts.add_row("output", _port_text(port))
    facts.add_row("opset", ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in found.opsets.items()))
    facts.add_row("IR version", str(found.ir_version))
    graphs = f", {found.subgraphs} subgraphs" if found.subgraphs else ""
    facts.add_row("nodes", f"{found.nodes}{graphs}")
    facts.add_row("operators", ", ".join(f"{n} {op}" for op, n in found.operators.items()))
    if found.functions:
        facts.add_row("functions", ", ".join(found.functions))
    for row in _weight_rows(found):
        facts.add_row(*row)
    for output, name in found.state:
        facts.add_row("state?", f"--state {output}={name}")
    if found.random_operators:
        facts.add_row("random", ", ".join(found.random_operators))
    kept = [s for s in tried.steps if s.kept]
    parts: list[RenderableType] = [facts, ""]
    if found.macs or any(layer.macs is None for layer in found.layers):
        parts += [*_layers(found), ""]
    if groups:
        parts += [_groups(found), ""]
    if kept:
        parts += [Text("basic would:", style="bold"), render_ledger(kept)]
        parts += [_sizes_line(tried.original, tried.optimized)]
    else:
        parts += [Text("basic would change nothing", style="bold")]
    return Group(*parts)


def _weight_rows(found: Inspection) -> Iterator[tuple[str, str]]:
    for kind in found.weights:
        yield (
            "weights",
            f"{kind.tensors} of {kind.dtype}, {kind.elements:,} elements, {kind.bytes:,} bytes",
        )
    for weight in found.largest:
        yield "large", f"{_port_text(weight)}, {weight.bytes:,} bytes"
    for packed in sorted(found.packed, key=lambda p: -p.elements)[:SHOWN_PACKED]:
        yield "packed", _packed_text(packed)
    if found.packed:
        yield "", _packed_sum(found.packed)
    if found.bits_per_weight is not None:
        yield "parameters", f"{found.parameters:,}, {found.bits_per_weight:.2f} bits each"
    for group in found.duplicates[:SHOWN_DUPLICATES]:
        names = ", ".join(group.names[:SHOWN_NAMES])
        more = f" and {len(group.names) - SHOWN_NAMES} more" * (len(group.names) > SHOWN_NAMES)
        yield "duplicates", f"{names}{more}: {group.saved_bytes:,} bytes"
    if len(found.duplicates) > SHOWN_DUPLICATES:
        yield "", f"and {len(found.duplicates) - SHOWN_DUPLICATES} groups more (--json)"
    if found.zero_share is not None:
        yield "zeros", f"{found.zero_share:.1%} of the floating-point weights"


def _groups(found: Inspection) -> RenderableType:
    """The groups of units that can only be removed together, and why some cannot."""
    table = new_table("group", ">units", "made by", "read by", "removable")
    for group in found.groups:
        made, read = ([e["node"] for e in group[side]] for side in ("producers", "consumers"))
        why = f"no: {group['frozen']}" if group["frozen"] else "yes"
        table.add_row(group["name"], str(group["units"]), _some(made), _some(read), why)
    return table


def _some(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    distinct = list(dict.fromkeys(names))
    more = len(distinct) - SHOWN_NAMES
    return ", ".join(distinct[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _layers(found: Inspection) -> Iterator[RenderableType]:
    """The layers with the most multiply-accumulates, and what the numbers stand for."""
    table = new_table(">MACs", ">share", ">parameters", ">zeros", "operator", "layer")
    order = sorted(found.layers, key=_layer_rank, reverse=True)
    for layer in order[:SHOWN_LAYERS]:
        table.add_row(*_layer_row(layer, found.macs))
    rest = order[SHOWN_LAYERS:]
    if rest:
        macs, parameters = sum(r.macs or 0 for r in rest), sum(r.parameters for r in rest)
        share, label = _share_text(share_of(macs, found.macs)), f"{len(rest)} more (--json)"
        table.add_row(f"{macs:,}", share, f"{parameters:,}", "", "", label)
    zeros = _share_text(zero_share_of(found.layers))
    table.add_row(f"{found.macs:,}", "", f"{found.parameters:,}", zeros, "", "all", style="bold")
    yield table
    for note in _layer_notes(found):
        yield Text(f"note: {note}", style="dim")


def _layer_rank(layer: LayerCost) -> tuple[int, int]:
    return -1 if layer.macs is None else layer.macs, layer.parameters


def _layer_row(layer: LayerCost, whole: int) -> list[str]:
    return [
        "?" if layer.macs is None else f"{layer.macs:,}",
        _share_text(share_of(layer.macs, whole)),
        f"{layer.parameters:,}",
        _share_text(layer.zero_share),
        layer.op_type.removeprefix("com.microsoft."),
        layer.name if layer.body_of is None else f"{layer.name} (in {layer.body_of})",
    ]


def _share_text(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _layer_notes(found: Inspection) -> Iterator[str]:
    if found.sizes:
        sizes = _first([f"{name} = {size}" for name, size in found.sizes.items()])
        other = f"; --size NAME=N says another {_first(found.assumed)}" if found.assumed else ""
        yield f"MACs at {sizes}{other}"
    unknown = Counter(layer.op_type for layer in found.layers if layer.macs is None)
    if unknown:
        operators = ", ".join(f"{count} {op_type}" for op_type, count in unknown.items())
        yield f"not in the sum, for want of a shape or of what the operator does: {operators}"
    if any(layer.body_of is not None for layer in found.layers):
        yield "bodies of Loop and Scan count for one iteration, and both branches of an If"


def _first(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - SHOWN_SIZES} more" if len(texts) > SHOWN_SIZES else ""
    return ", ".join(texts[:SHOWN_SIZES]) + more


def _packed_text(packed: PackedWeight) -> str:
    """What one packed weight takes: `w: float[64, 96], 4.25 bits each (16 levels, 4-bit codes)`."""
    of_codes = [f"{packed.levels} levels"] if packed.levels is not None else []
    if packed.code_bits is not None:
        of_codes.append(f"{packed.code_bits:.2g}-bit codes")
    if packed.zero_share is not None:
        of_codes.append(f"{packed.zero_share:.0%} zeros")
    inside = f" ({', '.join(of_codes)})" if of_codes else ""
    return (
        f"{_port_text(packed)}, {packed.bits_per_weight:.2f} bits each{inside}, "
        f"{packed.stored_bytes:,} bytes, {packed.memory_bytes:,} in memory, widened "
        f"{packed.widened}"
    )


def _packed_sum(packed: Sequence[PackedWeight]) -> str:
    elements = sum(p.elements for p in packed)
    stored_bytes = sum(p.stored_bytes for p in packed)
    memory_bytes = sum(p.memory_bytes for p in packed)
    return (
        f"all {len(packed)}: {elements:,} numbers, {8 * stored_bytes / elements:.2f} bits each, "
        f"{stored_bytes:,} bytes, {memory_bytes:,} in memory"
    )


def render_explanation(found: Explanation) -> RenderableType:
    """Kernels, what they take, why, and what would change it."""
    changes = [Text(f"- {line}") for line in tables.what_would_change(found)]
    parts: list[RenderableType] = [
        Text(tables.profile_text(found), style="dim"),
        _filled(tables.kernels_table(found)),
        "",
        Text(tables.kernels_text(found), style="bold"),
    ]
    if changes:
        parts += ["", Text("what would change it:", style="bold"), *changes]
    return Group(*parts, *(Text(f"note: {note}", style="dim") for note in found.notes))


def _port_text(port: Port | Weight | PackedWeight) -> str:
    """As errors about samples write it: `image: float[batch, 1, 8, 8]`."""
    if port.shape is None:
        return f"{port.name}: {port.dtype}[?]"
    dims = ", ".join("?" if d is None else str(d) for d in port.shape)
    return f"{port.name}: {port.dtype}[{dims}]"


def render_passes(
    classes: Sequence[type[Pass]],
    recipes: Mapping[str, Recipe],
    treatments: Mapping[str, Treatment],
    scenarios: Mapping[str, Scenario],
) -> RenderableType:
    """All passes, a line each, the recipes, and what tune and sensitivity choose from."""
    table = new_table("pass", "effect", "what it does")
    for cls in classes:
        table.add_row(cls.name, _effect_text(cls), summary(cls))
    lines: list[RenderableType] = [table]
    for name, recipe in recipes.items():
        lines += ["", Text(f"recipe {name}: {recipe.summary}", style="bold"), Text(recipe.passes)]
    return Group(*lines, "", _treatments(treatments), "", _scenarios(scenarios))


def _treatments(treatments: Mapping[str, Treatment]) -> Table:
    table = new_table("treatment of a layer", "options", "what it does")
    for name, one in treatments.items():
        table.add_row(name, ", ".join(one.options), one.summary)
    return table


def _scenarios(scenarios: Mapping[str, Scenario]) -> Table:
    table = new_table("scenario of tune", "least", "on", "what it is for")
    for name, one in scenarios.items():
        table.add_row(name, one.objective, one.provider, one.summary)
    return table


def _effect_text(cls: type[Pass]) -> str:
    if cls.effect is Effect.LOSSY:
        return f"{cls.effect.name} (rel-l2 {cls.max_error:g})"
    return cls.effect.name


def render_pass(cls: type[Pass]) -> RenderableType:
    """One pass: what it does, in its own words, and its options."""
    head = Text(f"{cls.name} ({_effect_text(cls)})", style="bold")
    table = new_table("option", "is", "default")
    for option in options_of(cls).values():
        bounds = f", {option.bounds}" if option.bounds is not None else ""
        table.add_row(option.name, describe_type(option.type) + bounds, str(option.default))
    parts: list[RenderableType] = [head, "", Text(inspect.cleandoc(cls.__doc__ or ""))]
    return Group(*parts, "", table) if table.rows else Group(*parts)


def render_demo_files(written: DemoFiles) -> RenderableType:
    """Where the files of the demonstration are, and what to try on them."""
    command = ["graphopt", "tune", str(written.model), "-o", "tuned.onnx"]
    command += ["--samples", str(written.samples), "--max-drop", "1"]
    lines = [
        f"written: {written.model}, {written.count} samples and their labels in {written.samples}",
        f"try: {shlex.join(command)}",
    ]
    return Group(*map(Text, lines))


def render_demo(shown: Demonstration) -> RenderableType:
    """The run on the digits model, and its accuracy before and after."""
    return Group(
        render_run(shown.run),
        Text(
            f"accuracy on {shown.count} digits: {shown.accuracy_before:.4f} -> "
            f"{shown.accuracy_after:.4f}; written to {shown.path}",
            style="bold",
        ),
    )


def _filled(content: TextTable) -> Table:
    table = new_table(*content.columns)
    for row in content.rows:
        table.add_row(*row)
    return table


def new_table(*columns: str) -> Table:
    """A table; a column whose title begins with `>` is aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right,
        )
    return table


def to_terminal_text(content: RenderableType, width: int | None, colors: bool) -> str:
    """Results as a terminal shows them.

    Args:
        content: to be shown.
        width: in columns; None takes that of the terminal.
        colors: write the codes of a terminal's colours.
    """
    # Names in a model may look like the markup of rich.
    console = Console(width=width, markup=False, emoji=False, force_terminal=colors)
    with console.capture() as captured:
        console.print(content)
    return "\n".join(line.rstrip() for line in captured.get().split("\n"))
