"""The README's table of what searches and recipes make of the project's own models.

    python tests/benchmarks/own_models.py [--models NAME ...] [--minutes 10] [--json FILE]

Trains and exports the digit classifiers (needs the extra `train`; a minute), and gives each to the
tools of `tune_peers.py`: `tune` for three scenarios within a drop of 1 point, and every recipe. The
tools get the 270 images by which an epoch was chosen, with labels. Accuracy is that on the 450 of
the test split, which neither training nor a tool saw; one image is 0.22 points. Size and latency
are ratios to the original, the latter interleaved, batch 1, one thread, onnxruntime's defaults.

Prints the table in Markdown, to stand between the marks <!-- own --> and <!-- /own -->. --json has
all that was measured; what each tool told of its result goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peers import table
from tune_peers import Entry, Row, as_json, compare, cut, installed, parse

from graphopt_models import digits
from graphopt_models.digits import Split, View
from graphopt_models.export import export
from graphopt_models.training import Classifier, train

MODELS = ("digits_cnn", "digits_lstm", "digits_transformer")
COMMANDS = {
    "tune-size": ("a small file, as on a device", "`tune --scenario edge`"),
    "small": ("", "`--recipe small`"),
    "int8-codebook": ("small, and fast on a CPU", "`--recipe int8-codebook`"),
    "tune-latency": ("speed on a CPU", "`tune --scenario server-cpu`"),
    "int8": ("", "`--recipe int8`"),
    "tune-memory": ("less memory for each token", "`tune --scenario llm-decode`"),
    "int4": ("", "`--recipe int4`"),
    "fp16": ("speed on a GPU", "`tune --scenario server-gpu`, `--recipe fp16`"),
    "basic": ("the same outputs", "`--recipe basic`, the default"),
}
"""By tool: what a user needs, and writes."""


def write_split(split: Split, view: View, folder: Path) -> None:
    """Samples of batch 1, and their labels beside them."""
    folder.mkdir()
    for number, image in enumerate(split.inputs(view)):
        np.savez(folder / f"{number:03d}.npz", **{view: image[np.newaxis]})
    (folder / "labels.json").write_text(json.dumps(split.labels.tolist()))


def entry_of(name: str, folder: Path) -> Entry:
    """A trained model, with samples for the tools and others for the judge."""
    classifier: Classifier = importlib.import_module(f"graphopt_models.{name}").CLASSIFIER
    data = digits.load()
    samples, evaluation = folder / f"{name}.samples", folder / f"{name}.evaluation"
    write_split(data.validation, classifier.view, samples)
    write_split(data.test, classifier.view, evaluation)
    model = folder / f"{name}.onnx"
    export(train(classifier), classifier.view, model)
    return Entry(name, model, samples, evaluation=evaluation, max_drop=1.0)


def head_of(entry: Entry, rows: Sequence[Row]) -> str:
    original = rows[0]
    kilobytes = (original.stored_bytes or 0) / 1e3
    return f"{entry.name}: {kilobytes:.0f} kB, {original.value:.2f} %"


def cell(row: Row) -> str:
    """Size, latency and accuracy, or why there are none."""
    figures = (row.size_ratio, row.latency_ratio, row.value)
    if row.fault is not None or None in figures:
        return cut(row.fault or row.remark)
    return ", ".join(f"{figure:.2f}" for figure in figures)


def shown(done: Sequence[tuple[Entry, Sequence[Row]]]) -> str:
    """A row for each command, a column for each model."""
    head = ["you need", "command", *(head_of(entry, rows) for entry, rows in done)]
    found = [{row.tool: row for row in rows} for _, rows in done]
    lines = [
        [need, command, *(cell(rows[tool]) for rows in found)]
        for tool, (need, command) in COMMANDS.items()
    ]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME",
                        help=f"of {', '.join(MODELS)}; by default all")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10.0, help="for each search of tune")
    parser.add_argument("--seconds", type=float, default=4.0, help="to time each result for")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was measured")
    given = parser.parse_args()
    arguments = parse(["--minutes", str(given.minutes), "--seconds", str(given.seconds)])
    # The weights depend on the order of sums, and that on the number of threads.
    torch.set_num_threads(1)
    done = []
    with tempfile.TemporaryDirectory(prefix="own-models-") as scratch:
        for name in given.models:
            entry = entry_of(name, Path(scratch))
            done.append((entry, compare(entry, list(COMMANDS), arguments, Path(scratch))))
    if given.json:
        text = json.dumps(as_json(done, installed(arguments.peers_python)), indent=2)
        given.json.write_text(f"{text}\n", encoding="utf-8")
    print(shown(done))


if __name__ == "__main__":
    main()
