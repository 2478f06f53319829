"""The bytes that are reckoned are those that are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from generated import generate

from graphopt.loading import open_model
from graphopt.saving import save, stored_bytes
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse
from graphopt_models import DIGITS_CNN


def assert_reckoned(model: ir.Model, folder: Path) -> None:
    reckoned = stored_bytes(model, external_data=False)

    assert reckoned == save(model, folder / "m.onnx", external_data=False)


@pytest.mark.parametrize("seed", range(40))
def test_of_generated_models(seed: int, tmp_path: Path) -> None:
    model = generate(seed)

    assert_reckoned(model, tmp_path)
    infer_shapes(model)
    assert_reckoned(model, tmp_path)


def test_of_an_exported_model(tmp_path: Path) -> None:
    assert_reckoned(open_model(DIGITS_CNN).model, tmp_path)


def test_of_long_names_other_alphabets_and_texts_beside_nodes(tmp_path: Path) -> None:
    model = parse(
        """
        agraph (float[N, 300] x, float[300] w) => (float[N, 300] y)
        { a = Mul(x, w)  y = LeakyRelu<alpha = 0.5>(a) }
        """,
        w=np.ones(300, np.float32),
    )
    first, second = model.graph
    first.name, second.name = "ü" * 100, "n" * 300
    first.outputs[0].name = "é"
    second.doc_string = "why"
    second.metadata_props["from"] = "test"
    model.graph.metadata_props["graph"] = "too"

    assert_reckoned(model, tmp_path)


def test_with_external_data_only_offsets_are_rough(tmp_path: Path) -> None:
    model = parse(
        "agraph (float[900] x, float[900] w) => (float[900] y) { y = Add(x, w) }",
        w=np.ones(900, np.float32),
    )

    reckoned = stored_bytes(model, external_data=True)

    assert abs(reckoned - save(model, tmp_path / "m.onnx", external_data=True)) < 50
