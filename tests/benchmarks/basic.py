"""The table of what the recipe basic does to a folder of models.

    python tests/benchmarks/basic.py MODELS SAMPLES [--threads 1 2] [--rounds-seconds 2]

MODELS holds `NAME/model.onnx` or `NAME.onnx`; SAMPLES holds a folder `NAME` of .npz files for each
(random samples are drawn for a model that has none). Without arguments, the models that come with
graphopt are used. Prints one row per model, in Markdown; times are those of this machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import graphopt
from graphopt.benchmark import benchmark
from graphopt.loading import open_model
from graphopt.samples import Samples, read_samples
from graphopt.signature import signature


@dataclass(frozen=True)
class Subject:
    name: str
    model: Path
    samples: Path | None


def subjects(models: Path, samples: Path | None) -> list[Subject]:
    files = sorted([*models.glob("*/model.onnx"), *models.glob("*.onnx")])
    named = [(f.parent.name if f.name == "model.onnx" else f.stem, f) for f in files]
    folders = {n: samples / n for n, _ in named if samples and (samples / n).is_dir()}
    return [Subject(name, file, folders.get(name)) for name, file in named]


def shipped(folder: Path) -> list[Subject]:
    from graphopt_models import DIGITS_CNN, DIGITS_CNN_SAMPLES
    from graphopt_models.llama import TINY, write_llama

    write_llama(folder / "llama_tiny.onnx", **TINY, seed=0, tied="copied")
    return [
        Subject("digits_cnn", DIGITS_CNN, DIGITS_CNN_SAMPLES),
        Subject("llama_tiny", folder / "llama_tiny.onnx", None),
    ]


def timing_samples(subject: Subject, run: graphopt.Run) -> Samples:
    inputs = signature(open_model(subject.model).model)
    if subject.samples is not None:
        return read_samples(subject.samples, inputs).first(8)
    from graphopt.random_samples import random_samples

    return read_samples(random_samples(run.model, 4), signature(run.model))


def row(subject: Subject, threads: list[int], folder: Path) -> str:
    out = folder / "optimized.onnx"
    started = time.perf_counter()
    run = graphopt.optimize(subject.model, samples=subject.samples, benchmark=False).save(out)
    seconds = time.perf_counter() - started
    rolled = sum(s.verdict == "rolled back" for s in run.steps)
    errors = run.numerics.get("as deployed", ())
    worst = max((e.rel_l2 for e in errors), default=float("nan"))
    exact = "identical" if all(e.identical for e in errors) else f"{worst:.1e}"
    pair = [("original", subject.model), ("optimized", out)]
    samples = timing_samples(subject, run)
    ratios = [
        benchmark(pair, samples=samples, threads=n, seconds=3.0).rows[1].ratio for n in threads
    ]
    before, after = run.original, run.optimized
    cells = [
        subject.name,
        f"{before.nodes} -> {after.nodes}",
        f"{before.stored_bytes:,} -> {after.stored_bytes:,}",
        f"{after.stored_bytes / before.stored_bytes:.3f}",
        f"{before.opset} -> {after.opset}",
        exact,
        f"{seconds:.1f}",
        *(f"{r:.2f}" for r in ratios),
        str(rolled),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="?")
    parser.add_argument("samples", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    latency = [f"latency, {n} thread{'s' if n > 1 else ''}" for n in arguments.threads]
    head = ["model", "nodes", "bytes", "size", "opset", "worst rel L2", "seconds", *latency,
            "rolled back"]  # fmt: skip
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = (
            subjects(arguments.models, arguments.samples) if arguments.models else shipped(folder)
        )
        for subject in found:
            print(row(subject, arguments.threads, folder), flush=True)


if __name__ == "__main__":
    main()
