"""Random networks whose channels, heads and hidden units can be removed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from graphopt.skeleton import infer_shapes

OPSETS = (11, 13, 17, 18, 21)
SIZE = 6


class Builder:
    """A network in the making: float32, images [N, channels, 6, 6] up to its head."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng((7, seed))
        self.opset = int(self.random.choice(OPSETS))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.channels: dict[str, int] = {"x": 3}
        self.batch: int | str = "N" if self.random.random() < 0.5 else 2
        self.outputs: list[str] = []
        self.count = 0

    def constant(self, array: np.ndarray) -> str:
        """A constant, as an initializer or as a Constant node."""
        self.count += 1
        name = f"c{self.count}"
        if self.random.random() < 0.3:
            tensor = numpy_helper.from_array(array)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *numbers: int) -> str:
        return self.constant(np.asarray(numbers, np.int64))

    def normal(self, *shape: int) -> str:
        scale = 1 / np.sqrt(max(1, int(np.prod(shape[1:]))))
        return self.constant((scale * self.random.standard_normal(shape)).astype(np.float32))

    def run(self, op: str, inputs: list[str], outputs: int = 1, **attributes: object) -> list[str]:
        self.count += 1
        names = [f"v{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(op, inputs, names, name=f"{op}_{self.count}", **attributes)
        )
        return names

    def one(self, op: str, *inputs: str, **attributes: object) -> str:
        return self.run(op, list(inputs), **attributes)[0]

    def image(self, op: str, channels: int, *inputs: str, **attributes: object) -> str:
        """A node that makes an image."""
        name = self.one(op, *inputs, **attributes)
        self.channels[name] = channels
        return name

    def any(self) -> str:
        """An image made so far; later ones more often."""
        names = list(self.channels)
        return names[-1 - min(int(self.random.exponential(1)), len(names) - 1)]

    def pick(self, *choices: int) -> int:
        return int(self.random.choice(choices))

    def model(self, made: str) -> ir.Model:
        """The model with this output, and those that were set aside."""
        graph = helper.make_graph(
            self.nodes,
            "structures",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.batch, 3, SIZE, SIZE])],
            [
                helper.make_tensor_value_info(o, TensorProto.FLOAT, None)
                for o in (made, *self.outputs)
            ],
            self.initializers,
        )
        imports = [helper.make_opsetid("", self.opset)]
        proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        infer_shapes(model)
        return model


# ------------------------------------------------------------------ images


def conv(b: Builder, source: str | None = None, made: int | None = None) -> str:
    source = source or b.any()
    channels, made = b.channels[source], made or b.pick(4, 6, 8)
    inputs = [source, b.normal(made, channels, 3, 3)]
    inputs += [b.normal(made)] if b.random.random() < 0.6 else []
    return b.image("Conv", made, *inputs, pads=[1, 1, 1, 1])


def grouped(b: Builder) -> None:
    source = conv(b, made=8)
    made, group = b.pick(4, 8, 12), b.pick(2, 4)
    b.image("Conv", made, source, b.normal(made, 8 // group, 1, 1), b.normal(made), group=group)


def depthwise(b: Builder) -> None:
    source = conv(b)
    channels, times = b.channels[source], b.pick(1, 1, 2)
    made = channels * times
    b.image("Conv", made, source, b.normal(made, 1, 3, 3), group=channels, pads=[1, 1, 1, 1])


def transposed(b: Builder) -> None:
    source = conv(b, made=8)
    group, each = b.pick(1, 2, 8), b.pick(1, 2, 3)
    inputs = [source, b.normal(8, each, 1, 1)]
    inputs += [b.normal(each * group)] if b.random.random() < 0.5 else []
    b.image("ConvTranspose", each * group, *inputs, group=group)


def activated(b: Builder) -> None:
    source = b.any()
    op = str(b.random.choice(["Relu", "Sigmoid", "Tanh", "LeakyRelu", "Softplus", "Identity"]))
    b.image(op, b.channels[source], source)


def normalized(b: Builder) -> None:
    source = conv(b)
    channels = b.channels[source]
    variance = b.constant(b.random.uniform(0.5, 2, channels).astype(np.float32))
    b.image("BatchNormalization", channels, source, *(b.normal(channels) for _ in range(3)),
            variance)  # fmt: skip


def instance_normalized(b: Builder) -> None:
    source = b.any()
    channels = b.channels[source]
    b.image("InstanceNormalization", channels, source, b.normal(channels), b.normal(channels))


def scaled(b: Builder) -> None:
    source = b.any()
    channels = b.channels[source]
    shape = [(channels, 1, 1), (1, channels, 1, 1), (1, 1, 1, 1), ()][b.pick(0, 0, 1, 2, 3)]
    b.image(str(b.random.choice(["Mul", "Add", "Sub", "Max"])), channels, source, b.normal(*shape))


def prelu(b: Builder) -> None:
    source = conv(b)
    b.image("PRelu", b.channels[source], source, b.normal(b.channels[source], 1, 1))


def residual(b: Builder) -> None:
    source = b.any()
    inner = conv(b, conv(b, source), b.channels[source])
    b.image(str(b.random.choice(["Add", "Mul", "Sum"])), b.channels[source], inner, source)


def squeezed_and_excited(b: Builder) -> None:
    source = conv(b)
    channels = b.channels[source]
    pooled = b.one("GlobalAveragePool", source)
    hidden = b.one("Relu", b.one("Conv", pooled, b.normal(4, channels, 1, 1)))
    gate = b.one("Sigmoid", b.one("Conv", hidden, b.normal(channels, 4, 1, 1)))
    b.image("Mul", channels, source, gate)


def concatenated(b: Builder) -> None:
    parts = [b.any(), conv(b), *([conv(b)] if b.random.random() < 0.4 else [])]
    b.image("Concat", sum(b.channels[p] for p in parts), *parts, axis=1)


def split(b: Builder) -> None:
    source = conv(b, made=8)
    sizes = [[4, 4], [3, 5], [2, 2, 4], [1, 7]][b.pick(0, 1, 2, 3)]
    even = len(set(sizes)) == 1 and b.random.random() < 0.5
    if even and b.opset >= 18:
        parts = b.run("Split", [source], len(sizes), axis=1, num_outputs=len(sizes))
    elif even:
        parts = b.run("Split", [source], len(sizes), axis=1)
    elif b.opset >= 13:
        parts = b.run("Split", [source, b.integers(*sizes)], len(sizes), axis=1)
    else:
        parts = b.run("Split", [source], len(sizes), axis=1, split=sizes)
    for part, size in zip(parts, sizes, strict=True):
        b.channels[part] = size


def sliced(b: Builder) -> None:
    source = conv(b, made=8)
    start, end, step = [(0, 4, 1), (2, 100, 1), (0, 8, 2), (1, 8, 3), (-1, -100, -1), (-6, -1, 1)][
        b.pick(0, 1, 2, 3, 4, 5)
    ]
    bounds = (b.integers(start), b.integers(end), b.integers(1), b.integers(step))
    b.image("Slice", len(range(8)[start:end:step]), source, *bounds)


def gathered(b: Builder) -> None:
    source = conv(b, made=8)
    index = b.random.permutation(8)[: b.pick(4, 8)]
    index[0] -= 8
    b.image("Gather", index.size, source, b.constant(index.astype(np.int64)), axis=1)


def shuffled(b: Builder) -> None:
    source = conv(b, made=8)
    group = b.pick(2, 4)
    inner = b.one("Reshape", source, b.integers(-1, group, 8 // group, SIZE, SIZE))
    inner = b.one("Transpose", inner, perm=[0, 2, 1, 3, 4])
    b.image("Reshape", 8, inner, b.integers(*[(0, -1), (-1, 8)][b.pick(0, 1)], SIZE, SIZE))


def padded(b: Builder) -> None:
    source = conv(b)
    before, after = b.pick(0, 2), b.pick(1, 3)
    pads = b.integers(0, before, 0, 0, 0, after, 0, 0)
    b.image("Pad", b.channels[source] + before + after, source, pads)


def pooled(b: Builder) -> None:
    source = b.any()
    op = str(b.random.choice(["MaxPool", "AveragePool"]))
    b.image(op, b.channels[source], source, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def resized(b: Builder) -> None:
    """Twice as large and back, by scales or sizes."""
    source = conv(b)
    channels = b.channels[source]
    scales = b.constant(np.asarray([1, 1, 2, 2], np.float32))
    large = b.one("Resize", source, b.constant(np.zeros(0, np.float32)), scales)
    nothing = b.constant(np.zeros(0, np.float32))
    if b.random.random() < 0.5 and b.batch == 2:
        sizes = b.integers(2, channels, SIZE, SIZE)
        b.image("Resize", channels, large, nothing, nothing, sizes)
    else:
        b.image("MaxPool", channels, large, kernel_shape=[2, 2], strides=[2, 2])


def deepened(b: Builder) -> None:
    source = conv(b, made=8)
    mode = str(b.random.choice(["DCR", "CRD"]))
    wide = b.one("DepthToSpace", source, blocksize=2, mode=mode)
    b.image("SpaceToDepth", 8, b.one("Relu", wide), blocksize=2)


def contracted(b: Builder) -> None:
    source, made = conv(b), b.pick(4, 6)
    weight = b.normal(b.channels[source], made)
    if b.opset >= 12:
        b.image("Einsum", made, source, weight, equation="nchw,cd->ndhw")


def chosen(b: Builder) -> None:
    """Where, Expand and Tile."""
    source = conv(b)
    channels = b.channels[source]
    is_larger = b.one("Greater", source, b.normal(channels, 1, 1))
    other = b.one("Expand", b.normal(1, channels, 1, 1), b.integers(1, channels, SIZE, 1))
    other = b.one("Tile", other, b.integers(1, 1, 1, SIZE))
    b.image("Where", channels, is_larger, source, other)


def doubled(b: Builder) -> None:
    source = conv(b, made=4)
    b.image("Tile", 8, source, b.integers(1, 2, 1, 1))


def centred(b: Builder) -> None:
    """The mean of each image goes, and its largest column is added."""
    source = b.any()
    channels = b.channels[source]
    pooled = b.one("GlobalAveragePool", source)
    largest = b.one("ArgMax", source, axis=3, keepdims=1)
    column = b.one("Cast", largest, to=TensorProto.FLOAT)
    b.image("Add", channels, b.one("Sub", source, pooled), column)


def tied(b: Builder) -> None:
    """One weight in two layers."""
    source = conv(b, made=6)
    weight = b.normal(6, 6, 1, 1)
    first = b.image("Conv", 6, source, weight)
    b.image("Conv", 6, b.one("Relu", first), weight)


def at_the_end(b: Builder) -> None:
    """Channels last, and a MatMul over them."""
    source = b.any()
    last = b.one("Transpose", source, perm=[0, 2, 3, 1])
    last = b.one("Add", b.one("MatMul", last, b.normal(b.channels[source], 5)), b.normal(5))
    b.image("Transpose", 5, last, perm=[0, 3, 1, 2])


def unknown(b: Builder) -> None:
    """A Softmax over the channels: none of them can go."""
    source = b.any()
    if b.random.random() < 0.3 and b.opset >= 13:
        b.image("Softmax", b.channels[source], source, axis=1)


def watched(b: Builder) -> None:
    """An image is an output as well."""
    if b.random.random() < 0.15:
        b.outputs.append(b.one("Neg", b.any()))


IMAGE_STEPS: tuple[Callable[[Builder], object], ...] = (
    activated, at_the_end, centred, chosen, concatenated, contracted, conv, deepened, depthwise,
    doubled, gathered, grouped, instance_normalized, normalized, padded, pooled, prelu, residual,
    resized, scaled, shuffled, sliced, split, squeezed_and_excited, tied, transposed, unknown,
    watched,
)  # fmt: skip


# ------------------------------------------------------------------ heads


def flattened(b: Builder, source: str) -> str:
    flat = b.one("Flatten", source)
    hidden = b.one("Gemm", flat, b.normal(7, b.channels[source] * SIZE**2), b.normal(7), transB=1)
    return b.one("Gemm", b.one("Relu", hidden), b.normal(7, 4), b.normal(4), alpha=0.5, beta=2.0)


def averaged(b: Builder, source: str) -> str:
    pooled = b.one("ReduceMax" if b.opset < 18 else "GlobalMaxPool", source,
                   **({"axes": [2, 3]} if b.opset < 18 else {}))  # fmt: skip
    flat = b.one("Reshape", pooled, b.integers(0, -1))
    return b.one("MatMul", flat, b.normal(b.channels[source], 4))


def sequence(b: Builder, source: str) -> tuple[str, int]:
    """[N, 36, channels]."""
    channels = b.channels[source]
    steps = b.one("Reshape", source, b.integers(0, channels, SIZE**2))
    return b.one("Transpose", steps, perm=[0, 2, 1]), channels


def attended(b: Builder, source: str) -> str:
    """Attention, with as many heads for keys as for queries or half as many."""
    steps, channels = sequence(b, source)
    heads, width = 4, 3
    of_keys = b.pick(2, 4)
    made = []
    for count in (heads, of_keys, of_keys):
        value = b.one("MatMul", steps, b.normal(channels, count * width))
        value = b.one("Reshape", value, b.integers(0, -1, count, width))
        value = b.one("Transpose", value, perm=[0, 2, 1, 3])
        if count < heads:
            value = b.one("Reshape", value, b.integers(0, count, 1, SIZE**2, width))
            value = b.one("Expand", value, b.integers(1, 1, heads // count, 1, 1))
            value = b.one("Reshape", value, b.integers(0, heads, SIZE**2, width))
        made.append(value)
    query, key, value = made
    scores = b.one("MatMul", query, b.one("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = b.one("MatMul", b.one("Softmax", scores, axis=3), value)
    mixed = b.one("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = b.one("Reshape", mixed, b.integers(0, SIZE**2, heads * width))
    return b.one("MatMul", joined, b.normal(heads * width, 4))


def remembered(b: Builder, source: str) -> str:
    """An LSTM, GRU or RNN, perhaps in both directions."""
    steps, channels = sequence(b, source)
    op, gates = [("LSTM", 4), ("GRU", 3), ("RNN", 1)][b.pick(0, 1, 2)]
    directions, units = b.pick(1, 2), 5
    inputs = [
        b.one("Transpose", steps, perm=[1, 0, 2]),
        b.normal(directions, gates * units, channels),
        b.normal(directions, gates * units, units),
        b.normal(directions, 2 * gates * units) if b.random.random() < 0.5 else "",
    ]
    if op == "LSTM" and b.random.random() < 0.5:
        inputs += ["", "", "", b.normal(directions, 3 * units)]
    options = {"linear_before_reset": b.pick(0, 1)} if op == "GRU" else {}
    every = b.one(op, *inputs, hidden_size=units, **options,
                  direction="forward" if directions == 1 else "bidirectional")  # fmt: skip
    every = b.one("Transpose", every, perm=[2, 0, 1, 3])
    every = b.one("Reshape", every, b.integers(0, SIZE**2, directions * units))
    return b.one("MatMul", every, b.normal(directions * units, 4))


HEADS = (flattened, averaged, attended, remembered)


def structure(seed: int) -> ir.Model:
    """A random network, with inferred shapes."""
    b = Builder(seed)
    conv(b)
    for _ in range(int(b.random.integers(2, 8))):
        IMAGE_STEPS[int(b.random.integers(len(IMAGE_STEPS)))](b)
    head = HEADS[int(b.random.integers(len(HEADS)))]
    source = list(b.channels)[-1]
    return b.model(head(b, source))
