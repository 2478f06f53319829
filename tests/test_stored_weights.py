"""Weights are found in every form in which they are stored, and written back in the same form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from packed_models import FORMS, INTEGERS, READERS, packed_integers, packed_reader  # noqa: E402

from graphopt.rewriting import constant_tensor  # noqa: E402
from graphopt.runtime import Reference, Session  # noqa: E402
from graphopt.testing import parse  # noqa: E402
from graphopt.training.interpreter import Interpreter  # noqa: E402
from graphopt.training.stored_weights import stored_weights, write  # noqa: E402
from graphopt.training.weight_forms import (  # noqa: E402
    CodebookNumbers,
    GridCodes,
    PlainNumbers,
    StoredWeight,
    forms_of,
)

BODIES = {"If"}
"""Readers whose weights are read in a body only through values of the main graph."""


def given(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = tuple(value.shape.numpy())
        if value.dtype == ir.DataType.INT64:
            found[value.name or ""] = rng.integers(0, 64, shape)
        else:
            found[value.name or ""] = rng.normal(size=shape).astype(value.dtype.numpy())
    return found


def sizes(model: ir.Model) -> dict[str, int]:
    return {name: v.const_value.nbytes for name, v in model.graph.initializers.items()}  # type: ignore[union-attr]


def moved(weight: StoredWeight, seed: int) -> torch.Tensor:
    """Other numbers that the form can hold."""
    generator = torch.Generator().manual_seed(seed)
    spread = weight.numbers.std(correction=0) + 0.1
    noise = torch.randn(weight.numbers.shape, generator=generator) * spread
    return weight.nearest(weight.numbers + noise)


def check_written(model: ir.Model) -> list[StoredWeight]:
    """What is written is what the interpreter was given, in as many bytes."""
    weights = stored_weights(model.graph)
    for weight in weights:
        assert torch.equal(weight.nearest(weight.numbers), weight.numbers)
    inputs, before = given(model), sizes(model)
    fed = {n: torch.from_numpy(a) for n, a in inputs.items()}
    new = [moved(weight, seed) for seed, weight in enumerate(weights)]
    changed = {w.value.name or "": w.fed(n) for w, n in zip(weights, new, strict=True)}
    assert weights and any(not torch.equal(w.numbers, n) for w, n in zip(weights, new, strict=True))
    interpreter = Interpreter(model, straight_through=True)
    expected = interpreter.run({**fed, **changed})["y"].numpy()

    write(model.graph, list(zip(weights, new, strict=True)))

    assert sizes(model) == before
    found = Session(model, Reference.AS_WRITTEN).run(inputs)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    again = {w.value.name: w for w in stored_weights(model.graph)}
    for weight, numbers in zip(weights, new, strict=True):
        assert torch.equal(again[weight.value.name].numbers, numbers)
    return weights


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_codes(form: str) -> None:
    weights = check_written(packed_reader("Gemm, transB", FORMS[form]))

    assert isinstance(weights[0], CodebookNumbers)


@pytest.mark.parametrize("reader", sorted(set(READERS) - BODIES))
def test_every_reader_of_codes(reader: str) -> None:
    weights = check_written(packed_reader(reader, FORMS["3 levels"]))

    assert "codebook" in forms_of(weights)


@pytest.mark.parametrize("reader", sorted(INTEGERS))
def test_integers_looked_up_for_integer_kernels(reader: str) -> None:
    model = packed_integers(reader, 16)

    weights = stored_weights(model.graph)

    assert any(isinstance(w, CodebookNumbers) for w in weights)
    for weight in weights:
        assert torch.equal(weight.nearest(weight.numbers), weight.numbers)


def test_a_codebook_stays_and_so_do_codes_that_are_not_in_use() -> None:
    model = packed_reader("MatMul", FORMS["4 levels"])
    (weight,) = [w for w in stored_weights(model.graph) if isinstance(w, CodebookNumbers)]
    levels = set(weight.numbers.unique().tolist())

    far = weight.nearest(torch.full_like(weight.numbers, 1e6))

    assert set(far.unique().tolist()) == {max(levels)}
    assert set(moved(weight, 1).unique().tolist()) <= levels
    books = [v for v in weight.constants(weight.numbers) if v.dtype != ir.DataType.UINT8]
    assert books == []


@pytest.mark.parametrize("form", [*FORMS, "grid"])
def test_what_lies_around_a_number_and_what_is_rounded_to_it(form: str) -> None:
    codes = np.arange(-24, 24).reshape(8, 6).astype(np.int8)
    grid = parse(GRID.format(kind="int8"), q=codes, s=np.ones(6, np.float32))
    model = grid if form == "grid" else packed_reader("Gemm, transB", FORMS[form])
    weight = next(w for w in stored_weights(model.graph) if w.is_rounded)
    generator = torch.Generator().manual_seed(0)
    spread = weight.numbers.std(correction=0) + 0.1
    other = weight.numbers + spread * torch.randn(weight.numbers.shape, generator=generator)

    lower, upper = weight.cell()
    within = other.clamp(lower + 1e-4 * spread, upper - 1e-4 * spread)
    assert torch.equal(weight.nearest(within), weight.numbers)
    below, above = weight.around(other)
    nearest = weight.nearest(other)
    free = weight.kept if getattr(weight, "kept", None) is not None else torch.ones(())
    assert bool((((nearest == below) | (nearest == above)) | ~free.bool()).all())
    between = (below <= other) & (other <= above)
    beyond = (below == above) & ((other >= above) | (other <= below))
    assert bool((between | beyond).all())


GRID = """
    agraph (float[4,8] x, {kind}[8,6] q, float[6] s) => (float[4,6] y) {{
        w = DequantizeLinear<axis = 1>(q, s)
        y = MatMul(x, w)
    }}
"""


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_stay_on_their_grid(kind: str) -> None:
    rng = np.random.default_rng(0)
    dtype = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}[kind]
    codes = rng.integers(-7, 8, (8, 6)).astype(dtype.numpy())
    model = parse(GRID.format(kind=kind), q=codes, s=rng.random(6).astype(np.float32))

    weights = check_written(model)

    assert [type(w) for w in weights] == [GridCodes]
    again = constant_tensor(weights[0].value)
    assert again is not None and again.dtype == dtype
    assert np.abs(again.numpy().astype(int)).max() <= 7


def test_the_scales_of_integers_stay_where_a_cast_widens_them() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (8, 6)).astype(np.int8)
    model = parse(
        """agraph (float[4,8] x, int8[8,6] q, float[6] s) => (float[4,6] y) {
            f = Cast<to = 1>(q)  w = Mul(f, s)  y = MatMul(x, w)
        }""",
        q=codes,
        s=rng.random(6).astype(np.float32),
    )

    assert [w.value.name for w in check_written(model)] == ["q"]


def test_zeros_of_a_matrix_stay_and_those_of_a_bias_do_not() -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(8, 6)).astype(np.float32) * (rng.random((8, 6)) < 0.5)
    model = parse(
        "agraph (float[4,8] x, float[8,6] w, float[6] b) => (float[4,6] y) { y = Gemm(x, w, b) }",
        w=array.astype(np.float32),
        b=np.zeros(6, np.float32),
    )

    weights = {w.value.name: w for w in stored_weights(model.graph)}

    assert forms_of(list(weights.values())) == ["pruned", "plain"]
    kept = moved(weights["w"], 0).numpy()
    assert ((kept == 0) == (array == 0)).all()
    assert (moved(weights["b"], 0) != 0).all()


def test_codes_that_were_pruned_stay_zero_and_a_coarse_grid_may_use_its_zero() -> None:
    rng = np.random.default_rng(0)
    half = rng.integers(-7, 8, (64, 6)).astype(np.int8) * (rng.random((64, 6)) < 0.5)
    text = """agraph (float[4,64] x, int8[64,6] q, float[6] s) => (float[4,6] y) {
        w = DequantizeLinear<axis = 1>(q, s)  y = MatMul(x, w) }"""
    scales = np.ones(6, np.float32)

    (pruned,) = stored_weights(parse(text, q=half.astype(np.int8), s=scales).graph)
    ternary = rng.integers(-1, 2, (64, 6)).astype(np.int8)
    (coarse,) = stored_weights(parse(text, q=ternary, s=scales).graph)

    assert ((moved(pruned, 0) == 0) | (pruned.numbers != 0))[pruned.numbers == 0].all()
    assert ((coarse.numbers == 0) & (moved(coarse, 0) != 0)).any()


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (2, 16), (8, 16)])
def test_codes_that_a_kernel_unpacks(bits: int, block: int) -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (6, 2, block * bits // 8)).astype(np.uint8)
    size = f"K = 32, N = 6, bits = {bits}, block_size = {block}"
    model = parse(
        f"agraph (float[4,32] x, uint8[{', '.join(map(str, stored.shape))}] q, float[12] s)"
        f" => (float[4,6] y) {{ y = com.microsoft.MatMulNBits<{size}>(x, q, s) }}",
        q=stored,
        s=rng.random(12).astype(np.float32),
    )
    (weight,) = stored_weights(model.graph)
    new = moved(weight, 3)
    x = rng.normal(size=(4, 32)).astype(np.float32)
    fed = {"x": torch.from_numpy(x), "q": weight.fed(new).requires_grad_()}

    expected = Interpreter(model, straight_through=True).run(fed)["y"]
    write(model.graph, [(weight, new)])

    assert torch.equal(weight.nearest(weight.numbers), weight.numbers)
    assert new.shape == (6, 2, block)
    again = Interpreter(model).run({"x": fed["x"]})["y"]
    np.testing.assert_array_equal(again.numpy(), expected.detach().numpy())
    (gradient,) = torch.autograd.grad(expected.sum(), fed["q"])
    assert (gradient != 0).any()


def test_the_type_of_a_weight_stays() -> None:
    array = np.linspace(-1, 1, 48).reshape(8, 6).astype(np.float16)
    model = parse(
        """agraph (float[4,8] x, float16[8,6] w) => (float[4,6] y) {
            n = Cast<to = 1>(w)  y = MatMul(x, n)
        }""",
        w=array,
    )

    (weight,) = check_written(model)

    assert isinstance(weight, PlainNumbers)
    assert weight.constants(weight.numbers)[weight.value].dtype == np.float16


CONTRIB = {
    "Attention": (
        "float[2,3,8] x, float[8,24] w, float[24] b",
        "y = com.microsoft.Attention<num_heads = 2>(x, w, b)",
    ),
    "BiasGelu": ("float[4,8] x, float[8] b", "y = com.microsoft.BiasGelu(x, b)"),
    "FastGelu": ("float[4,8] x, float[8] b", "y = com.microsoft.FastGelu(x, b)"),
    "MultiHeadAttention": (
        "float[2,3,8] x, float[24] b",
        "y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x, b)",
    ),
    "SimplifiedLayerNormalization": (
        "float[4,8] x, float[8] b",
        "y = SimplifiedLayerNormalization<axis = -1>(x, b)",
    ),
}


@pytest.mark.parametrize("operator", sorted(CONTRIB))
def test_layers_of_onnxruntime_have_weights(operator: str) -> None:
    rng = np.random.default_rng(0)
    inputs, nodes = CONTRIB[operator]
    arrays = {
        "w": rng.normal(size=(8, 24)).astype(np.float32),
        "b": rng.normal(size=24 if "24] b" in inputs else 8).astype(np.float32),
    }
    there = {name: a for name, a in arrays.items() if f" {name}" in inputs}
    header = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
    shape = "float[2,3,8]" if "float[2" in inputs else "float[4,8]"
    model = parse(f"{header} agraph ({inputs}) => ({shape} y) {{ {nodes} }}", **there)

    found = {weight.value.name for weight in check_written(model)}

    assert found == set(there)
