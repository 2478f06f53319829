"""Questions on values of models: numpy on the outputs of plain runs is the oracle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Context, Sample
from graphopt.errors import GraphoptError, ModelError, SampleError
from graphopt.observe import Observer, Question, content_key
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.skeleton import infer_shapes
from graphopt.statistics import Gram, Histogram, Patches, Reservoir, Rows, Spread, rows_of
from graphopt.testing import parse

SMALL = """
agraph (float[N, 4] x) => (float[N, 3] y, float[N, 4] z)
<float[4, 3] w = {1.0, 2.0, 3.0, -1.0, -2.0, -3.0, 0.5, 0.25, 0.125, 4.0, 5.0, 6.0}>
{ a = Neg(x)  b = MatMul(a, w)  y = Tanh(b)  z = Exp(a) }
"""


def rows(*counts: int, seed: int = 0, width: int = 4) -> list[dict[str, np.ndarray]]:
    """A sample for each count of rows."""
    generator = np.random.default_rng(seed)
    return [{"x": generator.standard_normal((n, width)).astype(np.float32)} for n in counts]


def feed(
    model: ir.Model,
    samples: Iterable[Mapping[str, np.ndarray]],
    state: Sequence[tuple[str, str]] = (),
) -> Feed:
    inputs = signature(model)
    return Feed(read_samples(samples, inputs, state), inputs, tuple(state))


def observer(model: ir.Model, samples: Iterable[Mapping[str, np.ndarray]], **more: Any) -> Observer:
    return Observer(feed(model, samples), **more)


def spread(answers: Mapping[Question, Any], value: str, axis: int | None = None) -> Spread:
    found = answers[Question(value, axis=axis)]
    assert isinstance(found, Spread)
    return found


def assert_same(first: Any, second: Any) -> None:
    """The same statistics: of histograms the counts, of arrays all elements."""
    assert type(first) is type(second)
    for name, one in vars(first).items():
        other = getattr(second, name)
        if isinstance(one, Histogram):
            assert_same(one, other)
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=name)
        elif name != "_random":
            assert one == other, name


class Runs:
    """How often models were run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run = Session.run

        def counted(session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.count += 1
            return run(session, feeds)

        monkeypatch.setattr(Session, "run", counted)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


# ------------------------------------------------------------------ answers


def test_answers_are_on_all_samples_also_of_inputs_and_outputs() -> None:
    """Of shapes that differ from sample to sample."""
    model, samples = parse(SMALL), rows(3, 1, 7, 2)
    names = ("x", "a", "b", "y", "z")

    answers = observer(model, samples)(model, [Question(n, axis=-1) for n in names])

    x = np.concatenate([s["x"] for s in samples])
    w = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    values = {"x": x, "a": -x, "b": -x @ w, "y": np.tanh(-x @ w), "z": np.exp(-x)}
    for name, value in values.items():
        found = spread(answers, name, -1)
        assert (found.arrays, found.count, found.left_out) == (4, value.size, 0)
        assert found.low == pytest.approx(value.min(), rel=1e-5)
        assert found.high == pytest.approx(value.max(), rel=1e-5)
        np.testing.assert_allclose(found.channel_mean, value.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.channel_low, value.min(0), rtol=1e-4)
        assert found.histogram.counts.sum() == value.size


def test_every_kind_of_question_is_answered_side_by_side() -> None:
    model, samples = parse(SMALL), rows(5, 6)
    kinds = {"spread": Spread, "gram": Gram, "rows": Rows, "reservoir": Reservoir}

    answers = observer(model, samples)(model, [Question("a", about) for about in kinds])

    x = -np.concatenate([s["x"] for s in samples])
    assert {q.about: type(found) for q, found in answers.items()} == kinds
    gram, kept, few = (answers[Question("a", about)] for about in ("gram", "rows", "reservoir"))
    assert isinstance(gram, Gram) and isinstance(kept, Rows) and isinstance(few, Reservoir)
    np.testing.assert_allclose(gram.total[0], x.T @ x, rtol=1e-5)
    assert sorted(kept.values[0].tolist()) == sorted(x.tolist())
    assert sorted(few.values.tolist()) == sorted(x.reshape(-1).tolist())


@pytest.mark.parametrize(
    ("op_type", "shape"), [("Gemm", (5, 4)), ("MatMul", (5, 4)), ("MatMul", (2, 5, 4))]
)
def test_rows_times_the_weight_are_the_outputs_of_the_layer(
    op_type: str, shape: tuple[int, ...]
) -> None:
    dims, outputs = (", ".join(map(str, s)) for s in (shape, (*shape[:-1], 3)))
    model = parse(
        f"agraph (float[{dims}] x, float[4, 3] w) => (float[{outputs}] y)"
        f"{{ a = Neg(x)  b = {op_type}(a, w)  y = Relu(b) }}",
        w=np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32),
    )
    samples = [
        {"x": np.random.default_rng(n).standard_normal(shape).astype(np.float32)} for n in (0, 1)
    ]

    answers = observer(model, samples)(model, [Question("a", "rows"), Question("b", "rows")])

    inputs, outputs = (answers[Question(n, "rows")].values[0] for n in "ab")  # type: ignore[union-attr]
    w = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    # Both are taken in the same places and kept in the same order.
    np.testing.assert_allclose(inputs @ w, outputs, rtol=1e-4, atol=1e-5)


def test_patches_of_a_convolution_inside_a_model() -> None:
    weight = np.random.default_rng(1).standard_normal((6, 1, 3, 3)).astype(np.float32)
    model = parse(
        """
        agraph (float[1, 3, 8, 8] x, float[6, 1, 3, 3] w) => (float[1, 6, 4, 4] y)
        {
            a = Abs(x)
            c = Conv <group = 3, strides = [2, 2], pads = [1, 1, 1, 1]> (a, w)
            y = Relu(c)
        }
        """,
        w=weight,
    )
    samples = [
        {"x": np.random.default_rng(n).standard_normal((1, 3, 8, 8)).astype(np.float32)}
        for n in range(3)
    ]
    patches = Patches((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), group=3)

    answers = observer(model, samples)(model, [Question("a", "gram", patches=patches)])

    gram = answers[Question("a", "gram", patches=patches)]
    assert isinstance(gram, Gram) and gram.rows == 48
    cut = np.concatenate([rows_of(np.abs(s["x"]), patches, 0) for s in samples], axis=1)
    np.testing.assert_allclose(gram.total, np.einsum("gri,grj->gij", cut, cut), rtol=1e-4)


def test_integers_texts_and_booleans_are_not_looked_at() -> None:
    model = parse(
        """
        agraph (int64[3] x, string[2] t) => (int64[3] y, bool[3] b, string[2] u)
        { y = Neg(x)  b = Equal(x, y)  u = Identity(t) }
        """
    )
    samples = [{"x": np.int64([1, 0, 2]), "t": np.array(["a", "b"], object)}] * 2
    names = ["x", "t", "y", "b", "u"]

    answers = observer(model, samples)(model, [Question(n, axis=0) for n in names])

    for name in names:
        found = spread(answers, name, 0)
        assert (found.arrays, found.elements, found.histogram.counts.sum()) == (0, 0, 0)


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_half_and_double_precision(kind: str, dtype: type) -> None:
    model = parse(f"agraph ({kind}[N, 4] x) => ({kind}[N, 4] y) {{ a = Neg(x)  y = Exp(a) }}")
    samples = [{"x": np.linspace(-2, 3, 8, dtype=dtype).reshape(2, 4)}]
    asked = [Question("a"), Question("a", "gram"), Question("y", "reservoir")]

    answers = observer(model, samples)(model, asked)

    found, gram = spread(answers, "a"), answers[asked[1]]
    assert (found.low, found.high, found.count) == (-3, 2, 8)
    x = samples[0]["x"].astype(np.float64)
    np.testing.assert_allclose(gram.total[0], x.T @ x, rtol=1e-5)  # type: ignore[union-attr]
    assert answers[asked[2]].values.dtype == np.float32  # type: ignore[union-attr]


def test_masks_inside_a_model_are_counted_by_themselves() -> None:
    model = parse(
        """
        agraph (float[N, 4] x) => (float[N, 4] y) <float m = {-1e9}, float zero = {0.0}>
        { c = Greater(x, zero)  k = Where(c, m, zero)  s = Add(x, k)  y = Softmax(s) }
        """
    )
    samples = rows(50, 50)

    found = spread(observer(model, samples)(model, [Question("s")]), "s")

    x = np.concatenate([s["x"] for s in samples])
    assert found.left_out == (x > 0).sum()
    assert (found.low, found.high) == (x[x <= 0].min(), x[x <= 0].max())


def test_inputs_with_defaults_and_inputs_that_are_outputs() -> None:
    model = parse(
        """
        agraph (float[2] x, float[2] d) => (float[2] a, float[2] y)
        <float[2] d = {3.0, 4.0}> { a = Add(x, d)  y = Neg(a) }
        """
    )
    model.graph.outputs.append(model.graph.inputs[0])
    samples = [{"x": np.float32([1, 2])}, {"x": np.float32([0, 1])}]

    answers = observer(model, samples)(model, [Question(n) for n in ("x", "d", "a", "y")])

    assert {q.value: (s.low, s.high) for q, s in answers.items()} == {  # type: ignore[union-attr]
        "x": (0, 2), "d": (3, 4), "a": (3, 6), "y": (-6, -3)
    }  # fmt: skip
    assert [o.name for o in model.graph.outputs] == ["a", "y", "x"]


# ------------------------------------------------------------------ models of all kinds


BRANCHES = """
agraph (float[3] x, bool c) => (float[3] y)
{
    a = Neg(x)
    b = If (c) <
        then_branch = t () => (float[3] p) { q = Exp(a)  p = Neg(q) },
        else_branch = e () => (float[3] r) { r = Abs(a) }
    >
    y = Add(a, b)
}
"""


def test_values_beside_and_behind_a_branch() -> None:
    model = parse(BRANCHES)
    samples = [{"x": np.float32([0, 1, 2]), "c": np.bool_(c)} for c in (True, False)]

    look = observer(model, samples)
    answers = look(model, [Question("a"), Question("b"), Question("y"), Question("c")])

    assert (spread(answers, "a").low, spread(answers, "a").high) == (-2, 0)
    assert (spread(answers, "b").low, spread(answers, "b").high) == (-1, 2)
    assert spread(answers, "y").count == 6
    with pytest.raises(GraphoptError, match="the main graph has no value 'q' to observe"):
        look(model, [Question("q")])


def test_names_of_values_may_be_anything() -> None:
    model = parse(SMALL)
    odd = ["/layer.0/Add_1:0", "größe 💡", 'a b\n"c"\'', "graphopt.probe.0", "..", "%s{0}\\"]
    graph = model.graph
    nodes = list(graph)
    for node, name in zip(nodes, odd, strict=False):
        node.outputs[0].name = name
    graph.inputs[0].name = odd[4]
    graph.initializers["w"].name = odd[5]
    samples = [{odd[4]: s["x"]} for s in rows(2, 2)]
    asked = [Question(name) for name in odd[:5]]

    answers = observer(model, samples)(model, asked)

    assert [spread(answers, name).count for name in odd[:5]] == [16, 12, 12, 16, 16]


def test_names_of_probes_are_not_those_of_values_in_bodies() -> None:
    model = parse(BRANCHES.replace("q", "taken"))
    branch = next(n for n in model.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    branch[0].outputs[0].name = "graphopt.probe.0"
    samples = [{"x": np.float32([0, 1, 2]), "c": np.bool_(True)}]

    answers = observer(model, samples)(model, [Question("b")])

    assert spread(answers, "b").high == pytest.approx(-np.exp(-2), rel=1e-5)


def test_values_of_operators_that_onnx_does_not_know() -> None:
    """They have no type; the second model imports no operators of ONNX at all."""
    for imports, last in (('"" : 21, ', "y = Relu(g)"), ("", "y = com.microsoft.Gelu(g)")):
        model = parse(
            f'<ir_version: 10, opset_import: [{imports}"com.microsoft" : 1]>'
            f"agraph (float[N, 4] x) => (float[N, 4] y) {{ g = com.microsoft.Gelu(x)  {last} }}"
        )

        answers = observer(model, rows(3))(model, [Question("g"), Question("y")])

        assert spread(answers, "g").count == spread(answers, "y").count == 12


@pytest.mark.parametrize("inferred", [True, False])
def test_what_is_no_tensor_is_a_clear_error(inferred: bool) -> None:
    model = parse(
        """
        agraph (float[2, 4] x) => (float[2, 4] y)
        { s = SequenceConstruct(x)  y = ConcatFromSequence <axis = 0> (s) }
        """
    )
    if inferred:
        infer_shapes(model)

    message = "'s' is no tensor; only tensors" if inferred else r"seq\(tensor\(float\)\)"
    with pytest.raises(GraphoptError, match=message):
        observer(model, rows(2))(model, [Question("s")])


@pytest.mark.parametrize("name", ["nowhere", "", "w"])
def test_a_value_that_is_not_there_is_a_clear_error_before_anything_runs(
    name: str, runs: Runs
) -> None:
    """Nothing is asked of weights, nor of outputs without a name."""
    model = parse(SMALL)
    model.graph.append(ir.node("Identity", [model.graph[0].outputs[0]], outputs=[ir.Value()]))

    with pytest.raises(GraphoptError, match=f"the main graph has no value {name!r} to observe"):
        observer(model, rows(2))(model, [Question("a"), Question(name)])

    assert runs.count == 0


def test_questions_are_of_kinds_that_there_are() -> None:
    with pytest.raises(
        ValueError, match="one of spread, gram, rows, reservoir, regression, chunks; not 'grams'"
    ):
        Question("a", "grams")


def test_a_model_that_does_not_run_is_an_error_and_leaves_nothing_half_known(runs: Runs) -> None:
    model = parse(
        """
        agraph (float[N, 4] x) => (float[1, 4] y)
        <int64[2] s = {1, 4}> { a = Neg(x)  y = Reshape(a, s) }
        """
    )
    look = observer(model, rows(1, 2))

    for _ in range(2):
        with pytest.raises(SampleError, match=r"fails on a sample \(x float32\[2, 4\]\)"):
            look(model, [Question("y")])

    unknown = parse(
        '<ir_version: 10, opset_import: ["" : 21, "local" : 1]>'
        "agraph (float[N, 4] x) => (float[N, 4] y) { a = Neg(x)  y = local.None(a) }"
    )
    with pytest.raises(ModelError, match="local"):
        look(unknown, [Question("y")])


def test_the_model_is_not_modified() -> None:
    model = parse(SMALL)
    before = ir.to_proto(model).SerializeToString()

    observer(model, rows(2))(model, [Question("a"), Question("x", "rows")])

    assert ir.to_proto(model).SerializeToString() == before


# ------------------------------------------------------------------ state


COUNTER = """
agraph (float[1] x, float[1] state) => (float[1] y, float[1] stateN)
<float[1] two = {2.0}>
{ d = Mul(state, two)  stateN = Add(d, x)  y = Neg(stateN) }
"""


def test_state_is_carried_from_sample_to_sample() -> None:
    model = parse(COUNTER)
    pairs = [("stateN", "state")]
    samples = [{"x": np.float32([n])} for n in (1, 2, 3, 4, 5, 6)]
    asked = [Question(n, "reservoir") for n in ("state", "d", "stateN", "y")]

    answers = Observer(feed(model, samples, pairs))(model, asked)

    states = [0.0]
    for n in (1, 2, 3, 4, 5, 6):
        states.append(2 * states[-1] + n)
    found = {q.value: sorted(s.values.tolist()) for q, s in answers.items()}  # type: ignore[union-attr]
    assert found["state"] == states[:-1]
    assert found["d"] == [2 * s for s in states[:-1]]
    assert found["stateN"] == states[1:]
    assert found["y"] == sorted(-s for s in states[1:])


def test_each_sequence_starts_anew(tmp_path: Path) -> None:
    model = parse(COUNTER)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for n in (1, 2):
            np.savez(tmp_path / folder / f"{n}.npz", x=np.float32([n]))
    inputs, pairs = signature(model), (("stateN", "state"),)
    look = Observer(Feed(read_samples(tmp_path, inputs, pairs), inputs, pairs))

    found = look(model, [Question("state", "reservoir")])[Question("state", "reservoir")]

    assert sorted(found.values.tolist()) == [0, 0, 1, 1]  # type: ignore[union-attr]


# ------------------------------------------------------------------ waves


ALL = [
    Question(name, about, axis)
    for name in ("x", "a", "b", "y", "z")
    for about, axis in (("spread", -1), ("gram", None), ("rows", None), ("reservoir", None))
]


@pytest.mark.parametrize("wave_bytes", [1, 200, 10_000])
def test_the_answers_do_not_depend_on_what_is_looked_at_together(wave_bytes: int) -> None:
    model, samples = parse(SMALL), rows(5, 9, 2)

    one = observer(model, samples)(model, ALL)
    many = observer(model, samples, wave_bytes=wave_bytes)(model, ALL)

    assert list(one) == list(many) == ALL
    for question in ALL:
        assert_same(one[question], many[question])


def test_what_does_not_fit_together_is_looked_at_in_turns(runs: Runs) -> None:
    """A run over the samples for the sizes, on at most 4, and one for each group of values."""
    model, samples = parse(SMALL), rows(*[5] * 6)
    asked = [Question(n, a) for n in ("a", "b", "z") for a in ("spread", "rows")]
    a_bytes = 5 * 4 * 4

    for wave_bytes, waves in ((1, 3), (a_bytes, 3), (2 * a_bytes - 20, 2), (1 << 20, 1)):
        runs.count = 0
        observer(model, samples, wave_bytes=wave_bytes)(model, asked)
        assert runs.count == 4 + 6 * waves


DEEP = """
import resource, sys
import numpy as np
from graphopt.observe import Observer, Question
from graphopt.recording import Feed
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import parse

count, depth, size = map(int, sys.argv[1:])
chain = " ".join(f"v{n + 1} = {'Neg' if n % 2 else 'Sin'}(v{n})" for n in range(depth))
model = parse(f"agraph (float[N] v0) => (float[N] y) {{ {chain}  y = Abs(v{depth}) }}")
inputs = signature(model)
samples = read_samples(({"v0": np.full(size, n, np.float32)} for n in range(count)), inputs)
look = Observer(Feed(samples, inputs), wave_bytes=16_000_000)
names = [f"v{n}" for n in range(1, depth + 1)]
kinds = ("spread", "reservoir") if depth < 9 else ("spread",)
look(model, [Question(n, about) for n in names for about in kinds])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kb(count: int, depth: int, size: int) -> int:
    """Peak resident set of a process that looks at a chain of so many values."""
    command = [sys.executable, "-c", DEEP, *map(str, (count, depth, size))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    assert peak_kb(512, 4, 100_000) <= 1.1 * peak_kb(32, 4, 100_000)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_depth_of_the_model() -> None:
    """4 MB a value: all 64 of them at once would more than double it."""
    assert peak_kb(2, 64, 1_000_000) <= 1.3 * peak_kb(2, 8, 1_000_000)


def test_sizes_are_asked_for_without_keeping_values(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    session = Session.__init__

    def watched(self: Session, *arguments: Any, **options: Any) -> None:
        given.append(options.get("shapes_first", False))
        session(self, *arguments, **options)

    monkeypatch.setattr(Session, "__init__", watched)
    model = parse(SMALL)
    observer(model, rows(2))(model, [Question("a")])

    assert given == [True, False]


# ------------------------------------------------------------------ what is remembered


def test_what_was_asked_before_runs_nothing(runs: Runs) -> None:
    model = parse(SMALL)
    look = observer(model, rows(3, 2))
    asked = [Question("a"), Question("b", "gram")]

    first = look(model, asked)
    count = runs.count
    again = look(model.clone(), [*asked, *asked])
    assert runs.count == count > 0
    assert list(again) == asked
    assert all(again[q] is first[q] for q in asked)

    more = look(model, [Question("a"), Question("z")])
    assert runs.count > count
    assert more[Question("a")] is first[Question("a")]
    assert look(model, []) == {}


def change_weight(model: ir.Model) -> None:
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(2), name="w")


def change_attribute(model: ir.Model) -> None:
    model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)


def change_operator(model: ir.Model) -> None:
    model.graph[0].op_type = "Celu"


@pytest.mark.parametrize("change", [change_weight, change_attribute, change_operator])
@pytest.mark.parametrize("width", [2, 40])
def test_a_changed_model_is_looked_at_anew(change: Any, width: int, runs: Runs) -> None:
    """Small weights are part of the graph, and large ones are not."""
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    model = parse(
        f"""
        agraph (float[N, {width}] x, float[{width}, {width}] w) => (float[N, {width}] y)
        {{ e = Elu <alpha = 1.0> (x)  b = MatMul(e, w)  y = Tanh(b) }}
        """,
        w=weight,
    )
    samples = rows(4, 4, width=width)
    look = observer(model, samples)
    before = spread(look(model, [Question("b")]), "b")
    changed = model.clone()
    change(changed)

    assert content_key(changed) != content_key(model)
    count = runs.count
    after = spread(look(changed, [Question("b")]), "b")
    assert runs.count > count

    fresh = spread(observer(changed, samples)(changed, [Question("b")]), "b")
    assert_same(after, fresh)
    if change is not change_operator:
        assert (after.low, after.high) != (before.low, before.high)
    count = runs.count
    assert spread(look(model, [Question("b")]), "b") is before
    assert runs.count == count


def test_the_key_depends_on_content_alone(tmp_path: Path) -> None:
    """Not on where weights lie, nor on shapes that were inferred."""
    model = parse(
        "agraph (float[N, 40] x, float[40, 40] w) => (float[N, 40] y)"
        "{ a = MatMul(x, w)  y = Tanh(a) }",
        w=np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32),
    )
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")
    elsewhere = ir.load(tmp_path / "m.onnx")
    inferred = model.clone()
    infer_shapes(inferred)

    assert content_key(elsewhere) == content_key(inferred) == content_key(model)


def test_weights_of_the_same_bytes_and_another_type_or_name_are_told_apart() -> None:
    weight = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    text = (
        "agraph (float[40, 40] x, float[40, 40] w, float[40, 40] v) => (float[40, 40] y)"
        "{ a = MatMul(x, w)  y = Sub(a, v) }"
    )
    first = parse(text, w=weight, v=weight.T.copy())
    second = parse(text, w=weight.T.copy(), v=weight)

    assert content_key(first) != content_key(second)


# ------------------------------------------------------------------ compare


def test_errors_are_those_of_the_outputs_as_deployed() -> None:
    model, samples = parse(SMALL), rows(3, 5)
    changed = model.clone()
    change_weight(changed)

    errors = {e.name: e for e in observer(model, samples).compare(model, changed, 8)}

    x = np.concatenate([s["x"] for s in samples]).astype(np.float64)
    w = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    expected, got = np.tanh(-x @ w), np.tanh(-x @ (2 * w))
    ratio = np.linalg.norm(expected - got) / np.linalg.norm(expected)
    assert errors["y"].rel_l2 == pytest.approx(ratio, rel=1e-4)
    assert errors["z"].identical
    assert errors["y"].count == expected.size


def test_a_reference_is_run_once_for_each_number_of_samples(runs: Runs) -> None:
    model = parse(SMALL)
    look = observer(model, rows(1, 2, 3, 4))
    counts = []
    for maximum in (3, 3, 2, 100):
        runs.count = 0
        (error, _) = look.compare(model, model.clone(), maximum)
        assert error.identical
        counts.append((runs.count, error.count))

    assert counts == [(6, 18), (3, 18), (4, 9), (8, 30)]


def test_comparing_with_a_changed_reference_does_not_take_the_old_one() -> None:
    model = parse(SMALL)
    look = observer(model, rows(3))
    changed = model.clone()
    change_weight(changed)

    assert not look.compare(model, changed, 8)[0].identical
    assert look.compare(changed, changed, 8)[0].identical


def test_state_is_carried_in_comparisons() -> None:
    """Wrong only once the state is not zero."""
    model = parse(COUNTER)
    changed = model.clone()
    changed.graph.initializers["two"].const_value = ir.tensor(np.float32([3]), name="two")
    look = Observer(feed(model, [{"x": np.float32([1])}] * 3, [("stateN", "state")]))

    assert look.compare(model, changed, 1)[0].identical
    assert not look.compare(model, changed, 3)[0].identical


def test_compare_of_models_that_do_not_run_is_an_error() -> None:
    model = parse(SMALL)
    broken = model.clone()
    broken.graph[0].op_type = "NoSuchOperator"

    with pytest.raises(GraphoptError, match="NoSuchOperator"):
        observer(model, rows(3)).compare(model, broken, 8)


# ------------------------------------------------------------------ the context of a pass


def test_a_context_asks_its_observer_on_any_model() -> None:
    """The original, and what has become of it."""
    model, samples = parse(SMALL), rows(4)
    look = observer(model, samples)
    context = Context(lambda: model, observer=look)
    changed = model.clone()
    node = next(n for n in changed.graph if n.op_type == "Neg")
    node.op_type = "Abs"

    before = context.observe(context.original, [Question("a")])
    after = context.observe(changed, [Question("a")])

    x = samples[0]["x"]
    assert spread(before, "a").high == (-x).max()
    assert spread(after, "a").high == np.abs(x).max()
    (y, z) = context.compare(context.original, changed, 1)
    assert (y.name, z.name) == ("y", "z") and not y.identical
    assert y == look.compare(model, changed, 1)[0]


def test_a_context_without_samples_says_so() -> None:
    model = parse(SMALL)
    context = Context(lambda: model)

    with pytest.raises(SampleError, match="no samples to observe the model on"):
        context.observe(model, [Question("a")])
    with pytest.raises(SampleError, match="no samples to compare models on"):
        context.compare(model, model, 1)


# ------------------------------------------------------------------ what is behind


def test_nodes_behind_what_is_asked_do_not_run() -> None:
    text = """agraph (float[2] x) => (float[2] y) <int64[1] far = {9}> {
        a = Neg(x)
        b = Gather(a, far)
        y = Add(a, b)
    }"""
    samples: list[Sample] = [{"x": np.float32([1, 2])}]
    model = parse(text)

    found = observer(model, samples)(model, [Question("a")])[Question("a")]

    assert isinstance(found, Spread) and found.low == -2
    assert len(list(model.graph)) == 3
    with pytest.raises(GraphoptError):
        observer(model, samples)(model, [Question("b")])


def test_what_only_a_body_reads_is_there() -> None:
    text = """agraph (float[2] x, bool c) => (float[2] y) <float[2] v = {3, 4}> {
        a = Neg(x)
        y = If (c) <then_branch = t () => (float[2] p) { p = Add(a, v) },
                    else_branch = e () => (float[2] q) { q = Sub(a, v) }>
        z = Relu(a)
    }"""
    samples: list[Sample] = [{"x": np.float32([1, 2]), "c": np.bool_(True)}]
    model = parse(text)
    asked = [Question("a"), Question("y")]

    found = observer(model, samples)(model, asked)

    spreads = [found[question] for question in asked]
    assert [s.high for s in spreads if isinstance(s, Spread)] == [-1, 2]
