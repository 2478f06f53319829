"""What training gives that passes alone do not, on scikit-learn's digits.

    python tests/benchmarks/digits.py [--seeds 5] [QUESTION ...]

The questions are those of `tests/trained_digits.py`. Prints, in Markdown, the mean accuracy of each
model over the seeds with its deviation, and the mean difference to what it is compared with, with
that of the differences by seed. Accuracies are those of ONNX files, in percent of 450 test images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from trained_digits import QUESTIONS, measured


def spread(values: np.ndarray, signed: bool = False) -> str:
    """Mean and standard deviation over seeds."""
    sign = "+" if signed else ""
    return f"{values.mean():{sign}.2f} ± {values.std(ddof=1):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), metavar="QUESTION")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.questions:
        question = QUESTIONS[name]
        with tempfile.TemporaryDirectory() as folder:
            found = measured(question, range(arguments.seeds), Path(folder))
        against = {second: first for first, second in question.pairs}
        print(f"\n| {name} | accuracy | difference | better in |\n|---|---|---|---|")
        for row, values in found.items():
            change = values - found[against[row]] if row in against else None
            told = "| |" if change is None else f"{spread(change, True)} | {(change > 0).sum()}"
            print(f"| {row} | {spread(values)} | {told} |", flush=True)


if __name__ == "__main__":
    main()
