"""Several models, one data file: stored once, read by all, and safe from one another."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import cli, sharing
from graphopt.sharing import Sharing

ort = pytest.importorskip("onnxruntime")

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
WIDTH = 64
X = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
DATA = re.compile(r"graphopt-shared\.[0-9a-f]{12}\.data")


def weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / 8


def parse(text: str, **initializers: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(HEAD + text)
    for name, array in initializers.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def on_a_trunk(head: int, width: int = 32) -> onnx.ModelProto:
    """A model whose trunk is that of the others, with a head of its own."""
    return parse(
        f"agraph (float[n, {WIDTH}] x) => (float[n, {width}] y)"
        " { a = MatMul(x, t1)  b = Tanh(a)  c = MatMul(b, t2)  y = MatMul(c, head) }",
        t1=weights(1, WIDTH, WIDTH),
        t2=weights(2, WIDTH, WIDTH),
        head=weights(100 + head, WIDTH, width),
    )


def write(folder: Path, external: bool = False, **models: onnx.ModelProto) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for name, proto in models.items():
        paths.append(folder / f"{name}.onnx")
        copy = onnx.ModelProto.FromString(proto.SerializeToString())
        onnx.save(copy, paths[-1], save_as_external_data=external, location=f"{name}.bin")
    return paths


def share(paths: list[Path], folder: Path, **options: Any) -> Sharing:
    return sharing.share(paths, folder, progress=lambda _: None, **options)


def outputs(model: Path | onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    source = model if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, feeds or {"x": X})
    return results


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def data_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if DATA.fullmatch(file.name))


# ------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_a_trunk_is_stored_once_and_both_models_give_the_same_bits(
    external: bool, tmp_path: Path
) -> None:
    models = {"a": on_a_trunk(0), "b": on_a_trunk(1, width=16)}
    paths = write(tmp_path / "in", external, **models)
    before = contents(tmp_path / "in")

    found = share(paths, tmp_path / "out")

    assert contents(tmp_path / "in") == before
    assert found.data is not None
    assert sorted(contents(tmp_path / "out")) == ["a.onnx", "b.onnx", found.data.name]
    distinct = 4 * (2 * WIDTH * WIDTH + WIDTH * 32 + WIDTH * 16)
    assert found.distinct_bytes == distinct <= found.data_bytes <= 1.01 * distinct
    assert found.data_bytes == found.data.stat().st_size
    assert found.bytes_before == sum(map(len, before.values()))
    assert found.bytes_after == sum(map(len, contents(tmp_path / "out").values()))
    for model, (name, proto) in zip(found.models, models.items(), strict=True):
        assert model.graph_bytes == model.path.stat().st_size
        assert model.shared_bytes == 4 * 2 * WIDTH * WIDTH < model.weight_bytes
        for path in (model.path, tmp_path / "in" / f"{name}.onnx"):
            np.testing.assert_array_equal(outputs(path), outputs(proto))
        onnx.checker.check_model(model.path)


def test_the_others_do_not_miss_a_graph_that_is_deleted_or_moved(tmp_path: Path) -> None:
    models = {name: on_a_trunk(n) for n, name in enumerate("abc")}
    found = share(write(tmp_path / "in", **models), tmp_path / "out")

    (tmp_path / "out" / "a.onnx").unlink()
    (tmp_path / "out" / "b.onnx").rename(tmp_path / "b.onnx")
    np.testing.assert_array_equal(outputs(tmp_path / "out" / "c.onnx"), outputs(models["c"]))
    assert found.data is not None
    shutil.copy(found.data, tmp_path)
    np.testing.assert_array_equal(outputs(tmp_path / "b.onnx"), outputs(models["b"]))


def test_equal_bytes_of_other_names_shapes_and_types_are_one_region(tmp_path: Path) -> None:
    table = weights(0, 40, 60)
    a = parse("agraph (float[n, 40] x) => (float[n, 60] y) { y = MatMul(x, w) }", w=table)
    b = parse(
        "agraph (float[60, n] x) => (float[40, n] y, int32[2400] z)"
        " { u = Reshape(v, s)  y = MatMul(u, x)  z = Identity(i) }",
        v=table.reshape(-1),
        s=np.array([40, 60]),
        i=table.reshape(-1).view(np.int32),
    )

    found = share(write(tmp_path / "in", a=a, b=b), tmp_path / "out")

    assert found.data_bytes == found.distinct_bytes == table.nbytes
    x = weights(3, 60, 2)
    for one, other in zip(outputs(found.models[1].path, x=x), outputs(b, x=x), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_equal_in_one_model_is_stored_once_too(tmp_path: Path) -> None:
    one = parse(
        f"agraph (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y)"
        " { a = MatMul(x, v)  y = MatMul(a, w) }",
        v=weights(1, WIDTH, WIDTH),
        w=weights(1, WIDTH, WIDTH),
    )

    found = share(write(tmp_path / "in", one=one, two=on_a_trunk(0)), tmp_path / "out")

    assert found.models[0].weight_bytes == found.models[0].shared_bytes == 4 * WIDTH * WIDTH


def test_small_tensors_and_those_of_bodies_stay_in_the_graphs(tmp_path: Path) -> None:
    text = (
        "agraph (bool c, float[n, 600] x) => (float[n, 600] y) { z = Add(x, small)  y = If(c) <"
        "then_branch = g () => (float[n, 600] t) { t = Add(z, w) },"
        "else_branch = h () => (float[n, 600] e) { e = Neg(z) } > }"
    )
    a, b = (parse(text, small=weights(0, 1)) for _ in range(2))
    for proto in (a, b):
        branch = next(at.g for at in proto.graph.node[1].attribute if at.name == "then_branch")
        branch.initializer.append(onnx.numpy_helper.from_array(weights(1, 600), "w"))

    found = share(write(tmp_path / "in", a=a, b=b), tmp_path / "out")

    assert found.data is None
    assert found.data_bytes == found.distinct_bytes == 0
    assert sorted(contents(tmp_path / "out")) == ["a.onnx", "b.onnx"]
    for c in (np.array(True), np.array(False)):
        x = weights(2, 3, 600)
        np.testing.assert_array_equal(outputs(found.models[0].path, c=c, x=x), outputs(a, c=c, x=x))


def test_models_that_have_their_data_file_in_common_count_it_once(tmp_path: Path) -> None:
    a, b = write(tmp_path / "in", external=True, a=on_a_trunk(0), b=on_a_trunk(0))
    shutil.copy(a, b)
    (tmp_path / "in" / "b.bin").unlink()

    found = share([a, b], tmp_path / "out")

    assert found.bytes_before == sum(map(len, contents(tmp_path / "in").values()))
    assert found.models[0].bytes_before == found.models[1].bytes_before > found.data_bytes


def test_bits_that_are_not_numbers_are_kept(tmp_path: Path) -> None:
    odd = np.array([np.nan, -0.0, np.inf, -np.inf] * 300, np.float32)
    odd.view(np.uint32)[0] |= 1
    text = "agraph (float[1200] x) => (float[1200] y) { y = Mul(x, w) }"

    found = share(
        write(tmp_path / "in", a=parse(text, w=odd), b=parse(text, w=odd)), tmp_path / "out"
    )

    assert found.data is not None
    assert found.data.read_bytes() == odd.tobytes()


def test_a_random_model_and_one_that_samples_cannot_run_are_told_of(tmp_path: Path) -> None:
    noisy = parse(
        f"agraph (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y)"
        " { r = RandomNormalLike(x)  a = Add(x, r)  y = MatMul(a, w) }",
        w=weights(1, WIDTH, WIDTH),
    )
    sequence = parse(
        "agraph (seq(float[n]) x) => (float[m] y)"
        " { a = ConcatFromSequence<axis = 0>(x)  y = Add(a, w) }",
        w=weights(4, 600),
    )

    found = share(write(tmp_path / "in", r=noisy, s=sequence, t=on_a_trunk(0)), tmp_path / "out")

    assert len(found.notes) == 2
    assert "the model is random" in found.notes[0]
    assert "its outputs were not compared" in found.notes[1]
    assert len(contents(tmp_path / "out")) == 4


# ------------------------------------------------------------------ sharing again


def test_the_same_models_give_the_same_bytes(tmp_path: Path) -> None:
    paths = write(tmp_path / "in", a=on_a_trunk(0), b=on_a_trunk(1))
    share(paths, tmp_path / "out")
    before = contents(tmp_path / "out")

    share(paths, tmp_path / "out", validate=False)
    share([tmp_path / "out" / name for name in ("a.onnx", "b.onnx")], tmp_path / "again")

    assert contents(tmp_path / "out") == before == contents(tmp_path / "again")


def test_older_data_goes_when_no_graph_reads_it_any_more(tmp_path: Path) -> None:
    out = tmp_path / "out"
    a, b, c = write(tmp_path / "in", a=on_a_trunk(0), b=on_a_trunk(1), c=on_a_trunk(2))
    share([a, b], out)
    (first,) = data_of(out)
    foreign = ["shared.0123456789ab.data", "graphopt-shared.data", "z.onnx.0123456789ab.data"]
    for name in foreign:
        (out / name).write_bytes(b"precious")

    share([a, c], out)
    assert first in data_of(out)
    assert len(data_of(out)) == 2
    np.testing.assert_array_equal(outputs(out / "b.onnx"), outputs(b))

    share([b, c], out)
    assert first not in data_of(out)
    assert len(data_of(out)) == 2

    # A graph by any name counts.
    (out / "a.onnx").rename(out / "kept")
    share([a, b, c], out)
    assert len(data_of(out)) == 2
    (out / "kept").unlink()
    share([a, c, b], out)
    assert len(data_of(out)) == 1
    for path in (a, b, c):
        np.testing.assert_array_equal(outputs(out / path.name), outputs(path))
    assert all((out / name).read_bytes() == b"precious" for name in foreign)


def test_what_an_optimized_model_left_in_its_data_file_goes_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    graphopt.save(graphopt.load(on_a_trunk(5)), out / "a.onnx", external_data=True)

    share(write(tmp_path / "in", a=on_a_trunk(0), b=on_a_trunk(1)), out)

    assert sorted(contents(out)) == ["a.onnx", "b.onnx", *data_of(out)]


# ------------------------------------------------------------------ what is wrong


@dataclass(frozen=True)
class Mistake:
    """How to call share in a folder with the models a and b, and what it must say."""

    make: Callable[[Path], list[Path]]
    words: str


def pair(folder: Path) -> list[Path]:
    return write(folder, a=on_a_trunk(0), b=on_a_trunk(1))


def same_names(folder: Path) -> list[Path]:
    return [*write(folder / "one", a=on_a_trunk(0)), *write(folder / "two", a=on_a_trunk(1))]


def with_file(name: str, content: bytes) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        (folder / name).write_bytes(content)
        return [*pair(folder), folder / name]

    return make


MISTAKES = {
    "one model": Mistake(lambda d: pair(d)[:1], "two or more"),
    "no models": Mistake(lambda d: pair(d)[:0], "two or more"),
    "missing": Mistake(lambda d: [*pair(d), d / "c.onnx"], "no model at .*c.onnx"),
    "a folder": Mistake(lambda d: [*pair(d), d], "is a folder"),
    "twice": Mistake(lambda d: pair(d)[:1] * 2, "a.onnx is given twice"),
    "twice, spelled differently": Mistake(
        lambda d: [*pair(d), d / ".." / d.name / "b.onnx"], "b.onnx is given twice"
    ),
    "same names": Mistake(same_names, "one.a.onnx and .*two.a.onnx have the same file name"),
    "no model": Mistake(with_file("c.onnx", b"no model"), "c.onnx is not an ONNX model"),
    "empty": Mistake(with_file("c.onnx", b""), "c.onnx is empty"),
    "does not load": Mistake(
        with_file(
            "c.onnx",
            parse("agraph (float[n] x) => (float[n] y) { y = no.Such(x) }").SerializeToString(),
        ),
        "c.onnx: onnxruntime does not load",
    ),
}


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "old folder"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_and_leaves_the_folder_as_it_was(
    name: str, there: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if there:
        share(write(tmp_path / "old", a=on_a_trunk(8), b=on_a_trunk(9)), out)
    before = contents(out) if there else None
    (tmp_path / "in").mkdir()
    paths = MISTAKES[name].make(tmp_path / "in")

    with pytest.raises(graphopt.ModelError, match=MISTAKES[name].words):
        share(paths, out)

    assert (contents(out) if out.exists() else None) == before


def test_nothing_that_is_read_is_overwritten(tmp_path: Path) -> None:
    a, b = pair(tmp_path / "in")
    with pytest.raises(graphopt.ModelError, match="the input itself"):
        share([a, b], tmp_path / "in")

    # The weights of b are in the file that the graph of a would be.
    out = tmp_path / "in" / "out"
    out.mkdir()
    proto = onnx.load(b)
    onnx.save(proto, b, save_as_external_data=True, location="out/a.onnx", size_threshold=0)
    before = contents(out)
    with pytest.raises(graphopt.ModelError, match=r"weights of the input .*b\.onnx are in"):
        share([a, b], out)
    assert contents(out) == before


def test_data_of_an_input_stays_whatever_its_name(tmp_path: Path) -> None:
    a, b = pair(tmp_path / "in")
    out = tmp_path / "in" / "out"
    out.mkdir()
    location = "out/graphopt-shared.0123456789ab.data"
    onnx.save(onnx.load(b), b, save_as_external_data=True, location=location, size_threshold=0)
    expected = outputs(b)

    share([a, b], out)

    for path in (b, out / "b.onnx"):
        np.testing.assert_array_equal(outputs(path), expected)


@pytest.mark.parametrize(
    ("place", "words"),
    [("file", "not a folder"), ("no/out", "no/out: No such"), ("file/out", "file/out: Not a")],
)
def test_a_folder_that_cannot_be_is_told(place: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(graphopt.ModelError, match=words):
        share(pair(tmp_path / "in"), tmp_path / place)


def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    # root may write everywhere.
    monkeypatch.setattr("os.access", lambda *_: False)

    with pytest.raises(graphopt.ModelError, match="not writable"):
        share(pair(tmp_path / "in"), tmp_path / "out")

    assert contents(tmp_path / "out") == {}


def test_a_graph_that_gives_other_outputs_is_not_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(write(tmp_path / "old", a=on_a_trunk(8), b=on_a_trunk(9)), tmp_path / "out")
    before = contents(tmp_path / "out")
    kept = sharing.saving.for_disk

    def one_bit_off(model: Any) -> Any:
        proto, tensors = kept(model)
        array = tensors["head"].numpy().copy()
        array.view(np.uint32)[0, 0] ^= 1 << 22
        return proto, {**tensors, "head": sharing.ir.tensor(array)}

    monkeypatch.setattr(sharing.saving, "for_disk", one_bit_off)
    with pytest.raises(graphopt.CheckFailed, match="differs: output 'y' is not bit-identical"):
        share(pair(tmp_path / "in"), tmp_path / "out")

    assert contents(tmp_path / "out") == before


# ------------------------------------------------------------------ the command line


def run(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["graphopt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_command_line_shows_the_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)

    arguments = ["share", "a.onnx", "b.onnx", "-o", "out", "--json", "r.json"]
    assert run(*arguments, monkeypatch=monkeypatch) == 0

    shown = capsys.readouterr()
    told = json.loads(Path("r.json").read_text())
    assert shown.err == ""
    assert "out/a.onnx" in shown.out
    assert f"all read out/{data_of(tmp_path / 'out')[0]}: {told['data_bytes']:,} bytes" in shown.out
    assert f"bytes {told['bytes_before']:,} -> {told['bytes_after']:,} (" in shown.out
    assert told["schema_version"] == 1
    assert [model["path"] for model in told["models"]] == ["out/a.onnx", "out/b.onnx"]
    assert told["validated"] is True

    assert run("share", "a.onnx", "b.onnx", "-o", "a.onnx", monkeypatch=monkeypatch) == 2
    assert (
        capsys.readouterr().err == "graphopt: error: cannot write to a.onnx: it is not a folder\n"
    )

    assert run(*arguments[:-1], "b.onnx", monkeypatch=monkeypatch) == 2
    assert "b.onnx is the input itself" in capsys.readouterr().err
