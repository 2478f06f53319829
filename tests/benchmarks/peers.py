"""The table of what the recipe basic makes of a folder of models, beside what its peers do.

    python tests/benchmarks/peers.py MODELS SAMPLES [--peers-python PYTHON] [--models-only NAME ...]
    python tests/benchmarks/peers.py --llama FOLDER [--peers-python PYTHON]

MODELS and SAMPLES are as for `basic.py`. The peers (onnxsim, onnxslim, onnxscript's optimizer, and
onnxruntime's basic level) run in PYTHON, each in a process of its own, on a copy of the model. A
result counts when it loads, agrees with the original within rounding as deployed, and has no
operators outside the standard that the original does not have; otherwise the reason stands beside
it. Nodes are those of all graphs, functions counted where they are called, Constant nodes left out.
Seconds and peak memory are those of the process, from its start to its end; graphopt's include the
validation of every pass on the samples. The second table says what each took.

--llama builds a decoder of 350 million parameters with external data in FOLDER, and times each tool
on it; there graphopt does not validate, as its peers do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from basic import Subject, subjects

from graphopt.benchmark import benchmark
from graphopt.contract import Effect, Sample
from graphopt.errors import GraphoptError
from graphopt.external_data import external_tensors
from graphopt.gate import computed_in_half
from graphopt.loading import open_model
from graphopt.operators import node_count, other_operators
from graphopt.random_samples import random_samples
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.signature import complete, signature
from graphopt.validation import Comparison, why_over

PEERS = {
    "onnxsim": "onnxsim",
    "onnxslim": "onnxslim",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime basic",
}
RUN_PEER = Path(__file__).with_name("run_peer.py")
SAMPLES_MAXIMUM = 8

# A process of its own, and a small one: what a process had in memory when it started another counts
# as the peak of that one too.
_MEASURE = """
import json, os, subprocess, sys, threading, time
limit, *command = sys.argv[1:]
started = time.perf_counter()
process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
timer = threading.Timer(float(limit), process.kill)
timer.start()
_, status, usage = os.wait4(process.pid, 0)
alive = timer.is_alive()
timer.cancel()
seconds = time.perf_counter() - started
print(json.dumps([os.waitstatus_to_exitcode(status), not alive, seconds, usage.ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class Outcome:
    """What a tool made of a model.

    Attributes:
        nodes: of the result; None where there is none.
        fault: why the result does not count, or None.
        seconds: that the process took.
        peak_bytes: of the process.
        stored_bytes: of the result.
    """

    nodes: int | None
    fault: str | None
    seconds: float
    peak_bytes: int
    stored_bytes: int

    def __str__(self) -> str:
        nodes = "-" if self.nodes is None else str(self.nodes)
        return nodes if self.fault is None else f"{nodes} ({self.fault})"

    @property
    def cost(self) -> str:
        return f"{self.seconds:.1f} s, {self.peak_bytes / 1e6:,.0f} MB, {self.stored_bytes:,} bytes"


def run_measured(
    command: Sequence[str | Path], folder: Path, limit_s: float
) -> tuple[Outcome, str]:
    """The cost of a command, and the last line that it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(limit_s), *map(str, command)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    code, timed_out, seconds, peak_bytes = json.loads(done.stdout)
    fault = f"over {limit_s:g} s" if timed_out else f"status {code}" if code else None
    lines = done.stderr.strip().splitlines() or [""]
    return Outcome(None, fault, seconds, peak_bytes, 0), lines[-1]


def copy_model(model: Path, folder: Path) -> Path:
    """A copy, data included, so that no tool can harm the original."""
    copy = folder / model.name
    shutil.copy(model, copy)
    for file in {Path(tensor.path) for tensor in external_tensors(open_model(model).model)}:
        place = folder / file.relative_to(model.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return copy


def chosen_samples(subject: Subject) -> list[Sample]:
    model = open_model(subject.model, drop_training_info=True).model
    inputs = [i for i in signature(model) if i.required]
    given = subject.samples if subject.samples is not None else random_samples(model, 4)
    return [complete(s, inputs) for s in read_samples(given, inputs).first(SAMPLES_MAXIMUM)]


def expected_outputs(model: Path, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
    session = Session(model)
    return [session.run(sample) for sample in samples]


def why_it_does_not_count(
    original: Path, result: Path, samples: Sequence[Sample], expected: Sequence[Sample]
) -> str | None:
    before, after = open_model(original).model, open_model(result).model
    others = other_operators(after).keys() - other_operators(before).keys()
    if others:
        return f"writes {', '.join(sorted(others))}"
    try:
        session = Session(result)
        if not set(session.inputs) <= set(samples[0]):
            return "has other inputs"
        got = [session.run({name: s[name] for name in session.inputs}) for s in samples]
    except GraphoptError:
        return "does not run"
    comparison = Comparison()
    for first, second in zip(expected, got, strict=True):
        comparison.add(first, second)
    coarse = computed_in_half(before)
    reason = why_over(Effect.ROUNDING, comparison.outputs(), computed_in=coarse)
    return None if reason is None else "disagrees"


def judged(
    cost: Outcome,
    last_line: str,
    original: Path,
    result: Path,
    samples: Sequence[Sample],
    expected: Sequence[Sample],
) -> Outcome:
    if cost.fault is not None or not result.exists():
        print(f"{original.parent.name}/{result.stem}: {last_line}", file=sys.stderr)
        return Outcome(None, cost.fault or "no result", cost.seconds, cost.peak_bytes, 0)
    try:
        source = open_model(result)
        fault = why_it_does_not_count(original, result, samples, expected)
        nodes: int | None = node_count(source.model)
        stored_bytes = source.stored_bytes
    except GraphoptError as error:
        print(f"{original.parent.name}/{result.stem}: {error}", file=sys.stderr)
        nodes, fault, stored_bytes = None, "not valid", result.stat().st_size
    return Outcome(nodes, fault, cost.seconds, cost.peak_bytes, stored_bytes)


def commands(
    peers: Sequence[str], python: Path, ours: Sequence[str]
) -> Iterator[tuple[str, list[str | Path]]]:
    """For each tool the command that takes a source, and then a target."""
    for peer in peers:
        yield peer, [python, RUN_PEER, peer]
    yield "graphopt", [sys.executable, "-m", "graphopt", "optimize", "--no-benchmark", *ours]


def outcomes(
    subject: Subject, peers: Sequence[str], python: Path, limit_s: float, folder: Path
) -> dict[str, Outcome]:
    samples = chosen_samples(subject)
    expected = expected_outputs(subject.model, samples)
    given = ["--samples", str(subject.samples.resolve())] if subject.samples else []
    found = {}
    for tool, command in commands(peers, python, given):
        place = folder / f"{subject.name}.{tool}"
        place.mkdir()
        source, result = copy_model(subject.model, place), place / f"{tool}.result.onnx"
        flags = ["-o"] if tool == "graphopt" else []
        cost = run_measured([*command, source, *flags, result], place, limit_s)
        found[tool] = judged(*cost, subject.model, result, samples, expected)
    return found


def best_of(found: dict[str, Outcome], peers: Sequence[str]) -> str:
    counts = [(found[p].nodes, PEERS[p]) for p in peers if found[p].fault is None]
    fewest = min((n for n, _ in counts if n is not None), default=None)
    names = [name for nodes, name in counts if nodes == fewest]
    return "none" if fewest is None else f"{fewest} ({', '.join(names)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(line, (head, ["---"] * len(head), *rows)))


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def compare(arguments: argparse.Namespace, peers: Sequence[str]) -> None:
    rows, costs = [], []
    for subject in subjects(arguments.models, arguments.samples):
        if arguments.models_only and subject.name not in arguments.models_only:
            continue
        with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
            folder = Path(scratch)
            found = outcomes(subject, peers, arguments.peers_python, arguments.timeout, folder)
            result = folder / f"{subject.name}.graphopt" / "graphopt.result.onnx"
            ratio = "-"
            if found["graphopt"].nodes is not None:
                pair = [("original", subject.model), ("graphopt", result)]
                report = benchmark(pair, samples=chosen_samples(subject), seconds=2.0)
                ratio = f"{report.rows[1].ratio:.2f}"
        before = node_count(open_model(subject.model, drop_training_info=True).model)
        told = [str(found[peer]) for peer in peers]
        best = best_of(found, peers)
        rows.append([subject.name, str(before), *told, best, str(found["graphopt"]), ratio])
        costs.append([subject.name, *(found[tool].cost for tool in (*peers, "graphopt"))])
        print(f"{subject.name} done", file=sys.stderr, flush=True)
    names = [PEERS[peer] for peer in peers]
    print(table(["model", "nodes", *names, "best peer", "graphopt", "latency"], rows))
    print()
    print(table(["model", *names, "graphopt"], costs))


def time_llama(arguments: argparse.Namespace, peers: Sequence[str]) -> None:
    from graphopt_models.llama import MODEL_350M, write_llama

    folder: Path = arguments.llama
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "llama_350m.onnx"
    if not model.exists():
        write_llama(model, **MODEL_350M, seed=0, tied="copied" if arguments.copied else "shared")
    source = open_model(model)
    rows = [["(as given)", str(node_count(source.model)), "", "", f"{source.stored_bytes:,}"]]
    samples = random_samples(source.model, 1)
    expected = expected_outputs(model, samples)
    for tool, command in commands(peers, arguments.peers_python, ["--no-validate"]):
        place = folder / tool
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        copy, result = copy_model(model, place), place / f"{tool}.result.onnx"
        flags = ["-o"] if tool == "graphopt" else []
        cost = run_measured([*command, copy, *flags, result], place, arguments.timeout)
        found = judged(*cost, model, result, samples, expected)
        name = PEERS.get(tool, tool)
        peak = f"{found.peak_bytes / 1e6:,.0f}"
        rows.append([name, str(found), f"{found.seconds:.1f}", peak, f"{found.stored_bytes:,}"])
        shutil.rmtree(place)
        print(f"{name} done", file=sys.stderr, flush=True)
    print(table(["tool", "nodes", "seconds", "peak MB", "bytes"], rows))


def installed_peers(python: Path) -> list[str]:
    """The peers that the interpreter has; says which of them, and which not."""
    done = subprocess.run(
        [python, RUN_PEER, "versions"], capture_output=True, text=True, check=True
    )
    versions: dict[str, str | None] = json.loads(done.stdout)
    for name, version in versions.items():
        told = f"{name} {version}" if version else f"{name} is not installed and is left out"
        print(told, file=sys.stderr)
    return [name for name, version in versions.items() if version]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="?")
    parser.add_argument("samples", type=Path, nargs="?")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--models-only", nargs="+", metavar="NAME")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each tool")
    parser.add_argument("--llama", type=Path, metavar="FOLDER")
    parser.add_argument("--copied", action="store_true", help="--llama: the head is a copy")
    arguments = parser.parse_args()
    if (arguments.models is None) == (arguments.llama is None):
        parser.error("give MODELS or --llama FOLDER")
    peers = installed_peers(arguments.peers_python)
    if arguments.llama is not None:
        time_llama(arguments, peers)
    else:
        compare(arguments, peers)


if __name__ == "__main__":
    main()
