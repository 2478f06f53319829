"""Figures of a report. The only file that needs plotly.

Series differ in pattern, dash or symbol as well as in colour, and the colours stand out from white
and from near black alike, at 3 to 1 or more. Names are clipped from the front, where those of
layers are least distinct, and escaped: plotly takes text for a kind of HTML.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from graphopt.benchmark import PERCENTILES, BenchmarkReport
from graphopt.explain import Explanation
from graphopt.layer_errors import LayerError
from graphopt.layer_sizes import LayerSize, bytes_by_name, dtype_totals
from graphopt.ledger import Size, Step
from graphopt.tables import operators_text
from graphopt.trade_offs import Candidate, Sensitivity, front

LABEL_MAXIMUM = 22
"""Characters of a label: on a phone more would leave no room for the figure."""

NAME_MAXIMUM = 80
"""Characters of a name that appears where a pointer is."""

BARS_MAXIMUM = 16
"""Of the largest; the rest is one bar together."""

POINTS_MAXIMUM = 2000
"""Of a curve over the layers of a model; of more, so many are drawn, evenly."""

CELLS_MAXIMUM = 60
"""Layers of a heat map, and options."""

_CLEAR = "rgba(0,0,0,0)"
_GRID = "rgba(128,128,128,0.35)"


@dataclass(frozen=True)
class _Style:
    color: str
    pattern: str
    dash: str
    symbol: str


_STYLES = (
    _Style("#b86a1c", "/", "dot", "circle-open"),
    _Style("#2f7fd6", "", "solid", "diamond"),
    _Style("#8a63d2", ".", "dashdot", "triangle-up"),
    _Style("#6b7f94", "x", "dash", "square-open"),
)


def _style(number: int) -> _Style:
    return _STYLES[number % len(_STYLES)]


@dataclass(frozen=True)
class Figure:
    """What is drawn, and what is said of it.

    Attributes:
        json: of plotly.
        height_px: on the page.
        caption: what it shows, in words.
    """

    json: str
    height_px: int
    caption: str


def plotly_script() -> str:
    """The code that draws, to be part of the page."""
    return str(get_plotlyjs())


def progress(original: Size, steps: Iterable[Step]) -> Figure:
    """Bytes and nodes after each pass that was kept, over those of the original."""
    kept = [step for step in steps if step.kept]
    names = ["original", *(step.spec.partition("{")[0] for step in kept)]
    series = {
        "bytes": [1.0, *(step.bytes_after / original.stored_bytes for step in kept)],
        "nodes": [1.0, *(step.nodes_after / max(1, original.nodes) for step in kept)],
    }
    traces = [
        _line(
            label,
            list(range(len(names))),
            ratios,
            number,
            list(map(_name, names)),
            "%{customdata}: %{y:.3f}",
        )
        for number, (label, ratios) in enumerate(series.items())
    ]
    ticks = {
        "tickvals": list(range(len(names))),
        "ticktext": [_clipped_after(n, LABEL_MAXIMUM) for n in names],
    }
    caption = "Bytes and nodes after each pass that was kept, over those of the original."
    axes = {
        "xaxis": {**ticks, "tickangle": -45},
        "yaxis": {"title": "over the original", "rangemode": "tozero"},
    }
    return _figure(traces, 360, caption, **axes)


def latency(report: BenchmarkReport) -> Figure:
    """For each latency, how many of the runs took at most so long."""
    traces = []
    for number, row in enumerate(report.rows):
        shares = [percent / 100 for percent in PERCENTILES]
        # The slowest runs are those that something else disturbed; they would set the scale.
        x_ms, y = row.percentiles_ms[:-1], shares[:-1]
        trace = _line(_label(row.model), x_ms, y, number, None, "%{y:.0%} within %{x:.4g} ms")
        trace.marker.maxdisplayed = 8
        traces.append(trace)
    caption = (
        "Latency of the interleaved runs: which share of the runs (upwards) took at most so long "
        f"(to the right), up to {PERCENTILES[-2]} %. Further to the left is faster."
    )
    axes = {
        "xaxis": {"title": "latency, ms", "rangemode": "tozero"},
        "yaxis": {"title": "share of runs", "tickformat": ".0%", "range": [0, 1]},
    }
    return _figure(traces, 360, caption, **axes)


def dtypes(sizes: Mapping[str, Sequence[LayerSize]]) -> Figure:
    """Bytes of constants by element type, for each model."""
    totals = {label: dtype_totals(layers) for label, layers in sizes.items()}
    return _bars(totals, "bytes", "Bytes of constants by element type.")


def layers(sizes: Mapping[str, Sequence[LayerSize]]) -> Figure:
    """Bytes of constants of the largest layers, for each model."""
    totals = {
        label: {name: sum(found.values()) for name, found in bytes_by_name(own).items()}
        for label, own in sizes.items()
    }
    return _bars(totals, "bytes", "Bytes of constants by layer, the largest layers first.")


def kernels(explanations: Mapping[str, Explanation]) -> Figure:
    """Time by operator, for each model."""
    totals: dict[str, dict[str, float]] = {}
    for label, found in explanations.items():
        sums: dict[str, float] = defaultdict(float)
        for row in found.rows:
            sums[operators_text(row.operators)] += row.us_per_run
        totals[label] = sums
    caption = "Microseconds in a run by operator, nodes that run in one kernel joined by +."
    return _bars(totals, "us", caption)


def layer_errors(errors: Sequence[LayerError]) -> Figure:
    """Relative L2 error of each value that can be compared, in the order of the model."""
    compared = [(n, e) for n, e in enumerate(errors, 1) if _has_a_place(e)]
    compared = compared[:: math.ceil(len(compared) / POINTS_MAXIMUM) or 1]
    differing = [(n, e) for n, e in compared if e.error.rel_l2]
    equal = [(n, e) for n, e in compared if not e.error.rel_l2]
    numbers = [e.error.rel_l2 for _, e in differing] or [1.0]
    floor = min(numbers) / 3
    traces = []
    caption = (
        "Relative L2 error of the values inside the model, from its inputs (left) to its outputs "
        "(right)."
    )
    if differing:
        traces.append(_errors_line("differs", differing, numbers, "%{customdata}: %{y:.2e}", 1))
    if equal:
        heights = [floor] * len(equal)
        traces.append(_errors_line("identical", equal, heights, "%{customdata}: 0", 0, "markers"))
        caption += " Values without any error lie at the lower edge."
    # Of a few decades also what lies between their ends.
    steps = "D2" if max(numbers) / floor < 1e3 else 1
    axes = {
        "xaxis": {"title": "value, in the order of the model"},
        "yaxis": {"title": "relative L2 error", "type": "log", "dtick": steps},
    }
    return _figure(traces, 360, caption, **axes)


def _has_a_place(found: LayerError) -> bool:
    return found.error.mismatch is None and math.isfinite(found.error.rel_l2)


def _errors_line(
    label: str,
    points: Sequence[tuple[int, LayerError]],
    heights: Sequence[float],
    shown: str,
    number: int,
    mode: str = "lines+markers",
) -> Any:
    names = [_name(f"{e.error.name} ({e.operator})") for _, e in points]
    return _line(label, [n for n, _ in points], heights, number, names, shown, mode)


def trade_off(tried: Sequence[Candidate], by: str, limit: float | None = None) -> Figure:
    """What models lose against what they take.

    Args:
        tried: those that were not timed are left out where it is by latency.
        by: "size" or "latency", over that of the original.
        limit: the drop that is allowed, for a line; None draws none.
    """
    costs = [(one.size_ratio if by == "size" else one.latency_ratio, one) for one in tried]
    points = [(cost, one) for cost, one in costs if cost is not None]
    best = front((cost, one.drop) for cost, one in points if not one.expected)
    corners = _line("", *_columns(best), 1, None, "", "lines")
    corners.update(hoverinfo="skip", showlegend=False, line={"shape": "hv"})
    groups: dict[str, list[tuple[float, Candidate]]] = {
        "tried": [],
        "best": [],
        "chosen": [],
        "expected": [],
    }
    for cost, one in sorted(points, key=lambda point: point[0]):
        kind = "best" if (cost, one.drop) in best else "tried"
        kind = "expected" if one.expected else kind
        groups["chosen" if one.chosen else kind].append((cost, one))
    traces = [corners]
    for number, (label, group) in enumerate(groups.items()):
        if group:
            traces.append(_candidates(label, group, number, by))
    caption = (
        f"What each model that was tried loses (upwards) against its {by} over the original's (to "
        "the right). The line joins those that none beats in both; the star is the one chosen."
    )
    if groups["expected"]:
        caption += " The dashed line is what the search expects of models that it did not build."
    if limit is not None:
        traces.append(_limit_line(limit, max((cost for cost, _ in points), default=1.0)))
    axes = {
        "xaxis": {"title": f"{by} over the original", "rangemode": "tozero"},
        "yaxis": {"title": "drop"},
    }
    return _figure(traces, 420, caption, **axes)


def _limit_line(limit: float, width: float) -> Any:
    line = _line("allowed", [0.0, width], [limit, limit], 2, None, "allowed: %{y:.3g}", "lines")
    line.update(line={"color": _STYLES[2].color, "width": 2, "dash": "dot"})
    return line


def _candidates(label: str, group: Sequence[tuple[float, Candidate]], number: int, by: str) -> Any:
    x, y = _columns([(cost, one.drop) for cost, one in group])
    names = [_name(one.name) for _, one in group]
    shown = f"%{{customdata}}<br>{by} %{{x:.3f}}, drop %{{y:.3g}}"
    mode = "lines+markers" if label == "expected" else "markers"
    trace = _line(label, x, y, number, names, shown, mode)
    if label == "chosen":
        trace.update(marker={"symbol": "star", "size": 16}, mode="markers+text")
        trace.update(text=[label] * len(x), textposition="top center")
    return trace


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def sensitivity(found: Sensitivity) -> Figure:
    """A cell for each layer and option, with its number in it."""
    rows = found.drops[:CELLS_MAXIMUM]
    options = found.options[:CELLS_MAXIMUM]
    cells = [list(row[:CELLS_MAXIMUM]) for row in rows]
    names = [[_name(f"{layer}, {option}") for option in options] for layer in found.layers]
    trace = go.Heatmap(
        z=cells,
        customdata=names,
        text=[[_cell_text(cell) for cell in row] for row in cells],
        texttemplate="%{text}",
        textfont={"color": "#111111"},
        hovertemplate="%{customdata}: %{z:.3g}<extra></extra>",
        hoverongaps=False,
        # Light enough for the numbers to stand out everywhere.
        colorscale=[[0, "#ffffff"], [1, "#6aa5e0"]],
        xgap=1,
        ygap=1,
        showscale=False,
    )
    left_out = len(found.layers) - len(rows)
    caption = f"Darker is worse: {found.measure}, when one layer alone takes the option." + (
        f" The first {len(rows)} layers; {left_out} more are in the table." if left_out > 0 else ""
    )
    bare = {"showgrid": False, "zeroline": False}
    axes = {
        "xaxis": {
            "tickvals": list(range(len(options))),
            "ticktext": [_clipped_after(option, LABEL_MAXIMUM) for option in options],
            "side": "top",
            "tickangle": -90,
            **bare,
        },
        "yaxis": {**_ticks(found.layers[: len(rows)]), "autorange": "reversed", **bare},
    }
    return _figure([trace], 180 + 22 * len(rows), caption, **axes)


# ------------------------------------------------------------------ how they are drawn


def _bars(totals: Mapping[str, Mapping[str, float]], unit: str, caption: str) -> Figure:
    """Horizontal bars, the largest first, those of one name in each model side by side."""
    names = _largest(totals)
    rest = {name for own in totals.values() for name in own} - set(names)
    labels = [*names, *([f"{len(rest)} others"] if rest else [])]
    traces = []
    for number, (label, own) in enumerate(totals.items()):
        values = [own.get(name, 0) for name in names]
        if rest:
            values.append(sum(own.get(name, 0) for name in rest))
        traces.append(_bar(label, values, number, [_name(text) for text in labels], unit))
    largest = max((max(trace.x, default=0) for trace in traces), default=0)
    axes = {
        # Room for the number behind the longest bar.
        "xaxis": {"title": unit, "range": [0, 1.22 * largest or 1], "nticks": 5},
        "yaxis": {**_ticks(labels), "autorange": "reversed", "showgrid": False},
        "bargap": 0.25,
    }
    height_px = 110 + len(labels) * (10 + 17 * len(totals))
    return _figure(traces, height_px, caption, **axes)


def _largest(totals: Mapping[str, Mapping[str, float]]) -> list[str]:
    heights: dict[str, float] = {}
    for own in totals.values():
        for name, value in own.items():
            heights[name] = max(heights.get(name, 0), value)
    order = sorted(heights, key=lambda name: -heights[name])
    return order if len(order) <= BARS_MAXIMUM + 1 else order[:BARS_MAXIMUM]


def _bar(label: str, values: Sequence[float], number: int, names: Sequence[str], unit: str) -> Any:
    style = _style(number)
    pattern = {"shape": style.pattern, "fgcolor": style.color, "bgcolor": _CLEAR, "size": 6}
    return go.Bar(
        name=_label(label),
        x=list(values),
        # Numbers, because names may look like numbers, or be alike once they are clipped.
        y=list(range(len(values))),
        orientation="h",
        customdata=list(names),
        hovertemplate=f"%{{customdata}}: %{{x:,.4~g}} {unit}",
        text=list(map(_short, values)),
        textposition="outside",
        cliponaxis=False,
        marker={
            "color": style.color,
            "line": {"color": style.color, "width": 1},
            **({"pattern": pattern} if style.pattern else {}),
        },
    )


def _line(
    label: str,
    x: Sequence[float],
    y: Sequence[float],
    number: int,
    names: Sequence[str] | None,
    shown: str,
    mode: str = "lines+markers",
) -> Any:
    style = _style(number)
    return go.Scatter(
        name=label,
        x=list(x),
        y=list(y),
        mode=mode,
        customdata=names,
        hovertemplate=shown,
        line={"color": style.color, "width": 2, "dash": style.dash},
        marker={"color": style.color, "symbol": style.symbol, "size": 8},
    )


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    return {"tickvals": list(range(len(names))), "ticktext": list(map(_label, names))}


def _figure(traces: Sequence[Any], height_px: int, caption: str, **layout: Any) -> Figure:
    axis = {
        "automargin": True,
        "fixedrange": True,
        "gridcolor": _GRID,
        "zerolinecolor": _GRID,
        "linecolor": _GRID,
    }
    axes = {name: {**axis, **layout.pop(name)} for name in ("xaxis", "yaxis")}
    drawn = go.Figure(
        list(traces),
        {
            "template": "none",
            "height": height_px,
            "margin": {"l": 8, "r": 24, "t": 8, "b": 8},
            "paper_bgcolor": _CLEAR,
            "plot_bgcolor": _CLEAR,
            "font": {"family": "system-ui, sans-serif", "size": 12},
            "showlegend": len(traces) > 1,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
            | {"itemclick": False, "itemdoubleclick": False},
            "dragmode": False,
            **axes,
            **layout,
        },
    )
    # Within a script element nothing but this could end it.
    content = str(drawn.to_json()).replace("<", "\\u003c")
    return Figure(content, height_px, caption)


def _short(number: float) -> str:
    """Three digits of a number, and nothing of what is not there."""
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= one:
            return f"{number / one:.3g}{unit}"
    return f"{number:.3g}" if number else ""


def _cell_text(drop: float | None) -> str:
    """As short as a cell on a phone is narrow."""
    if drop is None:
        return ""
    return f"{drop:.2g}" if drop == 0 or abs(drop) >= 0.01 else f"{drop:.0e}".replace("e-0", "e-")


def _label(name: str) -> str:
    return _clipped(name, LABEL_MAXIMUM)


def _name(name: str) -> str:
    return _clipped(name, NAME_MAXIMUM)


def _clipped_after(name: str, maximum: int) -> str:
    """For passes, whose names come first and options after."""
    short = name if len(name) <= maximum else f"{name[: maximum - 1]}…"
    return html.escape(short, quote=False)


def _clipped(name: str, maximum: int) -> str:
    short = name if len(name) <= maximum else f"…{name[1 - maximum :]}"
    return html.escape(short, quote=False)
