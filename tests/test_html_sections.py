"""Tables of HTML: read back, whatever the names of nodes and passes are."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

import graphopt
from graphopt import html_sections
from graphopt.benchmark import BenchmarkReport, BenchmarkRow
from graphopt.contract import Effect, Skip
from graphopt.explain import Explanation, Row
from graphopt.html_sections import SHOWN_NODES, candidates, ledger, sensitivities, table
from graphopt.layer_sizes import LayerSize
from graphopt.ledger import Step
from graphopt.reasons import Reason
from graphopt.tables import TextTable
from graphopt.testing import parse
from graphopt.trade_offs import Candidate, Sensitivity

HOSTILE = """<script>alert("1")</script><img src=x onerror='alert(2)'> & </td>"""


class Page(HTMLParser):
    """What is in a piece of HTML, and whether every element ends where it should."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link"):
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data


def step(**changed: object) -> Step:
    whole = Step("p", Effect.EXACT, "kept", None, {"done": 2}, (), 5, 4, 100, 90, 0.5, 1)
    return replace(whole, **changed)  # type: ignore[arg-type]


def test_a_table_says_what_its_cells_are_headings_of() -> None:
    content = TextTable(("name", ">bytes"), (("a", "1"), (HOSTILE, "2")))

    found = Page(table(content, f"caption {HOSTILE}"))

    assert found.cells == ["name", "bytes", "a", "1", HOSTILE, "2"]
    assert found.tags.count("caption") == 1
    assert [value for name, value in found.attributes if name == "scope"] == [
        "col",
        "col",
        "row",
        "row",
    ]
    assert set(found.tags) <= {"div", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert not any(name.startswith("on") for name, _ in found.attributes)


def test_a_long_table_is_cut_and_says_so() -> None:
    content = TextTable(("n",), tuple((str(n),) for n in range(10)))

    found = Page(table(content, "numbers", rows_maximum=3))

    assert found.cells == ["n", "0", "1", "2"]
    assert "numbers (the first 3 rows of 10)" in found.text


def test_an_empty_table_is_a_table() -> None:
    assert Page(table(TextTable(("a", ">b"), ()), "nothing")).cells == ["a", "b"]


def test_every_verdict_has_a_sign_and_a_word() -> None:
    steps = [
        step(spec="one"),
        step(spec="two", verdict="rolled back", reason=HOSTILE),
        step(spec="three", verdict="too slow", reason="it takes 1.2", latency_ratio=1.2),
        step(spec="four", verdict="refused", reason="not here", changes={}),
        step(spec="five", verdict="unchanged", changes={}),
        step(spec="six", verdict="unchanged", changes={}, skips=(Skip("n", "too large"),)),
    ]

    found = Page(ledger(steps))

    verdicts = [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in found.cells]
    for verdict in ("✓ kept", "✗ ROLLED BACK", "◷ TOO SLOW", "⊘ refused"):
        assert verdict in verdicts
    assert found.tags.count("details") == 5, "five has nothing to say"
    assert "Nothing to do: five, six." in found.text
    assert "too large: n" in found.text
    assert HOSTILE in found.text
    assert "script" not in found.tags
    assert "img" not in found.tags


def test_skipped_nodes_are_grouped_counted_and_bounded() -> None:
    skips = [Skip(f"node{n:03}", HOSTILE) for n in range(50)]
    skips += [Skip("again", "why"), Skip("again", "why")]

    found = Page(ledger([step(skips=tuple(skips))]))

    assert f"node{SHOWN_NODES - 1:03} and {50 - SHOWN_NODES} more" in found.text
    assert "node049" not in found.text
    assert "why: again (2 times)" in found.text
    assert "52 left alone" in found.text


def test_a_ledger_without_any_step_says_so() -> None:
    assert "No pass acted." in Page(ledger([])).text


def test_sizes_of_layers_that_only_one_model_has() -> None:
    sizes = {
        "original": (LayerSize("a", "Conv", {"float": 400}), LayerSize("b", "Conv", {"float": 8})),
        "optimized": (LayerSize(HOSTILE, "Conv", {"int8": 100, "float": 4}),),
    }

    by_layer, by_dtype = (
        Page(section(sizes)) for section in (html_sections.layer_sizes, html_sections.dtype_sizes)
    )

    assert by_layer.cells[5:] == [
        *("a", "400", "float", "", ""),
        *("b", "8", "float", "", ""),
        *(HOSTILE, "", "", "104", "int8, float"),
    ]
    assert by_dtype.cells[3:] == ["float", "408", "4", "int8", "0", "100", "all", "408", "104"]


def test_candidates_and_sensitivities() -> None:
    tried = [
        Candidate(HOSTILE, 0.5, None, 0.25),
        Candidate("best", 0.25, 0.75, 0.125, chosen=True),
    ]
    found = Sensitivity([HOSTILE, "b"], ["int8", "int4"], [[0.1, None], [0.2, 0.3]], "error")

    assert Page(candidates(tried)).cells[4:] == [
        *("★ best (chosen)", "0.250", "0.750", "0.125"),
        *(HOSTILE, "0.500", "", "0.25"),
    ]
    assert Page(sensitivities(found)).cells[3:] == [HOSTILE, "0.1", "", "b", "0.2", "0.3"]


# ------------------------------------------------------------------ notebooks

REPORT = BenchmarkReport(
    rows=(BenchmarkRow(HOSTILE, 1, 2, 3, 1.0, None, 4, 5_000_000, 6, 20, tuple([1.0] * 51)),),
    provider="cpu",
    threads=1,
    batch_size=None,
    cpu="a cpu",
    onnxruntime="1",
    onnx="1",
    python="3",
)


def test_a_benchmark_in_a_notebook() -> None:
    found = Page(REPORT._repr_html_())

    assert found.cells[9:14] == [HOSTILE, "1.000", "2.000", "3.000", "1.000"]
    assert found.cells[14:] == ["fixed batch", "4.0", "5", "6"]
    assert "20 interleaved rounds" in found.text


def test_an_explanation_in_a_notebook() -> None:
    row = Row((HOSTILE,), "Conv", "float", 3, 12.5, 1.0, Reason("c", HOSTILE, "nothing"))
    found = Page(
        Explanation((row,), (), (), 12.5, 9, "cpu", 1, "1", "cpu", (HOSTILE,))._repr_html_()
    )

    assert found.cells[6:] == [HOSTILE, "3", "Conv float", "12", "100.0%", HOSTILE]
    assert f"Note: {HOSTILE}" in found.text
    assert "script" not in found.tags


def test_a_run_and_a_comparison_in_a_notebook() -> None:
    pytest.importorskip("onnxruntime")
    model = parse("agraph (float[N, 4] x) => (float[N, 4] y) { h = Identity(x) y = Relu(h) }")
    samples = [{"x": np.ones((2, 4), np.float32)}]
    run = graphopt.optimize(model, passes="drop-identity", samples=samples, benchmark=False)

    shown = Page(replace(run, failures=(HOSTILE,))._repr_html_())
    compared = Page(graphopt.validate(model, run.model, samples=samples)._repr_html_())

    assert "1 × Identity removed" in shown.cells
    assert f"✗ Failed: {HOSTILE}" in shown.text
    assert "nodes 2 -> 1" in shown.text
    assert compared.cells[8:11] == ["y", "as written", "identical"]


def test_notebooks_need_no_plotly() -> None:
    code = "import sys; sys.modules['plotly'] = None; from graphopt import html_sections"

    subprocess.run([sys.executable, "-c", code], check=True)
