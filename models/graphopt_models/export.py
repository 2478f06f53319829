"""Writes a digit classifier as ONNX with labelled samples: files and command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from graphopt.training.exporting import DynamicAxes, exported
from graphopt_models import digits
from graphopt_models.digits import SIDE, Split, View
from graphopt_models.training import Classifier, accuracy, train

OPSET: Final = 18
SAMPLES: Final = 300
"""How many samples of the test split are written beside a model."""


def export(module: nn.Module, view: View, path: Path) -> None:
    """Write a classifier to one ONNX file, weights inside.

    The file has one input named by the view, float32 [batch, ...], and one output `logits`,
    float32 [batch, 10]. The graph is left as PyTorch translates it, so that there is something to
    optimize.

    Args:
        module: the classifier; it is put into evaluation mode.
        view: what the module takes.
        path: the file to write.
    """
    # A batch of 1 would be taken for a constant.
    shape = (2, 1, SIDE, SIDE) if view == "image" else (2, SIDE, SIDE)
    inputs = (torch.zeros(shape),)
    axes: DynamicAxes = {view: {0: "batch"}}
    ir.save(exported(module, inputs, [view], ["logits"], axes, OPSET), path)


def write_samples(split: Split, view: View, samples: Path, labels: Path) -> None:
    """Write the first `SAMPLES` samples of a split and their labels.

    Args:
        split: where the samples come from, shuffled already.
        view: the input that the samples are for.
        samples: .npz file; gets float32 [n, 1, ...] under the name of the view, that is n samples
            of batch 1.
        labels: .npy file; gets int64 [n].
    """
    batches = split.inputs(view)[:SAMPLES, np.newaxis]
    np.savez_compressed(samples, allow_pickle=False, **{view: batches})
    np.save(labels, split.labels[:SAMPLES])


def main(classifier: Classifier, argv: Sequence[str] | None = None) -> None:
    """Train a classifier and write model, samples and labels: the command line of each builder.

    Args:
        classifier: what to train; its name is the stem of the three files.
        argv: the arguments after the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=f"Train and export {classifier.name}.")
    parser.add_argument("out_dir", type=Path, help="folder for the three files")
    parser.add_argument("--epochs", type=int, default=classifier.epochs)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")

    # The order of a sum depends on the number of threads, and so do the weights; the models are
    # too small to gain from more than one.
    torch.set_num_threads(1)
    module = train(classifier, epochs=arguments.epochs, seed=arguments.seed)
    test = digits.load().test

    folder: Path = arguments.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    stem = classifier.name
    export(module, classifier.view, folder / f"{stem}.onnx")
    write_samples(
        test, classifier.view, folder / f"{stem}_samples.npz", folder / f"{stem}_labels.npy"
    )
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(f"{stem}: {parameters} parameters")
    print(f"accuracy on the test split: {accuracy(module, test, classifier.view):.4f}")
