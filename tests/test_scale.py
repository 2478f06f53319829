"""Memory does not grow with the weights: they stay in their files."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import loading
from graphopt.testing import parse
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


def peak_bytes(model: Path, output: Path, *options: str) -> int:
    """Peak resident memory of a process that optimizes the model without running it."""
    return peak_of("optimize", model, "-o", output, "--no-validate", "--no-benchmark", *options)


def peak_of(*arguments: str | Path) -> int:
    """Peak resident memory of a run of the command line."""
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


def write_rewritten(path: Path, layers: int, width: int) -> int:
    """A model each of whose weights, in external data, is rewritten; the bytes of the weights."""
    weight_bytes = 4 * width * width
    with open(path.with_name("weights"), "wb") as file:
        for seed in range(layers):
            noise = np.random.default_rng(seed).standard_normal((width, width), np.float32)
            file.write(noise.tobytes())
    weights = "".join(f", float[{width}, {width}] w{n}" for n in range(layers))
    model = parse(
        f"agraph (float[n, {width}] x0{weights}) => (float[n, {width}] x{layers})"
        + " <float two = {2.0}> {"
        + "".join(
            f"t{n} = Transpose(w{n})  x{n + 1} = MatMul(x{n}, t{n}) "
            if n % 2
            else f"m{n} = MatMul(x{n}, w{n})  x{n + 1} = Mul(m{n}, two) "
            for n in range(layers)
        )
        + "}"
    )
    for n, value in enumerate(model.graph.inputs[1:]):
        value.const_value = ir.ExternalTensor(
            "weights",
            n * weight_bytes,
            weight_bytes,
            ir.DataType.FLOAT,
            shape=ir.Shape([width, width]),
            name=value.name,
        )
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ir.save(model, path)
    return layers * weight_bytes


def test_memory_does_not_grow_where_every_weight_is_rewritten(tmp_path: Path) -> None:
    write_rewritten(tmp_path / "tiny.onnx", layers=2, width=8)
    base = peak_bytes(tmp_path / "tiny.onnx", tmp_path / "tiny.out.onnx")
    written = write_rewritten(tmp_path / "m.onnx", layers=48, width=1024)
    assert written > 190 * MEGABYTE

    peak = peak_bytes(tmp_path / "m.onnx", tmp_path / "out.onnx")

    assert peak - base < GROWTH_MAXIMUM
    assert len(graphopt.load(tmp_path / "out.onnx").graph) == 48


@pytest.mark.slow
def test_memory_does_not_grow_where_data_is_reused_or_shared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_llama(tmp_path / f"{name}.tiny.onnx", **TINY, seed=0)
        write_llama(tmp_path / f"{name}.onnx", **MODEL_64_MB, seed=0)

    peaks = {}
    for tail in (".tiny.onnx", ".onnx"):
        a, b = (tmp_path / f"{name}{tail}" for name in ("a", "b"))
        shared = peak_of("share", a, b, "-o", tmp_path / "shared", "--no-validate")
        reused = peak_bytes(a, tmp_path / f"o{tail}", "--reuse-data")
        peaks[tail] = (shared, reused)

    for small, large in zip(*peaks.values(), strict=True):
        assert large - small < GROWTH_MAXIMUM
    assert not list(tmp_path.glob("o.onnx.*"))
    stored = sum(file.stat().st_size for file in (tmp_path / "shared").glob("*.data"))
    assert stored < 1.01 * sum(
        (tmp_path / f"a{tail}").with_suffix(".onnx.data").stat().st_size for tail in peaks
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_1_gb_of_weights(tmp_path: Path) -> None:
    check_growth(tmp_path, MODEL_1_GB, 980 * MEGABYTE)
