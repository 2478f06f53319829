"""Activations that are rounded in training: what a step does, the export, and what passes make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from optimized import kernels

import graphopt
from graphopt.errors import ConfigError, ModelError
from graphopt.rewriting import constant_tensor
from graphopt.roundings import map_of
from graphopt.runtime import Reference, Session
from graphopt.testing import parse
from graphopt_passes.quantize.ranges import affine_parameters

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("sklearn")

from torch import nn  # noqa: E402

from graphopt.training import config_of, train  # noqa: E402
from graphopt.training.activations import (  # noqa: E402
    NAME,
    RATE,
    FixedRounding,
    InputRounding,
    RoundedActivations,
    code_map,
)
from graphopt.training.export_check import Following, check  # noqa: E402
from graphopt.training.grids import Quantized, gradient_factor  # noqa: E402
from graphopt.training.preparations import preparations_of  # noqa: E402
from graphopt_models import digits  # noqa: E402


def net() -> Any:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def dense() -> Any:
    """Without batch normalization, whose statistics are those of parts of batches."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def lookup() -> Any:
    return nn.Sequential(nn.Embedding(32, 16), nn.Flatten(), nn.ReLU())


def few(count: int = 200) -> tuple[digits.Samples, digits.Samples]:
    both = digits.samples()
    train_samples, validation = (digits.Samples(s.inputs[:count], s.labels[:count]) for s in both)
    return train_samples, validation


PREPARE = {"name": "quantized", "activations": 8, "min_elements": 1}


def table(*prepare: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "model": {"factory": "test_activations:net"},
        "data": {"factory": "test_activations:few"},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"epochs": 4},
        "prepare": list(prepare),
        **sections,
    }


def scales(module: Any) -> list[float]:
    found = (m for m in module.modules() if isinstance(m, FixedRounding))
    return [float(one.scale) for one in found]


# ------------------------------------------------------------------ codes


def test_codes_are_those_of_quantize_static() -> None:
    generator = np.random.default_rng(0)
    ranges = generator.normal(0, 3, (500, 2)).astype(np.float32).astype(np.float64)

    for low, high in (*ranges, (0.0, 0.0), (0.0, 1e-44), (-1.0, 0.0), (0.5, 2.0)):
        low, high = min(low, high), max(low, high)
        scale, zero_point = code_map(low, high, 255)
        assert (np.float32(scale), zero_point) == affine_parameters(low, high, np.uint8)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_is_that_of_onnxruntime_to_the_bit(bits: int) -> None:
    levels = 2**bits - 1
    fixed = FixedRounding(torch.tensor([0.0371]), levels // 3, levels)
    generator = torch.Generator().manual_seed(0)
    ties = (torch.arange(-300, 300) + 0.5) * fixed.scale
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(9.0)), torch.tensor([-0.0, 1e9])])
    numbers = torch.cat([near, torch.randn(5000, generator=generator) * 3])
    low, high = fixed.limits
    model = parse(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        agraph (float[N] x, float s, uint8 z, float low, float high) => (float[N] y)
        {{
            c = Clip(x, low, high) q = QuantizeLinear({"c" if bits < 8 else "x"}, s, z)
            y = DequantizeLinear(q, s, z)
        }}
    """)

    feed = {"x": numbers.numpy(), "low": np.array(low, "f"), "high": np.array(high, "f")}
    feed |= {"s": fixed.scale.numpy(), "z": fixed.zero_point.numpy()}
    (found,) = Session(model, Reference.AS_WRITTEN).run(feed).values()

    np.testing.assert_array_equal(fixed(numbers).numpy(), found)
    assert len(fixed.codes(numbers).unique()) == 2**bits
    assert fixed(torch.zeros(1)).item() == 0.0


def test_gradients_are_those_of_lsq_for_a_zero_point() -> None:
    rounding = InputRounding(4, learns=True)
    rounding.follow(-0.5, 1.0)
    rounding.watches = False
    numbers = torch.tensor([[-2.0, -0.31, 0.0, 0.26, 0.9, 3.0]], requires_grad=True)

    found = rounding(numbers)
    to_numbers, to_growth = torch.autograd.grad(found.sum(), (numbers, rounding.growth))

    scale, zero_point = code_map(-0.5, 1.0, 15)
    assert zero_point == 5
    v = numbers.detach() / np.float32(scale)
    within = (v > -5) & (v < 10)
    by_scale = torch.where(within, v.round() - v, v.clamp(-5, 10)).sum()
    assert torch.equal(to_numbers, within.float())
    expected = by_scale * scale * gradient_factor(6, 15)
    torch.testing.assert_close(to_growth.squeeze(), expected)
    torch.testing.assert_close(found, v.round().clamp(-5, 10) * np.float32(scale))


def test_ranges_follow_what_is_seen_and_scales_rest_meanwhile() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    options = Quantized("quantized", activations=8, min_elements=1)
    preparation = RoundedActivations(options)
    preparation.attach(module)
    rounding = module[0].get_submodule(NAME)
    batches = [torch.randn(8, 4) * size for size in (1.0, 3.0, 2.0)]

    assert torch.equal(rounding(batches[0]), batches[0]), "of nothing seen, nothing is rounded"
    rounding.seen = None
    low = high = 0.0
    for step, batch in enumerate(batches):
        preparation.advance(step, 100)
        module(batch[:5])
        module(batch[5:])
        (to_growth,) = torch.autograd.grad(module(batch).sum(), rounding.growth)
        assert not to_growth.any()
        preparation.gather()
        ends = float(batch.min()), float(batch.max())
        low, high = (
            ends if not step else (low + RATE * (ends[0] - low), high + RATE * (ends[1] - high))
        )
    assert float(rounding.low) == pytest.approx(low) and float(rounding.high) == pytest.approx(high)
    assert (float(rounding.start), int(rounding.zero_point)) == pytest.approx(
        code_map(low, high, 255)
    )

    preparation.advance(10, 100)
    before = rounding.start.clone()
    (to_growth,) = torch.autograd.grad(module(9 * batches[0]).sum(), rounding.growth)
    preparation.gather()
    assert to_growth.any() and torch.equal(rounding.start, before)


def test_what_is_never_called_is_not_rounded_in_the_end() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    preparation = RoundedActivations(Quantized("quantized", activations=8))
    preparation.attach(module)
    module[0](torch.randn(2, 4))
    preparation.gather()

    preparation.finish(module)

    assert isinstance(getattr(module[0], NAME), FixedRounding)
    assert not hasattr(module[1], NAME)
    assert module(torch.randn(3, 4)).shape == (3, 4)


# ------------------------------------------------------------------ from training to kernels


def _accuracy(path: Path, split: digits.Split) -> float:
    session = Session(path)
    (logits,) = session.run({session.inputs[0]: split.image}).values()
    return float((logits.argmax(1) == split.labels).mean())


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_the_optimized_model_computes_on_the_trained_codes(bits: int, tmp_path: Path) -> None:
    sections = {
        "data": {"factory": "graphopt_models.digits:samples", "batch_size": 32},
        "export": {"path": "exported.onnx"},
        "optimize": {"recipe": "int8", "benchmark": False},
        "training": {"epochs": 4},
    }

    result = train(config_of(table({**PREPARE, "activations": bits}, **sections), tmp_path))

    assert result.delivery.optimized is not None and result.best is not None
    model = graphopt.load(result.delivery.optimized)
    maps = [map_of(node) for node in model.graph if node.op_type == "QuantizeLinear"]
    assert {one.scale for one in maps if one is not None} == set(scales(result.module))
    assert None not in maps and len(scales(result.module)) == 3
    found = kernels(model, tmp_path)
    assert found["QLinearConv"] == 2 and found["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & found.keys()
    validation = digits.load().validation
    # A decision more or less: other codes at ties, and the sums of integer kernels.
    assert _accuracy(result.delivery.optimized, validation) == pytest.approx(
        result.best[0], abs=3 / len(validation.labels)
    )
    assert result.best[0] > 0.8
    with torch.no_grad():
        expected = result.module(torch.from_numpy(validation.image)).numpy()
    session = Session(result.delivery.optimized)
    (logits,) = session.run({session.inputs[0]: validation.image}).values()
    change = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert change < 0.01 * 2 ** (8 - bits)


def test_a_resumed_run_goes_on_with_its_ranges(tmp_path: Path) -> None:
    """Also from a step at which ranges are still watched."""
    checkpoint = {"folder": "run", "every_steps": 1, "keep": 99}
    given = config_of(table(PREPARE, checkpoint=checkpoint), tmp_path)
    unbroken = train(given)
    for name in ("step-00000001", "step-00000009"):
        (tmp_path / "run" / "latest").write_text(name)

        resumed = train(given, resume=True)

        assert resumed.losses == unbroken.losses[-len(resumed.losses) :]
        assert 0 < len(resumed.losses) < len(unbroken.losses)
        states = [result.module.state_dict() for result in (resumed, unbroken)]  # type: ignore[union-attr]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_accumulation_sees_whole_batches() -> None:
    found = []
    for parts in (1, 4):
        sections = {
            "model": {"factory": "test_activations:dense"},
            "training": {"epochs": 1, "accumulation": parts},
        }
        given = table({**PREPARE, "scales": "largest"}, **sections)
        found.append(scales(train(config_of(given)).module))

    assert len(found[0]) == 2
    # But for codes at ties; what a part of a batch shows is far less.
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


# ------------------------------------------------------------------ the check of an export


def _exported(tmp_path: Path) -> tuple[Path, Any, list[dict[str, Any]]]:
    path = tmp_path / "exported.onnx"
    given = table(PREPARE, training={"epochs": 1}, export={"path": str(path)})
    module = train(config_of(given, tmp_path)).module
    return path, module, [{"input": torch.from_numpy(digits.load().validation.image[:32])}]


def test_an_export_is_checked_at_every_code(tmp_path: Path) -> None:
    path, module, batches = _exported(tmp_path)

    checked = check(path, module, batches)

    assert checked.codes == 32 * (64 + 16 * 16 + 64) and checked.ties < 20
    rounding = module[3].get_submodule(NAME)
    assert isinstance(rounding, FixedRounding), "it is the module's own again"
    scale = rounding.scale.clone()
    rounding.scale.copy_(torch.nextafter(scale, torch.tensor(1.0)))
    with pytest.raises(ModelError, match="rounds 'relu' in another way than the module"):
        check(path, module, batches)
    rounding.scale.copy_(scale)
    with torch.no_grad():
        module[7].weight[3] *= 1.001
    with pytest.raises(ModelError, match="where activations are not rounded"):
        check(path, module, batches)


def test_codes_that_are_none_at_ties_are_told() -> None:
    place = FixedRounding(torch.tensor(0.5), 3, 255)
    numbers = torch.tensor([0.2500001, 1.0, 0.75])
    following = Following(place, "here")

    following.codes = [torch.tensor([3, 5, 4], dtype=torch.uint8)]
    assert following(numbers).tolist() == [0.0, 1.0, 0.5]
    assert (following.compared, following.ties) == (3, 2)

    following.codes = [torch.tensor([3, 6, 4], dtype=torch.uint8)]
    with pytest.raises(ModelError, match="1 of 3 numbers at 'here' to other codes"):
        following(numbers)


def test_a_model_that_does_not_round_where_the_module_does_is_told(tmp_path: Path) -> None:
    path, module, batches = _exported(tmp_path)
    module[5].add_module(NAME, FixedRounding(torch.tensor(0.1), 0, 255))

    with pytest.raises(ModelError, match=r"does not round as '5.input_rounding' of the module"):
        check(path, module, batches)


# ------------------------------------------------------------------ what cannot be


BAD: list[tuple[tuple[dict[str, Any], ...], str]] = [
    (({**PREPARE, "activations": 16},), "prepare.activations is 16; it must be"),
    (({**PREPARE, "activation": 8},), "has no key 'activation'; did you mean 'activations'"),
    (({"name": "masks", "activations": 8},), "has no key 'activations'"),
    ((PREPARE, PREPARE), "two 'quantized' with activations have '0' among their layers"),
    (({**PREPARE, "layers": ["4"]},), "'4' is no Linear, Conv or Embedding"),
]


@pytest.mark.parametrize(("prepare", "message"), BAD)
def test_what_cannot_be_rounded_is_told(prepare: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        for preparation in preparations_of(config_of(table(*prepare))):
            preparation.attach(net() if len(prepare) == 1 else MODULE)


MODULE = net()


def test_strategies_that_divide_modules_are_refused() -> None:
    given = table(PREPARE, strategy={"name": "fsdp"})

    with pytest.raises(ConfigError, match="the strategies single and ddp, not with fsdp"):
        preparations_of(config_of(given))


def test_an_embedding_reads_no_activation() -> None:
    with pytest.raises(ConfigError, match="leave none of them"):
        for preparation in preparations_of(config_of(table(PREPARE))):
            preparation.attach(lookup())


def test_the_exported_scale_is_an_initializer_of_the_module_s_name(tmp_path: Path) -> None:
    path, module, _ = _exported(tmp_path)
    model = graphopt.load(path)

    named = {
        name: constant_tensor(value)
        for name, value in model.graph.initializers.items()
        if NAME in name
    }

    assert set(named) == {f"{n}.{NAME}.{k}" for n in (0, 3, 7) for k in ("scale", "zero_point")}
    tensor = named[f"3.{NAME}.scale"]
    assert tensor is not None and tensor.dtype == ir.DataType.FLOAT
    assert float(tensor.numpy()) == float(module[3].get_submodule(NAME).scale)
