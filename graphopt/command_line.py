"""What the commands of the command line share: their options, and what is around their work."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from graphopt import json_report, report, saving
from graphopt.errors import GraphoptError, SpecError

WIDE = 1000
"""Columns of a pipe: nothing is wrapped, so that lines can be searched."""

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="PATH", help="Write the result as JSON; '-' for stdout."),
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="OUT.html",
        help="Write one page with all tables and figures, to be read without a network; needs "
        r"graphopt\[report].",
    ),
]
Provider = Annotated[str, typer.Option(help="cpu or cuda.")]
SamplesPath = Annotated[
    Path | None,
    typer.Option("--samples", help="Folder of .npz files keyed by input name, or one file."),
]
RandomSamples = Annotated[
    int | None,
    typer.Option("--random-samples", metavar="N", min=1, help="Draw N samples instead."),
]
MaxError = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[OUTPUT:]X[METRIC]",
        help="Error budget; METRIC rel-l2 (default), max-abs or disagreement. Repeatable.",
    ),
]
States = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        metavar="OUT=IN",
        help="Feed an output back as input of the next "
        "sample: samples in name order are a sequence. Repeatable.",
    ),
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The .onnx file.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where to write the result.")]
Require = Annotated[
    str | None,
    typer.Option("--require", metavar="TEXT", help="For example size<=0.3,latency<=0.9."),
]
BenchmarkThreads = Annotated[
    int, typer.Option("--threads", min=1, help="Threads of the benchmark.")
]
KernelThreads = Annotated[int, typer.Option("--threads", min=1, help="Intra-op threads.")]


# ------------------------------------------------------------------ around the work


def check_json(
    json: str | None, models: Sequence[Path] = (), others: Sequence[Path | None] = ()
) -> None:
    """Before any work is done: where the JSON goes, it destroys nothing."""
    for path in _json_file(json):
        saving.check_text_target(path, models, [other for other in others if other is not None])


def _json_file(json: str | None) -> list[Path]:
    return [] if json in (None, "-") else [Path(json)]


def check_page(
    page: Path | None, json: str | None, models: Sequence[Path], others: Sequence[Path | None]
) -> None:
    """Before any work is done: a page can be made, and where it goes, it destroys nothing."""
    if page is None:
        return
    files = [path for path in others if path is not None]
    saving.check_text_target(page, models, [*files, *_json_file(json)])
    _report_pages()


def _report_pages() -> ModuleType:
    """What makes pages, which needs more than the rest."""
    try:
        from graphopt import html_report
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise GraphoptError("--report needs plotly: pip install 'graphopt[report]'") from None
    return html_report


def write_page(page: Path | None, result: Any, *models: Path) -> None:
    """Write the page on a result, with the command that is running."""
    if page is None:
        return
    verb, *_ = arguments = sys.argv[1:]
    title = f"graphopt {verb}: {', '.join(model.name for model in models)}"
    sections = _report_pages().sections_of(result)
    command = shlex.join(["graphopt", *arguments])
    saving.write_text(page, _report_pages().page(title, sections, command))


def state_pairs(texts: list[str] | None) -> list[tuple[str, str]]:
    """The pairs of --state.

    Raises:
        SpecError: one is not of its form.
    """
    pairs = []
    for text in texts or []:
        output, mark, name = text.partition("=")
        if not (output and mark and name):
            raise SpecError(f"--state {text!r} is not of the form OUTPUT=INPUT")
        pairs.append((output, name))
    return pairs


@contextmanager
def watched() -> Iterator[Any]:
    """What goes on, on a terminal; nothing in a pipe."""
    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield status.update


def show(content: Any, json: str | None, plain: Callable[[], Mapping[str, Any]]) -> None:
    """Write a result to stdout, and as JSON where that was asked for.

    Args:
        content: the result as text.
        json: path of the JSON; "-" writes it to stdout instead of the text.
        plain: gives the result as plain data.
    """
    if json == "-":
        sys.stdout.write(json_report.to_text(plain()))
        return
    if json is not None:
        saving.write_text(Path(json), json_report.to_text(plain()))
    terminal = sys.stdout.isatty()
    sys.stdout.write(report.to_terminal_text(content, None if terminal else WIDE, terminal))
