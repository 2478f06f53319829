"""What holds for the interpreter in torch whatever the operators: feeding, folding, vmap."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from torch_cases import CODES, Single  # noqa: E402

import graphopt  # noqa: E402
from graphopt.errors import ModelError, SampleError  # noqa: E402
from graphopt.runtime import Reference, Session  # noqa: E402
from graphopt.testing import parse  # noqa: E402
from graphopt.training.interpreter import Interpreter  # noqa: E402

TWO_LAYERS = """
<ir_version: 10, opset_import: ["" : 21]>
m (float[N, 3] x) => (float[N, 2] y)
<float[3, 4] first = {0.5, -1, 2, 0.25, 1, 1, -0.5, 3, -2, 0.75, 1.5, -1},
 int8[4, 2] codes = {10, -20, 30, 40, -50, 60, 70, -80}, float[2] scales = {0.01, 0.02}>
{
  hidden = MatMul (x, first)
  feature = Relu (hidden)
  second = DequantizeLinear <axis = 1> (codes, scales)
  y = MatMul (feature, second)
}
"""

X = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])


def test_outputs_are_what_onnxruntime_computes() -> None:
    model = parse(TWO_LAYERS)

    got = Interpreter(model).run({"x": X})["y"]

    expected = Session(model, Reference.AS_WRITTEN).run({"x": X.numpy()})["y"]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_any_value_can_be_asked_for_in_any_order() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))

    got = interpreter.run({"x": X}, ["y", "hidden", "second", "first", "x"])

    assert list(got) == ["y", "hidden", "second", "first", "x"]
    assert torch.equal(got["hidden"], X @ got["first"])
    assert torch.equal(got["second"][:, 1], torch.tensor([-20.0, 40, 60, -80]) * 0.02)
    assert torch.equal(got["y"], got["hidden"].relu() @ got["second"])
    assert got["x"] is X


def test_a_fed_feature_stands_for_what_makes_it() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))
    whole = interpreter.run({"x": X}, ["feature", "y"])

    assert torch.equal(interpreter.run({"feature": whole["feature"]})["y"], whole["y"])


def test_a_fed_output_stays_where_the_node_runs_for_another() -> None:
    model = parse(
        "m (float[4] x) => (float[2] y) { a, b = Split <num_outputs = 2> (x)\n y = Add (a, b) }"
    )
    x, a = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0])

    got = Interpreter(model).run({"x": x, "a": a}, ["y", "a", "b"])

    assert [value.tolist() for value in got.values()] == [[13.0, 24.0], [10.0, 20.0], [3.0, 4.0]]


@pytest.mark.parametrize("name", ["first", "second", "scales"])
def test_a_fed_weight_is_used_and_learns(name: str) -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))
    as_it_was = interpreter.run({"x": X})["y"]
    weight = torch.nn.Parameter(interpreter.run({}, [name])[name] * 2)

    y = interpreter.run({"x": X, name: weight})["y"]
    y.sum().backward()

    # Both layers and the scales are linear in positive factors.
    torch.testing.assert_close(y, 2 * as_it_was)
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert torch.equal(interpreter.run({"x": X})["y"], as_it_was)


def test_what_hangs_on_constants_is_computed_once_and_what_is_fed_is_not_among_them() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))
    constants = interpreter._constants

    interpreter.run({"x": X})
    kept = {value.name: tensor for value, tensor in constants.items()}
    interpreter.run({"x": X, "first": torch.zeros(3, 4)})
    interpreter.run({"x": X}, ["hidden"])

    assert kept.keys() == {"first", "codes", "scales", "second"}
    assert all(tensor is kept[value.name] for value, tensor in constants.items())


def test_nodes_run_only_where_they_serve_what_is_wanted() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))

    def ran(fed: set[str], wanted: str) -> list[str]:
        plan = interpreter._planned(frozenset(fed), (wanted,))
        return [step.node.outputs[0].name or "" for step in plan.program.steps]

    assert ran({"x"}, "y") == ["hidden", "feature", "y"]
    assert ran({"x"}, "hidden") == ["hidden"]
    assert ran({"x", "feature"}, "y") == ["y"]
    assert ran({"x", "codes"}, "y") == ["hidden", "feature", "second", "y"]
    assert ran({"second"}, "second") == []


def test_a_value_is_dropped_after_its_last_reader() -> None:
    chain = "\n".join(f"v{i + 1} = Relu (v{i})" for i in range(6))
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]> m (float[4] v0) => (float[4] y) '
        f"{{ {chain} \n y = Add (v6, v2) }}"
    )
    program = Interpreter(model)._planned(frozenset({"v0"}), ("y",)).program
    names = {
        slot: o.name
        for s in program.steps
        for slot, o in zip(s.outputs, s.node.outputs, strict=True)
    }
    names[program.given[0]] = "v0"

    dropped = [[names[slot] for slot in step.releases] for step in program.steps]

    assert dropped == [["v0"], ["v1"], [], ["v3"], ["v4"], ["v5"], ["v2", "v6"]]


def test_a_constant_that_is_handed_out_is_a_copy() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))
    before = interpreter.run({"x": X})["y"]

    interpreter.run({}, ["second"])["second"].zero_()
    interpreter.run({}, ["first"])["first"].zero_()

    assert torch.equal(interpreter.run({"x": X})["y"], before)


def test_the_model_stays_as_it_was() -> None:
    model = parse(TWO_LAYERS)
    before = ir.to_proto(model).SerializeToString()

    Interpreter(model).run({"x": X})

    assert ir.to_proto(model).SerializeToString() == before


def test_constants_that_were_made_without_gradients_serve_runs_with_them() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))
    with torch.inference_mode():
        interpreter.run({"x": X})
    x = X.clone().requires_grad_()

    interpreter.run({"x": x})["y"].sum().backward()

    assert x.grad is not None


def test_constants_that_were_made_under_a_transform_serve_runs_without() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))

    def total(x: Any) -> Any:
        return interpreter.run({"x": x})["y"].sum()

    slope = torch.func.grad(total)(X)
    x = X.clone().requires_grad_()
    total(x).backward()

    torch.testing.assert_close(slope, x.grad)


def test_half_types_are_computed_in() -> None:
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        model = parse(
            f'<ir_version: 10, opset_import: ["" : 21]> m ({name}[2, 3] x) => ({name}[2, 3] y) '
            "{ z = Exp (x)\n y = Softmax (z) }"
        )

        y = Interpreter(model).run({"x": X.to(dtype)})["y"]

        assert y.dtype == dtype
        torch.testing.assert_close(y, X.exp().softmax(-1).to(dtype), atol=1e-2, rtol=1e-2)


def test_unsigned_types_wrap_around() -> None:
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]> m (uint16[2] x) => (uint16[2] y, int64[1] s) '
        "{ y = Add (x, x)\n s = Shape (y) }"
    )

    got = Interpreter(model).run({"x": torch.tensor([40000, 5], dtype=torch.uint16)})

    assert got["y"].dtype == torch.uint16 and got["y"].tolist() == [80000 - 65536, 10]
    assert got["s"].dtype == torch.int64 and got["s"].tolist() == [2]


BRANCHES = """
<ir_version: 10, opset_import: ["" : 21]>
m (bool c, float[3] x, int64 n) => (float[3] y, float[3] last, float[n, 3] all)
<float[3] w = {1, 2, 3}>
{
  scaled = Mul (x, w)
  y = If (c) <
    then_branch = g () => (float[3] a) { a = Mul (scaled, scaled) },
    else_branch = h () => (float[3] b) <float two = {2}> { t = Mul (scaled, two)\n b = Add (t, w) }
  >
  last, all = Loop (n, c, x) <
    body = l (int64 i, bool go, float[3] s) => (bool on, float[3] next, float[3] out) {
      on = Identity (go)
      next = Add (s, scaled)
      out = Mul (next, w)
    }
  >
}
"""


@pytest.mark.parametrize("condition", [True, False])
def test_bodies_read_from_around_them_and_gradients_pass(condition: bool) -> None:
    interpreter = Interpreter(parse(BRANCHES))
    fixed = {"c": torch.tensor(condition), "n": torch.tensor(3)}
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)

    got = interpreter.run({**fixed, "x": x, "w": w})

    torch.testing.assert_close(got["y"], (x * w) ** 2 if condition else 2 * x * w + w)
    trips = 3 if condition else 0
    torch.testing.assert_close(got["last"], x + trips * x * w)
    assert len(got["all"]) == trips
    names = ["y", "last"]
    assert torch.autograd.gradcheck(
        lambda x, w: tuple(interpreter.run({**fixed, "x": x, "w": w}, names).values()), (x, w)
    )


def test_functions_are_looked_into() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        m (float[2, 3] x) => (float[2, 3] y) { y = own.Twice <by = 3.0> (x) }
        <domain: "own", opset_import: ["" : 21]>
        Twice <by> (x) => (y) { f = Constant <value_float: float = @by> ()\n y = Mul (x, f) }
        """
    )

    assert torch.equal(Interpreter(model).run({"x": X})["y"], 3 * X)


def test_what_is_not_known_is_named_before_anything_runs() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        m (float[3] x, bool c) => (float[3] y, string[3] s) {
          a = own.Strange (x)
          s = Cast <to = 8> (a)
          y = If (c) <
            then_branch = g () => (float[3] p) { p = own.Odd (x) },
            else_branch = h () => (float[3] q) { q = Add <broadcast = 1> (x, x) }
          >
        }
        """
    )

    with pytest.raises(ModelError) as caught:
        Interpreter(model)

    message = str(caught.value)
    assert "own.Strange (node 'a'): there is no such operator here" in message
    assert "own.Odd (node 'p')" in message
    assert "Cast (node 's'): 's' is of STRING" in message
    assert "Add (node 'q'): it has no attribute 'broadcast' here" in message


def test_attributes_that_no_version_of_an_operator_has_are_ignored() -> None:
    model = parse("m (float[2, 3] x) => (float[2, 3] y) { y = Elu <epsion = 3.0> (x) }")

    got = Interpreter(model).run({"x": X})["y"]

    torch.testing.assert_close(got, torch.nn.functional.elu(X))


def test_threads_may_share_an_interpreter() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))
    samples = [torch.rand(2, 3) for _ in range(32)]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: interpreter.run({"x": x})["y"], samples))

    for x, y in zip(samples, together, strict=True):
        assert torch.equal(interpreter.run({"x": x})["y"], y)


def test_names_that_are_not_known_and_inputs_that_are_missing_are_said() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))

    with pytest.raises(SampleError, match="no value 'featur'; did you mean 'feature'"):
        interpreter.run({"featur": X})
    with pytest.raises(SampleError, match="no value 'z'"):
        interpreter.run({"x": X}, ["z"])
    with pytest.raises(SampleError, match="the input 'x' is needed, and not fed"):
        interpreter.run({}, ["y"])


def test_an_error_within_a_node_says_which() -> None:
    interpreter = Interpreter(parse(TWO_LAYERS))

    with pytest.raises(RuntimeError) as caught:
        interpreter.run({"x": torch.zeros(2, 5)})

    assert caught.value.__notes__ == ["in node 'hidden' (MatMul)"]


def stacked(interpreter: Interpreter, samples: Any, name: str) -> None:
    """Assert that `vmap` over samples gives what they give one by one, and their gradients."""

    def compute(x: Any) -> Any:
        (y,) = interpreter.run({name: x}).values()
        return y

    def total(x: Any) -> Any:
        return compute(x).square().sum()

    together = torch.func.vmap(compute)(samples)
    slopes = torch.func.vmap(torch.func.grad(total))(samples)
    for sample, y, slope in zip(samples, together, slopes, strict=True):
        x = sample.clone().requires_grad_()
        total(x).backward()
        torch.testing.assert_close(y, compute(sample), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slope, x.grad, rtol=1e-3, atol=1e-4)


def exported(module: Any, example: Any) -> Interpreter:
    """A module for a fixed batch of 1 as ONNX."""
    torch.manual_seed(0)
    program = torch.onnx.export(
        module.eval(), (example,), input_names=["x"], dynamo=True, verbose=False
    )
    assert program is not None
    return Interpreter(graphopt.load(program.model_proto))


def test_vmap_adds_an_axis_of_samples_to_a_convolutional_net() -> None:
    nn = torch.nn
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, 1, 1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.Flatten(),
        nn.Linear(4 * 16 * 16, 5),
        nn.Softmax(-1),
    )

    stacked(exported(net, torch.rand(1, 3, 16, 16)), torch.rand(4, 1, 3, 16, 16), "x")


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_vmap_adds_an_axis_of_samples_to_a_recurrent_net(kind: str) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(torch.nn, kind)(4, 6, batch_first=True, bidirectional=True)

        def forward(self, x: Any) -> Any:
            return self.layer(x)[0][:, -1]

    stacked(exported(Net(), torch.rand(1, 5, 4)), torch.rand(3, 1, 5, 4), "x")


def test_vmap_adds_an_axis_of_samples_to_a_transformer() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")

    stacked(exported(layer, torch.rand(1, 5, 8)), torch.rand(3, 1, 5, 8), "x")


QUANTIZED = """
m (float[1, 2, 4, 4] x, float[3, 8] w) => (float[1, 3] y)
<float scale = {0.1}, uint8 zero = {100}, uint8 low = {90}, uint8 high = {120},
 float[3] steps = {0.02, 0.03, 0.04}, int8[3] none = {0, 0, 0}>
{
  codes = QuantizeLinear (x, scale, zero)
  pooled = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (codes)
  flat = Flatten (pooled)
  limited = Clip (flat, low, high)
  back = DequantizeLinear (limited, scale, zero)
  w_codes = QuantizeLinear <axis = 0> (w, steps, none)
  w_back = DequantizeLinear <axis = 0> (w_codes, steps, none)
  turned = Transpose (w_back)
  y = MatMul (back, turned)
}
"""

VALUES = ["codes", "pooled", "flat", "limited", "back", "w_codes", "w_back", "y"]


def quantized(straight_through: bool) -> Interpreter:
    return Interpreter(parse(QUANTIZED), straight_through=straight_through)


def quantized_feeds() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(3, 8, generator=generator) - 0.5
    # Beyond the largest code of its row, 127 steps of 0.02.
    weight[0, 1] = 5.0
    return {"x": torch.randn(1, 2, 4, 4, generator=generator), "w": weight}


def test_straight_through_gives_the_same_numbers_and_keeps_codes_floating() -> None:
    feeds = quantized_feeds()

    plain = quantized(False).run(feeds, VALUES)
    through = quantized(True).run(feeds, VALUES)

    assert plain["codes"].dtype == torch.uint8 and plain["w_codes"].dtype == torch.int8
    assert all(value.dtype == torch.float32 for value in through.values())
    for name in VALUES:
        assert torch.equal(plain[name].to(torch.float32), through[name])


def test_gradients_go_straight_through_where_codes_are_not_saturated() -> None:
    feeds = {name: x.requires_grad_() for name, x in quantized_feeds().items()}

    values = quantized(True).run(feeds, VALUES)
    values["y"][0, 0].backward()

    slope = feeds["w"].grad
    expected = torch.zeros(3, 8)
    expected[0] = values["back"].detach()[0]
    expected[0, 1] = 0
    torch.testing.assert_close(slope, expected)
    # Of each window the largest learns, but for those whose codes Clip holds.
    flat, limited = values["flat"].detach(), values["limited"].detach()
    is_free = (flat == limited).reshape(2, 4)
    parts = feeds["x"].grad.reshape(2, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(2, 4, 4)
    assert torch.equal((parts != 0).sum(-1), is_free.long())
    torch.testing.assert_close(
        parts.sum(-1), torch.where(is_free, values["w_back"][0].detach().reshape(2, 4), 0.0)
    )


def test_the_scale_learns_as_in_learned_step_size_quantization() -> None:
    model = parse(
        "m (float[4] x, float s) => (float[4] y) <int8 zero = {0}> "
        "{ c = QuantizeLinear (x, s, zero)\n y = DequantizeLinear (c, s, zero) }"
    )
    x, scale = torch.tensor([0.34, -0.77, 99.0, -99.0]), torch.tensor(0.1, requires_grad=True)

    y = Interpreter(model, straight_through=True).run({"x": x, "s": scale})["y"]
    slopes = [torch.autograd.grad(y[i], scale, retain_graph=True)[0].item() for i in range(4)]

    # round(x / s) - x / s within the codes, and the codes' limits beyond (arXiv 1902.08153, eq. 3).
    np.testing.assert_allclose(slopes, [3 - 3.4, -8 + 7.7, 127, -128], rtol=1e-4)


@pytest.mark.parametrize("name", ["FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT4E2M1"])
def test_narrow_floats_are_straight_through_too(name: str) -> None:
    dtype = int(ir.DataType[name])
    model = parse(
        f"m (float[5] x) => (float[5] y) {{ c = Cast <to = {dtype}> (x)\n y = Cast <to = 1> (c) }}"
    )
    x = torch.tensor([0.3, -1.2, 2.6, -5.1, 0.0], requires_grad=True)

    plain = Interpreter(model).run({"x": x.detach()})["y"]
    y = Interpreter(model, straight_through=True).run({"x": x})["y"]
    y.sum().backward()

    assert torch.equal(y, plain) and not torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones(5))


@pytest.mark.parametrize("single", CODES, ids=lambda single: single.op_type)
def test_operators_of_codes_give_the_same_numbers_straight_through(single: Single) -> None:
    model = ir.from_proto(single.model)
    feeds = {name: torch.tensor(x) for name, x in single.feeds.items()}

    plain = Interpreter(model).run(feeds)
    through = Interpreter(model, straight_through=True).run(feeds)

    for name, value in plain.items():
        torch.testing.assert_close(through[name], value.to(through[name].dtype))


def test_floating_codes_go_into_the_operators_that_read_codes() -> None:
    model = parse(
        """
        m (float[2, 3] a, float[3, 4] b, float[1, 1, 4, 4] x) => (float[2, 4] p, float[2, 4] r,
          float[1, 1, 3, 3] q, float[2, 4] d)
        <float s = {0.05}, uint8 z = {128}, float t = {0.3}, uint8[1, 1, 2, 2] k = {3, 9, 4, 200}>
        {
          ca = QuantizeLinear (a, s, z)
          cb = QuantizeLinear (b, s, z)
          ci = MatMulInteger (ca, cb, z, z)
          p = Cast <to = 1> (ci)
          cr = QLinearMatMul (ca, s, z, cb, s, z, t, z)
          r = DequantizeLinear (cr, t, z)
          cx = QuantizeLinear (x, s, z)
          cq = QLinearConv (cx, s, z, k, s, z, t, z)
          q = DequantizeLinear (cq, t, z)
          cd, ds, dz = DynamicQuantizeLinear (a)
          cp = MatMulInteger (cd, cb, dz, z)
          pf = Cast <to = 1> (cp)
          dss = Mul (ds, s)
          d = Mul (pf, dss)
        }
        """
    )
    generator = torch.Generator().manual_seed(5)
    feeds = {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in (("a", (2, 3)), ("b", (3, 4)), ("x", (1, 1, 4, 4)))
    }

    plain = Interpreter(model).run({name: x.detach() for name, x in feeds.items()})
    through = Interpreter(model, straight_through=True).run(feeds)
    sum(y.sum() for y in through.values()).backward()

    for name, value in plain.items():
        torch.testing.assert_close(through[name], value)
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in feeds.values())


def test_halves_are_computed_wide_where_that_is_asked_for() -> None:
    model = parse(
        """agraph (float16[2,4] x, float16[4,3] w) => (float16[2,3] y) {
            a = MatMul(x, w)  f = Cast<to = 1>(a)  b = Cast<to = 10>(f)
            s = Shape(b)  c = ConstantOfShape<value = float16[1] {15360}>(s)  y = Add(b, c) }""",
        w=np.linspace(-1, 1, 12, dtype=np.float16).reshape(4, 3),
    )
    x = torch.linspace(-1e-4, 1e-3, 8).reshape(2, 4)

    # 15360 is how 1 is stored; what is added to it here would be lost in 16 bits.
    found = Interpreter(model, wide=True).run({"x": x.half(), "w": x.new_ones(4, 3)})["y"]

    assert found.dtype == torch.float32
    assert Interpreter(model).run({"x": x.half()})["y"].dtype == torch.float16
    np.testing.assert_array_equal(found, 1 + x.half().float() @ torch.ones(4, 3))
    assert (found.half().float() != found).any()
