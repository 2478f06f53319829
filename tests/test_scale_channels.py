from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from linear_layers import normal
from observed import observer

from graphopt.contract import Change, Context, Sample
from graphopt.errors import SpecError
from graphopt.registry import parse_passes
from graphopt.runtime import Reference, Session
from graphopt.testing import apply_pass, assert_equivalent, canonical, parse
from graphopt_passes.quantize.quantize_weights import QuantizeWeights
from graphopt_passes.quantize.scale_channels import EXPONENTS, WORTHWHILE, ScaleChannels
from graphopt_passes.quantize.stretches import FACTOR_MAXIMUM, FACTOR_MINIMUM

CHANNELS, BLOCK = 32, 16
PASS = ScaleChannels(bits=4, block=BLOCK)

GAMMA = np.where(np.arange(CHANNELS) % 11 == 3, 30, 1).astype(np.float32)
"""Three channels are far larger than the rest."""

NORMALIZATIONS = {
    "LayerNormalization": "n = LayerNormalization <axis = -1> (x, g, b)",
    "LayerNormalization without shift": "n = LayerNormalization <axis = 2> (x, g)",
    "RMSNormalization": "n = RMSNormalization <axis = -1> (x, g)",
    "nodes": "m = Tanh(x) s = Mul(g, m) n = Add(s, b)",
    "nodes without shift": "m = Tanh(x) n = Mul(m, g)",
}

OUTPUTS = "float[1,12,24] y, float[1,12,20] z"


def rows(count: int = 8, first: int = 0) -> list[Sample]:
    return [{"x": normal(100 + seed, 1, 12, CHANNELS)} for seed in range(first, first + count)]


def layers(
    body: str,
    more: str = "y = MatMul(n, v) z = MatMul(n, w)",
    outputs: str = OUTPUTS,
    **replaced: np.ndarray,
) -> ir.Model:
    """What makes `n` of x, g and b, and two products that read it."""
    arrays = {
        "g": GAMMA,
        "b": normal(3, CHANNELS),
        "v": normal(1, CHANNELS, 24),
        "w": normal(2, CHANNELS, 20),
    }
    stated = "".join(f", float[1] {name}" for name in arrays)
    text = f"""
    <ir_version: 11, opset_import: ["" : 23]>
    agraph (float[1,12,{CHANNELS}] x{stated}) => ({outputs}) {{ {body} {more} }}
    """
    return parse(text, **(arrays | replaced))


def scaled(
    model: ir.Model, samples: list[Sample] | None = None, one: ScaleChannels = PASS
) -> Change:
    """What the pass did; the outputs stay, and a second time there is nothing to do."""
    samples = rows() if samples is None else samples
    before = model.clone()
    change = apply_pass(one, model, observer=observer(model, samples))
    assert_equivalent(before, model, samples=samples)
    again = apply_pass(one, model.clone(), observer=observer(model, samples))
    assert not again, again.counts
    return change


def reasons(
    model: ir.Model, samples: list[Sample] | None = None, one: ScaleChannels = PASS
) -> list[str]:
    text = canonical(model)
    change = scaled(model, samples, one)
    assert not change, change.counts
    assert canonical(model) == text
    return [skip.reason for skip in change.skips]


def array_of(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def weights(model: ir.Model, *made: str) -> list[np.ndarray]:
    """The second inputs of the nodes that make these values."""
    nodes = {node.outputs[0].name: node for node in model.graph}
    return [array_of(nodes[name].inputs[1]) for name in made]


def error_of_nearest(model: ir.Model, samples: list[Sample]) -> float:
    """The squared error of all outputs after `quantize-weights` with nearest codes."""
    packed = model.clone()
    rounding = QuantizeWeights(bits=4, block=BLOCK, method="nearest", min_elements=64)
    assert apply_pass(rounding, packed)
    before, after = (Session(m, Reference.AS_WRITTEN, threads=1) for m in (model, packed))
    return sum(
        float(np.square(array - after.run(sample)[name]).sum())
        for sample in samples
        for name, array in before.run(sample).items()
    )


# ------------------------------------------------------------------ the oracle


def nearest(weight: np.ndarray, bits: int, block: int) -> np.ndarray:
    """A weight [inputs, outputs] by nearest codes, a float16 scale for each block of inputs."""
    half = 2 ** (bits - 1)
    blocks = weight.T.reshape(weight.shape[1], -1, block)
    at = np.abs(blocks).argmax(axis=2)[..., np.newaxis]
    scales = (np.take_along_axis(blocks, at, axis=2) / -half).astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint(blocks / scales), -half, half - 1)
    return (codes * scales).reshape(weight.shape[1], -1).T


def awq(
    inputs: np.ndarray, weights: Sequence[np.ndarray], has_bias: bool = False
) -> list[tuple[float, float, np.ndarray]]:
    """Error, exponent and factors for each exponent, written from the paper.

    Args:
        inputs: of all products, [rows, inputs].
        weights: of each product, [inputs, outputs].
        has_bias: the mean of an error does not count.
    """
    counted = inputs - inputs.mean(axis=0) if has_bias else inputs
    gram = counted.T @ counted / len(inputs)
    sizes = np.abs(inputs).mean(axis=0)
    found = []
    for exponent in np.arange(0, 1, 0.05):
        s = sizes**exponent
        s /= np.sqrt(s.max() * s.min())
        changes = [nearest(w * s[:, None], 4, BLOCK) / s[:, None] - w for w in weights]
        error = sum(float(np.trace(d.T @ gram @ d)) for d in changes)
        found.append((error, float(exponent), s))
    return found


def awq_until_nothing_is_gained(
    inputs: np.ndarray, weights: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[float]]:
    """All factors multiplied, and what each search left of the error."""
    factors, left = np.ones(inputs.shape[1]), []
    while True:
        found = awq(inputs / factors, [w * factors[:, None] for w in weights])
        least, _, s = min(found, key=lambda one: one[0])
        if least > WORTHWHILE * found[0][0]:
            return factors, left
        factors, left = factors * s, [*left, least / found[0][0]]


def made_by_gamma(samples: list[Sample]) -> np.ndarray:
    stacked = np.concatenate([sample["x"].reshape(-1, CHANNELS) for sample in samples])
    return np.asarray(np.tanh(stacked.astype(np.float64)) * GAMMA)


def test_the_exponents_are_those_of_the_paper() -> None:
    np.testing.assert_allclose(EXPONENTS, np.arange(0, 1, 0.05))


def test_factors_are_those_of_the_oracle() -> None:
    model = layers(NORMALIZATIONS["nodes without shift"])
    v, w = weights(model, "y", "z")
    factors, left = awq_until_nothing_is_gained(made_by_gamma(rows()), [v, w])
    assert left and left[0] < 0.6

    scaled(model)

    (gamma,) = weights(model, "n")
    assert GAMMA / gamma == pytest.approx(factors, rel=1e-5)
    for old, new in zip((v, w), weights(model, "y", "z"), strict=True):
        assert new == pytest.approx(old * factors[:, None], rel=1e-5)


def test_one_search_takes_the_exponent_of_the_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt_passes.quantize.stretches.ROUNDS_MAXIMUM", 1)
    model = layers(NORMALIZATIONS["nodes without shift"])
    found = awq(made_by_gamma(rows()), weights(model, "y", "z"))
    least, exponent, s = min(found, key=lambda one: one[0])
    assert 0 < exponent < 0.95 and least < WORTHWHILE * found[0][0]

    apply_pass(PASS, model, observer=observer(model, rows()))

    (gamma,) = weights(model, "n")
    assert GAMMA / gamma == pytest.approx(s, rel=1e-5)


def test_what_a_bias_makes_good_for_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that is large and always the same needs no fine weights where there is a bias."""
    monkeypatch.setattr("graphopt_passes.quantize.stretches.ROUNDS_MAXIMUM", 1)
    shift = np.where(np.arange(CHANNELS) % 5 == 2, 40, 0).astype(np.float32)
    samples = [{"x": normal(seed, 12, CHANNELS)} for seed in range(8)]
    inputs = np.concatenate([s["x"] for s in samples]).astype(np.float64) * GAMMA + shift
    weight, found = normal(4, CHANNELS, 24), {}
    for node in ("MatMul(n, v)", "Gemm(n, v)"):
        model = parse(
            f"""
            agraph (float[N,32] x, float[1] g, float[1] b, float[1] v) => (float[N,24] y)
            {{ m = Mul(x, g) n = Add(m, b) y = {node} }}
            """,
            g=GAMMA,
            b=shift,
            v=weight,
        )
        tried = awq(inputs, [weight], has_bias=node.startswith("Gemm"))
        _, found[node], s = min(tried, key=lambda one: one[0])

        assert apply_pass(PASS, model, observer=observer(model, samples))

        assert GAMMA / weights(model, "m")[0] == pytest.approx(s, rel=1e-5)
        assert weights(model, "n")[0] == pytest.approx(shift / s, rel=1e-5)
    assert found["MatMul(n, v)"] != found["Gemm(n, v)"]


# ------------------------------------------------------------------ what is folded


def test_rewrites_scale_and_weights_and_nothing_else() -> None:
    text = """
    agraph (float[N,32] x, float[32] g, float[32,24] v) => (float[N,24] y)
    { m = Tanh(x) n = Mul(m, g) y = MatMul(n, v) }
    """
    samples = [{"x": normal(seed, 12, CHANNELS)} for seed in range(8)]
    weight = normal(1, CHANNELS, 24)
    model = parse(text, g=GAMMA, v=weight)
    factors, _ = awq_until_nothing_is_gained(made_by_gamma(samples), [weight])

    change = scaled(model, samples)

    assert change.counts == {"Mul scaled": 1}
    (gamma,), (made,) = weights(model, "n"), weights(model, "y")
    assert gamma == pytest.approx(GAMMA / factors, rel=1e-5)
    assert made == pytest.approx(weight * factors[:, None], rel=1e-5)
    # What is not read any more the pipeline removes.
    for value in [v for v in model.graph.initializers.values() if not v.uses()]:
        del model.graph.initializers[value.name or ""]
    assert canonical(model) == canonical(parse(text, g=gamma, v=made))


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_large_channels_lose_less_when_weights_are_rounded(name: str) -> None:
    model = layers(NORMALIZATIONS[name])
    others = rows(4, first=50)
    before = error_of_nearest(model, others)

    change = scaled(model)

    assert sum(change.counts.values()) == 1 and not change.skips
    assert error_of_nearest(model, others) < 0.7 * before


def test_queries_keys_and_values_share_the_factors() -> None:
    arrays = {name: normal(seed, CHANNELS, 16) for seed, name in enumerate("qkv")}
    model = parse(
        """
        <ir_version: 11, opset_import: ["" : 23]>
        agraph (float[1,12,32] x, float[1] g, float[1] q, float[1] k, float[1] v)
            => (float[1,12,16] y)
        {
            n = RMSNormalization(x, g)
            a = MatMul(n, q) b = MatMul(n, k) c = MatMul(n, v)
            t = Transpose <perm = [0, 2, 1]> (b) s = MatMul(a, t) p = Softmax(s) y = MatMul(p, c)
        }
        """,
        g=GAMMA,
        **arrays,
    )

    change = scaled(model)

    assert change.counts == {"RMSNormalization scaled": 1} and not change.skips
    (gamma,) = weights(model, "n")
    factors = GAMMA / gamma
    assert factors[3] > 2 * factors[0]
    for old, new in zip(arrays.values(), weights(model, "a", "b", "c"), strict=True):
        assert new == pytest.approx(old * factors[:, None], rel=1e-5)


LINEAR = {
    "MatMul": ("c = MatMul(x, a)", "y = MatMul(d, e)", (32, 32), (32, 24)),
    "Gemm": ("c = Gemm(x, a, f)", "y = Gemm(d, e)", (32, 32), (32, 24)),
    "Gemm transposed": (
        "c = Gemm <transB = 1> (x, a, f)",
        "y = Gemm <transB = 1> (d, e)",
        (32, 32),
        (24, 32),
    ),
    "MatMul and Add": ("h = MatMul(x, a) c = Add(h, f)", "y = MatMul(d, e)", (32, 32), (32, 24)),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("between", ["Identity", "Relu"])
def test_the_rows_of_the_layer_before_are_divided(name: str, between: str) -> None:
    first, second, before, after = LINEAR[name]
    uneven = normal(1, *before) * (GAMMA if "trans" not in name else GAMMA[:, None])
    model = parse(
        f"""
        agraph (float[N,32] x, float[1] a, float[1] e, float[1] f) => (float[N,24] y)
        {{ {first} d = {between}(c) {second} }}
        """,
        a=uneven.astype(np.float32),
        e=normal(2, *after),
        f=normal(3, 32) * GAMMA,
    )
    samples = [{"x": normal(seed, 12, 32)} for seed in range(8)]
    wrong = error_of_nearest(model, samples)

    change = scaled(model, samples)

    assert sum(change.counts.values()) == 1
    # The first layer cannot be helped: x is an input of the graph.
    assert [skip.reason for skip in change.skips] == [
        "nothing that makes its inputs, and them alone, can be divided by channel"
    ]
    assert error_of_nearest(model, samples) < 0.8 * wrong


def test_a_convolution_is_a_layer_too() -> None:
    model = parse(
        """
        agraph (float[1,3,8,8] x, float[1] a, float[1] e) => (float[1,24,6,6] y)
        { c = Conv <pads = [1, 1, 1, 1]> (x, a) d = Relu(c) y = Conv(d, e) }
        """,
        a=(normal(1, 16, 3, 3, 3) * GAMMA[:16, None, None, None]).astype(np.float32),
        e=normal(2, 24, 16, 3, 3),
    )
    samples = [{"x": normal(seed, 1, 3, 8, 8)} for seed in range(8)]
    wrong = error_of_nearest(model, samples)

    change = scaled(model, samples, ScaleChannels(block=0))

    assert change.counts == {"Conv scaled": 1}
    assert error_of_nearest(model, samples) < 0.9 * wrong


def test_factors_cross_a_product_of_two_branches() -> None:
    """As the second branch of a gated feed-forward layer (SwiGLU)."""
    model = parse(
        """
        agraph (float[1,12,8] x, float[1] a, float[1] c, float[1] d) => (float[1,12,24] y)
        { p = MatMul(x, a) s = Sigmoid(p) q = MatMul(x, c) r = Mul(s, q) y = MatMul(r, d) }
        """,
        a=normal(1, 8, 32),
        c=normal(2, 8, 32) * GAMMA,
        d=normal(3, 32, 24),
    )
    samples = [{"x": normal(seed, 1, 12, 8)} for seed in range(8)]
    wrong = error_of_nearest(model, samples)

    change = scaled(model, samples)

    assert change.counts == {"MatMul scaled": 1}
    assert error_of_nearest(model, samples) < 0.8 * wrong


def test_a_scale_that_others_read_stays_for_them() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"], "y = MatMul(n, v) z = Add(x, g)", OUTPUTS)
    model.graph.outputs[1].shape = ir.Shape([1, 12, CHANNELS])

    assert scaled(model)

    (read,) = weights(model, "z")
    assert np.array_equal(read, GAMMA)


# ------------------------------------------------------------------ bits and blocks


def test_the_blocks_count() -> None:
    """Large inputs that all lie in one block of columns are no concern of the other blocks."""
    gamma = np.where(np.arange(CHANNELS) < BLOCK, 30, 1).astype(np.float32)
    body = NORMALIZATIONS["nodes without shift"]
    (reason,) = reasons(layers(body, g=gamma))
    assert "% of the error would go" in reason

    assert scaled(layers(body, g=gamma), one=ScaleChannels(block=0))


def test_a_block_that_does_not_divide_the_inputs_is_made_larger() -> None:
    found = []
    for block in (BLOCK, BLOCK - 1):
        model = layers(NORMALIZATIONS["RMSNormalization"])
        scaled(model, one=ScaleChannels(block=block))
        found.append(canonical(model))
    assert found[0] == found[1]


def test_options() -> None:
    assert parse_passes("scale-channels") == (ScaleChannels(bits=4, block=32),)
    assert parse_passes("scale-channels{bits=3,block=0}") == (ScaleChannels(bits=3, block=0),)
    for wrong in ("bits=7", "bits=0", "block=-1"):
        with pytest.raises(SpecError):
            parse_passes(f"scale-channels{{{wrong}}}")


# ------------------------------------------------------------------ what stays


def test_refuses_without_samples() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"])
    reason = PASS.refuse(model, Context(lambda: model))
    assert reason == "there are no samples to choose factors by"


@pytest.mark.parametrize(("seed", "is_worthwhile"), [(1, True), (2, False)])
def test_a_fiftieth_of_the_error_is_the_least_that_must_go(seed: int, is_worthwhile: bool) -> None:
    gamma = np.where(GAMMA > 1, 1.5, 1).astype(np.float32)
    products = {"v": normal(seed, CHANNELS, 24), "w": normal(seed + 50, CHANNELS, 20)}
    model = layers(NORMALIZATIONS["nodes without shift"], g=gamma, **products)
    inputs = made_by_gamma(rows()) / GAMMA * gamma
    found = [error for error, _, _ in awq(inputs, list(products.values()))]
    gone = 1 - min(found) / found[0]
    assert 0.05 < gone < 0.1 if is_worthwhile else 0.01 < gone < 0.02

    change = scaled(model)

    assert bool(change) == is_worthwhile
    if not is_worthwhile:
        assert [skip.reason for skip in change.skips] == [
            f"at best {gone:.1%} of the error would go"
        ]


def test_leaves_even_channels() -> None:
    """Signs are codes already; that of the lowest code is exact, its opposite is an eighth off."""
    signs = {name: np.sign(normal(seed, CHANNELS, 24)) for seed, name in enumerate("vw")}
    model = layers("m = Sign(x) n = Mul(m, g)", g=np.ones(CHANNELS, np.float32), **signs)
    model.graph.outputs[1].shape = ir.Shape([1, 12, 24])
    assert reasons(model) == ["at best 0.0% of the error would go"]


NOT_FOLDED = {
    "Softmax makes it": "n = Softmax(x)",
    "an input": "n = Identity(x)",
    "a constant for all channels": "k = Constant <value_float = 3.0> () n = Mul(x, k)",
    "a scale that is computed": "k = Exp(x) n = Mul(x, k)",
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_leaves_what_cannot_be_folded_and_adds_no_node(name: str) -> None:
    folded = "nothing that makes its inputs, and them alone, can be divided by channel"
    assert reasons(layers(NOT_FOLDED[name])) == [folded, folded]


def test_leaves_what_another_node_reads_too() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"], "y = MatMul(n, v) z = Tanh(n)")
    model.graph.outputs[1].shape = ir.Shape([1, 12, CHANNELS])
    (first, second) = reasons(model)
    assert first == "Tanh reads it" and "can be divided" in second


def test_leaves_an_output() -> None:
    model = layers(
        NORMALIZATIONS["RMSNormalization"],
        "y = MatMul(n, v)",
        f"float[1,12,24] y, float[1,12,{CHANNELS}] n",
    )
    assert reasons(model)[0] == "n is an output of the graph"


def test_leaves_shared_weights() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"], "y = MatMul(n, v) z = MatMul(x, v)")
    model.graph.outputs[1].shape = ir.Shape([1, 12, 24])
    assert reasons(model) == ["y reads it, and the weight is shared"]


def test_leaves_packed_weights() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"])
    assert apply_pass(QuantizeWeights(bits=4, block=BLOCK, min_elements=64), model)
    assert reasons(model) == ["y reads it, and the weight is packed"]


def test_leaves_what_a_caller_can_override() -> None:
    model = layers(NORMALIZATIONS["RMSNormalization"])
    model.graph.inputs.append(model.graph.initializers["g"])
    assert len(reasons(model, [{**sample, "g": GAMMA} for sample in rows()])) == 2


def test_leaves_what_too_few_rows_reach() -> None:
    reason = "the samples hold 12 rows of what it makes; it takes 16"
    assert reasons(layers(NORMALIZATIONS["RMSNormalization"]), rows(1)) == [reason]


def test_leaves_what_reads_more_inputs_than_a_gram_is_made_of() -> None:
    model = parse(
        """
        agraph (float[20,2305] x, float[1] g, float[1] v) => (float[20,2] y)
        { n = Mul(x, g) y = MatMul(n, v) }
        """,
        g=normal(1, 2305),
        v=normal(2, 2305, 2),
    )
    samples = [{"x": normal(seed, 20, 2305)} for seed in range(2)]
    assert reasons(model, samples) == ["what reads it has more than 2304 inputs"]


@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_leaves_weights_that_are_no_numbers(number: float) -> None:
    weight = normal(1, CHANNELS, 24)
    weight[5, 7] = number
    model = layers(NORMALIZATIONS["RMSNormalization"], v=weight)
    assert reasons(model) == ["its weights are not finite, or too large"]


def test_leaves_weights_that_are_zero() -> None:
    zeros = {"v": np.zeros((CHANNELS, 24), np.float32), "w": np.zeros((CHANNELS, 20), np.float32)}
    (reason,) = reasons(layers(NORMALIZATIONS["RMSNormalization"], **zeros))
    assert reason == "rounding its weights costs nothing, or more than float32 holds"


def test_leaves_products_in_a_body() -> None:
    model = parse(
        """
        agraph (float[20,32] x, bool c, float[1] v, float[1] w) => (float[20,24] y)
        {
            y = If (c) <
                then_branch = t () => (float[20,24] p) { p = MatMul(x, v) },
                else_branch = e () => (float[20,24] q) { k = Tanh(x) q = MatMul(k, w) }
            >
        }
        """,
        v=normal(1, CHANNELS, 24),
        w=normal(2, CHANNELS, 24),
    )
    samples = [{"x": normal(s, 20, CHANNELS), "c": np.array(True)} for s in range(2)]
    assert reasons(model, samples) == ["what goes on in a body cannot be observed"] * 2


# ------------------------------------------------------------------ hostile numbers


def test_leaves_channels_that_are_all_zero() -> None:
    model = layers(NORMALIZATIONS["nodes without shift"], g=np.zeros(CHANNELS, np.float32))
    assert reasons(model) == ["its channels are all zero"]


def test_channels_that_are_always_zero_keep_their_weights() -> None:
    gamma = GAMMA.copy()
    gamma[[0, 7]] = 0
    model = layers(NORMALIZATIONS["nodes without shift"], g=gamma)
    (old,) = weights(model, "y")

    assert scaled(model)

    (new,) = weights(model, "y")
    assert np.array_equal(new[[0, 7]], old[[0, 7]]) and not np.array_equal(new, old)


@pytest.mark.parametrize("rounds", [1, 20])
def test_sizes_far_apart(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors of one round are bounded, and those of all leave the outputs as they are."""
    monkeypatch.setattr("graphopt_passes.quantize.stretches.ROUNDS_MAXIMUM", rounds)
    gamma = np.geomspace(1e-15, 1e15, CHANNELS).astype(np.float32)
    model = layers(NORMALIZATIONS["nodes without shift"], g=gamma)
    before = model.clone()

    assert apply_pass(PASS, model, observer=observer(model, rows()))

    assert_equivalent(before, model, samples=rows())
    factors = gamma / weights(model, "n")[0]
    assert np.abs(np.log(factors)).max() <= rounds * np.log(FACTOR_MAXIMUM) + 1e-3
    assert pytest.approx(1 / FACTOR_MAXIMUM) == FACTOR_MINIMUM
