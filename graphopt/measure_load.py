"""Load time and peak memory of a model: run in a fresh process by `graphopt.benchmark`.

A process that has loaded other models before has their memory and their warm code, so this one
loads a single model, runs it once if a sample is given, and prints one line of JSON::

    python -m graphopt.measure_load MODEL PROVIDER THREADS [SAMPLE.npz]

The keys are those of `graphopt.benchmark.LoadFigures`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from graphopt.errors import GraphoptError
from graphopt.runtime import Session, check_provider
from graphopt.sample_files import read_npz


def main(arguments: Sequence[str]) -> int:
    """Measure as the arguments say and print the figures; 2 when the model does not load or run."""
    model, provider, threads, *sample = arguments
    try:
        figures = _measure_here(Path(model), provider, int(threads), *map(Path, sample))
    except GraphoptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(figures))
    return 0


def _measure_here(
    model: Path, provider: str, threads: int, sample: Path | None = None
) -> dict[str, float]:
    # It imports onnxruntime, which is not part of loading the model.
    check_provider(provider)
    _forget_peak()
    start_ns = time.perf_counter_ns()
    session = Session(model, provider=provider, threads=threads)
    load_ms = (time.perf_counter_ns() - start_ns) / 1e6
    if sample is not None:
        session.run(read_npz(sample))
    return {"load_ms": load_ms, "peak_rss_bytes": _peak_rss_bytes()}


def _forget_peak() -> None:
    """Set the peak back to what is resident now, where Linux lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_rss_bytes() -> int:
    """The peak of this process alone.

    Linux keeps `ru_maxrss` over exec: a child of a large process starts with its parent's peak.
    `VmHWM` belongs to the new address space and does not.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    kilobytes = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return int(kilobytes) * 1024 if kilobytes is not None else _peak_by_getrusage()


def _peak_by_getrusage() -> int:
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
