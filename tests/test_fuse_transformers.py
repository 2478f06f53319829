"""On small transformers, written as PyTorch's exporter writes them."""

from __future__ import annotations

import logging
import os
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.contract import Change, Context
from graphopt.scratch import Scratch
from graphopt.skeleton import LARGE_BYTES
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse
from graphopt_passes.fuse.fuse_transformers import FuseTransformers

HEADS, HEAD_SIZE, HIDDEN, VOCABULARY, POSITIONS = 2, 4, 8, 40, 16


class _Writer:
    """Nodes of a graph in the order of their calls; weights are drawn from a seed."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, content: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(content, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape) * 0.3)

    def axes(self, *axes: int) -> str:
        return self.constant(axes, np.int64)

    def __call__(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def model(self, inputs: list[str], output: str) -> ir.Model:
        infos = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in inputs
        ]
        self.nodes.append(helper.make_node("Identity", [output], ["y"]))
        made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", HIDDEN])
        graph = helper.make_graph(self.nodes, "transformer", infos, [made], self.initializers)
        imports = [helper.make_opsetid("", 17)]
        return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8))


def layer_norm(w: _Writer, x: str) -> str:
    difference = w("Sub", x, w("ReduceMean", x, axes=[-1]))
    variance = w("ReduceMean", w("Pow", difference, w.constant(2)), axes=[-1])
    deviation = w("Sqrt", w("Add", variance, w.constant(1e-5)))
    scaled = w("Mul", w("Div", difference, deviation), w.weight(HIDDEN))
    return w("Add", scaled, w.weight(HIDDEN))


def linear(w: _Writer, x: str, rows: int, columns: int) -> str:
    return w("Add", w.weight(columns), w("MatMul", x, w.weight(rows, columns)))


def gelu(w: _Writer, x: str) -> str:
    erf = w("Erf", w("Div", x, w.constant(2**0.5)))
    return w("Mul", w("Mul", x, w("Add", erf, w.constant(1))), w.constant(0.5))


def embedded(w: _Writer, ids: str) -> str:
    words = w("Gather", w.weight(VOCABULARY, HIDDEN), ids)
    positions = w.constant(np.arange(POSITIONS)[None], np.int64)
    length = w("Gather", w("Shape", ids), w.axes(1))
    present = w("Slice", positions, w.axes(0), length, w.axes(1))
    return w("Add", words, w("Gather", w.weight(POSITIONS, HIDDEN), present))


def bert(*, divisor: float = HEAD_SIZE**0.5, layers: int = 2) -> ir.Model:
    """An encoder, with a mask."""
    w = _Writer()
    wide = w("Unsqueeze", w("Unsqueeze", "mask", w.axes(1)), w.axes(2))
    kept = w("Cast", wide, to=TensorProto.FLOAT)
    mask = w("Mul", w("Sub", w.constant(1), kept), w.constant(-10000))
    x = layer_norm(w, embedded(w, "ids"))
    split = w.constant([0, 0, HEADS, HEAD_SIZE], np.int64)
    for _ in range(layers):
        parts = [w("Reshape", linear(w, x, HIDDEN, HIDDEN), split) for _ in range(3)]
        query = w("Transpose", parts[0], perm=[0, 2, 1, 3])
        key = w("Transpose", parts[1], perm=[0, 2, 3, 1])
        value = w("Transpose", parts[2], perm=[0, 2, 1, 3])
        scores = w("Div", w("MatMul", query, key), w.constant(divisor))
        share = w("Softmax", w("Add", scores, mask), axis=-1)
        mixed = w("Transpose", w("MatMul", share, value), perm=[0, 2, 1, 3])
        joined = w("Reshape", mixed, w.constant([0, 0, HIDDEN], np.int64))
        x = layer_norm(w, w("Add", linear(w, joined, HIDDEN, HIDDEN), x))
        inner = gelu(w, linear(w, x, HIDDEN, 4 * HIDDEN))
        x = layer_norm(w, w("Add", linear(w, inner, 4 * HIDDEN, HIDDEN), x))
    return w.model(["ids", "mask"], x)


def gpt2() -> ir.Model:
    """A decoder: queries, keys and values from one Gemm, and a causal mask cut from a constant."""
    w = _Writer()
    x = embedded(w, "ids")
    bias = w.constant(np.tril(np.ones((1, 1, POSITIONS, POSITIONS))), bool)
    for _ in range(2):
        normal = layer_norm(w, x)
        flat = w("Reshape", normal, w.constant([-1, HIDDEN], np.int64))
        gemm = w("Gemm", flat, w.weight(HIDDEN, 3 * HIDDEN), w.weight(3 * HIDDEN))
        batch = w("Slice", w("Shape", x), w.axes(0), w.axes(2), w.axes(0))
        shape = w("Concat", batch, w.axes(3 * HIDDEN), axis=0)
        together = w("Reshape", gemm, shape)
        names = [f"{together}_{part}" for part in "qkv"]
        sizes = w.constant([HIDDEN] * 3, np.int64)
        w.nodes.append(helper.make_node("Split", [together, sizes], names, together + "_s", axis=2))
        split = w.constant([0, 0, HEADS, HEAD_SIZE], np.int64)
        parts = [w("Reshape", name, split) for name in names]
        query = w("Transpose", parts[0], perm=[0, 2, 1, 3])
        key = w("Transpose", parts[1], perm=[0, 2, 3, 1])
        value = w("Transpose", parts[2], perm=[0, 2, 1, 3])
        scores = w("Div", w("MatMul", query, key), w.constant(HEAD_SIZE**0.5))
        shape = w("Shape", scores)
        last = w("Squeeze", w("Slice", shape, w.axes(3), w.axes(4), w.axes(0)), w.axes(0))
        rows = w("Squeeze", w("Slice", shape, w.axes(2), w.axes(3), w.axes(0)), w.axes(0))
        start = w("Unsqueeze", w("Sub", last, rows), w.axes(0))
        end = w("Unsqueeze", last, w.axes(0))
        cut = w("Slice", bias, start, end, w.axes(2), w.axes(1))
        cut = w("Slice", cut, w.axes(0), end, w.axes(3), w.axes(1))
        share = w("Softmax", w("Where", cut, scores, w.constant(-10000)), axis=-1)
        mixed = w("Transpose", w("MatMul", share, value), perm=[0, 2, 1, 3])
        joined = w("Reshape", mixed, w.constant([0, 0, HIDDEN], np.int64))
        flat = w("Reshape", joined, w.constant([-1, HIDDEN], np.int64))
        gemm = w("Gemm", flat, w.weight(HIDDEN, HIDDEN), w.weight(HIDDEN))
        shape = w("Concat", batch, w.axes(HIDDEN), axis=0)
        x = w("Add", x, w("Reshape", gemm, shape))
        x = w("Add", x, gelu(w, linear(w, layer_norm(w, x), HIDDEN, HIDDEN)))
    return w.model(["ids"], layer_norm(w, x))


def samples(*, mask: bool) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    found = []
    for batch, length in ((1, 5), (3, 4), (2, 1)):
        ids = random.integers(0, VOCABULARY, (batch, length))
        kept = np.arange(length) < random.integers(1, length + 1, (batch, 1))
        found.append({"ids": ids, "mask": kept.astype(np.int64)} if mask else {"ids": ids})
    return found


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def fused(one: FuseTransformers, model: ir.Model, **context: object) -> Change:
    original = model.clone()
    change = apply_pass(one, model, **context)
    with_mask = any(value.name == "mask" for value in original.graph.inputs)
    assert_equivalent(original, model, samples=samples(mask=with_mask))
    return change


def test_fuses_an_encoder_with_a_mask() -> None:
    model = bert()

    change = fused(FuseTransformers(), model)

    assert change.counts == {
        "Attention fused": 2,
        "BiasGelu fused": 2,
        "EmbedLayerNormalization fused": 1,
        "SkipLayerNormalization fused": 4,
    }
    assert change.skips == []
    assert not operators(model) & Counter(["Softmax", "Erf", "Pow"])
    assert model.opset_imports["com.microsoft"] == 1
    assert [value.name for value in model.graph.inputs] == ["ids", "mask"]


def test_fuses_a_decoder_whose_heads_are_read_from_the_graph() -> None:
    model = gpt2()

    change = fused(FuseTransformers(model_type="gpt2"), model)

    assert change.counts["Attention fused"] == 2
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.attributes["num_heads"].as_int() == HEADS
    assert attention.attributes["unidirectional"].as_int() == 1


def test_says_which_attention_it_does_not_know() -> None:
    change = fused(FuseTransformers(), gpt2())

    reasons = Counter(skip.reason for skip in change.skips)
    assert reasons == {"not an attention that the fusions of bert know": 2}


def test_needs_the_number_of_heads_for_a_decoder() -> None:
    of_two_kinds = parse(
        """
        agraph (float[batch, sequence, 8] x) => (float[batch, 2, sequence, 4] y,
                                                 float[batch, 4, sequence, 2] z)
        {
            a = Constant <value: tensor = int64[4] {0, 0, 2, 4}> ()
            b = Constant <value: tensor = int64[4] {0, 0, 4, 2}> ()
            p = Reshape(x, a)
            q = Reshape(x, b)
            y = Transpose <perm: ints = [0, 2, 1, 3]> (p)
            z = Transpose <perm: ints = [0, 2, 1, 3]> (q)
        }
        """
    )

    change = assert_unchanged(FuseTransformers(model_type="gpt2"), of_two_kinds)

    assert [s.reason for s in change.skips] == [
        "the number of heads was not found; state num_heads"
    ]


def test_a_second_time_finds_nothing() -> None:
    model = bert()
    apply_pass(FuseTransformers(), model)

    assert not apply_pass(FuseTransformers(), model)


def test_the_gate_leaves_attention_alone_that_is_scaled_otherwise() -> None:
    """The fusions take for granted that scores are divided by the root of the head size."""
    run = graphopt.optimize(
        bert(divisor=1.0), passes="fuse-transformers", samples=samples(mask=True), benchmark=False
    )

    (step,) = run.steps
    assert (step.spec, step.verdict) == ("fuse-transformers{attention=false}", "kept")
    assert "Attention fused" not in step.changes
    assert step.changes["BiasGelu fused"] == 2


def test_the_recipe_puts_it_after_basic() -> None:
    run = graphopt.optimize(
        bert(), recipe="transformers", samples=samples(mask=True), benchmark=False
    )

    assert [s for s in run.steps if s.verdict == "rolled back"] == []
    assert operators(run.model)["Attention"] == 2
    assert run.optimized.other_nodes == sum(n.domain == "com.microsoft" for n in run.model.graph)


@pytest.mark.parametrize("validate", [True, False])
def test_standard_operators_only(validate: bool) -> None:
    run = graphopt.optimize(
        bert(),
        passes="fuse-transformers",
        samples=samples(mask=True),
        validate=validate,
        benchmark=False,
        standard_ops_only=True,
    )

    (step,) = run.steps
    assert step.verdict == "rolled back"
    assert step.reason is not None and "com.microsoft" in step.reason
    assert run.optimized.other_nodes == 0


def test_other_operators_that_the_model_has_may_stay() -> None:
    model = bert()
    apply_pass(FuseTransformers(), model)
    count = sum(node.domain == "com.microsoft" for node in model.graph)

    run = graphopt.optimize(
        model, recipe="basic", samples=samples(mask=True), benchmark=False, standard_ops_only=True
    )

    assert [s for s in run.steps if s.verdict == "rolled back"] == []
    assert run.original.other_nodes == run.optimized.other_nodes == count


def test_weights_that_stay_keep_their_tensors_and_new_ones_go_to_scratch() -> None:
    model = bert(layers=1)
    before = {n: v.const_value for n, v in model.graph.initializers.items()}
    large = [n for n, t in before.items() if t is not None and t.nbytes > LARGE_BYTES]
    assert large

    change = apply_pass(FuseTransformers(), model, scratch=Scratch())

    assert change.counts["Attention fused"] == 1
    assert all(model.graph.initializers[name].const_value is before[name] for name in large)
    packed = next(v for n, v in model.graph.initializers.items() if n.endswith("_qkv_weight"))
    assert packed.const_value is not None
    assert tuple(packed.const_value.shape.numpy()) == (HIDDEN, 3 * HIDDEN)


def test_refuses_what_the_fusions_would_read_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(model: ir.Model, **options: int) -> str:
        return FuseTransformers(**options).refuse(model, Context(lambda: model)) or ""

    branch = parse(
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            y = If (c) <then_branch = a () => (float[2] p) { p = Neg(x) },
                        else_branch = b () => (float[2] q) { q = Abs(x) }>
        }
        """
    )
    old = parse(
        '<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y) { y = Abs(x) }'
    )
    overridable = bert(layers=1)
    overridable.graph.inputs.append(next(iter(overridable.graph.initializers.values())))

    assert "bodies" in why(branch)
    assert "opset 13" in why(old)
    assert "override" in why(overridable)
    assert why(bert(layers=1)) == ""
    assert "multiple" in why(bert(layers=1), num_heads=3, hidden_size=8)
    monkeypatch.setitem(sys.modules, "onnxruntime_tools", types.ModuleType("onnxruntime_tools"))
    assert "uninstall" in why(bert(layers=1))


def test_prints_logs_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)

    with caplog.at_level(logging.DEBUG):
        apply_pass(FuseTransformers(), bert(divisor=3.0))
        apply_pass(FuseTransformers(model_type="t5"), gpt2())

    assert os.listdir(tmp_path) == []
    assert {record.name for record in caplog.records} <= {"onnx_ir.serde"}
    assert capfd.readouterr() == ("", "")


def test_other_threads_may_print_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    model = bert(layers=1)
    thread = threading.Thread(target=apply_pass, args=(FuseTransformers(), model))
    thread.start()
    lines = 0
    while thread.is_alive():
        print("here")
        lines += 1
    thread.join()

    printed = capsys.readouterr().out.count("here\n")
    assert printed == lines
    assert operators(model)["Attention"] == 1
