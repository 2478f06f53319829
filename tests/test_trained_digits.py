"""On digits, training gives what passes alone do not: five seeds of each comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("sklearn")

from trained_digits import QUESTIONS, measured

SEEDS = range(5)

SURE = {
    "distilled": ("200 labels, hinton", "200 labels, standardized", "200 labels, features too"),
    "pruned": ("90% zeros, then fine-tuned",),
    "quantized": ("4 bits, in training", "2 bits, in training"),
    "integers": ("4 bits, in training", "3 bits, in training"),
}
"""Models whose mean difference is more than two standard errors from nothing."""

BETTER = {
    "distilled": ("all labels, standardized",),
    "pruned": ("80% zeros, then fine-tuned",),
    "quantized": ("3 bits, in training",),
    "integers": (),
}
"""Those that are better on the mean, while seeds differ by more."""


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_training_gives_what_passes_alone_do_not(name: str, tmp_path: Path) -> None:
    question = QUESTIONS[name]
    found = measured(question, SEEDS, tmp_path)
    against = {second: first for first, second in question.pairs}

    changes = {row: found[row] - found[first] for row, first in against.items()}
    for row in SURE[name]:
        change = changes[row]
        assert change.mean() > 2 * change.std(ddof=1) / np.sqrt(len(SEEDS)), (row, change)
    for row in BETTER[name]:
        assert changes[row].mean() > 0, (row, changes[row])
