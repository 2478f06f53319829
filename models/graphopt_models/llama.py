"""Writes untrained Llama-shaped decoders of any size, without holding their weights in memory.

`python -m graphopt_models.llama OUT.onnx --size tiny|350m|1b` writes one of the presets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypedDict, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Tied = Literal["shared", "copied", "none"]
"""Where the output head has its weights from.

`shared`: the embedding's initializer through a Transpose; `copied`: an initializer of its own with
the embedding's values transposed; `none`: weights of its own.
"""

OPSET: Final = 18

_IR_VERSION: Final = 10
_EPSILON: Final = 1e-5
_ROPE_BASE: Final = 10000.0
_MASKED: Final = float(np.finfo(np.float32).min)
_CHUNK: Final = 1 << 22  # elements in memory at a time: 16 MiB of float32
_FLOAT_BYTES: Final = 4


class LlamaSize(TypedDict):
    """The sizes that make a decoder, as keyword arguments of `write_llama`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int


TINY: Final[LlamaSize] = {
    "layers": 2,
    "hidden": 64,
    "intermediate": 128,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 256,
}
"""90 thousand parameters with a shared head, 0.36 MB."""

MODEL_350M: Final[LlamaSize] = {
    "layers": 24,
    "hidden": 1024,
    "intermediate": 3072,
    "heads": 16,
    "kv_heads": 8,
    "vocab": 32000,
}
"""335 million parameters with a shared head, 1.34 GB."""

MODEL_1B: Final[LlamaSize] = {
    "layers": 16,
    "hidden": 2048,
    "intermediate": 8192,
    "heads": 32,
    "kv_heads": 8,
    "vocab": 32000,
}
"""1.04 billion parameters with a shared head, 4.16 GB."""

_SIZES: Final = {"tiny": TINY, "350m": MODEL_350M, "1b": MODEL_1B}


def write_llama(
    path: Path | str,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    seed: int,
    tied: Tied = "shared",
) -> int:
    """Write a decoder with random weights: `path`, and the weights in `path` + ".data".

    The model takes `input_ids`, int64 [batch, sequence], and gives `logits`, float32 [batch,
    sequence, vocab]. It has no key-value cache. Each weight is normally distributed with a
    standard deviation of 1 / sqrt(fan-in). Peak memory does not grow with the model. The same
    arguments, file name and NumPy version give the same bytes.

    Args:
        path: the .onnx file to write; its folder must exist.
        layers: how many decoder layers.
        hidden: width of the residual stream, a multiple of `heads`.
        intermediate: width of the gated perceptron.
        heads: attention heads for queries, a multiple of `kv_heads`; each has an even width.
        kv_heads: attention heads for keys and values.
        vocab: how many token ids there are.
        seed: seeds the weights.
        tied: where the output head has its weights from.

    Returns:
        How many bytes of weights were written.

    Raises:
        ValueError: the sizes do not fit each other, or `tied` is none of its options.
    """
    size = LlamaSize(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
    )
    _check(size, tied)
    path = Path(path)
    data_path = path.with_name(path.name + ".data")
    with data_path.open("w+b") as file:
        builder = _Builder(file, data_path, seed)
        graph = _decoder(builder, size, tied)
    ir.save(ir.Model(graph, ir_version=_IR_VERSION, producer_name="graphopt_models"), path)
    return builder.written


def main(argv: Sequence[str] | None = None) -> None:
    """Write a preset: the command line of this module."""
    parser = argparse.ArgumentParser(description="Write an untrained Llama-shaped decoder.")
    parser.add_argument("out", type=Path, help="the .onnx file; weights go to OUT.data beside it")
    parser.add_argument("--size", choices=sorted(_SIZES), default="tiny")
    parser.add_argument("--tied", choices=get_args(Tied), default="shared")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    written = write_llama(
        arguments.out, **_SIZES[arguments.size], seed=arguments.seed, tied=arguments.tied
    )
    print(f"{arguments.out}: {written // _FLOAT_BYTES} parameters, {written} bytes of weights")


class _Builder:
    """Records nodes and writes each weight to the data file the moment it is asked for."""

    def __init__(self, file: BinaryIO, path: Path, seed: int) -> None:
        self.written = 0
        self._file = file
        self._path = path
        self._random = np.random.default_rng(seed)
        self._buffer = np.empty(_CHUNK, np.float32)
        self._tape = ir.tape.Tape()
        self._constants: dict[str, ir.Value] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """Add a node with one output; `name` becomes the name of the node."""
        return self._tape.op(op_type, inputs, attributes, name=name)

    def ints(self, *values: int) -> ir.Value:
        """Return an inline int64 constant [n]."""
        return self._constant("_".join(["ints", *map(str, values)]), np.array(values, np.int64))

    def scalar(self, name: str, value: float | int) -> ir.Value:
        """Return an inline constant [], int64 for an int and float32 for a float."""
        if isinstance(value, int):
            return self._constant(name, np.array(value, np.int64))
        return self._constant(name, np.array(value, np.float32))

    def floats(self, name: str, values: NDArray[np.float32]) -> ir.Value:
        """Return an inline float32 constant, for values that are computed and few."""
        return self._constant(name, values)

    def weight(self, name: str, *shape: int, deviation: float, mean: float = 0.0) -> ir.Value:
        """Write a normally distributed float32 tensor and return its initializer."""
        self._file.seek(self.written)
        left = math.prod(shape)
        while left:
            chunk = self._buffer[: min(left, _CHUNK)]
            self._random.standard_normal(dtype=np.float32, out=chunk)
            chunk *= np.float32(deviation)
            chunk += np.float32(mean)
            self._file.write(chunk.data)
            left -= chunk.size
        return self._external(name, shape)

    def transposed_copy(self, name: str, source: ir.Value) -> ir.Value:
        """Write a weight [rows, columns] of this file again, transposed; return its initializer."""
        tensor = source.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.offset is None:
            raise TypeError(f"{source.name} is not a weight in the data file")
        rows, columns = tensor.shape.numpy()
        # A block of rows becomes a run of columns: one short write into each row of the copy.
        block_rows = max(1, _CHUNK // columns)
        for first in range(0, rows, block_rows):
            count = min(block_rows, rows - first)
            self._file.seek(tensor.offset + first * columns * _FLOAT_BYTES)
            block = np.frombuffer(self._file.read(count * columns * _FLOAT_BYTES), np.float32)
            for column, run in enumerate(np.ascontiguousarray(block.reshape(count, columns).T)):
                self._file.seek(self.written + (column * rows + first) * _FLOAT_BYTES)
                self._file.write(run.data)
        return self._external(name, (columns, rows))

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """Return what was recorded as a graph."""
        return ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name="llama",
        )

    def _constant(self, name: str, values: NDArray[np.float32] | NDArray[np.int64]) -> ir.Value:
        """Return the inline initializer of this name, new at its first use."""
        if name not in self._constants:
            self._constants[name] = self._tape.initializer(ir.tensor(values, name=name))
        return self._constants[name]

    def _external(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """Return an initializer for the tensor that was just written at the end of the file."""
        length = math.prod(shape) * _FLOAT_BYTES
        tensor = ir.ExternalTensor(
            self._path.name,
            self.written,
            length,
            ir.DataType.FLOAT,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self._path.parent,
        )
        self.written += length
        return self._tape.initializer(tensor)


def _check(size: LlamaSize, tied: str) -> None:
    """Raise ValueError if no decoder has these sizes."""
    for name, value in size.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value}")
    if tied not in get_args(Tied):
        raise ValueError(f"tied must be one of {', '.join(get_args(Tied))}, not {tied}")
    if size["heads"] % size["kv_heads"]:
        raise ValueError(
            f"heads ({size['heads']}) must be a multiple of kv_heads ({size['kv_heads']})"
        )
    if size["hidden"] % (2 * size["heads"]):
        # Rotary embedding turns the two halves of a head against each other.
        raise ValueError(
            f"hidden ({size['hidden']}) must be an even multiple of heads ({size['heads']})"
        )


def _decoder(builder: _Builder, size: LlamaSize, tied: Tied) -> ir.Graph:
    """Build the whole graph, token ids to logits."""
    hidden, vocab = size["hidden"], size["vocab"]
    token_ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    embedding = builder.weight("embed_tokens.weight", vocab, hidden, deviation=hidden**-0.5)
    stream = builder.op("Gather", embedding, token_ids, name="embed_tokens", axis=0)
    positions = _positions(builder, token_ids)
    rotation = _rotation(builder, positions, hidden // size["heads"])
    mask = _causal_mask(builder, positions)
    for layer in range(size["layers"]):
        stream = _layer(builder, stream, f"layers.{layer}", size, rotation, mask)
    stream = _rms_norm(builder, stream, "norm", hidden)
    logits = builder.op(
        "MatMul", stream, _head_weight(builder, embedding, size, tied), name="lm_head"
    )
    logits.name = "logits"
    logits.dtype = ir.DataType.FLOAT
    logits.shape = ir.Shape(["batch", "sequence", vocab])
    return builder.graph([token_ids], [logits])


def _head_weight(builder: _Builder, embedding: ir.Value, size: LlamaSize, tied: Tied) -> ir.Value:
    """Return the weight of the output head, [hidden, vocab]."""
    if tied == "shared":
        return builder.op("Transpose", embedding, perm=[1, 0])
    if tied == "copied":
        return builder.transposed_copy("lm_head.weight", embedding)
    hidden = size["hidden"]
    return builder.weight("lm_head.weight", hidden, size["vocab"], deviation=hidden**-0.5)


def _layer(
    builder: _Builder,
    stream: ir.Value,
    name: str,
    size: LlamaSize,
    rotation: tuple[ir.Value, ir.Value],
    mask: ir.Value,
) -> ir.Value:
    """Add one decoder layer to the residual stream [batch, sequence, hidden]."""
    normed = _rms_norm(builder, stream, f"{name}.input_layernorm", size["hidden"])
    attended = _attention(builder, normed, f"{name}.self_attn", size, rotation, mask)
    stream = builder.op("Add", stream, attended)
    normed = _rms_norm(builder, stream, f"{name}.post_attention_layernorm", size["hidden"])
    return builder.op("Add", stream, _gated_mlp(builder, normed, f"{name}.mlp", size))


def _attention(
    builder: _Builder,
    tokens: ir.Value,
    name: str,
    size: LlamaSize,
    rotation: tuple[ir.Value, ir.Value],
    mask: ir.Value,
) -> ir.Value:
    """Build causal grouped-query attention, [batch, sequence, hidden] in and out."""
    hidden, heads, kv_heads = size["hidden"], size["heads"], size["kv_heads"]
    width = hidden // heads
    kv_hidden = kv_heads * width
    query = _linear(builder, tokens, f"{name}.q_proj", hidden, hidden)
    key = _linear(builder, tokens, f"{name}.k_proj", hidden, kv_hidden)
    value = _linear(builder, tokens, f"{name}.v_proj", hidden, kv_hidden)

    query = _rotate(builder, _split_heads(builder, query, heads, width), rotation, width)
    key = _rotate(builder, _split_heads(builder, key, kv_heads, width), rotation, width)
    value = _split_heads(builder, value, kv_heads, width)
    if heads != kv_heads:
        key = _repeat_heads(builder, key, heads, kv_heads, width)
        value = _repeat_heads(builder, value, heads, kv_heads, width)

    key = builder.op("Transpose", key, perm=[0, 1, 3, 2])
    scores = builder.op("MatMul", query, key, name=f"{name}.scores")
    scores = builder.op("Mul", scores, builder.scalar("attention_scale", width**-0.5))
    weights = builder.op("Softmax", builder.op("Add", scores, mask), axis=-1)
    mixed = builder.op("MatMul", weights, value, name=f"{name}.mix")
    mixed = builder.op("Transpose", mixed, perm=[0, 2, 1, 3])
    mixed = builder.op("Reshape", mixed, builder.ints(0, 0, hidden))
    return _linear(builder, mixed, f"{name}.o_proj", hidden, hidden)


def _gated_mlp(builder: _Builder, tokens: ir.Value, name: str, size: LlamaSize) -> ir.Value:
    """Build the SwiGLU perceptron, [batch, sequence, hidden] in and out."""
    hidden, intermediate = size["hidden"], size["intermediate"]
    gate = _linear(builder, tokens, f"{name}.gate_proj", hidden, intermediate)
    gate = builder.op("Mul", gate, builder.op("Sigmoid", gate))
    up = _linear(builder, tokens, f"{name}.up_proj", hidden, intermediate)
    product = builder.op("Mul", gate, up)
    return _linear(builder, product, f"{name}.down_proj", intermediate, hidden)


def _linear(builder: _Builder, tokens: ir.Value, name: str, inputs: int, outputs: int) -> ir.Value:
    """Multiply by a weight [inputs, outputs]."""
    weight = builder.weight(f"{name}.weight", inputs, outputs, deviation=inputs**-0.5)
    return builder.op("MatMul", tokens, weight, name=name)


def _rms_norm(builder: _Builder, tokens: ir.Value, name: str, width: int) -> ir.Value:
    """Build RMSNorm over the last axis from the operators that PyTorch exports."""
    # Weights that differ, as after training: all ones would let an optimizer drop the product.
    weight = builder.weight(f"{name}.weight", width, deviation=0.1, mean=1.0)
    squares = builder.op("Pow", tokens, builder.scalar("two", 2.0))
    mean = builder.op("ReduceMean", squares, builder.ints(-1), keepdims=1)
    root = builder.op("Sqrt", builder.op("Add", mean, builder.scalar("epsilon", _EPSILON)))
    normed = builder.op("Mul", tokens, builder.op("Reciprocal", root))
    return builder.op("Mul", normed, weight, name=name)


def _positions(builder: _Builder, token_ids: ir.Value) -> ir.Value:
    """Return 0, 1, ... for the length of the sequence, int64 [sequence]."""
    length = builder.op("Squeeze", builder.op("Shape", token_ids, start=1, end=2))
    return builder.op("Range", builder.scalar("zero", 0), length, builder.scalar("one", 1))


def _rotation(builder: _Builder, positions: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """Return cosine and sine of the rotary angles, float32 [sequence, width] each."""
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    frequencies = builder.floats(
        "rotary.frequencies", (_ROPE_BASE**-exponents).astype(np.float32)[np.newaxis]
    )
    column = builder.op("Unsqueeze", positions, builder.ints(1))
    column = builder.op("Cast", column, to=int(ir.DataType.FLOAT))
    angles = builder.op("Mul", column, frequencies)
    angles = builder.op("Concat", angles, angles, axis=-1)
    return builder.op("Cos", angles), builder.op("Sin", angles)


def _causal_mask(builder: _Builder, positions: ir.Value) -> ir.Value:
    """Return what to add to the scores, float32 [sequence, sequence]."""
    query = builder.op("Unsqueeze", positions, builder.ints(1))
    key = builder.op("Unsqueeze", positions, builder.ints(0))
    visible = builder.op("LessOrEqual", key, query)
    return builder.op(
        "Where", visible, builder.scalar("visible", 0.0), builder.scalar("masked", _MASKED)
    )


def _rotate(
    builder: _Builder, tokens: ir.Value, rotation: tuple[ir.Value, ir.Value], width: int
) -> ir.Value:
    """Apply rotary position embedding to [batch, heads, sequence, width]."""
    cosine, sine = rotation
    half, last_axis, step = builder.ints(width // 2), builder.ints(-1), builder.ints(1)
    first = builder.op("Slice", tokens, builder.ints(0), half, last_axis, step)
    second = builder.op("Slice", tokens, half, builder.ints(width), last_axis, step)
    turned = builder.op("Concat", builder.op("Neg", second), first, axis=-1)
    return builder.op("Add", builder.op("Mul", tokens, cosine), builder.op("Mul", turned, sine))


def _split_heads(builder: _Builder, tokens: ir.Value, heads: int, width: int) -> ir.Value:
    """Rearrange [batch, sequence, heads * width] as [batch, heads, sequence, width]."""
    tokens = builder.op("Reshape", tokens, builder.ints(0, 0, heads, width))
    return builder.op("Transpose", tokens, perm=[0, 2, 1, 3])


def _repeat_heads(
    builder: _Builder, tokens: ir.Value, heads: int, kv_heads: int, width: int
) -> ir.Value:
    """Repeat each key or value head for its group of queries: [batch, heads, sequence, width]."""
    tokens = builder.op("Unsqueeze", tokens, builder.ints(2))
    tokens = builder.op("Expand", tokens, builder.ints(1, 1, heads // kv_heads, 1, 1))
    return builder.op("Reshape", tokens, builder.ints(0, heads, -1, width))


if __name__ == "__main__":
    main()
