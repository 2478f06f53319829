"""Whatever a user gets wrong: one line that names the cause, exit code 2, and nothing written."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

import graphopt
import graphopt_models
from graphopt import cli

Make = Callable[[Path], object]

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
LINEAR = """
agraph (float[n, 3] x) => (float[n, 4] y)
<float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{ y = MatMul(x, w) }
"""
TWO_INPUTS = """
agraph (float[n, 3] x, int64[n] k) => (float[n, 3] y)
{ f = Cast<to = 1>(k)  c = Unsqueeze(f, one)  y = Mul(x, c) }
"""
RUN = "{d}/m.onnx -o {d}/out/o.onnx --passes drop-unused --no-benchmark"


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: of the test.
        make: makes the files in an empty folder; the folder `out` is there already.
        arguments: of the command line; `{d}` is the folder.
        words: what the message must contain.
    """

    name: str
    make: Make
    arguments: str
    words: tuple[str, ...]


# ------------------------------------------------------------------ how to make the files


def nothing(_: Path) -> None:
    """The mistake needs no file."""


def proto(text: str = LINEAR) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def text_model(text: str) -> Make:
    return lambda d: write(d, proto(text))


def write(d: Path, model: onnx.ModelProto) -> None:
    (d / "m.onnx").write_bytes(model.SerializeToString())


def linear(d: Path) -> None:
    write(d, proto())


def file(name: str, content: bytes) -> Make:
    return lambda d: (d / name).write_bytes(content)


def both(*makes: Make) -> Make:
    return lambda d: [make(d) for make in makes]


def changed(change: Callable[[onnx.ModelProto], object], text: str = LINEAR) -> Make:
    def make(d: Path) -> None:
        model = proto(text)
        change(model)
        write(d, model)

    return make


def cut(share: float) -> Make:
    def make(d: Path) -> None:
        whole = graphopt_models.DIGITS_CNN.read_bytes()
        (d / "m.onnx").write_bytes(whole[: int(len(whole) * share)])

    return make


def digits(d: Path) -> None:
    (d / "m.onnx").write_bytes(graphopt_models.DIGITS_CNN.read_bytes())


def external(data: bytes | None = bytes(48), **entries: str) -> Make:
    """LINEAR with its weight in the file `w.bin`, and what is said about it replaced."""

    def make(d: Path) -> None:
        model = proto()
        (tensor,) = model.graph.initializer
        tensor.ClearField("float_data")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in ({"location": "w.bin"} | entries).items():
            tensor.external_data.add(key=key, value=value.replace("{d}", str(d)))
        write(d, model)
        if data is not None:
            (d / "w.bin").write_bytes(data)

    return make


def escaping_link(d: Path) -> None:
    (d / "inner").mkdir()
    external(None)(d)
    (d / "m.onnx").rename(d / "inner" / "m.onnx")
    (d / "secret").write_bytes(bytes(48))
    (d / "inner" / "w.bin").symlink_to(d / "secret")


def linked(d: Path) -> None:
    linear(d)
    (d / "link.onnx").symlink_to(d / "m.onnx")


def input_in_data_of_output(d: Path) -> None:
    """The user copied an earlier output: its weights still lie in the data file of that one."""
    external(bytes(48), location="o.onnx.0123456789ab.data")(d)
    (d / "w.bin").rename(d / "o.onnx.0123456789ab.data")


def samples(**arrays: np.ndarray) -> Make:
    return lambda d: np.savez(d / "s.npz", **arrays)  # type: ignore[arg-type]


def with_samples(**arrays: np.ndarray) -> Make:
    return both(linear, samples(**arrays))


def cut_samples(d: Path) -> None:
    linear(d)
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((50, 3), np.float32))
    (d / "s.npz").write_bytes(buffer.getvalue()[:-100])


def folder(name: str) -> Make:
    return lambda d: (d / name).mkdir()


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


# ------------------------------------------------------------------ the mistakes

MODELS = [
    Case("missing", nothing, f"optimize {RUN}", ("m.onnx", "no such file")),
    Case("folder", folder("m.onnx"), f"optimize {RUN}", ("m.onnx is a folder", "give the .onnx")),
    Case("name-too-long", nothing, f"optimize {{d}}/{'m' * 300} -o {{d}}/o.onnx", ("too long",)),
    Case("empty", file("m.onnx", b""), f"optimize {RUN}", ("m.onnx is empty",)),
    Case("text", file("m.onnx", b"hello, world\n" * 9), f"optimize {RUN}", ("not an ONNX model",)),
    Case(
        "html-of-a-failed-download",
        file("m.onnx", b"<!DOCTYPE html><html><body>404</body></html>"),
        f"optimize {RUN}",
        ("not an ONNX model",),
    ),
    Case(
        "git-lfs-pointer",
        file("m.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        f"optimize {RUN}",
        ("Git LFS", "git lfs pull"),
    ),
    Case(
        "random-bytes",
        file("m.onnx", np.random.default_rng(0).bytes(4096)),
        f"optimize {RUN}",
        ("not an ONNX model",),
    ),
    Case(
        "no-outputs",
        changed(lambda proto: proto.graph.output.pop()),
        f"optimize {RUN}",
        ("has no outputs",),
    ),
    Case("cut-1%", cut(0.01), f"optimize {RUN}", ("truncated",)),
    Case("cut-half", cut(0.5), f"optimize {RUN}", ("truncated",)),
    Case("cut-99%", cut(0.99), f"optimize {RUN}", ("truncated",)),
    Case(
        "no-graph",
        changed(lambda m: m.ClearField("graph")),
        f"optimize {RUN}",
        ("m.onnx", "no graph"),
    ),
    Case(
        "no-opset",
        changed(lambda m: m.ClearField("opset_import")),
        f"optimize {RUN}",
        ("opset_import",),
    ),
    Case(
        "future-ir",
        changed(lambda m: setattr(m, "ir_version", 99)),
        f"optimize {RUN}",
        ("IR version", "99"),
    ),
    Case(
        "future-opset",
        changed(lambda m: setattr(m.opset_import[0], "version", 999)),
        f"optimize {RUN}",
        ("opset 999",),
    ),
    Case(
        "training-info",
        changed(lambda m: m.training_info.add()),
        f"optimize {RUN}",
        ("training_info", "--drop-training-info"),
    ),
    Case(
        "output-nobody-makes",
        changed(lambda m: m.graph.output.append(onnx.ValueInfoProto(name="ghost"))),
        f"optimize {RUN}",
        ("ghost",),
    ),
]

GRAPHS = [
    Case(
        "cycle",
        text_model("agraph (float[2] x) => (float[2] y) { a = Add(x, b)  b = Exp(a)  y = Neg(b) }"),
        f"optimize {RUN}",
        ("cycle",),
    ),
    Case(
        "undefined-value",
        text_model("agraph (float[2] x) => (float[2] y) { y = Add(x, ghost) }"),
        f"optimize {RUN}",
        ("'ghost'", "nothing makes"),
    ),
    Case(
        "undefined-value-in-subgraph",
        text_model(
            "agraph (bool c, float[2] x) => (float[2] y) { y = If(c) <"
            " then_branch = a () => (float[2] t) { t = Neg(ghost) },"
            " else_branch = b () => (float[2] e) { e = Abs(x) } > }"
        ),
        f"optimize {RUN}",
        ("'ghost'",),
    ),
    Case(
        "unknown-operator",
        text_model("agraph (float[2] x) => (float[2] y) { y = Frobnicate(x) }"),
        f"optimize {RUN}",
        ("Frobnicate",),
    ),
    Case(
        "unknown-domain",
        changed(
            lambda m: (
                setattr(m.graph.node[0], "domain", "com.acme"),
                m.opset_import.add(domain="com.acme", version=1),
            ),
        ),
        f"optimize {RUN}",
        ("com.acme", "MatMul"),
    ),
    Case(
        "domain-without-opset",
        changed(lambda m: setattr(m.graph.node[0], "domain", "com.acme")),
        f"optimize {RUN}",
        ("com.acme",),
    ),
    Case(
        "two-values-of-one-name",
        text_model("agraph (float[2] x) => (float[2] y) { y = Neg(x)  y = Exp(x) }"),
        f"optimize {RUN}",
        ("'y'", "twice"),
    ),
    Case(
        "output-named-like-an-input",
        text_model("agraph (float[2] x) => (float[2] y) { x = Neg(x)  y = Exp(x) }"),
        f"optimize {RUN}",
        ("'x'", "twice"),
    ),
    Case(
        "missing-attribute",
        text_model("agraph (float[2] x) => (int32[2] y) { y = Cast(x) }"),
        f"optimize {RUN}",
        ("Cast", "to"),
    ),
    Case(
        "weight-shorter-than-its-shape",
        changed(lambda m: m.graph.initializer[0].float_data.pop()),
        f"optimize {RUN}",
        ("tensor w", "shape"),
    ),
    Case(
        "weight-of-unknown-type",
        changed(lambda m: setattr(m.graph.initializer[0], "data_type", 77)),
        f"optimize {RUN}",
        ("tensor name: w", "77"),
    ),
    Case(
        "invalid-without-running",
        text_model("agraph (float[2] x) => (float[2] y) { y = Frobnicate(x) }"),
        f"optimize {RUN} --no-validate",
        ("Frobnicate",),
    ),
    Case(
        "sparse-index-outside",
        changed(
            lambda m: m.graph.sparse_initializer.append(
                onnx.helper.make_sparse_tensor(
                    onnx.helper.make_tensor("s", 1, [1], [1.0]),
                    onnx.helper.make_tensor("i", 7, [1], [9]),
                    [2, 2],
                )
            )
        ),
        f"optimize {RUN}",
        ("'s'", "sparse"),
    ),
]

DATA = [
    Case("data-missing", external(None), f"optimize {RUN}", ("'w'", "w.bin", "no such file")),
    Case("data-is-a-folder", both(external(None), folder("w.bin")), f"optimize {RUN}", ("w.bin",)),
    Case("data-above", external(location="../w.bin"), f"optimize {RUN}", ("../w.bin", "leaves")),
    Case(
        "data-above-by-detour",
        external(location="a/../../w.bin"),
        f"optimize {RUN}",
        ("a/../../w.bin", "leaves"),
    ),
    Case(
        "data-absolute",
        external(location="{d}/w.bin"),
        f"optimize {RUN}",
        ("w.bin", "absolute path"),
    ),
    Case(
        "data-behind-a-link",
        escaping_link,
        "optimize {d}/inner/m.onnx -o {d}/out/o.onnx",
        ("w.bin", "leaves"),
    ),
    Case("data-nameless", external(location=""), f"optimize {RUN}", ("'w'", "names no file")),
    Case("data-short", external(bytes(47)), f"optimize {RUN}", ("w.bin is too short", "47")),
    Case(
        "data-short-behind-offset",
        external(offset="4"),
        f"optimize {RUN}",
        ("too short", "4 to 52"),
    ),
    Case("offset-negative", external(offset="-8"), f"optimize {RUN}", ("'w'", "-8")),
    Case("offset-garbled", external(offset="0x8"), f"optimize {RUN}", ("'w'", "0x8")),
    Case("offset-huge", external(offset="9" * 30), f"optimize {RUN}", ("too short",)),
    Case("length-negative", external(length="-48"), f"optimize {RUN}", ("'w'", "-48")),
    Case("length-garbled", external(length="many"), f"optimize {RUN}", ("'w'", "many")),
    Case("length-other", external(length="44"), f"optimize {RUN}", ("'w'", "44", "48")),
]

OUTPUTS = [
    Case("out-folder-missing", linear, "optimize {d}/m.onnx -o {d}/no/o.onnx", ("no folder",)),
    Case("out-under-a-file", linear, "optimize {d}/m.onnx -o {d}/m.onnx/o.onnx", ("no folder",)),
    Case("out-is-a-folder", linear, "optimize {d}/m.onnx -o {d}/out", ("is a folder",)),
    Case("out-is-the-input", linear, "optimize {d}/m.onnx -o {d}/m.onnx", ("the input itself",)),
    Case(
        "out-is-the-input-spelled-differently",
        linear,
        "optimize {d}/m.onnx -o {d}/out/../m.onnx",
        ("the input itself",),
    ),
    Case("out-links-to-the-input", linked, "optimize {d}/m.onnx -o {d}/link.onnx", ("the input",)),
    Case("input-links-to-out", linked, "optimize {d}/link.onnx -o {d}/m.onnx", ("the input",)),
    Case("out-is-data-of-the-input", external(), "optimize {d}/m.onnx -o {d}/w.bin", ("w.bin",)),
    Case(
        "out-owns-data-of-the-input",
        input_in_data_of_output,
        "optimize {d}/m.onnx -o {d}/o.onnx",
        ("o.onnx.0123456789ab.data", "another output"),
    ),
    Case(
        "out-is-a-pipe",
        both(linear, lambda d: os.mkfifo(d / "p")),
        "optimize {d}/m.onnx -o {d}/p",
        ("not a regular file",),
    ),
    Case(
        "out-is-not-utf-8",
        linear,
        "optimize {d}/m.onnx -o {d}/\udcff.onnx",
        ("not UTF-8", "rename"),
    ),
    Case("out-empty", linear, "optimize {d}/m.onnx -o ''", ("is a folder",)),
    Case("out-name-too-long", linear, f"optimize {{d}}/m.onnx -o {{d}}/{'o' * 255}", ("too long",)),
    Case("reuse-without-data", linear, f"optimize {RUN} --reuse-data", ("no data file",)),
    Case(
        "reuse-in-another-folder",
        external(),
        f"optimize {RUN} --reuse-data",
        ("--reuse-data", "w.bin", "same folder"),
    ),
    Case("reuse-of-no-model", file("m.onnx", b"x"), f"optimize {RUN} --reuse-data", ("not an",)),
    Case("share-one", linear, "share {d}/m.onnx -o {d}/out", ("two or more",)),
    Case("share-twice", linear, "share {d}/m.onnx {d}/m.onnx -o {d}/out", ("given twice",)),
    Case("share-missing", linear, "share {d}/m.onnx {d}/n.onnx -o {d}/out", ("no such file",)),
    Case("json-folder-missing", linear, f"optimize {RUN} --json {{d}}/no/r.json", ("no folder",)),
    Case("json-is-a-folder", linear, f"optimize {RUN} --json {{d}}/out", ("is a folder",)),
    Case("json-is-the-input", linear, f"optimize {RUN} --json {{d}}/m.onnx", ("the input",)),
    Case(
        "json-is-the-output",
        linear,
        f"optimize {RUN} --json {{d}}/out/o.onnx",
        ("o.onnx", "another path"),
    ),
    Case("json-is-data-of-the-input", external(), f"optimize {RUN} --json {{d}}/w.bin", ("w.bin",)),
    Case(
        "json-of-inspect-is-the-input",
        linear,
        "inspect {d}/m.onnx --json {d}/m.onnx",
        ("the input",),
    ),
    Case("demo-folder-missing", nothing, "demo -o {d}/no/o.onnx", ("no folder",)),
]

TEXTS = [
    Case("pass-unknown", linear, "optimize {d}/m.onnx -o {d}/o --passes drop-unusde",
         ("'drop-unusde'", "did you mean 'drop-unused'?")),
    Case("option-unknown", linear, "optimize {d}/m.onnx -o {d}/o --passes fold-constants{limit=2}",
         ("'fold-constants'", "'limit'")),
    Case("option-of-wrong-type", linear,
         "optimize {d}/m.onnx -o {d}/o --passes raise-opset{opset=new}", ("'new'", "whole number")),
    Case("option-out-of-range", linear,
         "optimize {d}/m.onnx -o {d}/o --passes raise-opset{opset=99}", ("99", "from 7 to 25")),
    Case("option-twice", linear,
         "optimize {d}/m.onnx -o {d}/o --passes raise-opset{opset=18,opset=19}", ("twice",)),
    Case("brace-unclosed", linear, "optimize {d}/m.onnx -o {d}/o --passes raise-opset{opset=18",
         ("expected ',' or '}'", "'raise-opset{opset=18' >>> ''")),
    Case("passes-empty", linear, "optimize {d}/m.onnx -o {d}/o --passes ''",
         ("expected the name of a pass",)),
    Case("passes-end-in-a-comma", linear, "optimize {d}/m.onnx -o {d}/o --passes drop-unused,",
         ("expected the name of a pass",)),
    Case("recipe-unknown", linear, "optimize {d}/m.onnx -o {d}/o --recipe bassic",
         ("'bassic'", "did you mean 'basic'?")),
    Case("recipe-and-passes", linear, f"optimize {RUN} --recipe basic", ("not both",)),
    Case("provider-unknown", linear, f"optimize {RUN} --provider tpu", ("'tpu'", "cpu or cuda")),
    Case("max-error-word", linear, f"optimize {RUN} --max-error small", ("'small'", "for example")),
    Case("max-error-negative", linear, f"optimize {RUN} --max-error -0.1", ("-0.1",)),
    Case("max-error-metric", linear, f"optimize {RUN} --max-error 0.1psnr", ("psnr", "rel-l2")),
    Case("max-error-of-unknown-output", linear, f"optimize {RUN} --max-error z:0.1",
         ("'z'", "no output")),
    Case("require-word", linear, f"optimize {RUN} --require small", ("'small'", "size<=0.3")),
    Case("require-unknown", linear, f"optimize {RUN} --require sice<=1",
         ("'sice'", "did you mean 'size'?")),
    Case("require-empty", linear, f"optimize {RUN} --require ''", ("requirement",)),
    Case("state-form", linear, f"optimize {RUN} --state y", ("'y'", "OUTPUT=INPUT")),
    Case("state-unknown-output", linear, f"optimize {RUN} --state z=x", ("no output 'z'",)),
    Case("state-unknown-input", linear, f"optimize {RUN} --state y=z", ("no input 'z'",)),
    Case("state-of-other-shape", linear, f"optimize {RUN} --state y=x", ("y=x", "shape")),
    Case("passes-name-unknown", nothing, "passes fold-constant",
         ("did you mean 'fold-constants'?",)),
    Case("opset-with-unknown-model", nothing, f"optimize {RUN} --opset 20", ("no such file",)),
]  # fmt: skip

SAMPLES = [
    Case("samples-missing", linear, f"optimize {RUN} --samples {{d}}/s", ("no samples at", "/s")),
    Case("threads-absurd", linear, f"optimize {RUN} --threads 99999999999", ("threads is",)),
    Case("batch-absurd", linear, "benchmark {d}/m.onnx --batch-size 99999999999", ("batch_size",)),
    Case("samples-empty-folder", linear, f"optimize {RUN} --samples {{d}}/out", ("no .npz",)),
    Case("samples-no-such-input", with_samples(imagf=ones(1, 3), x=ones(1, 3)),
         f"optimize {RUN} --samples {{d}}/s.npz", ("no input 'imagf'", "x")),
    Case("samples-misspelled", both(digits, samples(imgae=ones(1, 1, 8, 8))),
         f"optimize {RUN} --samples {{d}}/s.npz", ("'imgae'", "did you mean 'image'?")),
    Case("samples-wrong-type", with_samples(x=ones(1, 3, dtype="float64")),
         f"optimize {RUN} --samples {{d}}/s.npz", ("float64[1, 3]", "float32[n, 3]")),
    Case("samples-wrong-rank", with_samples(x=ones(3)),
         f"optimize {RUN} --samples {{d}}/s.npz", ("float32[3]", "rank")),
    Case("samples-wrong-shape", with_samples(x=ones(1, 4)),
         f"optimize {RUN} --samples {{d}}/s.npz", ("float32[1, 4]", "float32[n, 3]", "shape")),
    Case("samples-input-missing",
         both(text_model("agraph (float[n] x, float[n] z) => (float[n] y) { y = Add(x, z) }"),
              samples(x=ones(3))),
         f"optimize {RUN} --samples {{d}}/s.npz", ("'z'", "missing")),
    Case("samples-sizes-disagree",
         both(text_model("agraph (float[n] x, float[n] z) => (float[n] y) { y = Add(x, z) }"),
              samples(x=ones(3), z=ones(2))),
         f"optimize {RUN} --samples {{d}}/s.npz", ("'n'", "'x'", "'z'")),
    Case("samples-counts-disagree",
         both(text_model("agraph (float[n] x, float[n] z) => (float[n] y) { y = Add(x, z) }"),
              samples(x=ones(5, 3), z=ones(4, 3))),
         f"optimize {RUN} --samples {{d}}/s.npz", ("different numbers", "[4, 5]")),
    Case("samples-no-arrays", with_samples(), f"optimize {RUN} --samples {{d}}/s.npz", ("'x'",)),
    Case("samples-none-stacked", with_samples(x=ones(0, 1, 3)),
         f"optimize {RUN} --samples {{d}}/s.npz", ("empty",)),
    Case("samples-objects", with_samples(x=np.array([{"a": 1}], object)),
         f"optimize {RUN} --samples {{d}}/s.npz", ("Python objects",)),
    Case("samples-truncated", cut_samples, f"optimize {RUN} --samples {{d}}/s.npz", ("s.npz",)),
    Case("samples-text-file", both(linear, file("s.npz", b"x,y\n1,2\n")),
         f"optimize {RUN} --samples {{d}}/s.npz", ("s.npz", "cannot be read")),
    Case("samples-other-suffix", both(linear, file("s.csv", b"x,y\n1,2\n")),
         f"optimize {RUN} --samples {{d}}/s.csv", ("s.csv", "cannot be read")),
    Case("samples-are-the-model", linear, f"optimize {RUN} --samples {{d}}/m.onnx",
         ("m.onnx", "cannot be read")),
    Case("samples-npy-for-two-inputs",
         both(text_model("agraph (float[n] x, float[n] z) => (float[n] y) { y = Add(x, z) }"),
              lambda d: np.save(d / "s.npy", ones(3))),
         f"optimize {RUN} --samples {{d}}/s.npy", ("x, z", ".npz")),
    Case("samples-that-cannot-run",
         both(text_model("agraph (int64[n] x) => (float[n] y) <float[2] w = {1, 2}> "
                         "{ y = Gather(w, x) }"),
              samples(x=np.full((1, 3), 7))),
         f"optimize {RUN} --samples {{d}}/s.npz", ("Gather", "sample")),
    Case("samples-and-random", with_samples(x=ones(1, 3)),
         f"optimize {RUN} --samples {{d}}/s.npz --random-samples 3", ("not both",)),
    Case("validate-other-interface",
         both(linear, lambda d: (d / "m.onnx").rename(d / "a.onnx"),
              text_model("agraph (float[n, 3] z) => (float[n, 3] y) { y = Neg(z) }")),
         "validate {d}/a.onnx {d}/m.onnx", ("'z'", "'x'")),
    Case("input-that-is-a-sequence",
         text_model("agraph (seq(float[n]) x) => (int64 y) { y = SequenceLength(x) }"),
         f"optimize {RUN}", ("'x'", "tensors")),
]  # fmt: skip

COMMANDS = [
    Case("validate-missing", linear, "validate {d}/m.onnx {d}/no.onnx", ("no.onnx", "no such")),
    Case("benchmark-missing", linear, "benchmark {d}/m.onnx {d}/no.onnx", ("no.onnx", "no such")),
    Case("inspect-missing", nothing, "inspect {d}/no.onnx", ("no.onnx", "no such file")),
    Case("explain-missing", nothing, "explain {d}/no.onnx", ("no.onnx", "no such file")),
    Case("explain-onto-itself", linear, "explain {d}/m.onnx --json {d}/m.onnx", ("input itself",)),
    Case("explain-provider", linear, "explain {d}/m.onnx --provider tpu", ("'tpu'", "cpu or cuda")),
    Case("inspect-text", file("m.onnx", b"hello"), "inspect {d}/m.onnx", ("not an ONNX model",)),
]

CASES = MODELS + GRAPHS + DATA + OUTPUTS + TEXTS + SAMPLES + COMMANDS

USAGE = [
    ("no-output", "optimize {d}/m.onnx", ("--output",)),
    ("no-model", "optimize -o {d}/o.onnx", ("MODEL",)),
    ("option-misspelled", "optimize {d}/m.onnx -o {d}/o.onnx --sampels s", ("--sampels",)),
    ("command-misspelled", "optimise {d}/m.onnx", ("optimise",)),
    ("random-samples-0", f"optimize {RUN} --random-samples 0", ("--random-samples",)),
    ("random-samples-word", f"optimize {RUN} --random-samples few", ("--random-samples",)),
    ("opset-out-of-range", f"optimize {RUN} --opset 99", ("--opset", "25")),
    ("gate-samples-0", f"optimize {RUN} --gate-samples 0", ("--gate-samples",)),
    ("threads-0", f"optimize {RUN} --threads 0", ("--threads",)),
    ("benchmark-of-nothing", "benchmark", ("MODEL",)),
]


def command(arguments: str, d: Path) -> list[str]:
    return [part.replace("{d}", str(d)) for part in shlex.split(arguments)]


def listing(d: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(d)): p.read_bytes() if p.is_file() else None for p in d.rglob("*")}


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int | str | None, str, str]:
    monkeypatch.setattr(sys, "argv", ["graphopt", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_mistake_is_named_in_one_line_and_nothing_is_written(
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    case.make(tmp_path)
    before = listing(tmp_path)

    code, out, err = run(command(case.arguments, tmp_path), monkeypatch, capsys)

    assert code == 2
    assert out == ""
    assert re.fullmatch(r"graphopt: error: [^\n]+\n", err)
    for word in case.words:
        assert word in err
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("name", "arguments", "words"), USAGE, ids=[u[0] for u in USAGE])
def test_a_wrong_command_line_names_what_is_wrong(
    name: str,
    arguments: str,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    linear(tmp_path)
    before = listing(tmp_path)

    code, out, err = run(command(arguments, tmp_path), monkeypatch, capsys)

    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert listing(tmp_path) == before


def test_every_mistake_has_its_own_name() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40


NEEDY = """
from dataclasses import dataclass
from typing import ClassVar
from graphopt import Change, Effect, Pass

@dataclass(frozen=True)
class CountSamples(Pass):
    "Change nothing, but count the samples."

    name: ClassVar[str] = "count-samples"
    effect: ClassVar[Effect] = Effect.EXACT
    needs_samples: ClassVar[bool] = True

    def apply(self, model, context):
        change = Change()
        change.skip("the model", f"{len(list(context.samples))} samples")
        return change
"""


@pytest.fixture
def needy_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pass of another distribution that needs samples."""
    site = tmp_path / "site"
    described = site / "needy-1.0.dist-info"
    described.mkdir(parents=True)
    (site / "needy_pass_of_a_test.py").write_text(NEEDY)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: needy\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[graphopt.passes]\ncount-samples = needy_pass_of_a_test:CountSamples\n"
    )
    monkeypatch.syspath_prepend(str(site))
    return "count-samples"


def test_a_pass_that_needs_samples_gets_some_or_stops(
    needy_pass: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    linear(tmp_path)
    arguments = f"optimize {{d}}/m.onnx -o {{d}}/o.onnx --passes {needy_pass} --no-benchmark"

    code, _, err = run(command(arguments, tmp_path), monkeypatch, capsys)

    assert code == 2
    assert err == "graphopt: error: count-samples needs samples; give --samples, or " + (
        "--random-samples N\n"
    )
    assert not (tmp_path / "o.onnx").exists()

    given = f"{arguments} --random-samples 3 --no-validate --json -"
    code, out, _ = run(command(given, tmp_path), monkeypatch, capsys)

    assert code == 0
    assert "3 samples" in out


def test_a_provider_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("CUDA is here")
    linear(tmp_path)
    arguments = "optimize {d}/m.onnx -o {d}/o.onnx --provider cuda"

    code, _, err = run(command(arguments, tmp_path), monkeypatch, capsys)

    assert code == 2
    assert "'cuda' is not available" in err
    assert "graphopt[gpu]" in err
    assert not (tmp_path / "o.onnx").exists()


def test_nan_and_infinity_in_samples_are_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    linear(tmp_path)
    samples(x=np.array([[np.nan, np.inf, 1]], np.float32))(tmp_path)
    (tmp_path / "out").mkdir()
    arguments = f"optimize {RUN} --samples {{d}}/s.npz"

    code, _, err = run(command(arguments, tmp_path), monkeypatch, capsys)

    assert code == 0
    assert err == ""
    assert (tmp_path / "out" / "o.onnx").is_file()


@pytest.mark.parametrize(
    "start", [["-m", "graphopt"], ["-c", "import graphopt.cli as c; c.main()"]]
)
def test_in_a_process_of_its_own_too_there_is_one_line(start: list[str], tmp_path: Path) -> None:
    # onnxruntime and onnx could write to stderr past Python; here that would be seen.
    changed(lambda m: m.graph.initializer[0].float_data.pop())(tmp_path)
    arguments = command("optimize {d}/m.onnx -o {d}/o.onnx", tmp_path)

    done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"graphopt: error: onnxruntime does not load [^\n]+\n", done.stderr)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]


def test_a_reader_that_goes_away_causes_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    with open(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "graphopt", "passes"], stdout=pipe, stderr=subprocess.PIPE
        )

    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_results_that_cannot_be_printed_are_told_in_a_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "graphopt", "passes"], stdout=full, stderr=subprocess.PIPE
        )

    assert done.returncode == 2
    assert re.fullmatch(rb"graphopt: error: [^\n]*No space left[^\n]*\n", done.stderr)


IF = """
agraph (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}>
{
    a = Neg(x)
    y = If(c) <
        then_branch = g () => (float[2] t) { q = Constant<value = float {3}>() t = Add(a, q) },
        else_branch = b () => (float[2] e) { e = Mul(a, w) }
    >
}
"""


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """The content with a few bytes changed, removed or added, once or twice."""
    result = bytearray(content)
    for _ in range(generator.integers(1, 3)):
        place = int(generator.integers(len(result)))
        length = int(generator.integers(0, 8))
        result[place : place + int(generator.integers(0, 8))] = generator.bytes(length)
    return bytes(result)


def test_a_damaged_model_is_refused_or_can_be_written_back(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    content = proto(IF).SerializeToString()
    refused = 0
    for _ in range(600):
        try:
            model = graphopt.load(damaged(content, generator))
            graphopt.save(model, tmp_path / "m.onnx")
        except graphopt.ModelError:
            refused += 1
    assert 0 < refused < 600
    assert os.listdir(tmp_path) == ["m.onnx"]
