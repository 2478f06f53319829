"""Which units go together, and why some have to stay."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from removed import assert_law, groups_of

from graphopt.groups import Group, analyze
from graphopt.reshape_blocks import cut, factors_of
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse


def _model(text: str, **shapes: tuple[int, ...]) -> ir.Model:
    """A model whose inputs of these names are random constants."""
    random = np.random.default_rng(0)
    arrays = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    inputs = ", ".join(
        f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items()
    )
    return parse(text.replace("WEIGHTS", inputs), **arrays)


def _between(body: str, rows: int = 8, taken: int = 8, **more: tuple[int, ...]) -> ir.Model:
    """`h` [2, 5, rows] comes out of one layer, `t` goes into another along its last axis."""
    text = f"""g (float[2,5,3] x, WEIGHTS) => (float[2,5,2] y) {{
        h = MatMul(x, w)
        {body}
        y = MatMul(t, v)
    }}"""
    return _model(text, w=(3, rows), v=(taken, 2), **more)


def _images(body: str, made: int = 8, taken: int = 8, **more: tuple[int, ...]) -> ir.Model:
    """`h` [2, made, 4, 4] comes out of one Conv, `t` goes into another."""
    text = f"""g (float[2,3,4,4] x, WEIGHTS) => (float[N,2,K,L] y) {{
        h = Conv(x, w)
        {body}
        y = Conv(t, v)
    }}"""
    return _model(text, w=(made, 3, 1, 1), v=(2, taken, 1, 1), **more)


def _group_of(model: ir.Model, weight: str) -> Group:
    """The one group that a weight makes."""
    (group,) = (
        g for g in groups_of(model).all if any(p.weight.name == weight for p in g.producers)
    )
    return group


def _together(group: Group, value: str, axis: int) -> list[list[int]]:
    """The indices along an axis that go together."""
    (place,) = (p for p in group.places if p.value.name == value and p.axis == axis)
    return [np.flatnonzero(place.labels == unit).tolist() for unit in range(group.units)]


def _runs(count: int, length: int) -> list[list[int]]:
    return np.arange(count * length).reshape(count, length).tolist()  # type: ignore[no-any-return]


def _alone(count: int) -> list[list[int]]:
    return _runs(count, 1)


# ------------------------------------------------------------------ what goes together


EACH_ALONE = {
    "unary": "a = Relu(h) b = Sigmoid(a) c = Clip(b) t = Identity(c)",
    "scalar": "k = Constant<value_float = 2.0>() t = Mul(h, k)",
    "vector": "t = Add(h, bias)",
    "column": "t = Add(h, column)",
    "residual": "a = Relu(h) t = Add(h, a)",
    "where": "c = Greater(h, bias) t = Where(c, h, bias)",
    "softmax along another axis": "t = Softmax<axis = 1>(h)",
    "mean along another axis": "m = ReduceMean<axes = [1]>(h) t = Sub(h, m)",
    "transpose there and back": """a = Transpose<perm = [2, 0, 1]>(h)
        t = Transpose<perm = [1, 2, 0]>(a)""",
    "unsqueeze and squeeze": """k = Constant<value_ints = [1]>() a = Unsqueeze(h, k) b = Relu(a)
        t = Squeeze(b, k)""",
    "flatten of other axes": """a = Flatten<axis = 2>(h) s = Constant<value_ints = [2, 5, 8]>()
        t = Reshape(a, s)""",
    "unknown sizes": "s = Constant<value_ints = [-1, 5, 8]>() t = Reshape(h, s)",
    "expand": """s = Constant<value_ints = [3, 1, 5, 8]>() a = Expand(h, s)
        k = Constant<value_ints = [0]>() t = ReduceMax<keepdims = 0>(a, k)""",
    "cumulated along another axis": "k = Constant<value_int = 1>() t = CumSum(h, k)",
    "cast": "a = Cast<to = 11>(h) t = Cast<to = 1>(a)",
}  # fmt: skip


@pytest.mark.parametrize("body", EACH_ALONE.values(), ids=EACH_ALONE)
def test_each_unit_by_itself(body: str) -> None:
    opset = "13" if "axes = [1]" in body else "18"
    model = _between(body, bias=(8,), column=(5, 1))
    if opset == "13":
        model.opset_imports[""] = 13

    group = _group_of(model, "w")

    assert group.frozen is None
    assert _together(group, "h", 2) == _alone(8)
    assert _together(group, "v", 0) == _alone(8)
    assert [c.weight.name for c in group.consumers] == ["v"]
    assert assert_law(model) == 1


TOGETHER = {
    "heads": (
        """s = Constant<value_ints = [2, 5, 4, 2]>() a = Reshape(h, s)
        m = Softmax<axis = 3>(a) z = Constant<value_ints = [2, 5, 8]>() t = Reshape(m, z)""",
        [[0, 1], [2, 3], [4, 5], [6, 7]],
    ),
    "places in heads": (
        """s = Constant<value_ints = [2, 5, 2, 4]>() a = Reshape(h, s)
        m = Softmax<axis = 2>(a) z = Constant<value_ints = [2, 5, 8]>() t = Reshape(m, z)""",
        [[0, 4], [1, 5], [2, 6], [3, 7]],
    ),
    "added halves": (
        """s = Constant<value_ints = [4, 4]>() a, b = Split<axis = 2>(h, s) c = Add(a, b)
        t = Concat<axis = 2>(c, c)""",
        [[0, 4], [1, 5], [2, 6], [3, 7]],
    ),
    "turned and added": (
        """b = Constant<value_ints = [-1]>() e = Constant<value_ints = [-100]>()
        k = Constant<value_ints = [2]>() r = Slice(h, b, e, k, b) t = Add(h, r)""",
        [[0, 7], [1, 6], [2, 5], [3, 4]],
    ),
    "gathered and added": (
        """i = Constant<value_ints = [1, 0, 3, 2, 5, 4, 7, -2]>() r = Gather<axis = 2>(h, i)
        t = Add(h, r)""",
        [[0, 1], [2, 3], [4, 5], [6, 7]],
    ),
}


@pytest.mark.parametrize(("body", "units"), TOGETHER.values(), ids=TOGETHER)
def test_units_of_several_indices(body: str, units: list[list[int]]) -> None:
    model = _between(body)

    group = _group_of(model, "w")

    assert _together(group, "h", 2) == units
    assert assert_law(model) == 1


def test_a_grouped_conv_keeps_its_groups_equal() -> None:
    model = _images("t = Conv<group = 2>(h, g)", g=(8, 4, 1, 1))

    before, after = _group_of(model, "w"), _group_of(model, "g")

    assert _together(before, "h", 1) == _together(after, "t", 1) == [[i, i + 4] for i in range(4)]
    assert assert_law(model) == 2


def test_a_depthwise_conv_passes_channels_on() -> None:
    model = _images("t = Conv<group = 8>(h, d, e)", taken=16, d=(16, 1, 1, 1), e=(16,))

    group = _group_of(model, "w")

    assert _together(group, "h", 1) == _alone(8)
    assert (
        _together(group, "t", 1)
        == _together(group, "e", 0)
        == [[2 * i, 2 * i + 1] for i in range(8)]
    )
    assert [p.weight.name for p in group.producers] == ["w"]
    assert assert_law(model) == 1


def test_a_shuffle_of_channels() -> None:
    model = _images("""s = Constant<value_ints = [2, 2, 4, 4, 4]>() a = Reshape(h, s)
        b = Transpose<perm = [0, 2, 1, 3, 4]>(a)
        z = Constant<value_ints = [2, 8, 4, 4]>() t = Reshape(b, z)""")  # fmt: skip

    group = _group_of(model, "w")

    assert _together(group, "h", 1) == [[i, i + 4] for i in range(4)]
    assert _together(group, "v", 1) == [[2 * i, 2 * i + 1] for i in range(4)]
    assert assert_law(model) == 1


def test_a_channel_is_all_its_places_in_a_flatten() -> None:
    model = _model("""g (float[2,3,4,4] x, WEIGHTS) => (float[2,5] y) {
        h = Conv(x, w) f = Flatten(h) y = Gemm<transB = 1>(f, v)
        }""", w=(4, 3, 1, 1), v=(5, 64))  # fmt: skip

    group = _group_of(model, "w")

    assert _together(group, "v", 1) == _runs(4, 16)
    assert assert_law(model) == 1


def test_padded_channels_go_with_what_is_added() -> None:
    model = _images("""p = Constant<value_ints = [0, 2, 0, 0, 0, 2, 0, 0]>() a = Pad(h, p)
        b = Conv(h, k) t = Add(a, b)""", made=4, k=(8, 4, 1, 1))  # fmt: skip

    groups = groups_of(model).prunable

    assert [group.units for group in groups] == [4, 4]
    assert assert_law(model) == 2


def test_the_parts_of_a_concat_are_groups_of_their_own() -> None:
    model = _images(
        "a = Relu(h) b = Conv(h, k) t = Concat<axis = 1>(a, b)", taken=13, k=(5, 8, 1, 1)
    )

    found = groups_of(model)
    groups = found.prunable

    assert [(g.name, g.units) for g in groups] == [("h", 8), ("b", 5)]
    assert found.on(model.graph.initializers["v"], 1) == groups
    assert found.on(model.graph.initializers["v"], 0) == found.frozen
    assert {c.weight.name for c in groups[0].consumers} == {"k", "v"}
    assert assert_law(model) == 2


def _attention(of_keys: int) -> ir.Model:
    """4 heads of width 3 for queries."""
    repeat = f"""s1 = Constant<value_ints = [2, {of_keys}, 1, 5, 3]>()
        s2 = Constant<value_ints = [1, 1, {4 // of_keys}, 1, 1]>()
        s3 = Constant<value_ints = [2, 4, 5, 3]>()
        k1 = Reshape(kt, s1) k2 = Expand(k1, s2) kk = Reshape(k2, s3)
        v1 = Reshape(vt, s1) v2 = Expand(v1, s2) vv = Reshape(v2, s3)"""
    return _model(f"""g (float[2,5,6] x, WEIGHTS) => (float[2,5,6] y) {{
        qs = Constant<value_ints = [0, 0, 4, 3]>()
        ks = Constant<value_ints = [0, 0, {of_keys}, 3]>()
        q = MatMul(x, wq) qr = Reshape(q, qs) qq = Transpose<perm = [0, 2, 1, 3]>(qr)
        k = MatMul(x, wk) kr = Reshape(k, ks) kt = Transpose<perm = [0, 2, 1, 3]>(kr)
        v = MatMul(x, wv) vr = Reshape(v, ks) vt = Transpose<perm = [0, 2, 1, 3]>(vr)
        {repeat}
        kx = Transpose<perm = [0, 1, 3, 2]>(kk) s = MatMul(qq, kx) p = Softmax(s)
        o = MatMul(p, vv) ot = Transpose<perm = [0, 2, 1, 3]>(o)
        z = Constant<value_ints = [0, 0, -1]>() oj = Reshape(ot, z) y = MatMul(oj, wo)
        }}""", wq=(6, 12), wk=(6, 3 * of_keys), wv=(6, 3 * of_keys), wo=(12, 6))  # fmt: skip


@pytest.mark.parametrize("of_keys", [4, 2])
def test_heads_of_attention(of_keys: int) -> None:
    model = _attention(of_keys)
    each = 12 // of_keys

    (group,) = groups_of(model).prunable

    assert {p.weight.name for p in group.producers} == {"wq", "wk", "wv"}
    assert _together(group, "k", 2) == [list(range(3 * i, 3 * i + 3)) for i in range(of_keys)]
    assert _together(group, "wo", 0) == [
        list(range(each * i, each * i + each)) for i in range(of_keys)
    ]
    assert assert_law(model) == 1


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_hidden_units(operator: str, gates: int) -> None:
    model = _model(f"""g (float[5,2,3] x, WEIGHTS) => (float[5,2,2] y) {{
        h, last = {operator}<hidden_size = 4>(x, w, r, b)
        k = Constant<value_ints = [1]>() t = Squeeze(h, k) y = MatMul(t, v)
        }}""", w=(1, 4 * gates, 3), r=(1, 4 * gates, 4), b=(1, 8 * gates), v=(4, 2))  # fmt: skip

    (group,) = groups_of(model).prunable

    assert _together(group, "w", 1) == [list(range(i, 4 * gates, 4)) for i in range(4)]
    assert _together(group, "b", 1) == [list(range(i, 8 * gates, 4)) for i in range(4)]
    assert _together(group, "r", 2) == _alone(4)
    assert [(c.weight.name, c.axis, c.data is None) for c in group.consumers] == [
        ("r", 2, True),
        ("v", 0, False),
    ]
    assert assert_law(model) == 1


def test_letters_of_an_einsum() -> None:
    model = _model("""g (float[2,5,3] x, WEIGHTS) => (float[5,2] y) {
        h = Einsum<equation = "btc,ch->bth">(x, w)
        s = Einsum<equation = "bth,buh->btuh">(h, h) m = ReduceMax<axes = [2], keepdims = 0>(s)
        r = Relu(m) n = Einsum<equation = "ho, bth -> bto">(v, r)
        y = ReduceMax<axes = [0], keepdims = 0>(n)
        }""", w=(3, 4), v=(4, 2))  # fmt: skip
    model.opset_imports[""] = 17

    (group,) = groups_of(model).prunable

    assert [(p.weight.name, p.axis) for p in group.producers] == [("w", 1)]
    assert [(c.weight.name, c.axis) for c in group.consumers] == [("v", 0)]
    assert assert_law(model) == 1


@pytest.mark.parametrize(("mode", "units"), [
    ("DCR", [[0, 2, 4, 6], [1, 3, 5, 7]]), ("CRD", [[0, 1, 2, 3], [4, 5, 6, 7]]),
])  # fmt: skip
def test_channels_in_depth_and_in_space(mode: str, units: list[list[int]]) -> None:
    model = _images(f"""a = DepthToSpace<blocksize = 2, mode = "{mode}">(h) b = Relu(a)
        t = SpaceToDepth<blocksize = 2>(b)""")  # fmt: skip

    group = _group_of(model, "w")

    assert _together(group, "h", 1) == units
    assert _together(group, "v", 1) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert assert_law(model) == 1


def test_an_embedding_makes_units() -> None:
    model = _model("""g (int64[2,5] i, WEIGHTS) => (float[2,5,2] y) {
        h = Gather(w, i) t = Relu(h) y = MatMul(t, v)
        }""", w=(7, 4), v=(4, 2))  # fmt: skip

    (group,) = groups_of(model).prunable

    assert _together(group, "w", 1) == _alone(4)
    assert assert_law(model) == 1


def test_a_body_reads_what_is_outside() -> None:
    model = _model("""g (float[2,3] x, bool c, WEIGHTS) => (float[2,2] y) {
        h = MatMul(x, w)
        y = If (c) <
            then_branch = a () => (float[2,2] p) { r = Relu(h) p = MatMul(r, v) },
            else_branch = b () => (float[2,2] q) { s = Neg(h) q = MatMul(s, u) }
        >
        }""", w=(3, 4), v=(4, 2), u=(4, 2))  # fmt: skip

    group = _group_of(model, "w")

    assert {c.weight.name for c in group.consumers} == {"v", "u"}
    assert assert_law(model) == 1


# ------------------------------------------------------------------ what has to stay

FROZEN = {
    "t is an output": "t = Identity(h) y2 = Identity(t)",
    "Softmax t: works along it": "t = Softmax(h)",
    "LayerNormalization t: works along it": "t = LayerNormalization(h, bias)",
    "ReduceMean m: works along it": "m = ReduceMean(h) t = Sub(h, m)",
    "Scatter t: nothing is known": "i = Constant<value = int64[1,1,1] {0}>() t = Scatter(h, i, i2)",
    "TopK t: works along it": "k = Constant<value_ints = [8]>() t, j = TopK(h, k)",
    "Einsum d: works along it": """d = Einsum<equation = "abc->ab">(h)
        k = Constant<value_ints = [2]>() e = Unsqueeze(d, k) t = Add(h, e)""",
    "MatMul s: sums over it, weighted by no constant": """a = Transpose<perm = [0, 2, 1]>(h)
        s = MatMul(h, a) m = ReduceMax(s) t = Add(h, m)""",
    "Shape z: its size is read": """z = Shape(h) n = Cast<to = 1>(z) m = ReduceSum(n)
        t = Mul(h, m)""",
    "Reshape r: works along it": """z = Shape(x) n = Mul(z, z) k = Constant<value_ints = [-1]>()
        a = ReduceMin(n) o = Reshape(a, k) p = Concat<axis = 0>(o, k) r = Reshape(h, p)
        q = Constant<value_ints = [2, 5, 8]>() t = Reshape(r, q)""",
    "x is an input": "b = Constant<value_ints = [0]>() t = Add(h, x2)",
}


@pytest.mark.parametrize(("reason", "body"), FROZEN.items(), ids=FROZEN)
def test_frozen_and_why(reason: str, body: str) -> None:
    text = f"""g (float[2,5,3] x, float[2,5,8] x2, float[1,1,1] i2, WEIGHTS) => (float[2,5,2] y) {{
        h = MatMul(x, w)
        {body}
        y = MatMul(t, v)
    }}"""
    model = _model(text, w=(3, 8), v=(8, 2), bias=(8,))
    if "is an output" in reason:
        model.graph.outputs.append(
            next(n for n in model.graph if n.op_type == "Identity").outputs[0]
        )

    group = _group_of(model, "w")

    assert group.frozen is not None
    assert reason.replace("x is", "x2 is") in group.frozen, group.frozen


def test_an_operator_of_another_domain_freezes_what_it_touches() -> None:
    model = parse("""<ir_version: 10, opset_import: ["" : 21, "com.example" : 1]>
        g (float[2,3] x, float[3,4] w, float[4,2] v) => (float[2,2] y) {
        h = MatMul(x, w) t = com.example.Relu(h) y = MatMul(t, v)
        }""", w=np.ones((3, 4), np.float32), v=np.ones((4, 2), np.float32))  # fmt: skip

    group = _group_of(model, "w")

    assert group.frozen == "Relu t: not all shapes are known"


def test_a_packed_weight_is_frozen() -> None:
    text = """g (float[2,3] x, int8[3,4] w, float s, float[4,2] v) => (float[2,2] y) {
        d = DequantizeLinear(w, s) h = MatMul(x, d) y = MatMul(h, v)
    }"""
    ones = np.ones((4, 2), np.float32)
    model = parse(text, w=np.ones((3, 4), np.int8), s=np.float32(1), v=ones)

    assert groups_of(model).prunable == ()


def test_a_weight_that_is_an_output_too_is_frozen() -> None:
    model = _between("t = Relu(h)")
    model.graph.outputs.append(model.graph.initializers["v"])

    group = _group_of(model, "w")

    assert group.frozen == "v is an output of the model"


def test_a_weight_in_a_frozen_place_too_is_frozen() -> None:
    model = _model("""g (float[2,3] x, WEIGHTS) => (float[2,2] y, float[4,2] z) {
        h = MatMul(x, w) y = MatMul(h, v) z = Softmax<axis = 0>(v)
        }""", w=(3, 4), v=(4, 2))  # fmt: skip

    group = _group_of(model, "w")

    assert group.frozen is not None and "Softmax z: works along it" in group.frozen


def test_a_weight_that_callers_may_override_is_frozen() -> None:
    model = _between("t = Relu(h)")
    model.graph.inputs.append(model.graph.initializers["v"])

    group = _group_of(model, "w")

    assert group.frozen is not None and "weighted by no constant" in group.frozen


def test_sizes_that_are_not_known_freeze_what_meets_them() -> None:
    model = _model("""g (float[2,3] x, float[2,M] z, WEIGHTS) => (float[2,2] y) {
        h = MatMul(x, w) t = Add(h, z) y = MatMul(t, v)
        }""", w=(3, 4), v=(4, 2))  # fmt: skip

    group = _group_of(model, "w")

    assert group.frozen == "Add t: the size that meets it is not known"


def test_the_last_piece_of_a_split_stays() -> None:
    body = "s = Constant<value_ints = [1, 7]>() a, b = Split<axis = 2>(h, s) t = Mul(b, a)"
    model = _between(body, taken=7)

    groups = groups_of(model)

    assert [(g.units, g.frozen is None) for g in groups.all if "h" in g.name] == [
        (1, False),
        (7, True),
    ]
    assert assert_law(model) == 1


def test_bounds_and_pads_as_attributes() -> None:
    model = _images("""a = Slice<axes = [1], starts = [1], ends = [7]>(h)
        b = Pad<pads = [0, 1, 0, 0, 0, 1, 0, 0]>(a) c, d = Split<axis = 1>(b)
        e = Unsqueeze<axes = [0]>(d) f = Squeeze(e) g = Add(c, f)
        t = Upsample<scales = [1.0, 1.0, 2.0, 2.0]>(g)""", taken=4)  # fmt: skip
    model.opset_imports[""] = 8
    model.graph.outputs[0].shape = ir.Shape([2, 2, 8, 8])

    (group,) = groups_of(model).prunable

    assert sorted(_together(group, "h", 1)) == [[1, 5], [2, 6], [3], [4]]
    assert assert_law(model) == 1


RESIZED = {
    "scales": "f = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>() t = Resize(h, , f)",
    "sizes": "s = Constant<value_ints = [2, 8, 2, 2]>() t = Resize(h, , , s)",
    "computed sizes": """z = Shape(h) b = Constant<value_ints = [0]>()
        e = Constant<value_ints = [1]>() n = Slice(z, b, e)
        k = Constant<value_ints = [8, 6, 6]>() s = Concat<axis = 0>(n, k) t = Resize(h, , , s)""",
}


@pytest.mark.parametrize("body", RESIZED.values(), ids=RESIZED)
def test_images_that_are_resized(body: str) -> None:
    model = _images(body)
    model.graph.inputs[0].shape = ir.Shape(["N", 3, 4, 4])

    group = _group_of(model, "w")

    assert group.frozen is None
    assert _together(group, "t", 1) == _alone(8)
    assert assert_law(model) == 1


def test_zeros_in_a_shape_that_are_copies_of_other_sizes() -> None:
    """The 4 that the first 0 copies is not the 4 that the second axis has."""
    model = _model("""g (float[4,3] x, WEIGHTS) => (float[4,2] y) {
        h = MatMul(x, w) s = Constant<value_ints = [0, 2, 2]>() r = Reshape(h, s)
        a = Transpose<perm = [2, 0, 1]>(r) z = Constant<value_ints = [0, 4, 0]>()
        b = Reshape(a, z) c = Transpose<perm = [1, 0, 2]>(b) e = Constant<value_ints = [0, -1]>()
        t = Reshape(c, e) y = MatMul(t, v)
        }""", w=(3, 4), v=(4, 2))  # fmt: skip

    assert assert_law(model) == 1


def test_old_opsets_broadcast_in_other_ways() -> None:
    model = _between("t = Relu(h)")
    model.opset_imports[""] = 6

    assert all("older than 7" in (group.frozen or "") for group in analyze(model).all)


# ------------------------------------------------------------------ how it is told


def test_described_for_json() -> None:
    model = _between("t = Relu(h)")
    infer_shapes(model)

    told = json.loads(json.dumps(analyze(model).describe()))

    assert told[0] == {
        "name": "h",
        "units": 8,
        "frozen": None,
        "producers": [{"node": "h", "weight": "w", "axis": 1}],
        "consumers": [{"node": "y", "weight": "v", "axis": 0}],
        "places": [
            {"value": "w", "axis": 1, "size": 8},
            {"value": "v", "axis": 0, "size": 8},
            {"value": "h", "axis": 2, "size": 8},
            {"value": "t", "axis": 2, "size": 8},
        ],
    }
    assert told[1]["frozen"] == "y is an output of the model"


# ------------------------------------------------------------------ blocks of reshapes


def test_a_reshape_is_cut_where_products_agree() -> None:
    assert cut([2, 12, 5], [2, 3, 4, 5]) == [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    assert cut([2, 3, 4], [6, 4]) == [((0, 1), (0,)), ((2,), (1,))]
    assert cut([1, 6, 1], [6]) == [((1,), (0,))]
    assert cut([6, 4], [4, 6]) == [((0, 1), (0, 1))]
    assert cut([2, 0, 3], [2, 3, 0]) == [((0,), (0,))]


def test_blocks_without_common_factors() -> None:
    assert factors_of([0, 1], [6, 4], [2, 3], [4, 6]) == ()
    (factor,) = factors_of([0], [6], [1], [6])
    assert factor.size == 6


@pytest.mark.parametrize(
    ("before", "after"), [([12], [3, 4]), ([3, 4], [12]), ([2, 12, 5], [6, 4, 5]), ([8], [2, 2, 2])]
)
def test_digits_are_those_of_numpy(before: list[int], after: list[int]) -> None:
    whole = int(np.prod(before))
    factors = factors_of(range(len(before)), before, range(len(after)), after)

    assert np.prod([f.size for f in factors]) == whole
    first, second = (np.unravel_index(np.arange(whole), shape) for shape in (before, after))
    for f in factors:
        of_input = f.input_digits()[first[f.input_axis]]
        of_output = f.output_digits()[second[f.output_axis]]
        assert np.array_equal(of_input, of_output)
