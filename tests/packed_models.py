"""Models whose weights are packed: in every form, and for every reader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.encoding import Encoding, Narrow
from graphopt.operators import all_graphs
from graphopt.rewriting import Names
from graphopt.testing import parse

Blocks = Literal["none", "rows", "blocks"]


@dataclass(frozen=True)
class Form:
    """How weights are packed.

    Attributes:
        levels: of a codebook.
        blocks: what shares a scale: nothing, a row, or a part of one.
        scale: the type of the scales.
        groups: of rows that have a codebook each.
        has_offsets: there are offsets beside the scales.
        common_share: of the numbers, about, that have one code.
    """

    levels: int = 16
    blocks: Blocks = "rows"
    scale: str = "float16"
    groups: int = 1
    has_offsets: bool = False
    common_share: float = 0.0

    def narrow(self, shape: tuple[int, ...], seed: int) -> Narrow:
        """A weight of random codes."""
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, self.levels, shape).astype(np.uint8)
        if self.common_share:
            codes = np.where(rng.random(shape) < self.common_share, np.uint8(1), codes)
        book = np.sort(rng.normal(size=(self.groups, self.levels)), axis=1).astype(np.float32)
        if self.blocks == "none":
            return Narrow(codes, book[0] if self.groups == 1 else book)
        columns = 2 if self.blocks == "blocks" and shape[1] % 2 == 0 else 1
        dims = (shape[0], columns, *(1,) * (len(shape) - 2))
        scales = (0.1 * rng.uniform(0.5, 1, dims)).astype(self.scale)
        book = book[0] if self.groups == 1 else book
        return Narrow(codes, book, scales, scales / 8 if self.has_offsets else None)


FORMS = {
    **{f"{levels} levels": Form(levels) for levels in (2, 3, 4, 8, 16, 32, 64, 256)},
    "no scales": Form(blocks="none"),
    "blocks": Form(8, "blocks"),
    "blocks, float32": Form(16, "blocks", "float32"),
    "groups": Form(16, "rows", groups=2),
    "offsets": Form(4, "blocks", has_offsets=True),
    "a mask": Form(common_share=0.7),
    "steps": Form(64, common_share=0.97),
}

SHAPES: Mapping[str, tuple[int, ...]] = {
    "C": (32, 16, 3, 3),
    "D": (16, 32, 3, 3),
    "K": (32, 16, 5),
    "M": (64, 96),
    "T": (96, 64),
    "E": (128, 64),
    "U": (1, 64, 96),
    "W": (1, 128, 64),
    "R": (1, 128, 32),
}
"""Of the weights that the models below read."""

IMAGE, ROWS = "float[1,16,8,8] x", "float[4,64] x"

READERS = {
    "Conv": (IMAGE, "y = Conv(x, C)"),
    "Conv, BatchNormalization": (
        IMAGE,
        "a = Conv(x, C, v) y = BatchNormalization(a, p, v, v, p)",
    ),
    "Conv, Mul, Add": (IMAGE, "a = Conv(x, C) b = Mul(a, q) y = Add(b, q)"),
    "Pad, Conv": (IMAGE, "a = Pad(x, pads) y = Conv(a, C)"),
    "Unsqueeze, Conv": (
        IMAGE,
        "o = Constant<value_ints = [2]>() n = Unsqueeze(K, o) y = Conv(x, n)",
    ),
    "ConvTranspose, Mul": (IMAGE, "a = ConvTranspose(x, D) y = Mul(a, q)"),
    "Gemm": (ROWS, "y = Gemm(x, M)"),
    "Gemm, transB": (ROWS, "y = Gemm<transB = 1, alpha = 0.5>(x, T)"),
    "Gemm, Mul": (ROWS, "a = Gemm(x, M, g) y = Mul(a, g)"),
    "MatMul": (ROWS, "y = MatMul(x, M)"),
    "MatMul, Mul, Add": (ROWS, "a = MatMul(x, M) b = Mul(a, g) y = Add(b, g)"),
    "Transpose, MatMul": (ROWS, "n = Transpose<perm = [1, 0]>(T) y = MatMul(x, n)"),
    "two Transpose": (ROWS, "n = Transpose(M) o = Transpose(n) y = MatMul(x, o)"),
    "Squeeze, MatMul": (
        ROWS,
        "o = Constant<value_ints = [0]>() n = Squeeze(U, o) y = MatMul(x, n)",
    ),
    "Reshape, MatMul": (
        ROWS,
        "o = Constant<value_ints = [64, 96]>() n = Reshape(T, o) y = MatMul(x, n)",
    ),
    "Mul, MatMul": (ROWS, "n = Mul(M, half) y = MatMul(x, n)"),
    "Mul, Mul, MatMul": (ROWS, "n = Mul(M, half) o = Mul(n, half) y = MatMul(x, o)"),
    "Add, MatMul": (ROWS, "n = Add(M, half) o = Add(n, half) y = MatMul(x, o)"),
    "Cast, MatMul": (
        ROWS,
        "n = Cast<to = 10>(M) o = Cast<to = 1>(n) y = MatMul(x, o)",
    ),
    "Slice, MatMul": (
        ROWS,
        "b = Constant<value_ints = [0]>() f = Constant<value_ints = [64]>()"
        " n = Slice(E, b, f) y = MatMul(x, n)",
    ),
    "Split, MatMul": (
        ROWS,
        "n, o = Split<axis = 1, num_outputs = 2>(M) a = MatMul(x, n) b = MatMul(x, o)"
        " y = Concat<axis = 1>(a, b)",
    ),
    "Concat, MatMul": (ROWS, "n = Concat<axis = 1>(M, M) y = MatMul(x, n)"),
    "two MatMul": (ROWS, "a = MatMul(x, M) b = MatMul(x, M) y = Add(a, b)"),
    "Add": (ROWS, "a = MatMul(x, M) n = Transpose(a) y = Add(n, t0)"),
    "Gather": ("int64[3] x", "y = Gather(E, x)"),
    "tied": (
        "int64[3] x",
        "a = Gather(E, x) n = Transpose<perm = [1, 0]>(E) y = MatMul(a, n)",
    ),
    "tied, Gemm": ("int64[3] x", "a = Gather(E, x) y = Gemm<transB = 1>(a, E)"),
    "LSTM": ("float[5,2,64] x", "y = LSTM<hidden_size = 32>(x, W, R)"),
    "If": (
        ROWS,
        """i = ReduceMax<keepdims = 0>(x) f = Greater(i, half)
        y = If(f) <
            then_branch = then () => (float[4,96] a) <float two = {2.0}>
                { b = Mul(x, two) a = MatMul(b, M) },
            else_branch = other () => (float[4,96] c) { d = Relu(x) c = Gemm(d, M, g) }
        >""",
    ),
}
"""The input, and nodes that make `y` of it and of weights; they read packed weights."""


def _quantized(body: str) -> str:
    """Between a quantized input `i` and a quantized output of `o`."""
    return (
        f"h = QuantizeLinear(x, s, z) i = DequantizeLinear(h, s, z) {body}"
        " j = QuantizeLinear(o, s, z) y = DequantizeLinear(j, s, z)"
    )


INTEGERS = {
    "QLinearConv": (
        IMAGE,
        _quantized("w = DequantizeLinear<axis = 0>(C, s0, z0) o = Conv(i, w, v)"),
    ),
    "QLinearMatMul": (
        ROWS,
        _quantized("w = DequantizeLinear<axis = 1>(M, s1, z1) o = MatMul(i, w)"),
    ),
    "QGemm": (
        ROWS,
        _quantized("w = DequantizeLinear<axis = 1>(M, s1, z1) o = Gemm(i, w)"),
    ),
    "QGemm, transB": (
        ROWS,
        _quantized("w = DequantizeLinear<axis = 0>(T, s1, z1) o = Gemm<transB = 1>(i, w)"),
    ),
    "QLinearMatMul, Transpose": (
        ROWS,
        _quantized(
            "w = DequantizeLinear<axis = 0>(T, s1, z1) t = Transpose<perm = [1, 0]>(w)"
            " o = MatMul(i, t)"
        ),
    ),
}
"""The same with weights of int8 beside activations of int8, on which integer kernels run."""

WEIGHTS_ONLY = {
    "MatMul": (ROWS, "w = DequantizeLinear<axis = 1>(M, s1) y = MatMul(x, w)"),
    "Gemm, transB": (ROWS, "w = DequantizeLinear<axis = 0>(T, s1) y = Gemm<transB = 1>(x, w)"),
    "Conv": (IMAGE, "w = DequantizeLinear<axis = 0>(C, s0) y = Conv(x, w)"),
    "Gather": ("int64[3] x", "w = DequantizeLinear(E, s) y = Gather(w, x)"),
    "two MatMul": (
        ROWS,
        "w = DequantizeLinear<axis = 1>(M, s1) a = MatMul(x, w) r = Relu(x) b = MatMul(r, w)"
        " y = Add(a, b)",
    ),
}
"""The same with weights of int8 beside activations of floating point."""

NUMBERS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8)
"""Of what weights are."""

KINDS = {"float32": "float", "float16": "float16", "int8": "int8", "int64": "int64"}

SMALL = {
    "v": np.linspace(0.5, 1, 32, dtype=np.float32),
    "p": np.linspace(1, 2, 32, dtype=np.float32),
    "q": np.linspace(1, 2, 32, dtype=np.float32).reshape(32, 1, 1),
    "g": np.linspace(1, 2, 96, dtype=np.float32),
    "t0": np.ones((96, 1), np.float32),
    "half": np.float32(0.5),
    "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
    "s": np.float32(0.02),
    "z": np.int8(3),
    "s0": np.linspace(0.01, 0.02, 32, dtype=np.float32),
    "z0": np.zeros(32, np.int8),
    "s1": np.linspace(0.01, 0.02, 96, dtype=np.float32),
    "z1": np.zeros(96, np.int8),
}
"""Constants that the models read beside weights."""


def packed_reader(reader: str, form: Form, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """A model of `READERS`, whose weights are packed in a form.

    Args:
        reader: its name.
        form: of the codes.
        dtype: of all numbers of floating point.
    """
    given, body = READERS[reader]
    model = _model(given, body, dtype)
    pack_all(model, form)
    return model


def float_model(reader: str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """A model of `READERS`, with weights as they are."""
    return _model(*READERS[reader], dtype)


def integer_model(reader: str) -> ir.Model:
    """A model of `INTEGERS` or `WEIGHTS_ONLY`, with int8 weights as they are."""
    return _model(*{**INTEGERS, **WEIGHTS_ONLY}[reader], ir.DataType.INT8)


def packed_integers(reader: str, levels: int) -> ir.Model:
    """A model of `INTEGERS` or `WEIGHTS_ONLY`, whose int8 weights have so many levels."""
    model = integer_model(reader)
    pack_all(model, Form(levels, "none"))
    return model


def _model(given: str, body: str, dtype: ir.DataType) -> ir.Model:
    """A model with the weights and constants that its nodes read; weights are of a type."""
    words = set(re.findall(r"\w+", body))
    is_half = dtype == ir.DataType.FLOAT16
    rng = np.random.default_rng(5)
    weights = {
        name: (8 * rng.normal(size=shape)).astype(dtype.numpy())
        for name, shape in SHAPES.items()
        if name in words
    }
    numbers = {
        name: array.astype(np.float16) if is_half and array.dtype == np.float32 else array
        for name, array in SMALL.items()
        if name in words
    }
    text = "".join(
        f", {KINDS[a.dtype.name]}{list(a.shape) or ''} {n}"
        for n, a in {**numbers, **weights}.items()
    )
    if is_half:
        given = given.replace("float", "float16")
    return parse(
        f"agraph ({given}{text}) => ({KINDS[dtype.numpy().name] if is_half else 'float'}[] y)"
        f" {{ {body} }}",
        **numbers,
        **weights,
    )


def pack_all(model: ir.Model, form: Form, min_elements: int = 256, min_rank: int = 2) -> list[str]:
    """Pack every weight of a model, in the bodies too; the names of these.

    Args:
        model: changed in place; its weights get other numbers.
        form: of the codes; weights of int8 get a codebook of int8, without scales.
        min_elements: smaller constants stay.
        min_rank: constants of fewer dimensions stay.
    """
    names, packed = Names(model), []
    for graph in all_graphs(model):
        encoding = Encoding(graph, names, lambda array, name: ir.tensor(array, name=name))
        for name, value in list(graph.initializers.items()):
            assert value.const_value is not None
            dtype, shape = value.const_value.dtype, tuple(value.const_value.shape.numpy())
            if value.const_value.size < min_elements or len(shape) < min_rank:
                continue
            if dtype not in NUMBERS or value.is_graph_input() or value.is_graph_output():
                continue
            narrow = form.narrow(shape, len(packed))
            if dtype == ir.DataType.INT8:
                steps = np.linspace(-127, 127, form.levels).astype(np.int8)
                narrow = Narrow(narrow.codes, steps)
            del graph.initializers[name]
            value.name = None
            value.replace_all_uses_with(encoding.weight(narrow, dtype, name))
            packed.append(name)
        encoding.close()
    return packed
