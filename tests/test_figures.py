"""Figures: what is drawn, as plotly is told it. How it looks is in test_html_report.py."""

from __future__ import annotations

import html
import json
import math
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("plotly")

from graphopt import figures
from graphopt.benchmark import PERCENTILES, BenchmarkReport, BenchmarkRow
from graphopt.contract import Effect
from graphopt.explain import Explanation, Row
from graphopt.figures import BARS_MAXIMUM, CELLS_MAXIMUM, LABEL_MAXIMUM, POINTS_MAXIMUM, Figure
from graphopt.layer_errors import LayerError
from graphopt.layer_sizes import LayerSize
from graphopt.ledger import Size, Step
from graphopt.trade_offs import Candidate, Sensitivity
from graphopt.validation import OutputError

HOSTILE = "<a href=//x>%{y}$x$"
"""Short enough to be nowhere clipped."""


def _read(figure: Figure) -> dict[str, Any]:
    assert "<" not in figure.json, "nothing can end the element that holds it"
    content: dict[str, Any] = json.loads(figure.json)
    assert content["layout"]["height"] == figure.height_px
    return content


def _texts(content: Any) -> list[str]:
    if isinstance(content, dict):
        return [text for part in content.values() for text in _texts(part)]
    if isinstance(content, list):
        return [text for part in content for text in _texts(part)]
    return [content] if isinstance(content, str) else []


def _error(name: str, rel_l2: float, mismatch: str | None = None) -> LayerError:
    error = OutputError(name, "float32", 8, not rel_l2, 1, 1, 1, rel_l2, 1, 1, None, mismatch)
    return LayerError("node", "Conv", name, error)


def _row(label: str, *percentiles_ms: float) -> BenchmarkRow:
    return BenchmarkRow(label, 1, 2, 3, 1.0, None, 4, 5, 6, 20, percentiles_ms)


def _report(*rows: BenchmarkRow) -> BenchmarkReport:
    return BenchmarkReport(rows, "cpu", 1, None, "cpu", "1", "1", "3")


def test_bars_are_aligned_by_name_the_largest_first() -> None:
    sizes = {
        "original": (LayerSize("a", "Conv", {"float": 4}), LayerSize("b", "Conv", {"float": 400})),
        "optimized": (LayerSize("b", "Conv", {"int8": 100}), LayerSize("c", "Conv", {"int8": 9})),
    }

    content = _read(figures.layers(sizes))

    assert content["layout"]["yaxis"]["ticktext"] == ["b", "c", "a"]
    assert [trace["x"] for trace in content["data"]] == [[400, 0, 4], [100, 9, 0]]
    assert [trace["name"] for trace in content["data"]] == ["original", "optimized"]
    assert content["data"][0]["marker"]["pattern"]["shape"], "told apart without colour"
    assert "pattern" not in content["data"][1]["marker"]


def test_of_many_bars_the_small_ones_are_one() -> None:
    layers = tuple(LayerSize(f"layer{n}", "Conv", {"float": 1000 - n}) for n in range(100))

    (trace,) = _read(figures.layers({"model": layers}))["data"]

    assert len(trace["x"]) == BARS_MAXIMUM + 1
    assert sum(trace["x"]) == sum(1000 - n for n in range(100))
    assert trace["customdata"][-1] == f"{100 - BARS_MAXIMUM} others"


def test_names_that_look_alike_when_clipped_stay_apart() -> None:
    layers = tuple(LayerSize(f"{n}" + "x" * 60, "Conv", {"float": 10}) for n in range(3))

    content = _read(figures.layers({"model": layers}))

    assert len(set(content["layout"]["yaxis"]["ticktext"])) == 1
    assert content["data"][0]["y"] == [0, 1, 2]


@pytest.mark.parametrize(
    "figure",
    [
        figures.layers({HOSTILE: (LayerSize(HOSTILE, "Conv", {HOSTILE: 4}),)}),
        figures.dtypes({HOSTILE: (LayerSize(HOSTILE, "Conv", {HOSTILE: 4}),)}),
        figures.layer_errors([_error(HOSTILE, 0.1)]),
        figures.latency(_report(_row(HOSTILE, *map(float, PERCENTILES)))),
        figures.trade_off([Candidate(HOSTILE, 0.5, None, 0.1, chosen=True)], "size"),
        figures.sensitivity(Sensitivity([HOSTILE], [HOSTILE], [[0.5]], "error")),
        figures.kernels(
            {
                HOSTILE: Explanation(
                    (Row((HOSTILE,), "K", None, 1, 1.0, 1.0, None),), *((),) * 2, 1.0, 1,
                    "cpu", 1, "1", "cpu", (),
                )
            }
        ),
        figures.progress(
            Size(1, 1, 1, 0),
            [Step(HOSTILE, Effect.EXACT, "kept", None, {}, (), 1, 1, 1, 1, 0.0, 1)],
        ),
    ],
)  # fmt: skip
def test_names_are_escaped_and_nowhere_taken_for_a_template(figure: Figure) -> None:
    texts = _texts(_read(figure))

    # Plotly takes `<a href>` in any text for a link, and `%{y}` in a template for a number.
    assert not any("<a" in text for text in texts)
    assert any("&lt;a href=//x&gt;" in text for text in texts)
    for trace in json.loads(figure.json)["data"]:
        template = trace.get("hovertemplate", "")
        assert "href" not in template


def test_labels_are_short_and_keep_their_end() -> None:
    name = "/backbone/stage2/branch1/" * 5 + "Conv_17"

    (label,) = _read(figures.layers({"m": (LayerSize(name, "Conv", {"float": 4}),)}))["layout"][
        "yaxis"
    ]["ticktext"]

    assert len(html.unescape(label)) == LABEL_MAXIMUM
    assert label.endswith("/Conv_17")


def test_the_latency_curve_leaves_the_slowest_run_out() -> None:
    slow = [1.0] * (len(PERCENTILES) - 1) + [1000.0]

    first, second = _read(figures.latency(_report(_row("a", *slow), _row("b", *slow))))["data"]

    assert max(first["x"]) == 1.0
    assert first["y"][-1] == PERCENTILES[-2] / 100
    assert first["line"]["dash"] != second["line"]["dash"]
    assert first["marker"]["symbol"] != second["marker"]["symbol"]


def test_errors_of_zero_and_what_cannot_be_compared() -> None:
    errors = [
        _error("a", 0.0),
        _error("b", 0.3),
        _error("c", 0.001),
        _error("d", math.inf),
        _error("e", 0.1, mismatch="is float32[2], was float32[3]"),
    ]

    differs, identical = _read(figures.layer_errors(errors))["data"]

    assert (differs["x"], differs["y"]) == ([2, 3], [0.3, 0.001])
    assert identical["x"] == [1]
    assert 0 < identical["y"][0] < 0.001, "0 has no place on a logarithmic axis"
    assert identical["mode"] == "markers"


def test_without_any_error_the_curve_is_at_the_lower_edge() -> None:
    (identical,) = _read(figures.layer_errors([_error("a", 0.0)]))["data"]

    assert identical["name"] == "identical"


def test_of_a_deep_model_a_bounded_number_of_points_is_drawn() -> None:
    (curve,) = _read(figures.layer_errors([_error(f"v{n}", 0.1) for n in range(5_000)]))["data"]

    assert POINTS_MAXIMUM / 2 < len(curve["x"]) <= POINTS_MAXIMUM


def test_the_front_is_joined_and_the_chosen_model_is_marked() -> None:
    tried = [
        Candidate("small", 0.2, 0.9, 0.3),
        Candidate("good", 0.5, 0.5, 0.1, chosen=True),
        Candidate("worse", 0.6, 0.6, 0.2),
        Candidate("exact", 1.0, None, 0.0),
    ]

    by_size = _read(figures.trade_off(tried, "size"))["data"]
    by_latency = _read(figures.trade_off(tried, "latency"))["data"]

    line, *groups = by_size
    assert (line["x"], line["y"]) == ([0.2, 0.5, 1.0], [0.3, 0.1, 0.0])
    assert {g["name"]: g["customdata"] for g in groups} == {
        "tried": ["worse"],
        "best": ["small", "exact"],
        "chosen": ["good"],
    }
    assert groups[-1]["text"] == ["chosen"]
    assert by_latency[0]["x"] == [0.5], "what was not timed is left out"
    assert len({g["marker"]["symbol"] for g in groups}) == 3


def test_nothing_tried_is_an_empty_figure() -> None:
    assert _read(figures.trade_off([], "size"))["data"][0]["x"] == []


def test_cells_have_their_numbers_and_their_count_is_bounded() -> None:
    layers = [f"l{n}" for n in range(CELLS_MAXIMUM + 5)]
    drops = [[0.123456, 0.0, None, 0.00012] for _ in layers]
    found = Sensitivity(layers, ["a", "b", "c", "d"], drops, "error")

    figure = figures.sensitivity(found)
    (trace,) = _read(figure)["data"]

    assert len(trace["z"]) == CELLS_MAXIMUM
    assert trace["text"][0] == ["0.12", "0", "", "1e-4"]
    assert "5 more are in the table" in figure.caption
    assert "more are" not in figures.sensitivity(replace(found, layers=["a"], drops=[[1]])).caption


def test_progress_counts_what_was_kept() -> None:
    def step(spec: str, verdict: str, nodes: int, stored_bytes: int) -> Step:
        return Step(spec, Effect.EXACT, verdict, None, {}, (), 0, nodes, 0, stored_bytes, 0.0, 1)  # type: ignore[arg-type]

    steps = [
        step("a{b=1}", "kept", 8, 50),
        step("c", "rolled back", 1, 1),
        step("d", "kept", 4, 25),
    ]

    stored, nodes = _read(figures.progress(Size(16, 100, 17, 0), steps))["data"]

    assert stored["y"] == [1, 0.5, 0.25]
    assert nodes["y"] == [1, 0.5, 0.25]
    assert stored["customdata"] == ["original", "a", "d"]
