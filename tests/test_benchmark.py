from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.benchmark import PERCENTILES, BenchmarkReport, benchmark, measure_load, take_turns
from graphopt.contract import Sample
from graphopt.errors import GraphoptError, ModelError, RuntimeUnavailable, SampleError
from graphopt.testing import parse

PLAIN = "agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
FIXED = "agraph (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }"


def _save(folder: Path, name: str, text: str, **initializers: np.ndarray) -> tuple[str, Path]:
    path = folder / f"{name}.onnx"
    ir.save(parse(text, **initializers), path)
    return name, path


def _samples(count: int = 3, rows: int = 2) -> list[Sample]:
    return [{"x": np.full((rows, 4), i, np.float32)} for i in range(count)]


def _quick(
    models: list[tuple[str, Path]], samples: object = None, **more: object
) -> BenchmarkReport:
    chosen = _samples() if samples is None else samples
    return benchmark(models, samples=chosen, seconds=0.01, rounds=(4, 10), **more)  # type: ignore[arg-type]


def test_measures_every_model_against_the_first_and_says_with_what(tmp_path: Path) -> None:
    models = [_save(tmp_path, "first", PLAIN), _save(tmp_path, "second", PLAIN)]

    report = _quick(models, threads=2, batch_size=3)

    assert (report.provider, report.threads, report.batch_size) == ("cpu", 2, 3)
    assert report.cpu
    assert report.python == ".".join(map(str, sys.version_info[:3]))
    assert report.onnxruntime != "none"
    assert [row.model for row in report.rows] == ["first", "second"]
    assert report.rows[0].ratio == 1
    for row in report.rows:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.ratio > 0
        assert row.load_ms > 0
        assert row.peak_rss_bytes is not None
        assert row.throughput_per_s is not None
        assert 4 <= row.rounds <= 10
        assert len(row.percentiles_ms) == len(PERCENTILES)
        assert list(row.percentiles_ms) == sorted(row.percentiles_ms)
        assert row.percentiles_ms[len(PERCENTILES) // 2] == pytest.approx(row.p50_ms, abs=1e-6)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["rows"][0]["model"] == "first"


def test_the_models_go_there_and_back_and_each_sample_comes_in_both_orders() -> None:
    turns: list[str] = []
    calls = [[partial(turns.append, f"{m}{n}") for n in (1, 2)] for m in "AB"]

    times_ms = take_turns(calls, budget_s=0, rounds=(5, 9))

    assert " ".join(turns) == "A1 B1 B1 A1 A2 B2 B2 A2 A1 B1"
    assert times_ms.shape == (5, 2)
    assert (times_ms > 0).all()


@pytest.mark.parametrize(
    ("rounds", "budget_s", "expected"),
    [((3, 9), 0, 3), ((3, 9), 60, 9), ((7, 2), 0, 7), ((0, 0), 60, 1), ((5, 5), 60, 5)],
)
def test_the_number_of_rounds_has_bounds(
    rounds: tuple[int, int], budget_s: float, expected: int
) -> None:
    assert len(take_turns([[lambda: None]], budget_s, rounds)) == expected


def test_the_samples_may_be_an_iterator_and_have_other_sizes(tmp_path: Path) -> None:
    samples = ({"x": np.ones((n + 1, 4), np.float32)} for n in range(100))

    assert _quick([_save(tmp_path, "m", PLAIN)], samples).rows[0].rounds >= 4
    assert next(samples)["x"].shape == (9, 4), "no more than eight were taken"


# ------------------------------------------------------------------ throughput


def _throughput(model: tuple[str, Path], batch_size: int | None, samples: object = None) -> bool:
    return _quick([model], samples, batch_size=batch_size).rows[0].throughput_per_s is not None


@pytest.mark.parametrize(("batch_size", "fixed_can"), [(2, True), (5, False)])
def test_a_dynamic_batch_takes_every_size_and_a_fixed_one_its_own(
    batch_size: int, fixed_can: bool, tmp_path: Path
) -> None:
    models = [_save(tmp_path, "fixed", FIXED), _save(tmp_path, "dynamic", PLAIN)]

    fixed, dynamic = _quick(models, batch_size=batch_size).rows

    assert (fixed.throughput_per_s is not None) is fixed_can
    assert dynamic.throughput_per_s is not None


def test_a_batch_in_the_middle_is_found_by_its_name(tmp_path: Path) -> None:
    text = """
        agraph (float[batch, 4] x, float[1, batch, 4] h, float[4] fixed)
            => (float[1, batch, 4] y) { z = Add(x, h) y = Add(z, fixed) }
    """
    sample = {
        "x": np.ones((2, 4), np.float32),
        "h": np.ones((1, 2, 4), np.float32),
        "fixed": np.ones(4, np.float32),
    }

    # Add would fail on (3, 4) and (1, 2, 4).
    assert _throughput(_save(tmp_path, "m", text), 3, [sample])


def test_a_first_dimension_that_is_no_batch_is_no_error(tmp_path: Path) -> None:
    text = "agraph (float[N] x, int64[2] s) => (float[2, 2] y) { y = Reshape(x, s) }"
    model = _save(tmp_path, "m", text, s=np.array([2, 2]))

    row = _quick([model], [{"x": np.ones(4, np.float32)}], batch_size=3).rows[0]

    assert row.throughput_per_s is None
    assert row.p50_ms > 0


def test_a_model_without_inputs_runs(tmp_path: Path) -> None:
    text = "agraph () => (float[2] y) { y = Constant<value_floats=[1.0, 2.0]>() }"
    model = _save(tmp_path, "m", text)

    assert _throughput(model, None, [{}])


# ------------------------------------------------------------------ samples that are not complete


def test_state_that_a_sample_lacks_is_zeros_as_large_as_the_sample(tmp_path: Path) -> None:
    text = """
        agraph (float[batch, 4] x, float[1, batch, 4] state, string[?] words)
            => (float[1, batch, 4] stateN, string[?] w)
        { stateN = Add(x, state) w = Identity(words) }
    """
    rows = [{"x": np.ones((3, 4), np.float32)}]

    assert _quick([_save(tmp_path, "m", text)], rows).rows[0].p50_ms > 0


def test_inputs_that_have_become_constant_are_not_fed(tmp_path: Path) -> None:
    text = "agraph (float[N, 4] x, float[4] b) => (float[N, 4] y) { y = Add(x, b) }"
    models = [
        _save(tmp_path, "input", text),
        _save(tmp_path, "constant", text, b=np.ones(4, np.float32)),
    ]

    sample = {**_samples(1)[0], "b": np.ones(4, np.float32)}
    assert len(_quick(models, [sample]).rows) == 2


# ------------------------------------------------------------------ load, memory and bytes


def test_stored_bytes_count_each_data_file_once(tmp_path: Path) -> None:
    text = """
        agraph (float[N, 4] x, float[4] a, float[4] b) => (float[N, 4] y)
        { c = Add(x, a) y = Add(c, b) }
    """
    model = parse(text, a=np.ones(4, np.float32), b=np.zeros(4, np.float32))
    path = tmp_path / "m.onnx"
    ir.save(model, path, external_data="m.data", size_threshold_bytes=0)
    (tmp_path / "other.data").write_bytes(bytes(1000))

    row = _quick([("m", path)]).rows[0]

    assert row.stored_bytes == path.stat().st_size + (tmp_path / "m.data").stat().st_size


def test_the_peak_is_that_of_the_child_alone_and_shows_the_weights(tmp_path: Path) -> None:
    text = """
        agraph (float[N, 4] x, float[8000000] w) => (float[N, 4] y, float[8000000] v)
        { y = Relu(x) v = Neg(w) }
    """
    _, small = _save(tmp_path, "small", PLAIN)
    _, large = _save(tmp_path, "large", text, w=np.ones(8_000_000, np.float32))
    ballast = np.ones(100_000_000)  # 800 MB in this process

    before, after = (measure_load(path) for path in (small, large))

    assert ballast[-1] == 1
    assert 10e6 < before.peak_rss_bytes < after.peak_rss_bytes - 30e6 < 700e6


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("string", np.array(["a", "é"], object)),
        ("bfloat16", np.ones(2, ml_dtypes.bfloat16)),
    ],
)
def test_the_child_runs_samples_of_every_type(kind: str, array: np.ndarray, tmp_path: Path) -> None:
    text = f"agraph ({kind}[2] x) => ({kind}[2] y) {{ y = Identity(x) }}"
    _, path = _save(tmp_path, "m", text)

    with_a_run = measure_load(path, sample={"x": array})

    assert with_a_run.load_ms > 0


def test_the_module_runs_by_itself_and_prints_one_line(tmp_path: Path) -> None:
    _, path = _save(tmp_path, "m", PLAIN)
    np.savez(tmp_path / "s.npz", **_samples(1)[0])  # type: ignore[arg-type]
    command = [sys.executable, "-m", "graphopt.measure_load", str(path), "cpu", "1"]

    done = subprocess.run(
        [*command, str(tmp_path / "s.npz")], capture_output=True, text=True, check=True
    )

    assert done.stderr == ""
    assert json.loads(done.stdout).keys() == {"load_ms", "peak_rss_bytes"}


# ------------------------------------------------------------------ errors


def test_a_child_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(GraphoptError, match=r"cannot measure the load of .*junk\.onnx: Load model"):
        measure_load(tmp_path / "junk.onnx")

    _, path = _save(tmp_path, "m", PLAIN)
    with pytest.raises(GraphoptError, match=r"m\.onnx: .*x.* missing"):
        measure_load(path, sample={})


def test_no_samples_no_model_and_no_provider(tmp_path: Path) -> None:
    model = _save(tmp_path, "m", PLAIN)

    with pytest.raises(SampleError, match="a benchmark needs samples to run on"):
        _quick([model], [])
    with pytest.raises(ModelError, match="no model at"):
        _quick([("gone", tmp_path / "gone.onnx")])
    with pytest.raises(RuntimeUnavailable, match="there is no provider 'tpu'"):
        _quick([model], provider="tpu")
    with pytest.raises(SampleError, match="Expected: 4"):
        _quick([model], [{"x": np.ones((2, 3), np.float32)}])
