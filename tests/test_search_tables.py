"""What a search found, in words and tables, whatever was found."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

pytest.importorskip("onnxruntime")

import graphopt
from graphopt import html_sections, json_report, search_report
from graphopt.probing import Probe
from graphopt.report import to_terminal_text
from graphopt.search_tables import (
    certificate_lines,
    effect_grid,
    effect_table,
    is_shown,
    layer_options_table,
    option_counts,
    parts_text,
    points_table,
    ranked,
    refusals_table,
    tried_points,
)
from graphopt.sensitivity import Sensitivity
from graphopt.testing import parse
from graphopt.tune import Point, Tuning, drop_text
from graphopt.verifying import Certificate

CERTIFICATE = Certificate(
    limit=1.0,
    original=90.0,
    value=89.5,
    drop=0.5,
    error=0.25,
    bound=0.8,
    confidence=0.95,
    items=400,
    items_needed=333,
    reason=None,
)
EVIL = "<script>[/bold]:smile:"


def probe(layer: str, option: str, divergence: float, **changed: object) -> Probe:
    one = Probe("clusters", layer, "Conv", option, 100, divergence, 0.0)
    return replace(one, **changed)  # type: ignore[arg-type]


PROBES = (
    probe("a", "16", 1e-3, loss=-0.0),
    probe("a", "8", 2e-3, loss=None),
    probe("a", "4", 4e-3, loss=1.5),
    probe(EVIL, "16", 1e-2),
    probe(EVIL, "8", 2e-2, loss=None),
    probe(EVIL, "4", math.inf),
    probe("c", "16", 0.0, loss=None, reason="its weight is shared"),
    probe("c", "8", 0.0, loss=None, reason="its weight is shared"),
    probe("c", "4", 0.0, loss=None, reason="its weight is shared"),
)


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    """The model and the ledger are real; what was searched is made up."""
    model = parse("agraph (float[n] x) => (float[n] y) { a = Identity(x) y = Relu(a) }")
    run = graphopt.optimize(model, passes="drop-identity", random_samples=2, benchmark=False)
    long = "cluster-weights{each=(" + ",".join(f"{EVIL}{n}:16" for n in range(99)) + ")}"
    points = (
        Point("float", "", 0.9, None, 0.0, True, False, {}),
        Point("half", "p", 0.5, 0.7, 3.0, True, False, {}),
        Point("float", long, 0.2, 0.9, 0.5, True, True, {"a": "clusters 4", EVIL: "clusters 16"}),
        Point("float", "", 0.3, None, 1e-24, False, False, {}),
        Point("float", "", 0.1, None, 50.0, False, False, {}),
    )
    return Tuning(
        run=run,
        scenario="edge",
        objective="size",
        metric="accuracy",
        unit="%",
        certificate=CERTIFICATE,
        points=points,
        probes=PROBES,
        parts=(128, 128, 400),
        evaluations=4,
        minutes=1.25,
        notes=("no time for more",),
        certify=False,
    )


def shown(tuning: Tuning, width: int = 1000) -> str:
    return to_terminal_text(search_report.render_tuning(tuning), width, colors=False)


# ------------------------------------------------------------------ tune


def test_what_is_proven_is_told_in_plain_words(tuning: Tuning) -> None:
    assert certificate_lines(tuning) == [
        "certified: the drop is at most 0.8 points, at 95 %",
        "measured by 400 samples: accuracy 90 -> 89.5 %, a drop of 0.5 points, standard error 0.25",
    ]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"bound": 4.5, "reason": "too few", "items": 22},
            "not certified: too few; they prove at most 4.5 points, at 95 %",
        ),
        ({"bound": None, "reason": "one number for all"}, "not certified: one number for all"),
        ({"bound": 1.5, "reason": "no less than 1.5"}, "not certified: no less than 1.5"),
    ],
)
def test_what_is_not_proven_is_told_with_the_reason(
    changes: dict[str, object], lines: str, tuning: Tuning
) -> None:
    certificate = replace(CERTIFICATE, **changes)  # type: ignore[arg-type]

    assert certificate_lines(replace(tuning, certificate=certificate))[0] == lines


def test_a_gain_is_no_negative_drop_and_an_unknown_error_is_left_out(tuning: Tuning) -> None:
    certificate = replace(CERTIFICATE, value=91.0, drop=-1.0, error=math.inf)

    _, measured = certificate_lines(replace(tuning, certificate=certificate))

    assert measured.endswith("accuracy 90 -> 91 %, a gain of 1 point")


def test_a_unit_of_the_users_own_has_no_points() -> None:
    assert [drop_text(0.25, ""), drop_text(1, "%"), drop_text(0, "%")] == [
        "0.25",
        "1 point",
        "0 points",
    ]


def test_few_samples_are_told_to_be_shared(tuning: Tuning) -> None:
    assert "too few to divide" in parts_text(replace(tuning, parts=(8, 8, 8)))
    assert "400 to verify by, which the search never saw" in parts_text(tuning)


def test_points_that_were_built_are_rows_the_largest_first(tuning: Tuning) -> None:
    assert points_table(tuning).rows == (
        ("float", "", "0.900", "", "0", ""),
        ("half", "", "0.500", "0.700", "3", "over the drop"),
        ("float", "2", "0.200", "0.900", "0.5", "chosen"),
    )


def test_a_figure_has_what_was_expected_near_the_drop(tuning: Tuning) -> None:
    tried = tried_points(tuning)

    assert [(one.size_ratio, one.drop) for one in tried if one.expected] == [(0.3, 0.0)]
    assert [one.name for one in tried if one.chosen] == ["float, 2 layers treated"]


def test_layers_are_counted_by_what_they_got(tuning: Tuning) -> None:
    assert sorted(option_counts(tuning)) == [
        "1 × clusters 16",
        "1 × clusters 4",
        "1 × left as in float",
    ]
    assert layer_options_table(tuning).rows == (
        ("a", "Conv", "clusters 4", "100", "0.004"),
        (EVIL, "Conv", "clusters 16", "100", "0.01"),
        ("c", "Conv", "left as it was", "", ""),
    )


def test_the_terminal_shortens_what_is_long_and_json_has_it_all(tuning: Tuning) -> None:
    text = shown(tuning)

    assert max(map(len, text.splitlines())) < 400
    assert "… (--json has all)" in text
    assert "note: no time for more" in text
    assert "asked: the least size (edge) on cpu for a drop of at most 1 point of accuracy" in text
    told = json_report.tuning_to_json(tuning)
    assert [point["passes"] for point in told["points"]] == [p.passes for p in tuning.points]
    assert told["probes"][5]["divergence"] == "inf"
    assert json_report.to_text(told)


def test_where_nothing_was_taken_nothing_is_said_of_a_drop(tuning: Tuning) -> None:
    points = tuple(replace(point, chosen=False) for point in tuning.points)
    none = replace(tuning, points=points, run=replace(tuning.run, failures=("no lossy model",)))

    text = shown(none)

    assert (certificate_lines(none), option_counts(none)) == ([], [])
    assert "certified" not in text and "passes after basic" not in text
    assert text.endswith("failed: no lossy model\n")


def test_only_a_result_that_is_proven_is_for_use_where_that_was_asked_for(tuning: Tuning) -> None:
    proven = replace(tuning, certify=True)
    unproven = replace(proven, certificate=replace(CERTIFICATE, bound=2.0, reason="x"))

    assert (proven.proves_enough, unproven.proves_enough) == (True, False)
    assert replace(unproven, certify=False).proves_enough


# ------------------------------------------------------------------ sensitivity


def test_cells_have_divergence_and_loss_and_a_mark_where_nothing_can_be_given() -> None:
    found = effect_table(PROBES, ranked(PROBES), lambda _: True)

    assert found.columns == ("layer", "operator", ">clusters 16", ">clusters 8", ">clusters 4")
    assert found.rows == (
        (EVIL, "Conv", "0.01 0", "0.02", "inf 0"),
        ("a", "Conv", "1e-3 0", "2e-3", "4e-3 1.5"),
        ("c", "Conv", "-", "-", "-"),
    )


def test_a_narrow_place_shows_the_ends_of_what_was_tried() -> None:
    wanted = is_shown(PROBES[:3])

    assert [p.option for p in PROBES[:3] if wanted(p)] == ["16", "4"]
    grid = effect_grid(PROBES, ["a", EVIL, "c"], wanted)
    assert grid.options == ["clusters 16", "clusters 4"]
    assert grid.drops == [[1e-3, 4e-3], [1e-2, None], [None, None]]


def test_reasons_are_counted_by_layers() -> None:
    assert refusals_table(PROBES).rows == (("clusters", "1", "its weight is shared", "c"),)


def test_a_terminal_shows_twenty_layers_and_counts_the_rest() -> None:
    probes = tuple(probe(f"layer{n}", "16", 1 / n) for n in range(1, 31))
    found = Sensitivity(probes, {"clusters": "shared values"}, 1000, (8, 8), ("a note",))

    text = to_terminal_text(search_report.render_sensitivity(found), 60, colors=False)

    assert len(re.findall(r"^layer\d", text, re.MULTILINE)) == 20
    assert "layer1 " in text and "layer21 " not in text
    assert "and 10 layers more (--json)" in text and "note: a note" in text


# ------------------------------------------------------------------ notebooks


def test_notebooks_show_both_with_all_names_escaped(tuning: Tuning) -> None:
    found = Sensitivity(PROBES, {"clusters": EVIL}, 1000, (8, 8), (EVIL,))

    for markup in (tuning._repr_html_(), found._repr_html_(), html_sections.layer_options(tuning)):
        assert "<script" not in markup
        assert markup.count("<table>") == markup.count("</table>") > 0
    assert "&lt;script&gt;" in found._repr_html_()
    assert "certified: the drop is at most 0.8 points" in tuning._repr_html_()
