from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.contract import Context
from graphopt.errors import SpecError
from graphopt.packing import packed_weights
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import apply_pass, assert_unchanged, canonical, parse
from graphopt_passes.share.pack_constants import PackConstants
from graphopt_passes.simplify.fold_constants import FoldConstants

PASS = PackConstants()
ADD = "agraph (float[64,64] x, float[64,64] m) => (float[64,64] y) { y = Add(x, m) }"
PRODUCT = "agraph (float[4,64] x, float[64,96] w) => (float[4,96] y) { y = MatMul(x, w) }"


def mask(size: int = 64, low: float = -1e9) -> np.ndarray:
    return np.triu(np.full((size, size), low, np.float32), 1)


def few(levels: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Numbers of which there are so many different ones."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal(levels).astype(np.float32)
    array = rng.choice(numbers, shape)
    array.reshape(-1)[:levels] = numbers
    return array


def unfolded(model: ir.Model, name: str) -> np.ndarray:
    """What the nodes of a graph make of a packed constant."""
    probe = model.clone()
    value = next(o for node in probe.graph for o in node.outputs if o.name == name)
    probe.graph.outputs.append(value)
    feeds = {v.name or "": np.zeros([64, 64], np.float32) for v in probe.graph.inputs}
    return Session(probe, Reference.AS_WRITTEN).run(feeds)[name]


def test_a_mask_takes_a_bit_for_each_element() -> None:
    model = parse(ADD, m=mask())
    change = apply_pass(PASS, model)

    assert change.counts == {"constant packed in codes": 1}
    (packed,) = packed_weights(model.graph)
    assert packed.name == "m"
    assert [node.op_type for node in model.graph] == [
        *("Cast", "Cast", "Gather", "Gather", "Reshape"),
        "Add",
    ], canonical(model)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    assert 64 * 64 // 8 in [tensor.nbytes for tensor in tensors if tensor is not None]
    np.testing.assert_array_equal(unfolded(model, "m"), mask())


@pytest.mark.parametrize("levels", [2, 3, 5, 16, 17, 100, 255, 256])
def test_every_number_of_levels_is_bit_for_bit(levels: int) -> None:
    array = few(levels, 64, 64)
    model = parse(ADD, m=array)
    apply_pass(PASS, model)

    found = unfolded(model, "m")
    np.testing.assert_array_equal(found.view(np.uint32), array.view(np.uint32))


def test_zeros_of_both_signs_infinities_and_kinds_of_nan_stay_apart() -> None:
    bits = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FC00001, 1], np.uint32)
    array = np.resize(bits, (64, 64)).view(np.float32)
    model = parse(ADD, m=array)
    apply_pass(PASS, model)

    np.testing.assert_array_equal(unfolded(model, "m").view(np.uint32), array.view(np.uint32))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("double", np.float64), ("int64", np.int64), ("int32", np.int32), ("float16", np.float16)],
)
def test_other_types(kind: str, dtype: type) -> None:
    array = (
        few(9, 64, 64).astype(dtype) if dtype != np.int64 else (np.eye(64) * 2**40).astype(dtype)
    )
    text = f"agraph ({kind}[64,64] m, bool[64,64] x) => ({kind}[64,64] y) {{ y = Where(x, m, m) }}"
    model = parse(text, m=array)
    apply_pass(PASS, model)

    (packed,) = packed_weights(model.graph)
    given = {"x": np.ones((64, 64), bool)}
    (found,) = Session(model, Reference.AS_WRITTEN).run(given).values()
    assert packed.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    np.testing.assert_array_equal(found, array)


def test_bfloat16() -> None:
    text = "agraph (bfloat16[64,64] m) => (float[64,64] y) { y = Cast <to = 1> (m) }"
    array = few(4, 64, 64).astype(ml_dtypes.bfloat16)
    model = parse(text.replace("(bfloat16[64,64] m)", "(bfloat16[64,64] m, float[1] x)"), m=array)
    apply_pass(PASS, model)

    (found,) = Session(model, Reference.AS_WRITTEN).run({"x": np.zeros(1, np.float32)}).values()
    np.testing.assert_array_equal(found, array.astype(np.float32))


@pytest.mark.parametrize(
    "array",
    [few(257, 64, 64), np.zeros((64, 64), np.float32)[:, :0], few(200, 15, 17)],
    ids=["many numbers", "none", "few elements"],
)
def test_what_does_not_pay_stays(array: np.ndarray) -> None:
    shape = ",".join(map(str, array.shape))
    assert_unchanged(
        PASS, parse(f"agraph (float[{shape}] m) => (float[{shape}] y) {{ y = Neg(m) }}", m=array)
    )


def test_tables_are_counted() -> None:
    """A constant that gains less than the digits of bytes take is left; beside others it pays."""
    small, large = few(2, 20, 20), mask()
    text = """
        agraph (float[20,20] x, float[20,20] m, float[64,64] z, float[64,64] n)
            => (float[20,20] y, float[64,64] u)
        { y = Add(x, m) u = Add(z, n) }
    """
    assert_unchanged(PASS, parse(text, m=small, n=np.random.default_rng(0).random((64, 64), "f4")))
    change = apply_pass(PASS, parse(text, m=small, n=large))
    assert change.counts == {"constant packed in codes": 2}


def test_weights_are_left_alone_on_request() -> None:
    model = parse(PRODUCT, w=few(16, 64, 96))
    assert_unchanged(PackConstants(weights=False), model.clone())
    assert apply_pass(PASS, model)


def test_overridable_and_returned_constants_stay() -> None:
    overridable = parse(
        "agraph (float[64,64] x, float[64,64] m) => (float[64,64] y) { y = Add(x, m) }", m=mask()
    )
    overridable.graph.inputs.append(overridable.graph.initializers["m"])
    assert_unchanged(PASS, overridable)
    returned = parse(
        "agraph (float[64,64] x, float[64,64] m) => (float[64,64] y, float[64,64] m) "
        "{ y = Add(x, m) }",
        m=mask(),
    )
    assert_unchanged(PASS, returned)


def test_what_other_domains_read_stays() -> None:
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        agraph (float[64,64] x, float[64,64] m) => (float[64,64] y)
        { y = com.microsoft.FusedMatMul(x, m) }
        """,
        m=mask(),
    )
    assert_unchanged(PASS, model)


def test_later_passes_keep_it_packed_and_twice_is_once() -> None:
    model = parse(ADD, m=mask())
    apply_pass(PASS, model)
    infer_shapes(model)

    assert not apply_pass(FoldConstants(), model)
    assert not apply_pass(PASS, model)


def test_unpacking_gives_it_back() -> None:
    array = mask(low=-np.inf)
    model = parse(ADD, m=array)
    samples = [{"x": np.ones((64, 64), np.float32)}]
    run = graphopt.optimize(model, passes="pack-constants", samples=samples, benchmark=False)
    assert run.optimized.stored_bytes < run.original.stored_bytes / 4
    back = graphopt.optimize(run.model, passes="unpack-weights", samples=samples, benchmark=False)

    tensor = back.model.graph.initializers["m"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_old_opsets_are_refused() -> None:
    model = parse(f'<ir_version: 8, opset_import: ["" : 12]> {ADD}', m=mask())
    assert PASS.refuse(model, None)  # type: ignore[arg-type]


def test_empty_constants_and_bounds() -> None:
    empty = np.zeros(0, np.float32)
    model = parse("agraph (float[0] x, float[0] m) => (float[0] y) { y = Add(x, m) }", m=empty)
    assert_unchanged(PackConstants(min_elements=1), model)
    with pytest.raises(SpecError, match="min-elements"):
        PackConstants(min_elements=0)


def test_every_graph_needs_tables_of_its_own() -> None:
    """A constant of a body that gains less than a table does not follow one of the main graph."""
    model = parse(
        """
        agraph (bool c, float[64,64] x, float[64,64] m) => (float[64,64] y) {
            a = Add(x, m)
            y = If (c) <
                then_branch = t () => (float[64,64] p) { p = Neg(a) },
                else_branch = e () => (float[64,64] q) { q = Abs(a) }
            >
        }
        """,
        m=mask(),
    )
    for attribute in model.graph[1].attributes.values():
        body = attribute.as_graph()
        value = ir.Value(name=f"small_{body.name}", const_value=ir.tensor(few(2, 18, 18)))
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([18, 18])
        body.initializers.add(value)
        unread = ir.node("Exp", [value], outputs=[ir.Value(name=f"made_{body.name}")])
        body.append(unread)

    change = PASS.apply(model, Context(model.clone))
    assert change.counts == {"constant packed in codes": 1}


def test_masks_before_a_product_are_no_weights() -> None:
    text = """
        agraph (float[64,64] x, float[64,64] m, float[64,64] w) => (float[64,64] y)
        { a = Add(x, m) y = MatMul(a, w) }
    """
    change = apply_pass(PackConstants(weights=False), parse(text, m=mask(), w=few(9, 64, 64)))
    assert change.counts == {"constant packed in codes": 1}
