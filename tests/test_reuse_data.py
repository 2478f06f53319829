"""Results that go on reading the data files of their input: `--reuse-data`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import cli
from graphopt.errors import ModelError
from graphopt.ledger import INPUT_GRAPH_KEY, INPUT_KEY

ort = pytest.importorskip("onnxruntime")

WIDTH = 64
WEIGHT_BYTES = 4 * WIDTH * WIDTH
X = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)


def chain(scaled: int, length: int = 4, seed: int = 0) -> onnx.ModelProto:
    """MatMul after MatMul; what the first ones make is scaled, which fuse-scale folds."""
    generator = np.random.default_rng(seed)
    text = f'<ir_version: 10, opset_import: ["" : 18]> agraph (float[n, {WIDTH}] x0) => '
    text += f"(float[n, {WIDTH}] x{length}) <float two = {{2}}> {{"
    for n in range(length):
        text += (
            f"m{n} = MatMul(x{n}, w{n})  x{n + 1} = Mul(m{n}, two) "
            if n < scaled
            else f"x{n + 1} = MatMul(x{n}, w{n}) "
        )
    proto = onnx.parser.parse_model(text + "}")
    for n in range(length):
        array = generator.standard_normal((WIDTH, WIDTH), np.float32) / 8
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, f"w{n}"))
    return proto


def write(folder: Path, scaled: int, name: str = "m", seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.onnx"
    onnx.save(chain(scaled, seed=seed), path, save_as_external_data=True, location=f"{name}.bin")
    return path


def optimize(path: Path, output: Path, passes: str = "fuse-scale") -> graphopt.Run:
    run = graphopt.optimize(path, passes=passes, benchmark=False)
    return run.save(output, reuse_data=True)


def outputs(path: Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x0": X})
    return np.asarray(result)


def read_by(path: Path) -> dict[str, int]:
    """How many tensors of a graph are in which data file."""
    counts: dict[str, int] = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                counts[entry.value] = counts.get(entry.value, 0) + 1
    return counts


def test_unchanged_weights_stay_where_they_are_and_the_others_get_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, scaled=1)
    before = (tmp_path / "m.bin").stat()

    run = optimize(path, tmp_path / "o.onnx")

    (new,) = tmp_path.glob("o.onnx.*.data")
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(
        ["m.onnx", "m.bin", "o.onnx", new.name]
    )
    assert (tmp_path / "m.bin").stat() == before
    assert read_by(tmp_path / "o.onnx") == {"m.bin": 3, new.name: 1}
    assert new.stat().st_size == WEIGHT_BYTES
    graph_bytes = (tmp_path / "o.onnx").stat().st_size
    assert run.optimized.stored_bytes == graph_bytes + 4 * WEIGHT_BYTES
    assert f"{3 * WEIGHT_BYTES:,} bytes of the result are weights in m.bin, which" in run.notes[-1]
    np.testing.assert_allclose(outputs(tmp_path / "o.onnx"), outputs(path), rtol=1e-4, atol=1e-4)
    onnx.checker.check_model(tmp_path / "o.onnx")


def test_where_nothing_changes_only_a_graph_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, scaled=0)

    run = optimize(path, tmp_path / "o.onnx", "drop-unused")

    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.bin", "m.onnx", "o.onnx"]
    assert run.optimized.stored_bytes == (tmp_path / "o.onnx").stat().st_size + 4 * WEIGHT_BYTES
    np.testing.assert_array_equal(outputs(tmp_path / "o.onnx"), outputs(path))


def test_where_everything_changes_the_input_can_go(tmp_path: Path) -> None:
    path = write(tmp_path, scaled=4)
    expected = outputs(path)

    run = optimize(path, tmp_path / "o.onnx")

    assert run.notes[-1].startswith("every weight was rewritten")
    path.unlink()
    (tmp_path / "m.bin").unlink()
    np.testing.assert_allclose(outputs(tmp_path / "o.onnx"), expected, rtol=1e-4, atol=1e-4)


def test_a_result_that_reads_two_files_can_be_optimized_again(tmp_path: Path) -> None:
    first = write(tmp_path, scaled=0)
    # Each time, one more weight is rewritten.
    for n in range(3):
        source = first if n == 0 else tmp_path / f"o{n - 1}.onnx"
        target = tmp_path / f"o{n}.onnx"
        run = graphopt.optimize(source, passes="drop-unused", benchmark=False)
        tensor = run.model.graph.initializers[f"w{n}"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        run.model.graph.initializers[f"w{n}"].const_value = ir.Tensor(-tensor.numpy())
        run = run.save(target, reuse_data=True)

        assert len(read_by(target)) == n + 2
        assert read_by(target)["m.bin"] == 3 - n
        assert run.optimized.stored_bytes == target.stat().st_size + 4 * WEIGHT_BYTES
        np.testing.assert_array_equal(outputs(target), outputs(first) * (-1) ** (n + 1))
    assert len(list(tmp_path.glob("*.data"))) == 3

    # Saved without, it has all in one file of its own.
    alone = graphopt.optimize(tmp_path / "o2.onnx", passes="drop-unused", benchmark=False)
    (tmp_path / "alone").mkdir()
    alone.save(tmp_path / "alone" / "o.onnx")
    assert len(read_by(tmp_path / "alone" / "o.onnx")) == 1
    np.testing.assert_array_equal(outputs(tmp_path / "alone" / "o.onnx"), -outputs(first))


def test_a_file_that_another_result_reads_outlives_its_own(tmp_path: Path) -> None:
    first = write(tmp_path, scaled=1)
    middle, last = tmp_path / "o.onnx", tmp_path / "p.onnx"
    optimize(first, middle)
    optimize(middle, last, "drop-unused")
    (data,) = tmp_path.glob("o.onnx.*.data")
    expected = outputs(last)

    other = write(tmp_path, scaled=1, name="n", seed=1)
    optimize(other, middle)

    assert data.exists()
    assert len(list(tmp_path.glob("o.onnx.*.data"))) == 2
    np.testing.assert_array_equal(outputs(last), expected)

    last.unlink()
    optimize(first, middle, "drop-unused")
    assert list(tmp_path.glob("o.onnx.*.data")) == []


def test_a_result_that_does_not_load_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, scaled=1)
    optimize(path, tmp_path / "o.onnx")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def refuse(*_: object) -> None:
        raise ModelError("does not load")

    run = graphopt.optimize(path, passes="fuse-scale", benchmark=False)
    run.model.graph.initializers["w3"].const_value = ir.tensor(np.zeros((64, 64), np.float32))
    monkeypatch.setattr(graphopt.Run, "_load", refuse)
    with pytest.raises(ModelError, match="does not load"):
        run.save(tmp_path / "o.onnx", reuse_data=True)

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_graph_says_of_which_graph_it_was_made(tmp_path: Path) -> None:
    path = write(tmp_path, scaled=1)
    run = graphopt.optimize(path, passes="fuse-scale", benchmark=False)
    run.save(tmp_path / "whole.onnx")
    again = graphopt.optimize(tmp_path / "whole.onnx", passes="drop-unused", benchmark=False)
    again.save(tmp_path / "o.onnx", reuse_data=True)

    metadata = {
        p.key: p.value
        for p in onnx.load(tmp_path / "o.onnx", load_external_data=False).metadata_props
    }

    assert metadata[INPUT_GRAPH_KEY] == again.source.graph_sha256
    # What the input says of its own input must not be taken for this.
    assert INPUT_KEY not in metadata


@pytest.mark.parametrize("way", ["other folder", "folder below", "inline"])
def test_what_cannot_be_reused_is_told(way: str, tmp_path: Path) -> None:
    path = write(tmp_path, scaled=1)
    target, words = tmp_path / "o.onnx", "no data file"
    if way == "inline":
        onnx.save(onnx.load(path), path)
    else:
        words = f"m.bin, and the result can read .*give an output path in {tmp_path}$"
        (tmp_path / "below").mkdir()
        target = tmp_path / "below" / "o.onnx"
    if way == "other folder":
        path = shutil.copytree(tmp_path, tmp_path / "in") / "m.onnx"
        words = words.replace(str(tmp_path), str(tmp_path / "in"))
        target = tmp_path / "o.onnx"

    with pytest.raises(ModelError, match=words):
        optimize(path, target)
    assert not target.exists()


def test_a_folder_by_another_name_is_the_same_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "in", scaled=1)
    os.symlink("in", tmp_path / "link")

    optimize(path, tmp_path / "link" / "o.onnx")
    optimize(tmp_path / "link" / "m.onnx", tmp_path / "in" / "p.onnx")

    for name in ("o.onnx", "p.onnx"):
        assert read_by(tmp_path / "in" / name)["m.bin"] == 3
        np.testing.assert_allclose(
            outputs(tmp_path / "in" / name), outputs(path), rtol=1e-4, atol=1e-4
        )


def test_a_link_to_the_data_file_is_followed(tmp_path: Path) -> None:
    path = write(tmp_path, scaled=1)
    (tmp_path / "m.bin").rename(tmp_path / "real.bin")
    os.symlink("real.bin", tmp_path / "m.bin")

    optimize(path, tmp_path / "o.onnx")

    assert read_by(tmp_path / "o.onnx")["real.bin"] == 3


def test_weights_that_share_their_bytes_count_once(tmp_path: Path) -> None:
    path = write(tmp_path, scaled=0)
    proto = onnx.load(path, load_external_data=False)
    first, second = proto.graph.initializer[1:3]
    del second.external_data[:]
    second.external_data.extend(first.external_data)
    path.write_bytes(proto.SerializeToString())

    run = optimize(path, tmp_path / "o.onnx", "drop-unused")

    assert run.optimized.stored_bytes == (tmp_path / "o.onnx").stat().st_size + 3 * WEIGHT_BYTES


def test_a_model_in_memory_can_be_saved_so_too(tmp_path: Path) -> None:
    path = write(tmp_path, scaled=0)
    model = graphopt.load(path)

    size = graphopt.save(model, tmp_path / "o.onnx", reuse_data=True)

    assert size == (tmp_path / "o.onnx").stat().st_size + 4 * WEIGHT_BYTES
    assert read_by(tmp_path / "o.onnx") == {"m.bin": 4}
    graphopt.save(graphopt.load(path), tmp_path / "inline.onnx", external_data=False)
    graphopt.save(graphopt.load(tmp_path / "inline.onnx"), tmp_path / "p.onnx", reuse_data=True)
    assert read_by(tmp_path / "p.onnx") == {}


def test_the_command_line_takes_it_as_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, scaled=1)
    words = ["optimize", str(path), "-o", str(tmp_path / "o.onnx"), "--passes", "fuse-scale"]
    monkeypatch.setattr(sys, "argv", ["graphopt", *words, "--no-benchmark", "--reuse-data"])

    with pytest.raises(SystemExit) as stopped:
        cli.main()

    assert stopped.value.code == 0
    assert "are weights in m.bin, which the input and the result both" in capsys.readouterr().out
    assert read_by(tmp_path / "o.onnx")["m.bin"] == 3
