"""Memory does not grow with the weights: they stay in their files."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from graphopt import loading
from graphopt_models.llama import TINY, LlamaSize, write_llama

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc"
)

MEGABYTE = 1 << 20
GROWTH_MAXIMUM = 40 * MEGABYTE

MODEL_64_MB: LlamaSize = {
    "layers": 3,
    "hidden": 512,
    "intermediate": 1536,
    "heads": 8,
    "kv_heads": 4,
    "vocab": 16000,
}
MODEL_1_GB: LlamaSize = {
    "layers": 18,
    "hidden": 1024,
    "intermediate": 3072,
    "heads": 16,
    "kv_heads": 8,
    "vocab": 32000,
}

# Not ru_maxrss: that of a child begins with what its parent held when it forked.
OPTIMIZE = """
    import sys
    from graphopt.cli import main
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code
    status = open("/proc/self/status").read()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(peak.split()[1], file=sys.stderr)
    sys.exit(code)
"""


def peak_bytes(model: Path, output: Path) -> int:
    """Peak resident memory of a process that optimizes the model without running it."""
    arguments = ["optimize", model, "-o", output, "--no-validate", "--no-benchmark"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OPTIMIZE), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr) * 1024


def check_growth(folder: Path, size: LlamaSize, least_bytes: int) -> None:
    write_llama(folder / "tiny.onnx", **TINY, seed=0)
    written = write_llama(folder / "m.onnx", **size, seed=0)
    assert written >= least_bytes

    base = peak_bytes(folder / "tiny.onnx", folder / "tiny.out.onnx")
    peak = peak_bytes(folder / "m.onnx", folder / "out.onnx")

    assert peak - base < GROWTH_MAXIMUM
    kept = loading.open_model(folder / "out.onnx")
    assert kept.stored_bytes >= written


def test_memory_does_not_grow_with_64_mb_of_weights(tmp_path: Path) -> None:
    check_growth(tmp_path, MODEL_64_MB, 64 * MEGABYTE)


@pytest.mark.slow
def test_memory_does_not_grow_with_1_gb_of_weights(tmp_path: Path) -> None:
    check_growth(tmp_path, MODEL_1_GB, 980 * MEGABYTE)
