"""`benchmarks/tune_peers.py`: what it reads, and that its figures are those of the models."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from graphopt.errors import SpecError
from graphopt_models import DIGITS_CNN, DIGITS_CNN_SAMPLES

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import tune_peers  # noqa: E402


def _evaluation(folder: Path) -> Path:
    """Every fourth sample, half of the labels wrong, so that the original is not always right."""
    folder.mkdir(parents=True)
    session = onnxruntime.InferenceSession(DIGITS_CNN)
    labels = []
    with np.load(DIGITS_CNN_SAMPLES) as samples:
        rows = {name: array[::4] for name, array in samples.items()}
    for index in range(len(next(iter(rows.values())))):
        file = folder / f"{index:04d}.npz"
        np.savez(file, **{name: array[index] for name, array in rows.items()})
        labels.append((_answer(session, file) + index % 2) % 10)
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def _answer(session: onnxruntime.InferenceSession, file: Path) -> int:
    with np.load(file) as sample:
        return int(session.run(None, dict(sample))[0].argmax())


def _accuracy(model: Path, folder: Path) -> float:
    session = onnxruntime.InferenceSession(model)
    labels = json.loads((folder / "labels.json").read_text())
    files = sorted(folder.glob("*.npz"))
    right = [_answer(session, file) == label for file, label in zip(files, labels, strict=True)]
    return 100 * float(np.mean(right))


@pytest.mark.parametrize("tool", ["onnxruntime", pytest.param("fp16", marks=pytest.mark.slow)])
def test_figures_are_those_of_the_models(tmp_path: Path, tool: str) -> None:
    evaluation = _evaluation(tmp_path / "evaluation" / "digits_cnn")
    score = 'import sys, os; print(\'{"file": "x", "bytes": %d}\' % os.path.getsize(sys.argv[2]))'

    done = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "tune_peers.py"),
            *("--model", DIGITS_CNN, DIGITS_CNN_SAMPLES),
            *("--tools", tool, "--seconds", "0.05"),
            *("--evaluation", evaluation.parent),
            *(
                "--evaluate",
                f"{shlex.quote(sys.executable)} -c {shlex.quote(score)} {{name}} {{model}}",
            ),
            *("--json", tmp_path / "table.json", "--keep", tmp_path / "kept"),
        ],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["schema_version"] == tune_peers.SCHEMA_VERSION
    original, row = found["models"][0]["rows"]
    before = _accuracy(DIGITS_CNN, evaluation)
    assert 0 < before < 100
    assert original["value"] == pytest.approx(before)
    file = tmp_path / "kept" / f"digits_cnn.{tool}.onnx"
    stored_bytes = file.stat().st_size
    assert row["tool"] == tool
    assert row["fault"] is None
    assert row["size_ratio"] == stored_bytes / DIGITS_CNN.stat().st_size
    assert row["drop"] == pytest.approx(before - _accuracy(file, evaluation))
    assert row["latency_ratio"] > 0
    assert json.loads(row["evaluated"])["bytes"] == stored_bytes
    assert f"| bytes {stored_bytes:.4g} |" in done.stdout


def test_onnxruntime_gives_integers_by_channel_at_opset_17(tmp_path: Path) -> None:
    entry = tune_peers.Entry("digits", DIGITS_CNN, DIGITS_CNN_SAMPLES, max_drop=1.0)

    row = tune_peers.run_tool("onnxruntime", entry, _arguments(), tmp_path)

    assert row.fault is None
    model = onnx.load(tmp_path / "digits.onnxruntime.onnx")
    assert model.opset_import[0].version >= 17
    constants = {one.name: one for one in model.graph.initializer}
    weights = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in constants
        and constants[node.input[0]].data_type == onnx.TensorProto.INT8
    ]
    assert weights
    assert all(len(constants[node.input[1]].dims) == 1 for node in weights)
    activations = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {constants[node.input[2]].data_type for node in activations} == {onnx.TensorProto.UINT8}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "is no list of models"),
        ("[]", "is no list of models"),
        ("[3]", "entry 0 is a int"),
        ('[{"model": "m.onnx"}]', "has no 'samples'"),
        ('[{"modle": "m.onnx"}]', "has no 'modle'; did you mean 'model'?"),
        ('[{"model": "m.onnx", "samples": 3}]', "samples is 3; it must be a str"),
        ('[{"model": "m.onnx", "samples": "s", "max_drop": true}]', "max_drop is True"),
        ('[{"model": "gone.onnx", "samples": "s"}]', "there is no"),
    ],
)
def test_a_list_that_is_wrong_is_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "list.json"
    file.write_text(text)
    (tmp_path / "m.onnx").touch()
    (tmp_path / "s").mkdir()

    with pytest.raises(SpecError, match=r"list\.json|gone") as caught:
        tune_peers.read_list(file)

    assert told in str(caught.value)


def test_a_list_is_relative_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.onnx").touch()
    (tmp_path / "s").mkdir()
    file = tmp_path / "list.json"
    file.write_text('[{"model": "net/model.onnx", "samples": "s", "max_drop": 2}]')

    (entry,) = tune_peers.read_list(file)

    assert entry.name == "net"
    assert entry.model == tmp_path / "net" / "model.onnx"
    assert entry.max_drop == 2


def _arguments(*words: object) -> argparse.Namespace:
    return tune_peers.parse([str(word) for word in words])


def test_models_of_the_same_name_are_refused(tmp_path: Path) -> None:
    pair = ("--model", DIGITS_CNN, DIGITS_CNN_SAMPLES)

    with pytest.raises(SpecError, match="two models are called 'digits_cnn'"):
        tune_peers.chosen(_arguments(*pair, *pair))
    with pytest.raises(SpecError, match="no such model; did you mean 'digits_cnn'"):
        tune_peers.chosen(_arguments(*pair, "--only", "digit_cnn"))
    with pytest.raises(SpecError, match=r"--peers-python .*gone"):
        tune_peers.installed(tmp_path / "gone")


def test_a_tool_that_raises_is_a_row_that_says_so(tmp_path: Path) -> None:
    samples = tmp_path / "samples.npz"
    with np.load(DIGITS_CNN_SAMPLES) as sample:
        np.savez(samples, **{name: array[..., :1] for name, array in sample.items()})
    entry = tune_peers.Entry("digits", DIGITS_CNN, samples, max_drop=1.0)

    row = tune_peers.run_tool("onnxruntime", entry, _arguments(), tmp_path)

    assert row.fault == "status 1"
    assert "SampleError" in row.remark
    assert "simplified first" in row.remark


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -c \"raise SystemExit('no {{name}}')\""

    assert tune_peers.evaluated(command, "digits", tmp_path) == "failed: no digits"
    assert tune_peers.short("no | number") == "no \\| number"
