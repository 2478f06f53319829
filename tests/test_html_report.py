"""The page: complete in itself, and as a browser shows it on a screen, a phone and paper."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("plotly")

import graphopt
import graphopt_models
from graphopt import cli
from graphopt.benchmark import benchmark
from graphopt.explain import explain_model
from graphopt.html_report import (
    Section,
    page,
    sections_of,
    sensitivity_section,
    trade_off_section,
)
from graphopt.ledger import Run
from graphopt.markup import element
from graphopt.testing import parse
from graphopt.trade_offs import Candidate, Sensitivity

PAGE_BYTES_MAXIMUM = 6_000_000

EVIL = "<script>alert('{}')</script><img src='http://example.invalid/{}.png' onerror='alert(1)'>"

SAMPLES = [
    {"x": np.random.default_rng(n).normal(size=(2, 32)).astype(np.float32)} for n in range(4)
]


def _hostile_model() -> ir.Model:
    """Three layers, and nodes and values whose names would be code."""
    weights = {
        name: np.random.default_rng(n).normal(size=(32, 32)).astype(np.float32)
        for n, name in enumerate("uvw")
    }
    model = parse(
        """
        agraph (float[N, 32] x, float[32, 32] u, float[32, 32] v, float[32, 32] w)
            => (float[N, 32] y) {
            a = MatMul(x, u)
            b = Relu(a)
            c = Identity(b)
            d = MatMul(c, v)
            e = Relu(d)
            y = MatMul(e, w)
        }""",
        **weights,
    )
    for number, node in enumerate(model.graph):
        node.name = EVIL.format(f"node{number}", number)
        if not node.outputs[0].is_graph_output():
            node.outputs[0].name = EVIL.format(f"value{number}", number)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with all that a report can show, timed only as long as it takes to have numbers."""
    folder = tmp_path_factory.mktemp("models")
    model = _hostile_model()
    found = graphopt.optimize(
        model,
        passes="drop-identity,quantize-weights{min-elements=1},quantize-static",
        samples=SAMPLES,
        max_error=0.5,
        benchmark=False,
        details=True,
    )
    files = [("original", folder / "a.onnx"), (EVIL.format("label", "l"), folder / "b.onnx")]
    for (_, path), one in zip(files, (model, found.model), strict=True):
        ir.save(one, path)
    report = benchmark(files, samples=SAMPLES, seconds=0.01, rounds=(6, 10))
    assert found.details is not None
    explanations = {
        label: explain_model(one, SAMPLES)
        for label, one in (("original", model), ("optimized", found.model))
    }
    details = replace(found.details, explanations=explanations)
    return replace(found, benchmark=report, details=details, notes=(EVIL,), failures=("size is 2",))


def _whole(run: Run) -> str:
    rng = np.random.default_rng(0)
    tried = [
        Candidate(EVIL.format(n, n), *rng.uniform(0.2, 1, 2).tolist(), rng.uniform(), n == 3, n > 6)
        for n in range(9)
    ]
    layers = [EVIL.format(n, n) for n in range(12)]
    options = ["int8", "<a href=//x>4</a>", "prune-magnitude{sparsity=0.7}", EVIL]
    drops = [[float(drop) for drop in rng.uniform(0, 0.3, 4)] for _ in layers]
    sections = [
        *sections_of(run),
        trade_off_section(tried, 0.8),
        sensitivity_section(Sensitivity(layers, options, drops, f"error {EVIL}")),
    ]
    return page(f"graphopt optimize: {EVIL}", sections, f"graphopt optimize '{EVIL}'")


@pytest.fixture(scope="module")
def whole(run: Run) -> str:
    return _whole(run)


# ------------------------------------------------------------------ the file


class _Outline(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_is_small_enough_and_holds_plotly_once(whole: str) -> None:
    assert len(whole.encode()) < PAGE_BYTES_MAXIMUM
    assert whole.count("plotly.js v") == 1


def test_nothing_is_loaded_from_anywhere(whole: str) -> None:
    outline = _Outline(whole)

    addresses = [
        (tag, name, value)
        for tag, attributes in outline.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert all(tag in ("a", "link") for tag, *_ in addresses)
    assert all(v is not None and v.startswith(("#", "data:")) for *_, v in addresses)
    (policy,) = [m["content"] for m in outline.all("meta") if "http-equiv" in m]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_names_make_no_elements(whole: str) -> None:
    outline = _Outline(whole)

    assert outline.all("img") == []
    kinds = [attributes.get("type") for attributes in outline.all("script")]
    assert kinds.count(None) == 2, "plotly and what calls it"
    assert set(kinds) == {None, "application/json"}
    assert not any(n.startswith("on") for _, attributes in outline.elements for n in attributes)


def test_the_contents_lead_to_every_section_and_ids_are_unique(whole: str) -> None:
    outline = _Outline(whole)

    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in outline.all("a")]
    assert targets == [f"#{section['id']}" for section in outline.all("section")]
    assert len(outline.all("h1")) == 1


def test_every_table_has_a_caption_and_every_figure_says_what_it_shows(whole: str) -> None:
    outline = _Outline(whole)

    assert len(outline.all("table")) == len(outline.all("caption")) > 8
    assert all("scope" in attributes for attributes in outline.all("th"))
    plots = [a for a in outline.all("div") if a.get("class") == "plot"]
    assert len(plots) == len(outline.all("figcaption")) == len(outline.all("figure")) == 9
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)


def test_the_same_result_gives_the_same_bytes(run: Run, whole: str) -> None:
    assert _whole(run) == whole


def test_a_page_without_figures_has_no_script() -> None:
    text = page("title", [Section("Part", [element("p", "text")])], "graphopt x")

    assert _Outline(text).all("script") == []
    assert len(text) < 20_000


def test_what_was_not_measured_is_left_out(run: Run) -> None:
    bare = replace(run, benchmark=None, details=None, numerics={}, notes=())

    assert [s.title for s in sections_of(bare)] == ["Summary", "Ledger"]
    with pytest.raises(TypeError, match="no report of int"):
        sections_of(3)


# ------------------------------------------------------------------ the command line

DIGITS = str(graphopt_models.DIGITS_CNN)
RANDOM = ("--random-samples", "2")


def _graphopt(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int | str | None, str]:
    monkeypatch.setattr(sys, "argv", ["graphopt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "titles"),
    [
        (
            ["optimize", DIGITS, "-o", "o.onnx", "--passes", "drop-unused", "--no-benchmark"],
            ["Summary", "Ledger", "Outputs", "Error by layer", "Size by layer and element type"],
        ),
        (
            ["validate", DIGITS, DIGITS],
            ["Outputs", "Error by layer", "Size by layer and element type"],
        ),
        (["benchmark", DIGITS], ["Latency"]),
        (["explain", DIGITS], ["Time by operator and kernel"]),
    ],
)
def test_commands_write_a_page_that_says_how_to_repeat_it(
    arguments: list[str],
    titles: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments, *RANDOM, "--report", "it's.html"]

    assert _graphopt(arguments, monkeypatch, capsys) == (0, "")

    text = Path("it's.html").read_text()
    found = re.findall(r"<h2 id=[^>]*>([^<]*)</h2>", text)
    assert found == [*titles, "Versions, machine and command"]
    assert f"<h1>graphopt {arguments[0]}: digits_cnn.onnx" in text
    assert "--report &#x27;it&#x27;&quot;&#x27;&quot;&#x27;s.html&#x27;</code>" in text


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (DIGITS, "is the input itself"),
        ("o.onnx", "o.onnx is asked for twice"),
        ("result.json", "result.json is asked for twice"),
        ("no/such/page.html", "there is no folder no/such"),
        (".", "is a folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_run(
    report: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["optimize", DIGITS, "-o", "o.onnx", "--json", "result.json", "--report", report]

    code, err = _graphopt([*arguments, *RANDOM], monkeypatch, capsys)

    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_without_plotly_the_run_does_not_start(tmp_path: Path) -> None:
    code = "import sys; sys.modules['plotly'] = None; from graphopt.cli import main; main()"
    arguments = ["optimize", DIGITS, "-o", "o.onnx", *RANDOM, "--report", "r.html"]

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 2
    assert done.stderr == (
        "graphopt: error: --report needs plotly: pip install 'graphopt[report]'\n"
    )
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ in a browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@dataclass
class _Shown:
    """A page in a browser, and all that it did beside being shown."""

    page: Any
    happened: list[str] = field(default_factory=list)

    def all(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH (apt-get install chromium)")
    # Chromium's own sandbox needs more than the root of a container may do.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


def _open(chromium: Any, path: Path, width: int, scheme: str = "light") -> _Shown:
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, device_scale_factor=1
    )
    shown = _Shown(context.new_page())
    happened = shown.happened
    shown.page.on("console", lambda message: happened.append(f"console: {message.text}"))
    shown.page.on("pageerror", lambda error: happened.append(f"error: {error}"))
    shown.page.on("dialog", lambda dialog: (happened.append("dialog"), dialog.dismiss()))
    shown.page.on("request", lambda request: happened.append(f"request: {request.url}"))
    shown.page.goto(path.as_uri())
    shown.page.wait_for_function("document.querySelectorAll('.plot svg .bglayer').length > 8")
    return shown


@pytest.fixture
def file(whole: str, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(whole)
    return path


CUT_OFF = """
[...document.querySelectorAll('.plot')].flatMap(plot => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.width && (own.left < box.left - 1 || own.right > box.right + 1
      || own.top < box.top - 1 || own.bottom > box.bottom + 1);
  }).map(text => `${plot.id}: ${text.textContent}`);
})"""

HIDDEN = """
[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('.plot')
  && e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName)"""

CONTRAST = """
(() => {
  const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const ratio = color => {
    const [low, high] = [paper, luminance(color)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const texts = [...document.querySelectorAll('p, td, th, dt, dd, a, h2, caption, figcaption')]
    .map(e => ratio(getComputedStyle(e).color));
  const ticks = [...document.querySelectorAll('.xtick text, .ytick text, .legendtext, .xtitle')]
    .map(e => ratio(getComputedStyle(e).fill));
  return [Math.min(...texts), Math.min(...ticks)];
})()"""


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_it_looks_right_and_does_nothing_else(
    width: int, scheme: str, chromium: Any, file: Path
) -> None:
    shown = _open(chromium, file, width, scheme)

    assert shown.happened == [f"request: {file.as_uri()}"]
    assert shown.all("document.documentElement.scrollWidth") <= width
    assert shown.all(HIDDEN) == []
    assert shown.all(CUT_OFF) == []
    assert shown.all("document.querySelectorAll('svg a, main img').length") == 0
    least = shown.all(CONTRAST)
    assert all(ratio >= 4.5 for ratio in least), "WCAG asks for 4.5 to 1"
    # Names are shown as they are, also in figures.
    assert "<img src=" in shown.all("document.querySelector('h1').textContent")
    labels = shown.all("[...document.querySelectorAll('.ytick text')].map(e => e.textContent)")
    assert any("onerror='alert(1)'>" in label for label in labels)
    # What is too wide scrolls by itself, and steps open by the keyboard.
    hidden = shown.all(
        "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    )
    assert max(hidden) > 50 or width > 390
    assert shown.all("getComputedStyle(document.querySelector('.scroll')).overflowX") == "auto"
    shown.page.focus("summary")
    shown.page.keyboard.press("Enter")
    assert shown.all("document.querySelectorAll('details[open]').length") == 1


@pytest.mark.browser
def test_on_paper_all_is_open_and_nothing_is_cut_off(chromium: Any, file: Path) -> None:
    shown = _open(chromium, file, 1280, "dark")
    shown.page.emulate_media(media="print")
    shown.page.set_viewport_size({"width": 680, "height": 900})
    shown.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    shown.page.wait_for_function(
        "[...document.querySelectorAll('.plot .main-svg')].every(e => e.clientWidth == 680)"
    )

    assert shown.all("document.querySelectorAll('details:not([open])').length") == 0
    assert shown.all("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.all(CUT_OFF) == []
    assert min(shown.all(CONTRAST)) >= 4.5

    shown.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert shown.all("document.querySelectorAll('details[open]').length") == 0
    printed = shown.page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) > 3
    assert shown.happened == [f"request: {file.as_uri()}"]


@pytest.mark.browser
def test_without_javascript_the_tables_are_there(chromium: Any, file: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(file.as_uri())

    assert opened.locator("noscript p").count() == 1
    assert opened.locator("table").count() > 8


def test_figures_are_json(whole: str) -> None:
    held = re.findall(r'<script type="application/json" id="figure-\d+-json">(.*?)</script>', whole)

    assert len(held) == 9
    assert all(json.loads(text)["data"] for text in held)
