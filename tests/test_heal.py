"""heal: an optimized model learns again, in the form in which it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

import graphopt  # noqa: E402
import graphopt_models  # noqa: E402
from graphopt.errors import CheckFailed, GraphoptError, ModelError, SpecError  # noqa: E402
from graphopt.samples import read_samples  # noqa: E402
from graphopt.signature import signature  # noqa: E402
from graphopt.testing import parse  # noqa: E402
from graphopt.training import heal  # noqa: E402
from graphopt.training.common_values import features  # noqa: E402
from graphopt.training.interpreter import Interpreter  # noqa: E402
from graphopt.training.output_aims import Likely, Near, Scored, aim_of  # noqa: E402
from graphopt.training.sample_batches import Batches, Way, way_of  # noqa: E402
from graphopt.training.stored_weights import stored_weights  # noqa: E402

FOLDER = Path(graphopt_models.__file__).parent
MODEL = FOLDER / "digits_cnn.onnx"
STEPS = 150


def samples(count: int = 100) -> list[dict[str, np.ndarray]]:
    with np.load(FOLDER / "digits_cnn_samples.npz") as file:
        (name,) = file.files
        return [{name: array} for array in file[name][:count]]


def optimized(passes: str) -> ir.Model:
    run = graphopt.optimize(
        MODEL,
        passes=f"lift-constants,fuse-batchnorm,merge-duplicates,{passes}",
        samples=samples(40),
        max_error="100",
        benchmark=False,
    )
    assert run.steps[-1].kept
    return run.model


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


PASSES = {
    "pruned": "prune-magnitude{sparsity=0.8}",
    "grid": "quantize-weights{bits=3,min-elements=256}",
    "codebook": "cluster-weights{clusters=4,min-elements=256}",
    "structures": "prune-structures{macs=0.5}",
}


@pytest.mark.parametrize("form", PASSES)
def test_the_outputs_come_nearer_and_the_form_stays(form: str) -> None:
    given = optimized(PASSES[form])
    before = arrays(given)

    found = heal(MODEL, given, samples=samples(), steps=STEPS, threads=1)

    assert found.after[0].rel_l2 < found.before[0].rel_l2
    assert found.curve[0].error > min(point.error for point in found.curve)
    after = arrays(found.model)
    assert [n.op_type for n in found.model.graph] == [n.op_type for n in given.graph]
    assert {n: (a.shape, a.dtype) for n, a in after.items()} == {
        n: (a.shape, a.dtype) for n, a in before.items()
    }
    assert any((after[name] != before[name]).any() for name in before)
    # The models that were given are as they were.
    assert all((arrays(given)[name] == before[name]).all() for name in before)


QDQ = """
    agraph (float[1,8] x, float e, uint8 z, int8[8,16] q, float[16] s, int32[16] b, float[16] t,
            float d, uint8 f, int8[16,4] r, float[4] u) => (float[1,4] y) {
        xq = QuantizeLinear(x, e, z)  xf = DequantizeLinear(xq, e, z)
        w = DequantizeLinear<axis = 1>(q, s)  c = DequantizeLinear<axis = 0>(b, t)
        g = Gemm(xf, w, c)  h = Relu(g)
        hq = QuantizeLinear(h, d, f)  hf = DequantizeLinear(hq, d, f)
        v = DequantizeLinear<axis = 1>(r, u)
        y = MatMul(hf, v)
    }
"""
FLOAT = """
    agraph (float[1,8] x, float[8,16] w, float[16] c, float[16,4] v) => (float[1,4] y) {
        g = Gemm(x, w, c)  h = Relu(g)  y = MatMul(h, v)
    }
"""


def test_integers_learn_between_activations_that_are_quantized() -> None:
    rng = np.random.default_rng(0)
    w, c, v = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 16), 16, (16, 4)))
    s, u = np.abs(w).max(0) / 7, np.abs(v).max(0) / 7
    numbers = {
        "e": np.float32(0.03),
        "z": np.uint8(128),
        "d": np.float32(0.06),
        "f": np.uint8(0),
        "q": np.trunc(w / s).astype(np.int8),
        "s": s,
        "b": (c / (0.03 * s)).astype(np.int32),
        "t": np.float32(0.03) * s,
        "r": np.trunc(v / u).astype(np.int8),
        "u": u,
    }
    coarse = parse(QDQ, **{name: np.asarray(array) for name, array in numbers.items()})
    given = [{"x": rng.normal(size=(1, 8)).astype(np.float32)} for _ in range(200)]

    found = heal(parse(FLOAT, w=w, c=c, v=v), coarse, samples=given, steps=200, threads=1)

    assert found.weights == {"integers on a grid": 3}
    assert found.after[0].rel_l2 < 0.8 * found.before[0].rel_l2
    for name in ("e", "z", "s", "t", "d", "f", "u"):
        np.testing.assert_array_equal(arrays(found.model)[name], numbers[name])
    assert np.abs(arrays(found.model)["q"]).max() <= 7


def test_zeros_and_codebooks_stay_bit_for_bit() -> None:
    pruned = optimized("prune-magnitude{sparsity=0.8,refit=false}")
    healed = heal(MODEL, pruned, samples=samples(), steps=40, threads=1).model
    for name, array in arrays(pruned).items():
        if array.ndim > 1 and array.dtype == np.float32:
            assert ((arrays(healed)[name] == 0) >= (array == 0)).all()

    coded = optimized("cluster-weights{clusters=4,min-elements=256}")
    healed = heal(MODEL, coded, samples=samples(), steps=40, threads=1).model
    books = [n for n, a in arrays(coded).items() if a.shape == (4,) and a.dtype == np.float32]
    assert books
    for name in books:
        np.testing.assert_array_equal(arrays(healed)[name], arrays(coded)[name])


def test_the_same_steps_give_the_same_model() -> None:
    given = optimized(PASSES["pruned"])

    first, second = (heal(MODEL, given, samples=samples(), steps=6, threads=1) for _ in range(2))

    for name, array in arrays(first.model).items():
        np.testing.assert_array_equal(array, arrays(second.model)[name])


def test_two_processes_learn_what_one_learns() -> None:
    given = optimized(PASSES["pruned"])

    alone = heal(MODEL, given, samples=samples(), steps=16, threads=1)
    both = heal(MODEL, given, samples=samples(), steps=16, threads=2, processes=2)

    assert [p.steps for p in alone.curve] == [p.steps for p in both.curve]
    errors = [[p.error for p in run.curve] for run in (alone, both)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-3)
    for name, array in arrays(alone.model).items():
        np.testing.assert_allclose(arrays(both.model)[name], array, atol=2e-4, rtol=1e-3)


STEP = """
    agraph (float[1,4] x, float[1,8] h, float[4,8] w, float[8,8] r, float[8,3] o)
        => (float[1,3] y, float[1,8] n) {
        a = MatMul(x, w)  b = MatMul(h, r)  c = Add(a, b)  n = Tanh(c)  y = MatMul(n, o)
    }
"""


def test_a_stateful_model_learns_from_roll_outs() -> None:
    rng = np.random.default_rng(0)
    weights = {
        n: rng.normal(size=s).astype(np.float32)
        for n, s in (("w", (4, 8)), ("r", (8, 8)), ("o", (8, 3)))
    }
    original = parse(STEP, **weights)
    cut = {n: np.where(np.abs(a) > 0.6, a, 0).astype(np.float32) for n, a in weights.items()}
    steps = [{"x": rng.normal(size=(1, 4)).astype(np.float32)} for _ in range(24)]

    found = heal(
        original, parse(STEP, **cut), samples=steps, state=[("n", "h")], steps=60, threads=1
    )

    assert found.after[0].rel_l2 < 0.9 * found.before[0].rel_l2
    assert ((arrays(found.model)["r"] == 0) >= (cut["r"] == 0)).all()


def test_roll_outs_that_do_not_judge_are_those_that_are_learnt_from(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(10):
        (tmp_path / f"clip{number}").mkdir()
        for step in range(5):
            x = rng.normal(size=(1, 4)).astype(np.float32)
            np.savez(tmp_path / f"clip{number}" / f"{step}.npz", x=x)
    shapes = {"w": (4, 8), "r": (8, 8), "o": (8, 3)}
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    cut = {n: np.where(np.abs(a) > 0.6, a, 0).astype(np.float32) for n, a in weights.items()}

    found = heal(
        parse(STEP, **weights),
        parse(STEP, **cut),
        samples=tmp_path,
        state=[("n", "h")],
        steps=60,
        threads=1,
    )

    assert found.samples == (30, 20)
    # Both outputs of all steps of the roll-outs that judge.
    assert [o.count for o in found.after] == [20 * 3, 20 * 8]
    assert found.after[0].rel_l2 < found.before[0].rel_l2


def test_how_much_an_output_varies_is_not_known_by_the_first_steps_alone() -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 8), "r": (8, 8), "o": (8, 3)}
    weights = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    cut = {n: np.where(np.abs(a) > 0.6, a, 0).astype(np.float32) for n, a in weights.items()}
    # Silence, from which no output ever comes, before all that matters.
    loud = [rng.normal(size=(1, 4)) * (number >= 12) for number in range(24)]

    found = heal(
        parse(STEP, **weights),
        parse(STEP, **cut),
        samples=[{"x": x.astype(np.float32)} for x in loud],
        state=[("n", "h")],
        steps=60,
        threads=1,
    )

    assert found.curve[0].error < 2


FIXED = """
    agraph (float[1,6] x, float[6,4] w) => (float[1,4] y) {
        s = Constant<value_ints = [1,6]>()  a = Reshape(x, s)  b = MatMul(a, w)  y = Softmax(b)
    }
"""


def test_a_batch_in_the_graph_is_run_side_by_side() -> None:
    model = Interpreter(parse(FIXED, w=np.eye(6, 4, dtype=np.float32)))
    pair = [{"x": torch.randn(1, 6)} for _ in range(2)]
    free = Interpreter(parse(FIXED.replace("[1,6]>", "[-1,6]>"), w=np.eye(6, 4, dtype=np.float32)))

    assert way_of([model], pair) is Way.BESIDE
    assert way_of([free], pair) is Way.TOGETHER


def test_values_are_known_by_content_and_not_by_name() -> None:
    text = """agraph (float[8,6] x, float[6,6] u, float[6,6] v) => (float[8,6] y) {{
        {a} = MatMul(x, u)  {b} = Relu({a})  {c} = MatMul({b}, v)  y = Tanh({c}) }}"""
    rng = np.random.default_rng(0)
    numbers = {n: rng.normal(size=(6, 6)).astype(np.float32) for n in "uv"}
    original = Interpreter(parse(text.format(a="a", b="b", c="c"), **numbers))
    near = {
        n: array + 0.1 * rng.normal(size=(6, 6)).astype(np.float32) for n, array in numbers.items()
    }
    ours = Interpreter(parse(text.format(a="c", b="a", c="b"), **near))
    looks = [{"x": torch.from_numpy(rng.normal(size=(8, 6)).astype(np.float32))} for _ in range(4)]

    found = features(ours, original, ["c", "a", "b"], looks)

    assert [(f.name, f.original) for f in found] == [("c", "a"), ("a", "b"), ("b", "c")]
    assert all(f.variance > 0 for f in found)


def test_values_whose_channels_a_pass_has_scaled_are_not_the_same() -> None:
    text = """agraph (float[8,6] x, float[6,16] u, float[16,16] v, float[16,6] w)
        => (float[8,6] y) {
        a = MatMul(x, u)  b = Relu(a)  c = MatMul(b, v)  d = Relu(c)  y = MatMul(d, w) }"""
    rng = np.random.default_rng(0)
    shapes = {"u": (6, 16), "v": (16, 16), "w": (16, 6)}
    numbers = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    factors = rng.uniform(0.3, 3, 16).astype(np.float32)
    scaled = {**numbers, "u": numbers["u"] * factors, "v": numbers["v"] / factors[:, None]}
    looks = [{"x": torch.from_numpy(rng.normal(size=(8, 6)).astype(np.float32))} for _ in range(4)]
    models = [Interpreter(parse(text, **arrays)) for arrays in (scaled, numbers)]

    found = features(*models, ["b", "d"], looks)

    assert [feature.name for feature in found] == ["d"]


def test_what_is_asked_of_an_output_is_seen_in_its_numbers() -> None:
    scores = torch.randn(6, 10)
    likely, near = aim_of(list(scores.softmax(1).split(1))), aim_of(list(scores[:, :2].split(1)))

    assert isinstance(likely, Likely) and isinstance(near, Near)
    assert float(likely.error(scores.softmax(1), scores.softmax(1))) == pytest.approx(0, abs=1e-6)
    mean = scores.softmax(1).mean(0, keepdim=True).expand(6, 10)
    assert float(likely.error(mean, scores.softmax(1))) == pytest.approx(1, rel=1e-4)
    pairs = scores[:, :2]
    middle = torch.full_like(pairs, float(pairs.mean()))
    assert float(near.error(middle, pairs)) == pytest.approx(1, rel=1e-4)


def test_scores_of_classes_are_asked_for_their_distribution_too() -> None:
    scores = 5 * torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    aim = aim_of(list(scores.split(1)))

    assert isinstance(aim, Scored) and aim.temperature == 1
    assert float(aim.error(scores, scores)) == pytest.approx(0, abs=1e-6)
    # Where a class is out of the question, its score matters less than between the likely ones.
    most, least = (torch.zeros_like(scores) for _ in range(2))
    most.scatter_(1, scores.argmax(1, keepdim=True), -1.0)
    least.scatter_(1, scores.argmin(1, keepdim=True), -1.0)
    assert aim.error(scores + most, scores) > 1.5 * aim.error(scores + least, scores)


@pytest.mark.parametrize(("size", "kind"), [(0.1, Near), (500.0, Scored)])
def test_numbers_that_no_softmax_is_made_for_count_within_bounds(size: float, kind: type) -> None:
    numbers = size * torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    aim = aim_of(list(numbers.split(1)))

    assert isinstance(aim, kind)
    assert float(aim.error(torch.zeros_like(numbers), numbers)) < 10


def test_a_model_that_is_as_good_already_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="nothing to heal"):
        heal(MODEL, MODEL, samples=samples(20), steps=2, threads=1).save(tmp_path / "out.onnx")

    assert list(tmp_path.iterdir()) == []


OTHER = "agraph (float[1,2] z) => (float[1,2] y) { y = Relu(z) }"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"steps": 0}, SpecError, "0 steps"),
        ({"minutes": 0.0}, SpecError, "more than 0"),
        ({"device": "tpu"}, SpecError, "no device 'tpu'"),
        ({"processes": 0}, SpecError, "0 processes"),
    ],
)
def test_bad_options_are_told(
    options: dict[str, object], kind: type[GraphoptError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        heal(MODEL, MODEL, samples=samples(8), **options)  # type: ignore[arg-type]


def test_models_that_do_not_belong_together_are_told() -> None:
    with pytest.raises(ModelError, match="input 'z' that the original has not"):
        heal(MODEL, parse(OTHER), samples=samples(8), steps=1)


def test_a_model_without_weights_is_told() -> None:
    text = "agraph (float[1,2] x) => (float[1,2] y) {{ y = {}(x) }}"
    original, other = (parse(text.format(operator)) for operator in ("Relu", "Neg"))

    with pytest.raises(ModelError, match="no weight in a known form"):
        heal(original, other, samples=[{"x": np.ones((1, 2), np.float32)}], steps=1)


def test_outputs_that_no_weight_makes_cannot_be_learnt() -> None:
    text = """agraph (float[1,4] x, float[4,3] w) => (int64[1,1] y) {{
        a = MatMul(x, w)  y = {}<axis = 1>(x) }}"""
    original, other = (
        parse(text.format(operator), w=np.eye(4, 3, dtype=np.float32))
        for operator in ("ArgMax", "ArgMin")
    )

    with pytest.raises(ModelError, match="no output of floating point"):
        heal(original, other, samples=[{"x": np.eye(4, dtype=np.float32)[:1]}], steps=1)


def test_the_threads_of_torch_are_as_before() -> None:
    before = torch.get_num_threads()

    with pytest.raises(CheckFailed):
        heal(MODEL, MODEL, samples=samples(8), steps=1, threads=before + 1)

    assert torch.get_num_threads() == before


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from graphopt.cli import app

    given, out, report = (tmp_path / n for n in ("given.onnx", "out.onnx", "report.json"))
    graphopt.save(optimized(PASSES["pruned"]), given)
    np.savez(
        tmp_path / "samples.npz",
        **{k: np.stack([s[k] for s in samples(60)]) for k in samples(1)[0]},
    )

    app(
        [
            "heal",
            str(MODEL),
            str(given),
            "-o",
            str(out),
            "--samples",
            str(tmp_path / "samples.npz"),
            "--steps",
            "10",
            "--threads",
            "1",
            "--json",
            str(report),
        ],
        standalone_mode=False,
    )

    assert "weights of" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert content["schema_version"] == 1
    assert content["curve"][0]["steps"] == 0
    assert content["steps"] == 10
    assert abs(out.stat().st_size - given.stat().st_size) < 500


def test_neither_model_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from graphopt.cli import main

    for name in ("original", "optimized"):
        (tmp_path / f"{name}.onnx").write_bytes(MODEL.read_bytes())
    models = [str(tmp_path / f"{name}.onnx") for name in ("original", "optimized")]
    for target in models:
        arguments = ["graphopt", "heal", *models, "-o", target, "--samples", str(tmp_path)]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert "input" in capsys.readouterr().err


def test_images_are_seen_otherwise_and_nothing_else_is() -> None:
    image = np.arange(3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32)
    tokens = np.arange(6, dtype=np.int64)
    text = "agraph (float[1,3,32,32] x, int64[6] t) => (int64[6] y) { y = Neg(t) }"
    inputs = signature(parse(text))
    read = read_samples([{"x": image, "t": tokens}] * 4, inputs)
    batches = Batches(read, 2, inputs, torch.device("cpu"), seed=1).epochs()

    seen = [sample for _, batch in zip(range(6), batches, strict=False) for sample in batch[0]]

    assert all(sample["x"].shape == image.shape for sample in seen)
    assert any(not np.array_equal(sample["x"].numpy(), image) for sample in seen)
    assert all(np.array_equal(sample["t"].numpy(), tokens) for sample in seen)
    # Numbers are moved, toned or mixed, and none is beyond those of the image.
    assert all(sample["x"].min() >= 0 and sample["x"].max() <= image.max() for sample in seen)


def test_images_of_bytes_are_seen_otherwise_and_stay_bytes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 40, 3)).astype(np.uint8)
    text = "agraph (uint8[1,32,40,3] x) => (uint8[1,32,40,3] y) { y = Identity(x) }"
    inputs = signature(parse(text))
    batches = Batches(read_samples([{"x": image}] * 8, inputs), 4, inputs, torch.device("cpu"))

    seen = [one for _, batch in zip(range(8), batches.epochs(), strict=False) for one in batch[0]]

    assert all(sample["x"].dtype == torch.uint8 for sample in seen)
    assert len({sample["x"].numpy().tobytes() for sample in seen}) > 4


def test_codes_go_up_or_down_from_the_number_of_the_original() -> None:
    given = optimized(PASSES["grid"])
    before = {w.value.name: w for w in stored_weights(given.graph) if w.is_rounded}

    found = heal(MODEL, given, samples=samples(), steps=STEPS, threads=1)

    after = {w.value.name: w for w in stored_weights(found.model.graph) if w.is_rounded}
    steps = [(after[name].numbers - before[name].numbers).abs() for name in before]
    assert any(bool((step > 0).any()) for step in steps)
    assert all(float(step.max()) <= 1 for step in steps)
