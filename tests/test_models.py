from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import graphopt_models
from graphopt_models import llama
from graphopt_models.llama import TINY, LlamaSize, Tied, write_llama

if TYPE_CHECKING:
    from graphopt_models.training import Classifier

ort = pytest.importorskip("onnxruntime")

CLASSIFIERS = ["digits_cnn", "digits_transformer", "digits_lstm"]
ACCURACY = {"digits_cnn": 0.97, "digits_transformer": 0.93, "digits_lstm": 0.93}
INLINE_BYTES = 256

# What PyTorch's exporter warns about is its own code, not a model of ours.
exports = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def run(path: Path, **inputs: NDArray[Any]) -> NDArray[np.float32]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(["logits"], inputs)
    return np.asarray(output, np.float32)


def classifier(name: str) -> Classifier:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxscript")
    found: Classifier = importlib.import_module(f"graphopt_models.{name}").CLASSIFIER
    return found


def op_types(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


# The trained model in the package


def test_import_of_the_package_stays_light() -> None:
    code = (
        "import sys, graphopt_models, graphopt_models.llama;"
        "sys.exit(bool({'torch', 'sklearn'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_committed_model_reaches_its_accuracy_on_the_committed_samples() -> None:
    with np.load(graphopt_models.DIGITS_CNN_SAMPLES) as archive:
        assert archive.files == ["image"]
        images = archive["image"]
    labels = np.load(graphopt_models.DIGITS_CNN_LABELS)

    assert images.shape == (300, 1, 1, 8, 8)
    assert images.dtype == np.float32
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert labels.shape == (300,)
    assert labels.dtype == np.int64
    predicted = run(graphopt_models.DIGITS_CNN, image=images[:, 0]).argmax(axis=1)
    assert (predicted == labels).mean() >= ACCURACY["digits_cnn"]


def test_committed_model_leaves_work_for_an_optimizer() -> None:
    model = onnx.load(graphopt_models.DIGITS_CNN)

    onnx.checker.check_model(model, full_check=True)
    assert {"Pad", "Conv", "BatchNormalization", "Gemm"} <= op_types(model)
    assert dimensions(model.graph.input[0]) == ["batch", 1, 8, 8]
    assert dimensions(model.graph.output[0]) == ["batch", 10]


def test_committed_model_tells_nothing_about_the_machine_it_was_made_on() -> None:
    model = onnx.load(graphopt_models.DIGITS_CNN, load_external_data=False)
    graph = model.graph
    parts = [model, graph, *graph.node, *graph.initializer, *graph.value_info]
    parts += [*graph.input, *graph.output]

    assert not [part for part in parts if part.doc_string or part.metadata_props]
    serialized = model.SerializeToString()
    assert b".py" not in serialized
    assert b"stack_trace" not in serialized


def test_committed_files_are_small_and_complete() -> None:
    paths = [
        graphopt_models.DIGITS_CNN,
        graphopt_models.DIGITS_CNN_SAMPLES,
        graphopt_models.DIGITS_CNN_LABELS,
    ]
    model = onnx.load(graphopt_models.DIGITS_CNN, load_external_data=False)

    assert sum(path.stat().st_size for path in paths) < 400_000
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_committed_samples_are_of_the_test_split_only() -> None:
    pytest.importorskip("sklearn")
    from graphopt_models import digits

    data = digits.load()
    with np.load(graphopt_models.DIGITS_CNN_SAMPLES) as archive:
        images = archive["image"][:, 0]

    np.testing.assert_array_equal(images, data.test.image[:300])
    np.testing.assert_array_equal(
        np.load(graphopt_models.DIGITS_CNN_LABELS), data.test.labels[:300]
    )
    seen = {image.tobytes() for image in (*data.train.image, *data.validation.image)}
    assert not [image for image in images if image.tobytes() in seen]


# The data set


def test_split_is_fixed_and_stratified() -> None:
    pytest.importorskip("sklearn")
    from graphopt_models import digits

    first, second = digits.load(), digits.load()
    parts = [first.train, first.validation, first.test]

    assert sum(len(part.labels) for part in parts) == 1797
    for part, again in zip(parts, [second.train, second.validation, second.test], strict=True):
        np.testing.assert_array_equal(part.image, again.image)
        np.testing.assert_array_equal(part.labels, again.labels)
        np.testing.assert_array_equal(part.rows, part.image.reshape(-1, 8, 8))
        shares = np.bincount(part.labels, minlength=10) / len(part.labels)
        assert shares.min() > 0.09
        assert shares.max() < 0.11


# The builders


@exports
@pytest.mark.parametrize(
    "name",
    [CLASSIFIERS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in CLASSIFIERS[1:])],
)
def test_export_agrees_with_the_module_at_any_batch(name: str, tmp_path: Path) -> None:
    task = classifier(name)
    import torch

    from graphopt_models import digits
    from graphopt_models.export import export
    from graphopt_models.training import train

    module = train(task, epochs=1)
    path = tmp_path / "model.onnx"
    export(module, task.view, path)

    for batch in (1, 5):
        inputs = digits.load().test.inputs(task.view)[:batch]
        with torch.no_grad():
            expected = module(torch.from_numpy(inputs)).numpy()
        actual = run(path, **{task.view: inputs})
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    characteristic = {
        "digits_cnn": {"Pad", "Conv", "BatchNormalization"},
        "digits_transformer": {"MatMul", "Softmax", "LayerNormalization", "Erf"},
        "digits_lstm": {"LSTM"},
    }
    assert characteristic[name] <= op_types(model)
    assert model.opset_import[0].version == 18


def test_training_is_seeded_and_leaves_the_random_state_alone() -> None:
    task = classifier("digits_lstm")
    import torch

    from graphopt_models.training import train

    before = torch.get_rng_state()
    first, second = train(task, epochs=1, seed=3), train(task, epochs=1, seed=3)
    other = train(task, epochs=1, seed=4)

    assert torch.equal(before, torch.get_rng_state())
    weights = [module.state_dict()["head.weight"] for module in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_refuses_no_epochs() -> None:
    task = classifier("digits_lstm")
    from graphopt_models.training import train

    with pytest.raises(ValueError, match="epochs must be at least 1, not 0"):
        train(task, epochs=0)


@exports
def test_command_line_writes_model_samples_and_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = classifier("digits_cnn")
    import torch

    from graphopt_models.export import main

    threads = torch.get_num_threads()
    try:
        main(task, [str(tmp_path / "new"), "--epochs", "1"])
    finally:
        torch.set_num_threads(threads)

    assert "accuracy on the test split" in capsys.readouterr().out
    committed = {
        graphopt_models.DIGITS_CNN,
        graphopt_models.DIGITS_CNN_SAMPLES,
        graphopt_models.DIGITS_CNN_LABELS,
    }
    written = {path.name: path for path in (tmp_path / "new").iterdir()}
    assert set(written) == {path.name for path in committed}
    new = written[graphopt_models.DIGITS_CNN_LABELS.name]
    assert new.read_bytes() == graphopt_models.DIGITS_CNN_LABELS.read_bytes()
    # Not the bytes of the archive: Pythons differ in what they write into its headers.
    new = written[graphopt_models.DIGITS_CNN_SAMPLES.name]
    with np.load(new) as found, np.load(graphopt_models.DIGITS_CNN_SAMPLES) as wanted:
        assert found.files == wanted.files
        for name in wanted.files:
            assert found[name].dtype == wanted[name].dtype
            assert np.array_equal(found[name], wanted[name])
    old, new = onnx.load(graphopt_models.DIGITS_CNN), onnx.load(written["digits_cnn.onnx"])
    assert [node.name for node in old.graph.node] == [node.name for node in new.graph.node]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_full_training_reaches_the_accuracy(name: str) -> None:
    task = classifier(name)
    from graphopt_models import digits
    from graphopt_models.training import accuracy, train

    assert accuracy(train(task), digits.load().test, task.view) >= ACCURACY[name]


# The decoder


def token_ids(batch: int, sequence: int, vocab: int = TINY["vocab"]) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, vocab, (batch, sequence), np.int64)


def read_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    initializers = ir.load(path).graph.initializers.values()
    return {
        value.name or "": value.const_value.numpy()
        for value in initializers
        if value.const_value is not None
    }


def reference_logits(
    weights: dict[str, NDArray[np.float32]], ids: NDArray[np.int64], size: LlamaSize
) -> NDArray[np.float64]:
    # A plain decoder, position by position, that shares no step with the graph.
    heads, kv_heads = size["heads"], size["kv_heads"]
    width = size["hidden"] // heads
    rates = 10000.0 ** (-2 * np.arange(width // 2) / width)

    def norm(row: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        root = float(np.sqrt((row**2).mean() + 1e-5))
        return row / root * weights[f"{name}.weight"]

    def turn(head: NDArray[np.float64], position: int) -> NDArray[np.float64]:
        pairs = (head[: width // 2] + 1j * head[width // 2 :]) * np.exp(1j * position * rates)
        return np.concatenate([pairs.real, pairs.imag])

    rows = [weights["embed_tokens.weight"][token].astype(np.float64) for token in ids]
    for layer in range(size["layers"]):
        name = f"layers.{layer}"
        keys: list[NDArray[np.float64]] = []
        values: list[NDArray[np.float64]] = []
        for position, row in enumerate(rows):
            normed = norm(row, f"{name}.input_layernorm")
            query, key, value = (
                normed @ weights[f"{name}.self_attn.{part}_proj.weight"] for part in "qkv"
            )
            keys.append(np.stack([turn(head, position) for head in key.reshape(kv_heads, width)]))
            values.append(value.reshape(kv_heads, width))
            mixed = []
            for index, head in enumerate(query.reshape(heads, width)):
                group = index // (heads // kv_heads)
                scores = [turn(head, position) @ key[group] / np.sqrt(width) for key in keys]
                shares = np.exp(scores) / np.exp(scores).sum()
                mixed.append(sum(s * v[group] for s, v in zip(shares, values, strict=True)))
            row = row + np.concatenate(mixed) @ weights[f"{name}.self_attn.o_proj.weight"]
            normed = norm(row, f"{name}.post_attention_layernorm")
            gate = normed @ weights[f"{name}.mlp.gate_proj.weight"]
            up = normed @ weights[f"{name}.mlp.up_proj.weight"]
            product = gate / (1 + np.exp(-gate)) * up
            rows[position] = row + product @ weights[f"{name}.mlp.down_proj.weight"]
    head_weight = weights.get("lm_head.weight", weights["embed_tokens.weight"].T)
    return np.stack([norm(row, "norm") @ head_weight for row in rows])


@pytest.mark.parametrize("tied", ["shared", "copied", "none"])
def test_decoder_computes_what_a_plain_decoder_does(tied: Tied, tmp_path: Path) -> None:
    path = tmp_path / "llama.onnx"
    write_llama(path, **TINY, seed=0, tied=tied)
    weights = read_weights(path)

    onnx.checker.check_model(path, full_check=True)
    for batch, sequence in ((1, 1), (3, 7)):
        ids = token_ids(batch, sequence)
        actual = run(path, input_ids=ids)
        assert actual.shape == (batch, sequence, TINY["vocab"])
        expected = [reference_logits(weights, row, TINY) for row in ids]
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_decoder_with_one_or_all_key_value_heads(kv_heads: int, tmp_path: Path) -> None:
    path = tmp_path / "llama.onnx"
    size = LlamaSize(layers=1, hidden=16, intermediate=24, heads=4, kv_heads=kv_heads, vocab=32)
    write_llama(path, **size, seed=0)
    ids = token_ids(1, 5, size["vocab"])

    expected = reference_logits(read_weights(path), ids[0], size)
    np.testing.assert_allclose(run(path, input_ids=ids)[0], expected, rtol=1e-3, atol=1e-4)


def test_output_head_is_tied_as_asked(tmp_path: Path) -> None:
    heads: dict[str, NDArray[np.float32] | None] = {}
    for tied in ("shared", "copied", "none"):
        path = tmp_path / f"{tied}.onnx"
        write_llama(path, **TINY, seed=0, tied=tied)
        weights = read_weights(path)
        heads[tied] = weights.get("lm_head.weight")
        embedding = weights["embed_tokens.weight"]

    assert heads["shared"] is None
    assert heads["copied"] is not None
    assert heads["none"] is not None
    np.testing.assert_array_equal(heads["copied"], embedding.T)
    assert not np.array_equal(heads["none"], embedding.T)


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        write_llama(tmp_path / folder / "llama.onnx", **TINY, seed=seed)
        names = ("llama.onnx", "llama.onnx.data")
        written.append([(tmp_path / folder / name).read_bytes() for name in names])

    assert written[0] == written[1]
    assert written[0][1] != written[2][1]


def test_all_weights_are_in_one_data_file(tmp_path: Path) -> None:
    path = tmp_path / "llama.onnx"
    size = write_llama(path, **TINY, seed=0)
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    external = [tensor for tensor in initializers if tensor.external_data]
    inline = [tensor for tensor in initializers if not tensor.external_data]

    assert {tensor.external_data[0].value for tensor in external} == {"llama.onnx.data"}
    assert {tensor.name for tensor in external} >= {"embed_tokens.weight", "norm.weight"}
    assert all(tensor.ByteSize() < INLINE_BYTES for tensor in inline)
    assert not [tensor.name for tensor in inline if tensor.name.endswith(".weight")]
    assert (tmp_path / "llama.onnx.data").stat().st_size == size
    assert sum(int(np.prod(tensor.dims)) for tensor in external) * 4 == size


def test_weights_are_scaled_by_their_fan_in(tmp_path: Path) -> None:
    path = tmp_path / "llama.onnx"
    write_llama(path, **TINY, seed=0)
    weight = read_weights(path)["layers.0.mlp.down_proj.weight"]

    assert weight.shape == (TINY["intermediate"], TINY["hidden"])
    assert weight.std() == pytest.approx(TINY["intermediate"] ** -0.5, rel=0.05)
    assert abs(weight.mean()) < 0.01


@pytest.mark.parametrize("tied", ["shared", "copied", "none"])
def test_weights_are_streamed_in_chunks(
    tied: Tied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small chunks, so that even the small embedding takes several and the last one is not full.
    monkeypatch.setattr(llama, "_CHUNK", 30_000)
    path = tmp_path / "llama.onnx"
    size: LlamaSize = {**TINY, "vocab": 10_001}

    tracemalloc.start()
    try:
        written = write_llama(path, **size, seed=0, tied=tied)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < written / 2
    weights = read_weights(path)
    embedding = weights["embed_tokens.weight"]
    assert len(np.unique(embedding)) > 0.9 * embedding.size
    if tied == "copied":
        np.testing.assert_array_equal(weights["lm_head.weight"], embedding.T)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 0}, "layers must be a positive integer, not 0"),
        ({"kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"hidden": 36}, r"hidden \(36\) must be an even multiple of heads \(4\)"),
        ({"tied": "twice"}, "tied must be one of shared, copied, none, not twice"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {**TINY, "seed": 0, **changed}
    with pytest.raises(ValueError, match=message):
        write_llama(tmp_path / "llama.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_decoder_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "llama.onnx"
    llama.main([str(path), "--size", "tiny", "--tied", "none"])

    assert "106816 parameters, 427264 bytes" in capsys.readouterr().out
    assert run(path, input_ids=token_ids(2, 3)).shape == (2, 3, TINY["vocab"])
