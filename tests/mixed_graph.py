"""A graph of any number of nodes, mixed from what exporters write and passes look for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIZE, WIDTH = 4, 6, 8


class _Graph:
    """Nodes in order; two values run through them, a picture and a matrix, each [N, ...]."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.image, self.matrix = "image", "matrix"

    def constant(self, array: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(array, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape) / np.prod(shape[1:]) ** 0.5)

    def __call__(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"{op}_{name}", **attributes))
        return name


def convolution(g: _Graph) -> None:
    """Conv, BatchNormalization, Relu, and the way around them."""
    made = g("Conv", g.image, g.weight(CHANNELS, CHANNELS, 3, 3), pads=[1, 1, 1, 1])
    statistics = [g.weight(CHANNELS) for _ in range(3)]
    variance = g.constant(g.random.uniform(0.5, 2, CHANNELS))
    made = g("Relu", g("BatchNormalization", made, *statistics, variance))
    g.image = g("Tanh", g("Add", made, g.image))


def dense(g: _Graph) -> None:
    """MatMul, Add, and a product with a constant."""
    product = g("MatMul", g.matrix, g.weight(WIDTH, WIDTH))
    biased = g("Add", product, g.constant(g.random.standard_normal(WIDTH)))
    g.matrix = g("Tanh", g("Mul", biased, g.constant(0.5)))


def shape_arithmetic(g: _Graph) -> None:
    """Shape, Gather, Unsqueeze, Concat, Reshape, and back."""
    flat = g.image
    for rest in ([CHANNELS * SIZE * SIZE], [CHANNELS, SIZE, SIZE]):
        batch = g("Gather", g("Shape", flat), g.constant(0, np.int64), axis=0)
        first = g("Unsqueeze", batch, g.constant([0], np.int64))
        shape = g("Concat", first, g.constant(rest, np.int64), axis=0)
        flat = g("Reshape", flat, shape)
    g.image = flat


def nothing(g: _Graph) -> None:
    """What exporters leave behind: Identity, a Cast to the same type, Dropout."""
    same = g("Cast", g("Identity", g.matrix), to=TensorProto.FLOAT)
    g.matrix = g("Dropout", same)


def constants(g: _Graph) -> None:
    """A scale that is computed from constants."""
    root = g("Sqrt", g.constant([4.0]))
    scale = g("Div", g.constant([1.0]), g("Mul", root, g.constant([0.4])))
    g.matrix = g("Relu", g("Mul", g.matrix, scale))


def twice(g: _Graph) -> None:
    """The same nodes again."""
    first, second = (g("Sigmoid", g("Neg", g.matrix)) for _ in range(2))
    g.matrix = g("Sub", g("Add", first, second), g.matrix)


def transposes(g: _Graph) -> None:
    """To channels last and back, with nothing and with something between."""
    last = g("Transpose", g.image, perm=[0, 2, 3, 1])
    again = g("Transpose", g("Transpose", last, perm=[0, 3, 1, 2]), perm=[0, 2, 3, 1])
    g.image = g("Transpose", g("Relu", again), perm=[0, 3, 1, 2])


def branch(g: _Graph) -> None:
    """An If on an input, with constants to fold in its bodies."""
    bodies = []
    for op in ("Neg", "Tanh"):
        count = len(g.nodes)
        folded = g("Exp", g.constant([0.5]))
        made = g("Mul", g(op, g("Identity", g.matrix)), folded)
        inner = g.nodes[count:]
        del g.nodes[count:]
        names = {name: f"{op}_{count}_{name}" for node in inner for name in node.output}
        for node in inner:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names[name] for name in node.output]
        output = helper.make_tensor_value_info(names[made], TensorProto.FLOAT, None)
        bodies.append(helper.make_graph(inner, f"{op}_{count}", [], [output]))
    g.matrix = g("If", "flag", then_branch=bodies[0], else_branch=bodies[1])


# onnxruntime 1.32 does not load a model in which `constants` follows on `nothing`.
PATTERNS: tuple[Callable[[_Graph], None], ...] = (
    convolution,
    dense,
    shape_arithmetic,
    nothing,
    convolution,
    dense,
    constants,
    twice,
    transposes,
    dense,
    branch,
)


def mixed_graph(nodes: int) -> onnx.ModelProto:
    """A model of about that many nodes, those in bodies not counted: the patterns in turn."""
    g = _Graph()
    for pattern in cycle(PATTERNS):
        if len(g.nodes) >= nodes:
            break
        pattern(g)
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", CHANNELS, SIZE, SIZE]),
        helper.make_tensor_value_info("matrix", TensorProto.FLOAT, ["N", WIDTH]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    outputs = [
        helper.make_tensor_value_info(g.image, TensorProto.FLOAT, ["N", CHANNELS, SIZE, SIZE]),
        helper.make_tensor_value_info(g.matrix, TensorProto.FLOAT, ["N", WIDTH]),
    ]
    graph = helper.make_graph(g.nodes, "mixed", inputs, outputs, g.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
