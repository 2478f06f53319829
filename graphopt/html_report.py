"""Results as one page of HTML that needs nothing else: no network, no other file.

The page is laid out for a screen, a phone and paper, light and dark. What its figures show is in
its tables, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from importlib.resources import files

from graphopt import figures, html_sections, search_tables, tables
from graphopt.api import Validation
from graphopt.benchmark import BenchmarkReport, cpu_name
from graphopt.details import Details
from graphopt.explain import Explanation
from graphopt.figures import Figure
from graphopt.html_sections import definitions, remarks, table
from graphopt.json_report import versions
from graphopt.ledger import Run
from graphopt.markup import Markup, element, joined
from graphopt.probing import Probe
from graphopt.sensitivity import Sensitivity as LayerSensitivity
from graphopt.trade_offs import Candidate, Sensitivity
from graphopt.tune import Tuning
from graphopt.validation import OutputError, worst

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""What a browser lets the page do: run what is in it, and load nothing."""

OPEN_ROWS = 20
"""A table of candidates of more is closed at first."""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading, and its line in the table of contents.
        content: finished HTML and figures, in order.
    """

    title: str
    content: Sequence[Markup | Figure]


# ------------------------------------------------------------------ pages


@singledispatch
def sections_of(result: object) -> list[Section]:
    """What a page says of a result of `optimize`, `tune`, `validate` and other verbs.

    Args:
        result: best one with `details`; what was not measured is left out.
    """
    raise TypeError(f"there is no report of {type(result).__name__}")


@sections_of.register
def _of_run(run: Run) -> list[Section]:
    sections = [_summary(run), _ledger(run)]
    if run.numerics:
        errors = tables.numerics_table(run.numerics)
        content = table(errors, "Outputs of the result against those of the original")
        sections.append(Section("Outputs", [content]))
    if run.details is not None:
        sections += [*_error_sections(run.details), *_size_sections(run.details)]
    if run.benchmark is not None:
        sections.append(latency_section(run.benchmark))
    if run.details is not None and run.details.explanations:
        sections.append(kernels_section(run.details.explanations))
    return sections


@sections_of.register
def _of_validation(found: Validation) -> list[Section]:
    details = found.details
    shown = html_sections.validation(found)
    if details is None:
        return [Section("Outputs", [shown])]
    outputs = Section("Outputs", [shown, remarks(details.notes)])
    return [outputs, *_error_sections(details), *_size_sections(details)]


@sections_of.register
def _of_benchmark(found: BenchmarkReport) -> list[Section]:
    return [latency_section(found)]


@sections_of.register
def _of_explanation(found: Explanation) -> list[Section]:
    return [kernels_section({"model": found})]


@sections_of.register
def _of_tuning(found: Tuning) -> list[Section]:
    _, *evidence = sections_of(found.run)
    tried = trade_off_section(search_tables.tried_points(found), found.certificate.limit)
    return [_tuning_summary(found), tried, *_layer_sections(found), *evidence]


@sections_of.register
def _of_sensitivity(found: LayerSensitivity) -> list[Section]:
    about = [
        element("p", search_tables.bytes_text(found)),
        html_sections.treatments(found),
        html_sections.remarks(found.notes),
    ]
    if not found.layers:
        return [Section("Summary", [element("p", "No layer can be treated."), *about])]
    return [Section("Summary", about), effects_section(found.probes, found.layers)]


def page(title: str, sections: Iterable[Section], command: str) -> str:
    """A whole page: the sections, and at the end what repeats it.

    Args:
        title: heading of the page.
        sections: in order.
        command: that repeats the run.
    """
    whole = [*sections, _origin(command)]
    shown = [part for section in whole for part in section.content if isinstance(part, Figure)]
    contents = [
        element("li", element("a", section.title, href=f"#part-{number}"))
        for number, section in enumerate(whole, 1)
    ]
    body = element(
        "body",
        element("header", element("h1", title)),
        element("nav", element("h2", "Contents"), element("ol", *contents), aria_label="Contents"),
        element("main", *_written(whole)),
        *([_scripts()] if shown else []),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(_file("report_page.css"))),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


# ------------------------------------------------------------------ sections


def latency_section(report: BenchmarkReport) -> Section:
    """Latencies as curves, and all that was measured with them."""
    return Section("Latency", [figures.latency(report), html_sections.benchmark(report)])


def kernels_section(explanations: Mapping[str, Explanation]) -> Section:
    """Time by operator and kernel, of each model by its label."""
    written = [
        html_sections.explanation(found, f"Kernels of the {label}, and their time")
        for label, found in explanations.items()
    ]
    return Section("Time by operator and kernel", [figures.kernels(explanations), *written])


def trade_off_section(tried: Sequence[Candidate], limit: float | None = None) -> Section:
    """What a search has tried: its Pareto fronts, by size and by latency, and the chosen model.

    Args:
        tried: built, and expected.
        limit: the drop that is allowed, for a line; None draws none.
    """
    shown = [figures.trade_off(tried, "size", limit)]
    if any(one.latency_ratio is not None for one in tried):
        shown.append(figures.trade_off(tried, "latency", limit))
    written = html_sections.candidates(tried)
    if len(tried) > OPEN_ROWS:
        written = element("details", element("summary", "All numbers"), written)
    return Section("What was tried", [*shown, written])


def sensitivity_section(found: Sensitivity) -> Section:
    """What each layer loses under each option."""
    written = element(
        "details", element("summary", "All numbers"), html_sections.sensitivities(found)
    )
    return Section("Sensitivity by layer", [figures.sensitivity(found), written])


def effects_section(probes: Sequence[Probe], layers: Sequence[str]) -> Section:
    """What options do to each layer alone.

    Args:
        probes: of all layers.
        layers: in the order that is shown.
    """
    grid = search_tables.effect_grid(probes, layers, search_tables.is_shown(probes))
    written = element(
        "details", element("summary", "All numbers"), html_sections.effects(probes, layers)
    )
    return Section("Sensitivity by layer", [figures.sensitivity(grid), written])


def _tuning_summary(found: Tuning) -> Section:
    run, (certificate, *measured) = found.run, (*search_tables.certificate_lines(found), "")
    facts = [*_facts(run), ("search", search_tables.effort_text(found))]
    content = [
        element("p", search_tables.asked_text(found)),
        *([element("p", element("strong", certificate))] if certificate else []),
        *(element("p", line) for line in measured if line),
        element("p", search_tables.parts_text(found)),
        definitions(facts),
        remarks((*_notes(run), *found.notes), run.failures),
        _passes_in_full(run),
    ]
    return Section("Summary", content)


def _layer_sections(found: Tuning) -> list[Section]:
    if not found.probes:
        return []
    counts = search_tables.option_counts(found)
    content: list[Markup | Figure] = [
        *([element("p", f"{', '.join(counts)}.")] if counts else []),
        element("details", element("summary", "All layers"), html_sections.layer_options(found)),
    ]
    layers = search_tables.ranked(found.probes)
    return [Section("Options by layer", content), effects_section(found.probes, layers)]


def _summary(run: Run) -> Section:
    facts = [*_facts(run), ("recipe", run.plan.recipe)]
    content = [definitions(facts), remarks(_notes(run), run.failures), _passes_in_full(run)]
    return Section("Summary", content)


def _notes(run: Run) -> tuple[str, ...]:
    return (*run.notes, *(run.details.notes if run.details is not None else ()))


def _passes_in_full(run: Run) -> Markup:
    return element("details", element("summary", "The passes in full"), str(run.plan))


def _facts(run: Run) -> list[tuple[str, str | None]]:
    benchmark, deployed = run.benchmark, run.numerics.get("as deployed")
    nodes = f"{run.original.nodes:,} -> {run.optimized.nodes:,}"
    stored = (
        f"{run.original.stored_bytes:,} -> {run.optimized.stored_bytes:,} "
        f"({run.optimized.stored_bytes / run.original.stored_bytes:.3f}x)"
    )
    latency = None
    if benchmark is not None:
        first, *_, last = benchmark.rows
        latency = f"{first.p50_ms:.3f} -> {last.p50_ms:.3f} ms ({last.ratio:.3f}x)"
    return [
        ("bytes", stored),
        ("latency, median", latency),
        ("nodes", nodes),
        ("relative L2 error of the worst output, as deployed", _error_text(deployed)),
        ("opset", f"{run.original.opset} -> {run.optimized.opset}"),
    ]


def _error_text(outputs: Sequence[OutputError] | None) -> str | None:
    if outputs is None:
        return None
    return "identical" if all(o.identical for o in outputs) else f"{worst(outputs):.3g}"


def _ledger(run: Run) -> Section:
    written = html_sections.ledger(run.steps)
    if not any(step.kept for step in run.steps):
        return Section("Ledger", [written])
    return Section("Ledger", [figures.progress(run.original, run.steps), written])


def _error_sections(details: Details) -> list[Section]:
    if not details.errors:
        return []
    text = (
        "Values that both models compute, known by what they hold, on at most 8 samples. A pass "
        "may move a factor from one layer to the next, or make a value coarser that only one "
        "layer reads: an error in the middle is no error of the outputs."
    )
    written = element(
        "details", element("summary", "All values"), html_sections.layer_errors(details.errors)
    )
    content: list[Markup | Figure] = [
        element("p", text),
        figures.layer_errors(details.errors),
        written,
    ]
    return [Section("Error by layer", content)]


def _size_sections(details: Details) -> list[Section]:
    if not any(details.sizes.values()):
        return []
    written = element(
        "details", element("summary", "All layers"), html_sections.layer_sizes(details.sizes)
    )
    content: list[Markup | Figure] = [
        figures.dtypes(details.sizes),
        html_sections.dtype_sizes(details.sizes),
        figures.layers(details.sizes),
        written,
    ]
    return [Section("Size by layer and element type", content)]


def _origin(command: str) -> Section:
    lines = [("processor", cpu_name()), *versions().items()]
    content = [
        element("p", "The command that repeats this:"),
        element("pre", element("code", command), tabindex="0"),
        definitions(lines),
    ]
    return Section("Versions, machine and command", content)


# ------------------------------------------------------------------ HTML


def _written(sections: Iterable[Section]) -> Iterable[Markup]:
    count = 0
    for number, section in enumerate(sections, 1):
        parts = []
        for part in section.content:
            if isinstance(part, Figure):
                count += 1
                parts.append(_figure(part, f"figure-{count}"))
            else:
                parts.append(part)
        yield element(
            "section",
            element("h2", section.title, id=f"heading-{number}"),
            *parts,
            id=f"part-{number}",
            aria_labelledby=f"heading-{number}",
        )


def _figure(shown: Figure, key: str) -> Markup:
    place = element(
        "div",
        class_="plot",
        id=key,
        role="img",
        aria_label=shown.caption,
        style=f"height:{shown.height_px}px",
    )
    content = element("script", Markup(shown.json), type="application/json", id=f"{key}-json")
    return element("figure", place, element("figcaption", shown.caption), content)


def _scripts() -> Markup:
    missing = "The figures are drawn by JavaScript; what they show is in the tables, too."
    return joined(
        element("noscript", element("p", missing)),
        element("script", Markup(figures.plotly_script())),
        element("script", Markup(_file("report_page.js"))),
    )


def _file(name: str) -> str:
    return files("graphopt").joinpath(name).read_text(encoding="utf-8")
