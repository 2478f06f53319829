"""heal learns from what outputs are made of, where the outputs themselves say too little."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from graphopt.errors import CheckFailed, ModelError  # noqa: E402
from graphopt.testing import parse  # noqa: E402
from graphopt.training import heal  # noqa: E402
from graphopt.training.heal import Healed  # noqa: E402

SHAPES = {"u": (8, 16), "b": (16, 48), "s": (16, 12)}
LAYERS = "float[1,8] x, float[8,16] u, float[16,48] b, float[16,12] s"


def weights(share: float = 0.0) -> dict[str, np.ndarray]:
    """Random ones; a share of them, the smallest, is zero."""
    rng = np.random.default_rng(0)
    found = {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
    return {n: a * (np.abs(a) >= np.quantile(np.abs(a), share)) for n, a in found.items()}


def _of(share: float, text: str) -> dict[str, np.ndarray]:
    """Those that a model has."""
    return {name: array for name, array in weights(share).items() if f"] {name}" in text}


def healed(text: str, optimized: str = "", steps: int = 40) -> Healed:
    rng = np.random.default_rng(1)
    # Some are zeros, as silence is.
    rows = [rng.normal(size=(1, 8)) * (number % 10 > 0) for number in range(60)]
    samples = [{"x": row.astype(np.float32)} for row in rows]
    original, pruned = parse(text, **_of(0, text)), parse(optimized or text, **_of(0.5, text))
    return heal(original, pruned, samples=samples, steps=steps, threads=1)


def errors(found: Healed) -> dict[str, tuple[float, float]]:
    """Of each value that was learnt, before and after."""
    pairs = zip(found.before, found.after, strict=True)
    return {b.name: (b.rel_l2, a.rel_l2) for b, a in pairs if b.name.startswith("value ")}


def check(found: Healed, learnt: set[str], replaced: str) -> None:
    """These values came nearer, and the model is the one that was given."""
    assert set(errors(found)) == learnt
    assert all(after < before for before, after in errors(found).values())
    told = [note for note in found.notes if "no gradients" in note]
    assert [note.partition(":")[0] for note in told] == ([replaced] if replaced else [])
    assert not any((o.name or "").startswith("value ") for o in found.model.graph.outputs)
    assert found.weights["pruned"] >= 1


LABEL = f"""agraph ({LAYERS}) => (int64[1] y) {{
    h = MatMul(x, u)  r = Relu(h)  a = MatMul(r, s)  p = Softmax<axis = 1>(a)
    y = ArgMax<axis = 1, keepdims = 0>(p) }}"""


def test_a_label_is_learnt_from_its_probabilities() -> None:
    check(healed(LABEL), {"value p"}, "y")


def test_values_before_a_label_may_have_other_names_and_nodes() -> None:
    # Without the Softmax, which does not change which is the largest.
    plain = f"""agraph ({LAYERS}) => (int64[1] y) {{
        h = MatMul(x, u)  p = Relu(h)  r = MatMul(p, s)
        y = ArgMax<axis = 1, keepdims = 0>(r) }}"""

    check(healed(LABEL, plain), {"value a"}, "y")


DETECTOR = f"""agraph ({LAYERS}) => (int64[n,3] found, float[m,4] rows, float[1,12] scores) {{
    h = MatMul(x, u)  r = Relu(h)
    l = MatMul(r, b)  f = Constant<value_ints = [1,12,4]>()  boxes = Reshape(l, f)
    scores = MatMul(r, s)  g = Constant<value_ints = [1,1,12]>()  marks = Reshape(scores, g)
    most = Constant<value_ints = [5]>()  over = Constant<value_floats = [0.5]>()
    found = NonMaxSuppression(boxes, marks, most, over)
    two = Constant<value_ints = [2]>()  which = Gather<axis = 1>(found, two)
    one = Constant<value_ints = [1]>()  places = Squeeze(which, one)
    zero = Constant<value_ints = [0]>()  flat = Squeeze(boxes, zero)
    rows = Gather<axis = 0>(flat, places) }}"""


def test_values_before_an_operator_that_torch_has_not_are_learnt() -> None:
    found = healed(DETECTOR)

    # Scores are an output already, and as marks no other numbers.
    (learnt,) = errors(found)
    check(found, {learnt}, "found, rows")
    before, after = (next(o for o in e if o.name == "scores") for e in (found.before, found.after))
    assert after.rel_l2 < before.rel_l2


ROWS = f"""agraph ({LAYERS}) => (float[n] y) {{
    h = MatMul(x, u)  r = Relu(h)  a = MatMul(r, s)
    f = Constant<value_ints = [12]>()  v = Reshape(a, f)
    zero = Constant<value_float = 0.0>()  is = Greater(v, zero)  y = Compress(v, is) }}"""


def test_rows_that_data_decides_on_are_learnt_from_all_of_them() -> None:
    check(healed(ROWS), {"value v"}, "y")


CODES = f"""agraph ({LAYERS}) => (uint8[1,12] y) {{
    h = MatMul(x, u)  r = Relu(h)  a = MatMul(r, s)
    e = Constant<value_float = 0.1>()  o = Constant<value_int = 128>()  z = Cast<to = 2>(o)
    y = QuantizeLinear(a, e, z) }}"""


def test_codes_are_learnt_as_numbers() -> None:
    check(healed(CODES), {"value y"}, "")


def test_strings_behind_the_outputs_are_left_out() -> None:
    text = LABEL.replace("int64[1] y", "string[1] y").replace("y = ArgMax", "n = ArgMax")
    names = ", ".join(f'"{i}"' for i in range(12))
    keys = ", ".join(map(str, range(12)))
    node = f"y = ai.onnx.ml.LabelEncoder<keys_int64s = [{keys}], values_strings = [{names}]>(n) }}"
    text = '<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 2]>\n' + text[:-1] + node

    check(healed(text), {"value p"}, "y")


def test_what_torch_has_not_before_the_layers_is_told() -> None:
    text = f"""agraph ({LAYERS}) => (float[1,12] y) {{
        f = Constant<value_ints = [1,2,4]>()  k = Reshape(x, f)  l = Abs(k)
        d = NonMaxSuppression(k, l)  e = Cast<to = 1>(d)  m = ReduceMax(e)
        t = Constant<value_ints = [1,8]>()  q = Expand(m, t)
        h = MatMul(q, u)  a = Relu(h)  y = MatMul(a, s) }}"""

    with pytest.raises(ModelError, match=r"NonMaxSuppression .*no such operator"):
        healed(text, text.replace("Relu", "Neg"), 1)


def test_nothing_lost_is_told_as_such() -> None:
    samples = [{"x": np.ones((1, 8), np.float32) * i} for i in range(8)]
    model = parse(LABEL, **weights())

    with pytest.raises(CheckFailed, match="nothing to heal"):
        heal(model, model, samples=samples, steps=1)


def test_layers_in_functions_learn() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        agraph (float[1,8] x, float[8,16] u, float[16,12] s) => (float[1,12] y) {
            a = local.layer(x, u)  y = local.layer(a, s) }
        <domain: "local", opset_import: ["" : 17]>
        layer (x, w) => (y) { y = MatMul(x, w) }"""
    found = healed(text)

    assert found.after[0].rel_l2 < found.before[0].rel_l2
    assert found.weights["pruned"] == 2


def test_few_samples_that_both_teach_and_judge_are_told() -> None:
    rng = np.random.default_rng(1)
    samples = [{"x": rng.normal(size=(1, 8)).astype(np.float32)} for _ in range(4)]
    text = LABEL.replace("int64[1] y", "float[1,12] a")
    found = heal(parse(text, **weights()), parse(text, **weights(0.5)), samples=samples, steps=30)

    assert "4 samples, too few to split: what judges was learnt from, too" in found.notes


def test_inputs_that_are_strings_are_left_out() -> None:
    text = f"""agraph ({LAYERS}, string[1] t) => (float[1,12] y, string[1] n) {{
        h = MatMul(x, u)  a = Relu(h)  y = MatMul(a, s)  n = Identity(t) }}"""
    rng = np.random.default_rng(1)
    word = np.array(["word"], object)
    samples = [{"x": rng.normal(size=(1, 8)).astype(np.float32), "t": word} for _ in range(40)]
    original, pruned = (parse(text, **_of(share, text)) for share in (0, 0.5))

    found = heal(original, pruned, samples=samples, steps=30)

    assert found.after[0].rel_l2 < found.before[0].rel_l2


def test_gradients_that_are_no_numbers_do_no_harm() -> None:
    text = f"""agraph ({LAYERS}) => (float[1,12] y) {{
        h = MatMul(x, u)  q = Mul(h, h)  r = Sqrt(q)  y = MatMul(r, s) }}"""

    found = healed(text)

    assert found.after[0].rel_l2 < found.before[0].rel_l2
    assert all(np.isfinite(point.error) for point in found.curve)
