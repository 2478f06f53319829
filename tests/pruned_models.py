"""Models and samples for the tests of passes that set weights to zero, and what became of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from observed import observer
from on_codes import normal

from graphopt.contract import Change, Context, Pass, Sample
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import parse
from graphopt_passes.share.zeros import dense_zeros

CONVS = """
agraph (float[N,8,10,10] x, float[16,8,3,3] w, float[16,1,3,3] u, float[12,16,1,1] v, float[12] b)
    => (float[A,B,C,D] y)
{ a = Conv<pads = [1,1,1,1]>(x, w) r = Relu(a) d = Conv<group = 16, strides = [2,2]>(r, u)
  y = Conv(d, v, b) }
"""
PRODUCTS = """
agraph (float[N,24] x, float[24,32] w, float[32,32] u, float[16,32] v, float[16] b)
    => (float[A,B] y)
{ a = MatMul(x, w) r = Relu(a) c = MatMul(r, u) s = Add(c, r) t = Tanh(s)
  y = Gemm<transB = 1>(t, v, b) }
"""
LSTM = """
agraph (float[T,N,12] x, float[2,64,12] w, float[2,64,16] r, float[32,20] v) => (float[A,B,C] y)
{ h, last = LSTM<hidden_size = 16, direction = "bidirectional">(x, w, r)
  t = Transpose<perm = [0,2,1,3]>(h) f = Reshape(t, to) y = MatMul(f, v) }
"""


def convs() -> ir.Model:
    """A full, a depthwise and a pointwise Conv, of 1152, 144 and 192 entries."""
    return parse(
        CONVS,
        w=normal(0, 16, 8, 3, 3, scale=0.2),
        u=normal(1, 16, 1, 3, 3, scale=0.4),
        v=normal(2, 12, 16, 1, 1, scale=0.3),
        b=normal(3, 12),
    )


def products() -> ir.Model:
    """A residual block between products, of 768, 1024 and 512 entries."""
    return parse(
        PRODUCTS,
        w=normal(0, 24, 32, scale=0.2),
        u=normal(1, 32, 32, scale=0.2),
        v=normal(2, 16, 32),
        b=normal(3, 16),
    )


def lstm() -> ir.Model:
    """An LSTM of both directions, of 1536 and 2048 entries, and a product of 640."""
    text = LSTM.replace("float[32,20] v", "float[32,20] v, int64[3] to")
    return parse(
        text,
        w=normal(0, 2, 64, 12, scale=0.3),
        r=normal(1, 2, 64, 16, scale=0.3),
        v=normal(2, 32, 20),
        to=np.array([0, 0, 32]),
    )


MODELS = {"convs": convs, "lstm": lstm, "products": products}


def samples(model: ir.Model, count: int = 12, seed: int = 0, batch: int = 0) -> list[Sample]:
    """Inputs whose channels have much in common, about a mean of 0.5; batches of 24 to 40 rows."""
    rng = np.random.default_rng(seed)
    shape = [d if isinstance(d, int) else 0 for d in model.graph.inputs[0].shape or ()]
    axis = 1 if len(shape) == 4 else len(shape) - 1
    mix = np.random.default_rng(7).normal(size=(shape[axis], shape[axis])) / shape[axis] ** 0.5
    found = []
    for number in range(count):
        free = batch or (2 if len(shape) == 4 else 24 + number % 17)
        sizes = [d or (free if i == 0 else 3) for i, d in enumerate(shape)]
        array = np.moveaxis(rng.normal(size=sizes), axis, -1) @ mix
        found.append({"x": np.moveaxis(array + 0.5, -1, axis).astype(np.float32)})
    return found


def pruned(
    one: Pass, model: ir.Model, given: list[Sample] | None = None
) -> tuple[ir.Model, Change]:
    """What a pass makes of a model, which is not modified; checked to be valid."""
    infer_shapes(model)
    after = model.clone()
    context = Context(lambda: model, observer=observer(model, given) if given else None)
    assert one.refuse(after, context) is None
    change = one.apply(after, context)
    for name, value in list(after.graph.initializers.items()):
        if not value.uses():
            del after.graph.initializers[name]
    infer_shapes(after)
    assert why_invalid(after) is None
    return after, change


def weights(model: ir.Model, entries: int = 100) -> dict[str, np.ndarray]:
    """The float constants of so many entries or more by name, without what stores their zeros."""
    dense = model.clone()
    dense_zeros(dense, Context(lambda: model))
    found = {name: v for name, v in dense.graph.initializers.items() if v.uses()}
    arrays = {n: v.const_value.numpy() for n, v in found.items() if v.const_value is not None}
    return {n: a for n, a in arrays.items() if a.dtype.kind == "f" and a.size >= entries}


def share_of_zeros(model: ir.Model, entries: int = 100) -> float:
    """Of all weights together."""
    arrays = weights(model, entries).values()
    return 1 - sum(map(np.count_nonzero, arrays)) / sum(array.size for array in arrays)


def error(before: ir.Model, after: ir.Model, given: list[Sample]) -> float:
    """The relative L2 error of the first output."""
    first, second = Session(before), Session(after)
    wrong = total = 0.0
    for sample in given:
        a, b = (next(iter(session.run(sample).values())) for session in (first, second))
        wrong += float(np.square(a - b).sum())
        total += float(np.square(a).sum())
    return (wrong / total) ** 0.5
