from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.content import read_array
from graphopt.errors import ModelError
from graphopt.scratch import LARGE_BYTES, Scratch, is_scratch
from graphopt.testing import parse

LARGE = np.arange(LARGE_BYTES // 4, dtype=np.float32).reshape(2, -1)


def test_large_tensors_are_kept_in_a_file_that_goes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = Scratch()
    assert not list(tmp_path.iterdir())

    kept = [scratch.keep(ir.tensor(LARGE * factor, name="large")) for factor in (1, 2)]
    del scratch
    gc.collect()

    for factor, tensor in zip((1, 2), kept, strict=True):
        assert isinstance(tensor, ir.ExternalTensor) and is_scratch(tensor)
        assert tensor.name == "large"
        np.testing.assert_array_equal(read_array(tensor), LARGE * np.float32(factor))
        np.testing.assert_array_equal(tensor.numpy(), LARGE * np.float32(factor))
    del tensor, kept
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensor",
    [
        ir.tensor(np.zeros(LARGE_BYTES - 1, np.uint8)),
        ir.StringTensor([b"x"] * LARGE_BYTES, shape=ir.Shape([LARGE_BYTES])),
    ],
    ids=["small", "strings"],
)
def test_small_tensors_and_strings_stay_in_memory(tensor: ir.TensorProtocol) -> None:
    assert Scratch().keep(tensor) is tensor


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"'large' in the folder for temporary files, .*none"):
        Scratch().keep(ir.tensor(LARGE, name="large"))


TWO_SCALED = """
agraph (float[n, 600] x, float[600, 600] w, float[600, 600] v) => (float[n, 600] y)
<float two = {2.0}> { a = MatMul(x, w)  b = Mul(a, two)  t = Transpose(v)  y = MatMul(b, t) }
"""


def test_a_model_with_external_data_keeps_it_when_every_weight_is_rewritten(
    tmp_path: Path,
) -> None:
    weights = np.random.default_rng(0).standard_normal((2, 600, 600), np.float32)
    graphopt.save(
        parse(TWO_SCALED, w=weights[0], v=weights[1]), tmp_path / "m.onnx", external_data=True
    )

    run = graphopt.optimize(tmp_path / "m.onnx", benchmark=False)
    saved = run.save(tmp_path / "o.onnx")

    tensors = [v.const_value for v in run.model.graph.initializers.values()]
    assert len(tensors) == 2 and all(t is not None and is_scratch(t) for t in tensors)
    files = [file for file in tmp_path.iterdir() if file.name.startswith("o.onnx")]
    assert len(files) == 2
    assert saved.optimized.stored_bytes == sum(file.stat().st_size for file in files)
    again = graphopt.load(tmp_path / "o.onnx").graph.initializers
    assert sorted(float(v.const_value.numpy()[0, 1]) for v in again.values() if v.const_value) == (
        sorted(float(n) for n in (2 * weights[0, 0, 1], weights[1, 1, 0]))
    )


def test_a_result_can_be_optimized_again_when_its_run_is_gone(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((2, 600, 600), np.float32)
    graphopt.save(
        parse(TWO_SCALED, w=weights[0], v=weights[1]), tmp_path / "m.onnx", external_data=True
    )
    model = graphopt.optimize(tmp_path / "m.onnx", benchmark=False).model
    second = graphopt.optimize(model, benchmark=False)
    del model
    gc.collect()

    second.save(tmp_path / "o.onnx")

    assert graphopt.validate(tmp_path / "m.onnx", tmp_path / "o.onnx").failure is None
