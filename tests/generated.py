"""Random small models: real operators with real shapes, in the ways that exporters combine them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from graphopt.contract import Sample
from graphopt.errors import SampleError
from graphopt.runtime import Reference, Session

OPSETS = (11, 13, 17, 18, 21)
AXES_OPSET = 13
"""Squeeze and Unsqueeze take their axes as an input from here on, as an attribute before."""


class Builder:
    """A model in the making. Values are float32, of known shape but for a batch called N."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = int(self.random.choice(OPSETS))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.batch: int | str = "N" if self.random.random() < 0.5 else 2
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, array: np.ndarray) -> str:
        """A constant, as an initializer or as a Constant node."""
        name = self.name()
        if self.random.random() < 0.4:
            tensor = numpy_helper.from_array(array)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def normal(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape).astype(np.float32))

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: object) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{name}", **attributes))
        self.shapes[name] = shape
        return name

    def any(self, rank: int | None = None) -> str | None:
        """A value made so far; later ones more often, so that chains grow."""
        names = [n for n, s in self.shapes.items() if rank is None or len(s) == rank]
        if not names:
            return None
        return names[-1 - min(int(self.random.exponential(2)), len(names) - 1)]

    def dims(self, name: str) -> list[int | None]:
        return [d if d >= 0 else None for d in self.shapes[name]]

    def model(self) -> ir.Model:
        """The model: everything that nothing reads is an output, or is left unread now and then."""
        read = {i for n in self.nodes for i in n.input}
        loose = [n for n in self.shapes if n not in read and n != "x"]
        outputs = [n for n in loose[:-1] if self.random.random() < 0.7] + loose[-1:]
        graph = helper.make_graph(
            self.nodes,
            "generated",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.batch, 4, 6, 6])],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, self.dims(o)) for o in outputs],
            self.initializers,
        )
        imports = [helper.make_opsetid("", self.opset)]
        if self.functions:
            imports.append(helper.make_opsetid("local", 1))
        proto = helper.make_model(
            graph, opset_imports=imports, ir_version=10, functions=self.functions
        )
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def unary(b: Builder) -> None:
    value = b.any()
    assert value is not None
    op = b.random.choice(["Relu", "Neg", "Sigmoid", "Tanh", "Abs", "Identity", "Dropout", "Not"])
    if op == "Not":
        positive = b.add("Greater", [value, b.constant(np.float32(0))], b.shapes.pop(value, ()))
        shape = b.shapes.pop(positive)
        b.shapes[value] = shape
        flipped = b.add("Not", [b.add("Not", [positive], shape)], shape)
        inner = b.nodes[-1].input[0]
        del b.shapes[flipped], b.shapes[inner]
        b.add("Cast", [flipped], shape, to=TensorProto.FLOAT)
        return
    b.add(str(op), [value], b.shapes[value])


def cast(b: Builder) -> None:
    value = b.any()
    assert value is not None
    b.add("Cast", [value], b.shapes[value], to=TensorProto.FLOAT)


def with_constant(b: Builder) -> None:
    value = b.any()
    assert value is not None
    shape = b.shapes[value]
    op = str(b.random.choice(["Add", "Sub", "Mul", "Div"]))
    kind = b.random.integers(4)
    if kind == 0:
        neutral = {"Add": -0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}[op]
        operand = b.constant(np.float32(neutral))
    elif kind == 1:
        operand = b.constant(np.float32(b.random.choice([0.0, 0.5, 2.0]) if op != "Div" else 2.0))
    else:
        channels = (shape[1],) + (1,) * (len(shape) - 2) if len(shape) > 1 else shape
        array = b.random.uniform(0.5, 2, channels).astype(np.float32)
        operand = b.constant(array)
    inputs = [value, operand]
    if op in ("Add", "Mul") and b.random.random() < 0.5:
        inputs.reverse()
    b.add(op, inputs, shape)


def binary(b: Builder) -> None:
    value = b.any()
    assert value is not None
    same = [n for n, s in b.shapes.items() if s == b.shapes[value]]
    b.add(str(b.random.choice(["Add", "Mul", "Sub", "Max"])),
          [value, str(b.random.choice(same))], b.shapes[value])  # fmt: skip


def twice(b: Builder) -> None:
    """The same node again, as exporters write it for a value that is used in two places."""
    again = [n for n in b.nodes if len(n.output) == 1 and n.output[0] in b.shapes]
    if not again:
        return
    node = again[int(b.random.integers(len(again)))]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    b.add(node.op_type, list(node.input), b.shapes[node.output[0]], **attributes)


def convolution(b: Builder) -> None:
    value = b.any(4)
    if value is None:
        return
    batch, channels, height, width = b.shapes[value]
    if min(height, width) < 3 or channels % 2:
        return
    if b.random.random() < 0.4:
        value = b.add("Pad", [value, b.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))],
                      (batch, channels, height + 2, width + 2))  # fmt: skip
        height, width = height + 2, width + 2
    group = int(b.random.choice([1, 2, channels]))
    made = channels
    transposed = b.random.random() < 0.25
    # As many channels go in as come out, so the weights of both operators have the same shape.
    inputs = [value, b.normal(made, channels // group, 3, 3)]
    kind = b.random.random()
    if kind < 0.4:
        inputs.append(b.normal(made))
    elif kind < 0.6:
        inputs.append(b.constant(np.zeros(made, np.float32)))
    grown = 2 if transposed else -2
    value = b.add(
        "ConvTranspose" if transposed else "Conv",
        inputs,
        (batch, made, height + grown, width + grown),
        group=group,
        dilations=[1, 1],
    )
    kind = b.random.random()
    if kind < 0.5:
        normalized(b, value)
    elif kind < 0.8:
        with_constant(b)


def normalized(b: Builder, value: str) -> None:
    channels = b.shapes[value][1]
    variance = b.constant(b.random.uniform(0.5, 2, channels).astype(np.float32))
    inputs = [value, b.normal(channels), b.normal(channels), b.normal(channels), variance]
    b.add("BatchNormalization", inputs, b.shapes[value])


def dense(b: Builder) -> None:
    value = b.any(4)
    if value is None:
        return
    batch, *rest = b.shapes[value]
    width = int(np.prod(rest))
    flat = b.add("Flatten", [value], (batch, width))
    if b.random.random() < 0.5:
        product = b.add("MatMul", [flat, b.normal(width, 6)], (batch, 6))
        b.add(str(b.random.choice(["Add", "Mul"])), [product, b.normal(6)], (batch, 6))
    else:
        out = b.add(
            "Gemm", [flat, b.normal(6, width), b.normal(6)], (batch, 6), transB=1, alpha=0.5
        )
        if b.random.random() < 0.5:
            normalized(b, out)
        else:
            with_constant(b)


def softmax(b: Builder) -> None:
    value = b.any()
    assert value is not None
    b.add("Softmax", [value], b.shapes[value], axis=len(b.shapes[value]) - 1)


def transposes(b: Builder) -> None:
    value = b.any(4)
    if value is None:
        return
    for _ in range(int(b.random.integers(1, 4))):
        shape = b.shapes[value]
        perm = [0, *(int(i) for i in b.random.permutation([1, 2, 3]))]
        value = b.add("Transpose", [value], tuple(shape[p] for p in perm), perm=perm)
        if b.random.random() < 0.3:
            value = b.add("Relu", [value], b.shapes[value])


def reshapes(b: Builder) -> None:
    value = b.any(4)
    if value is None:
        return
    batch, c, h, w = b.shapes[value]
    flat = b.add("Reshape", [value, b.constant(np.int64([0, c, h * w]))], (batch, c, h * w))
    if b.random.random() < 0.5:
        tall = with_axes(b, "Unsqueeze", flat, (batch, 1, c, h * w))
        flat = with_axes(b, "Squeeze", tall, (batch, c, h * w))
    b.add("Reshape", [flat, b.constant(np.int64([-1, c, h, w]))], (batch, c, h, w))


def with_axes(b: Builder, op: str, value: str, shape: tuple[int, ...]) -> str:
    if b.opset < AXES_OPSET:
        return b.add(op, [value], shape, axes=[1])
    return b.add(op, [value, b.constant(np.int64([1]))], shape)


def shape_arithmetic(b: Builder) -> None:
    value = b.any(4)
    if value is None:
        return
    batch, c, h, w = b.shapes[value]
    shape = b.add("Shape", [value], (4,))
    first = b.add("Gather", [shape, b.constant(np.int64([0]))], (1,), axis=0)
    rest = b.constant(np.int64([c * h * w]))
    joined = b.add("Concat", [first, rest], (2,), axis=0)
    for name in (shape, first, joined):
        del b.shapes[name]
    b.add("Reshape", [value, joined], (batch, c * h * w))


def constant_chain(b: Builder) -> None:
    value = b.any()
    assert value is not None
    chain = b.add("Sqrt", [b.constant(np.float32([4.0]))], (1,))
    chain = b.add("Mul", [chain, b.constant(np.float32([0.5]))], (1,))
    for name in (chain, b.nodes[-1].input[0]):
        b.shapes.pop(name, None)
    b.add("Mul", [value, chain], b.shapes[value])


def branch(b: Builder) -> None:
    """An If whose bodies read outer values and hold constants of their own."""
    value = b.any()
    assert value is not None
    outer = b.shapes
    condition = b.constant(np.array(b.random.random() < 0.5))
    bodies = []
    for _ in range(2):
        inner = Builder(int(b.random.integers(1 << 30)))
        inner.count, b.count = b.count, b.count + 100
        inner.shapes = {value: outer[value]}
        made = inner.add("Identity", [value], outer[value])
        for _ in range(2):
            with_constant(inner)
        made = inner.add("Relu", [list(inner.shapes)[-1]], outer[value])
        bodies.append(helper.make_graph(inner.nodes, "body", [], [onnx.ValueInfoProto(name=made)],
                                        inner.initializers))  # fmt: skip
        b.count = max(b.count, inner.count)
    b.add("If", [condition], outer[value], then_branch=bodies[0], else_branch=bodies[1])


def loop(b: Builder) -> None:
    """A Loop that carries a value, reads an outer one, and counts its rounds from a constant."""
    value = b.any()
    assert value is not None
    shape = b.shapes[value]
    inner = Builder(int(b.random.integers(1 << 30)))
    inner.count = b.count
    round_number, go, carried = inner.name(), inner.name(), inner.name()
    still = inner.add("Identity", [go], ())
    inner.shapes = {carried: shape}
    with_constant(inner)
    twice(inner)
    made = inner.add("Add", [list(inner.shapes)[-1], value], shape)
    made = inner.add("Tanh", [made], shape)
    b.count = inner.count
    inputs = [
        helper.make_tensor_value_info(round_number, TensorProto.INT64, []),
        helper.make_tensor_value_info(go, TensorProto.BOOL, []),
        helper.make_tensor_value_info(carried, TensorProto.FLOAT, None),
    ]
    outputs = [
        helper.make_tensor_value_info(still, TensorProto.BOOL, []),
        helper.make_tensor_value_info(made, TensorProto.FLOAT, None),
    ]
    body = helper.make_graph(inner.nodes, "body", inputs, outputs, inner.initializers)
    rounds, start = b.constant(np.int64(b.random.integers(4))), b.constant(np.array(True))
    b.add("Loop", [rounds, start, value], shape, body=body)


def call(b: Builder) -> None:
    """A call of a function of the model, which is made when it is first called."""
    value = b.any()
    assert value is not None
    if not b.functions:
        nodes = [
            helper.make_node(
                "Constant", [], ["half"], value=numpy_helper.from_array(np.array(0.5, np.float32))
            ),
            helper.make_node("Mul", ["a", "half"], ["m"]),
            helper.make_node("Sigmoid", ["m"], ["r"]),
        ]
        imports = [helper.make_opsetid("", b.opset)]
        b.functions.append(helper.make_function("local", "f", ["a"], ["r"], nodes, imports))
    b.add("f", [value], b.shapes[value], domain="local")


Step = Callable[[Builder], None]

STEPS: tuple[Step, ...] = (
    unary,
    cast,
    with_constant,
    with_constant,
    binary,
    twice,
    convolution,
    convolution,
    dense,
    softmax,
    transposes,
    reshapes,
    shape_arithmetic,
    constant_chain,
    branch,
    loop,
)
FUNCTION_SHARE = 0.1
"""Of the models; most passes leave functions to inline-functions."""


def generate(seed: int, focus: Sequence[Step] = ()) -> ir.Model:
    """The model of a seed: 3 to 14 steps on an input x of [batch, 4, 6, 6].

    With a focus, every other step is one of those.
    """
    builder = Builder(seed)
    builder.shapes["x"] = (-1 if builder.batch == "N" else 2, 4, 6, 6)
    for _ in range(int(builder.random.integers(3, 15))):
        steps = focus if focus and builder.random.random() < 0.5 else STEPS
        step = steps[int(builder.random.integers(len(steps)))]
        step(builder)
    if len(builder.shapes) == 1:
        unary(builder)
    if builder.random.random() < FUNCTION_SHARE:
        call(builder)
    return builder.model()


def runs_as_written(model: ir.Model, sample: Sample) -> bool:
    """Now and then onnxruntime 1.32, optimizations off, frees too early what a branch reads."""
    try:
        Session(model, Reference.AS_WRITTEN).run(sample)
    except SampleError:
        return False
    return True
