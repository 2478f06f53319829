from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.benchmark import BenchmarkReport, benchmark, measure_load
from graphopt.contract import Sample
from graphopt.errors import GraphoptError, ModelError, RuntimeUnavailable, SampleError
from graphopt.testing import parse

PLAIN = "agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
SLOW = "agraph (float[N, 4] x) => (float[N, 4] y) {{ a0 = Relu(x) {} y = Relu(a{}) }}"
FIXED = "agraph (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }"


def _save(folder: Path, name: str, text: str, **initializers: np.ndarray) -> tuple[str, Path]:
    path = folder / f"{name}.onnx"
    ir.save(parse(text, **initializers), path)
    return name, path


def _samples(count: int = 3, rows: int = 2) -> list[Sample]:
    return [{"x": np.full((rows, 4), i, np.float32)} for i in range(count)]


def _quick(models: list[tuple[str, Path]], samples: object = None, **more: object) -> BenchmarkReport:
    chosen = _samples() if samples is None else samples
    return benchmark(models, samples=chosen, seconds=0.01, rounds=(4, 10), **more)  # type: ignore[arg-type]


def test_measures_every_model_against_the_first(tmp_path: Path) -> None:
    models = [_save(tmp_path, "first", PLAIN), _save(tmp_path, "second", PLAIN)]

    report = _quick(models)

    assert [row.model for row in report.rows] == ["first", "second"]
    assert report.rows[0].ratio == 1
    for row in report.rows:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.ratio > 0
        assert row.load_ms > 0
        assert row.peak_rss_bytes is not None
        assert row.peak_rss_bytes > 10e6
        assert row.throughput_per_s is not None
        assert 4 <= row.rounds <= 10


def test_says_what_it_was_measured_with(tmp_path: Path) -> None:
    report = _quick([_save(tmp_path, "m", PLAIN)], threads=2, batch_size=3)

    assert (report.provider, report.threads, report.batch_size) == ("cpu", 2, 3)
    assert report.cpu
    assert report.python == ".".join(map(str, sys.version_info[:3]))
    assert report.onnxruntime != "none"
    assert json.loads(json.dumps(dataclasses.asdict(report)))["rows"][0]["model"] == "m"


def test_a_thousand_times_the_work_shows(tmp_path: Path) -> None:
    chain = " ".join(f"a{n} = Exp(a{n - 1})" for n in range(1, 1000))
    models = [_save(tmp_path, "short", PLAIN), _save(tmp_path, "long", SLOW.format(chain, 999))]

    assert _quick(models).rows[1].ratio > 1


@pytest.mark.parametrize(("rounds", "expected"), [((3, 3), 3), ((7, 2), 7), ((0, 0), 1), ((5, 5), 5)])
def test_the_number_of_rounds_has_bounds(
    rounds: tuple[int, int], expected: int, tmp_path: Path
) -> None:
    model = _save(tmp_path, "m", PLAIN)

    report = benchmark([model], samples=_samples(), seconds=0, rounds=rounds)

    assert report.rows[0].rounds == expected


def test_the_samples_may_be_an_iterator_and_have_other_sizes(tmp_path: Path) -> None:
    samples = ({"x": np.ones((n + 1, 4), np.float32)} for n in range(100))

    assert _quick([_save(tmp_path, "m", PLAIN)], samples).rows[0].rounds >= 4
    assert next(samples)["x"].shape == (9, 4), "no more than eight were taken"


# ------------------------------------------------------------------ throughput


def _throughput(model: tuple[str, Path], batch_size: int | None, samples: object = None) -> bool:
    return _quick([model], samples, batch_size=batch_size).rows[0].throughput_per_s is not None


def test_a_dynamic_batch_takes_every_size_and_a_fixed_one_its_own(tmp_path: Path) -> None:
    dynamic, fixed = _save(tmp_path, "dynamic", PLAIN), _save(tmp_path, "fixed", FIXED)

    assert [_throughput(dynamic, n) for n in (None, 1, 2, 5)] == [True] * 4
    assert [_throughput(fixed, n) for n in (None, 1, 2, 5)] == [True, False, True, False]


def test_models_that_cannot_take_the_batch_stand_beside_those_that_can(tmp_path: Path) -> None:
    models = [_save(tmp_path, "fixed", FIXED), _save(tmp_path, "dynamic", PLAIN)]

    rows = _quick(models, batch_size=7).rows

    assert rows[0].throughput_per_s is None
    assert rows[1].throughput_per_s is not None


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
    text = "agraph (float[N] x) => (float[2, 2] y) { y = Reshape(x, s) s = Constant<value_ints=[2, 2]>() }"
    model = parse(text)
    model.graph.sort()
    ir.save(model, tmp_path / "m.onnx")

    row = _quick([("m", tmp_path / "m.onnx")], [{"x": np.ones(4, np.float32)}], batch_size=3).rows[0]

    assert row.throughput_per_s is None
    assert row.p50_ms > 0


def test_a_model_without_inputs_runs(tmp_path: Path) -> None:
    model = _save(tmp_path, "m", "agraph () => (float[2] y) { y = Constant<value_floats=[1.0, 2.0]>() }")

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
    text = "agraph (float[N, 4] x, float[4] a, float[4] b) => (float[N, 4] y) { c = Add(x, a) y = Add(c, b) }"
    model = parse(text, a=np.ones(4, np.float32), b=np.zeros(4, np.float32))
    path = tmp_path / "m.onnx"
    ir.save(model, path, external_data="m.data", size_threshold_bytes=0)
    (tmp_path / "other.data").write_bytes(bytes(1000))

    row = _quick([("m", path)]).rows[0]

    assert row.stored_bytes == path.stat().st_size + (tmp_path / "m.data").stat().st_size


def test_the_peak_is_that_of_the_child_alone(tmp_path: Path) -> None:
    _, path = _save(tmp_path, "m", PLAIN)
    ballast = np.ones(50_000_000)  # 400 MB

    figures = measure_load(path)

    assert ballast[-1] == 1
    assert figures.first_run_ms is None
    assert figures.peak_rss_bytes is not None
    assert 10e6 < figures.peak_rss_bytes < 390e6


def test_weights_show_in_the_peak(tmp_path: Path) -> None:
    text = "agraph (float[N, 4] x, float[8000000] w) => (float[N, 4] y, float[8000000] v) { y = Relu(x) v = Neg(w) }"
    _, small = _save(tmp_path, "small", PLAIN)
    _, large = _save(tmp_path, "large", text, w=np.ones(8_000_000, np.float32))
    peaks = [measure_load(path).peak_rss_bytes or 0 for path in (small, large)]

    assert peaks[1] - peaks[0] > 30e6


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("string", np.array(["a", "é"], object)),
        ("bfloat16", np.ones(2, ml_dtypes.bfloat16)),
        ("bool", np.array([True, False])),
    ],
)
def test_the_child_runs_samples_of_every_type(kind: str, array: np.ndarray, tmp_path: Path) -> None:
    text = f"agraph ({kind}[2] x) => ({kind}[2] y) {{ y = Identity(x) }}"
    _, path = _save(tmp_path, "m", text)

    first_run_ms = measure_load(path, sample={"x": array}).first_run_ms

    assert first_run_ms is not None
    assert first_run_ms > 0


def test_the_module_runs_by_itself_and_prints_one_line(tmp_path: Path) -> None:
    _, path = _save(tmp_path, "m", PLAIN)
    np.savez(tmp_path / "s.npz", **_samples(1)[0])  # type: ignore[arg-type]
    command = [sys.executable, "-m", "graphopt.measure_load", str(path), "cpu", "1"]

    done = subprocess.run(
        [*command, str(tmp_path / "s.npz")], capture_output=True, text=True, check=True
    )

    assert done.stderr == ""
    assert json.loads(done.stdout).keys() == {"load_ms", "first_run_ms", "peak_rss_bytes"}


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
