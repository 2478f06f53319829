"""Weights that are trained in a form: what a step does, what stays, and what passes make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt.code_fields import fields_of
from graphopt.errors import ConfigError
from graphopt.runtime import Session

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("sklearn")

from torch import nn  # noqa: E402

from graphopt.training import config_of, train  # noqa: E402
from graphopt.training.codebooks import Attended, clustered, nearest, soft_means  # noqa: E402
from graphopt.training.grids import Grid, gradient_factor, rounded  # noqa: E402
from graphopt.training.masking import Sparsity, largest  # noqa: E402
from graphopt.training.preparations import preparation_of, preparations_of  # noqa: E402
from graphopt.training.prepared_weights import in_half, straight_through  # noqa: E402
from graphopt_models import digits  # noqa: E402


def mlp(width: int = 64) -> Any:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def cnn(norm: bool = True) -> Any:
    """Convolutions with batch normalizations that scale and turn the signs of channels."""

    def block(inputs: int, outputs: int, kernel: int) -> list[Any]:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        if not norm:
            return [convolution, nn.ReLU()]
        normalization = nn.BatchNorm2d(outputs)
        nn.init.uniform_(normalization.weight, -2, 2)
        return [convolution, normalization, nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 3),
        *block(16, 24, 3),
        *block(24, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def pruned() -> Any:
    module = mlp()
    with torch.no_grad():
        module[1].weight.mul_(torch.rand(64, 64) > 0.75)
        module[3].weight.mul_(torch.rand(10, 64) > 0.5)
    return module


def tied() -> Any:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64))
    module[2].weight = module[1].weight
    return module


def table(*prepare: dict[str, Any], factory: str = "mlp", **options: Any) -> dict[str, Any]:
    return {
        "model": {"factory": f"test_preparations:{factory}", "options": options},
        "data": {"factory": "graphopt_models.digits:samples"},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
        "training": {"epochs": 2},
        "prepare": list(prepare),
    }


def trained(*prepare: dict[str, Any], factory: str = "mlp", **options: Any) -> Any:
    return train(config_of(table(*prepare, factory=factory, **options))).module


def weights(module: Any) -> list[Any]:
    return [p.detach() for n, p in module.named_parameters() if n.endswith("weight") and p.ndim > 1]


# ------------------------------------------------------------------ gradients


def test_straight_through_gives_exactly_the_first_with_the_gradient_of_the_second() -> None:
    soft = torch.randn(1000, requires_grad=True)
    hard = torch.randn(1000)

    found = straight_through(hard, soft * 3)
    (gradient,) = torch.autograd.grad(found.sum(), soft)

    assert torch.equal(found, hard)
    assert torch.equal(gradient, torch.full((1000,), 3.0))


def test_gradients_to_a_step_size_are_those_of_lsq() -> None:
    """Esser et al., equation 3: round(v) - v within the range, and its bounds beyond."""
    weight = torch.tensor([[-1.7, -0.26, 0.04, 0.33, 0.9, 5.0]], requires_grad=True)
    step = torch.tensor([[0.25]], requires_grad=True)

    found = rounded(weight, step, -4, 3)
    to_weight, to_step = torch.autograd.grad(found.sum(), (weight, step))

    v = (weight / step).detach()
    within = (v > -4) & (v < 3)
    expected = torch.where(within, v.round() - v, v.clamp(-4, 3)).sum()
    assert found.tolist() == [[-1.0, -0.25, 0.0, 0.25, 0.75, 0.75]]
    torch.testing.assert_close(to_step.squeeze(), expected)
    assert to_weight.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0, 0.0]]


def test_the_gradient_of_growth_is_that_of_the_step_size_balanced() -> None:
    """growth moves s by ds = s dg; LSQ scales its gradient by 1 / sqrt(N Q)."""
    torch.manual_seed(0)
    weight = torch.randn(3, 20)
    grid = Grid(weight, 4, 0, learns=True)

    (found,) = torch.autograd.grad((grid(weight) * torch.arange(20.0)).sum(), grid.growth)

    scales = in_half(grid.start).requires_grad_()
    by_hand = (rounded(weight, scales, -8, 7) * torch.arange(20.0)).sum()
    (to_scales,) = torch.autograd.grad(by_hand, scales)
    torch.testing.assert_close(found, to_scales * scales.detach() * gradient_factor(20, 7))
    assert gradient_factor(20, 7) == pytest.approx(1 / np.sqrt(140))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_numbers_of_a_grid_are_exact_products(bits: Any) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(16, 5, 3, 3)
    grid = Grid(weight, bits, 0, learns=True)
    with torch.no_grad():
        grid.growth.uniform_(-1, 1)

    numbers = grid(weight).detach().flatten(1).double()
    scales = in_half(grid.start * grid.growth.exp()).detach().double()
    integers = numbers / scales

    assert torch.equal(integers, integers.round())
    assert integers.min() >= -(2 ** (bits - 1)) and integers.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(scales, scales.half().double())


def test_the_closest_scales_are_closer_than_those_of_the_largest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)

    errors = [
        (Grid(weight, 3, 0, learns)(weight) - weight).square().mean().item()
        for learns in (True, False)
    ]

    assert errors[0] < 0.9 * errors[1]


def test_dkm_becomes_k_means_as_its_temperature_falls() -> None:
    torch.manual_seed(0)
    numbers, codebook = torch.randn(500), torch.linspace(-2, 2, 8)

    soft = soft_means(numbers, codebook, torch.tensor(1e-6))

    codes = (numbers[:, None] - codebook).abs().argmin(1)
    means = torch.stack([numbers[codes == k].mean() for k in range(8)])
    torch.testing.assert_close(soft, means)


def test_dkm_gives_gradients_to_all_numbers_and_hard_ones_in_evaluation() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 30, requires_grad=True)
    form = Attended(weight.detach(), 2, False, 0.5)

    (gradient,) = torch.autograd.grad(form(weight).square().sum(), weight)
    hard = form.eval()(weight)

    assert (gradient != 0).all()
    assert len(hard.unique()) == 4
    assert torch.equal(hard, form.codebook[nearest(weight.flatten(), form.codebook)].view(20, 30))


def test_k_means_finds_clusters_that_are_apart() -> None:
    torch.manual_seed(0)
    centers = torch.tensor([-5.0, -1.0, 0.5, 3.0])
    numbers = (centers[:, None] + 0.01 * torch.randn(4, 50)).flatten()

    torch.testing.assert_close(clustered(numbers, 4), numbers.view(4, 50).mean(1))


def test_binary_weights_are_the_closest_signs_with_one_scale() -> None:
    """XNOR-Net: the scale is the mean magnitude; beyond the clip no gradient passes the sign."""
    preparation = preparation_of({"name": "binary", "min_elements": 1})
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.5, -0.25, 0.0, 1.25], [3.0, -3.0, 3.0, -3.0]]))
    preparation.attach(module)

    assert module[0].weight.tolist() == [[0.5, -0.5, 0.5, 0.5], [3.0, -3.0, 3.0, -3.0]]
    module[0].weight[1, 0].backward()
    # By the sign nothing, beyond the clip; by the scale 1/4 of the sign of each.
    gradient = module[0].parametrizations.weight.original.grad
    assert gradient[1].tolist() == [0.25, -0.25, 0.25, -0.25]


# ------------------------------------------------------------------ masks


MASKS: list[tuple[dict[str, Any], str]] = [
    ({"name": "masks"}, "pruned"),
    ({"name": "masks", "sparsity": 0.8}, "mlp"),
    ({"name": "masks", "sparsity": 0.8, "scope": "global"}, "mlp"),
    ({"name": "masks", "pattern": "2:4"}, "mlp"),
]


@pytest.mark.parametrize(("prepare", "factory"), MASKS)
def test_zeros_stay_zero_under_momentum_and_weight_decay(
    prepare: dict[str, Any], factory: str
) -> None:
    torch.manual_seed(0)
    before = {"mlp": mlp, "pruned": pruned}[factory]()
    preparation = preparation_of(prepare)
    preparation.attach(before)
    masks = [layer.weight.detach() != 0 for layer in (before[1], before[3])]

    found = weights(trained(prepare, factory=factory))

    for mask, weight in zip(masks, found, strict=True):
        assert 0.1 < mask.float().mean() < 0.9
        assert not weight[~mask].any()
        assert not torch.signbit(weight[~mask]).any()
        assert weight[mask].all()


def test_a_pattern_keeps_the_largest_of_each_group() -> None:
    module = nn.Sequential(nn.Conv2d(8, 4, 3))
    before = module[0].weight.detach().clone()
    preparation = preparation_of({"name": "masks", "pattern": "1:4", "min_elements": 1})
    preparation.attach(module)
    preparation.finish(module)

    groups = module[0].weight.detach().movedim(1, -1).reshape(4, 3, 3, 2, 4)
    assert ((groups != 0).sum(-1) == 1).all()
    largest = before.movedim(1, -1).reshape(4, 3, 3, 2, 4).abs().max(-1).values
    assert torch.equal(groups.abs().max(-1).values, largest)


def test_sparsity_grows_by_the_cube() -> None:
    options = Sparsity("sparsity", sparsity=0.8, begin=0.1, end=0.6, every_steps=1)

    assert options.share(5, 101) == 0.0
    assert options.share(10, 101) == 0.0
    # Zhu and Gupta, equation 1, half way between begin and end.
    assert options.share(35, 101) == pytest.approx(0.8 + (0 - 0.8) * (1 - 0.5) ** 3)
    assert options.share(60, 101) == options.share(100, 101) == 0.8
    assert not options.is_settled(60, 101) and options.is_settled(61, 101)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsity_is_reached_and_zeros_never_come_back(scope: str) -> None:
    preparation = preparation_of(
        {"name": "sparsity", "sparsity": 0.7, "scope": scope, "every_steps": 3}
    )
    torch.manual_seed(0)
    module = mlp()
    preparation.attach(module)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    seen, zeros = 0, [torch.zeros_like(w, dtype=torch.bool) for w in _now(module)]
    for step in range(40):
        preparation.advance(step, 40)
        optimizer.zero_grad()
        module(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        now = [w == 0 for w in _now(module)]
        assert all((new | ~old).all() for old, new in zip(zeros, now, strict=True))
        zeros, seen = now, seen + (sum(int(z.sum()) for z in now) > 0)
    preparation.finish(module)

    shares = [(w == 0).float().mean().item() for w in weights(module)]
    total = sum(int((w == 0).sum()) for w in weights(module))
    assert total == (round(0.7 * 4096) + round(0.7 * 640) if scope == "layer" else 3315)
    assert seen > 20
    assert (shares[0] == pytest.approx(shares[1], abs=1e-3)) == (scope == "layer")


def _now(module: Any) -> list[Any]:
    return [module[1].weight.detach(), module[3].weight.detach()]


def test_the_largest_magnitudes_are_kept() -> None:
    one, other = torch.tensor([[3.0, -1.0], [0.5, -4.0]]), torch.tensor([10.0, 20.0])

    assert largest([one], 0.5, "layer")[0].tolist() == [[True, False], [False, True]]
    kept = largest([one, other], 0.5, "global")
    assert [k.tolist() for k in kept] == [[[False, False], [False, True]], [True, True]]


def test_an_epoch_before_the_zeros_are_there_is_not_the_best() -> None:
    given = table({"name": "sparsity", "sparsity": 0.95, "end": 0.7})
    given["training"]["epochs"] = 4

    found = train(config_of(given))

    assert found.best is not None and found.best[1] > 2
    assert (weights(found.module)[0] == 0).float().mean() == pytest.approx(0.95, abs=1e-3)


# ------------------------------------------------------------------ what is left in the end


def test_forms_of_one_weight_are_applied_in_order() -> None:
    module = trained(
        {"name": "masks", "sparsity": 0.6}, {"name": "quantized", "bits": 4, "layers": ["1"]}
    )

    first, second = weights(module)
    assert (first == 0).float().mean() >= 0.6
    assert max(len(row.unique()) for row in first) <= 16
    assert len(second.unique()) > 100


@pytest.mark.parametrize("method", ["dkm", "straight-through"])
def test_a_codebook_keeps_zeros_apart(method: str) -> None:
    module = trained(
        {"name": "masks", "sparsity": 0.6},
        {"name": "codebook", "bits": 2, "method": method, "keep_zeros": True},
    )

    for weight in weights(module):
        assert (weight == 0).float().mean() == pytest.approx(0.6, abs=1e-3)
        assert len(weight.unique()) <= 4


def test_parametrizations_are_gone_in_the_end() -> None:
    module = trained({"name": "quantized", "bits": 4}, {"name": "masks", "sparsity": 0.5})

    assert [name for name, _ in module.named_parameters()] == [
        "1.bias",
        "1.weight",
        "3.bias",
        "3.weight",
    ]
    assert not list(module.buffers())


def test_a_resumed_run_goes_on_with_its_forms(tmp_path: Path) -> None:
    prepare = (
        {"name": "sparsity", "sparsity": 0.7, "layers": ["1"]},
        {"name": "codebook", "bits": 3, "layers": ["3"]},
    )
    whole = table(*prepare)
    first = {**whole, "checkpoint": {"folder": "run", "every_steps": 10, "keep": 9}}
    unbroken = train(config_of(first, tmp_path))
    # As if it had been killed after the first checkpoint.
    newest = sorted((tmp_path / "run").glob("step*"))[0].name
    (tmp_path / "run" / "latest").write_text(newest)

    resumed = train(config_of(first, tmp_path), resume=True)

    assert 0 < len(resumed.losses) < len(unbroken.losses)
    assert resumed.losses == unbroken.losses[-len(resumed.losses) :]
    for one, other in zip(weights(resumed.module), weights(unbroken.module), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------ hand-over to the passes


def _images(count: int) -> Iterator[dict[str, np.ndarray]]:
    return ({"input": image[None]} for image in digits.load().validation.image[:count])


def _decoded(model: Path, names: list[str], feed: np.ndarray) -> dict[str, np.ndarray]:
    """Values of a model and its output, as onnxruntime computes them."""
    loaded = graphopt.load(model).clone()
    made = {v.name: v for node in loaded.graph for v in node.outputs}
    kept = {n: v.const_value for n, v in loaded.graph.initializers.items()}
    loaded.graph.outputs.extend(made[name] for name in names if name in made)
    session = Session(loaded)
    found = session.run({session.inputs[0]: feed})
    plain = {n: kept[n].numpy() for n in names if n not in made}  # type: ignore[union-attr]
    return {**found, **plain}


HANDED: list[tuple[dict[str, Any], str, float]] = [
    ({"name": "quantized", "bits": 8}, "quantize-weights", 8.0),
    ({"name": "quantized", "bits": 4}, "quantize-weights{bits=4}", 4.0),
    ({"name": "quantized", "bits": 3}, "quantize-weights{bits=3}", 3.2),
    ({"name": "quantized", "bits": 2}, "quantize-weights{bits=2}", 2.0),
    ({"name": "codebook", "bits": 4}, "cluster-weights{clusters=16,min-elements=256}", 4.0),
    ({"name": "codebook", "bits": 3}, "pack-constants", 3.2),
    ({"name": "binary"}, "quantize-binary{bases=1,layers=all,min-elements=256}", 1.0),
    ({"name": "masks", "sparsity": 0.8}, "pack-zeros", 7.4),
    ({"name": "masks", "sparsity": 0.8}, "prune-magnitude{sparsity=0.8},pack-zeros", 7.4),
]
"""With what each number then takes in the file, in bits."""

TABLES = {field.table().shape for count in range(2, 257) for field in fields_of(count)}
"""Of digits, by which bytes become numbers: there once, whatever the size of the weights."""


def _stored_bytes(path: Path) -> int:
    """Of all constants of a model but those tables."""
    found = [v.const_value for v in graphopt.load(path).graph.initializers.values()]
    return sum(t.nbytes for t in found if t is not None and tuple(t.shape) not in TABLES)


def _handed_over(
    prepare: dict[str, Any], passes: str, tmp_path: Path, samples: int, **model: Any
) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray], list[int]]:
    """Train, export, run basic and the passes: the module, all weights before and after, bytes."""
    given = table(prepare, **model)
    given["export"] = {"path": "exported.onnx"}
    module = train(config_of(given, tmp_path)).module
    paths = [tmp_path / name for name in ("exported.onnx", "basic.onnx", "packed.onnx")]
    graphopt.optimize(paths[0], recipe="basic", benchmark=False).save(paths[1])
    run = graphopt.optimize(
        paths[1],
        passes=passes,
        samples=list(_images(samples)) if samples else None,
        benchmark=False,
        strict=True,
    )
    run.save(paths[2])
    plain = graphopt.load(paths[1])
    names = [
        name
        for name, value in plain.graph.initializers.items()
        if value.const_value is not None and len(value.const_value.shape) > 1
    ]
    feed = digits.load().test.image[:50]
    before, after = (_decoded(path, names, feed) for path in paths[1:])
    return module, before, after, [_stored_bytes(path) for path in paths]


@pytest.mark.parametrize("samples", [pytest.param(0, marks=pytest.mark.slow), 16])
@pytest.mark.parametrize(("prepare", "passes", "bits"), HANDED)
def test_passes_give_the_trained_numbers_back_bit_for_bit(
    prepare: dict[str, Any], passes: str, bits: float, samples: int, tmp_path: Path
) -> None:
    module, before, after, sizes = _handed_over(prepare, passes, tmp_path, samples)

    handed = {name: after[name] for name in ("1.weight", "3.weight")}
    for weight, name in zip(weights(module), handed, strict=True):
        np.testing.assert_array_equal(handed[name], weight.numpy(), strict=True)
    assert before.keys() == after.keys()
    for name, output in before.items():
        np.testing.assert_allclose(after[name], output, rtol=1e-5, atol=1e-5)
    # float16 scales of outputs, float32 biases, and codebooks.
    assert sizes[2] <= bits / 8 * (64 * 64 + 64 * 10) + 6 * (64 + 10) + 256


@pytest.mark.parametrize(("prepare", "passes", "bits"), HANDED)
def test_batch_normalizations_move_grids_and_codebooks_and_lose_none(
    prepare: dict[str, Any], passes: str, bits: float, tmp_path: Path
) -> None:
    if passes == "pack-constants":
        pytest.skip("whose numbers are bit for bit, and of rows of many scales they are many")
    _, before, after, sizes = _handed_over(prepare, passes, tmp_path, 16, factory="cnn")

    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-6, atol=1e-5)
    # float32 scales of outputs, and the small first weight as it was.
    numbers = 24 * 16 * 9 + 32 * 24 + 10 * 32
    assert sizes[2] <= bits / 8 * numbers + 8 * (16 + 24 + 32 + 10) + 4 * 16 * 9 + 768


def test_blocks_are_found_again(tmp_path: Path) -> None:
    prepare = {"name": "quantized", "bits": 4, "block": 16}

    module, _, after, _ = _handed_over(prepare, "quantize-weights{bits=4,block=16}", tmp_path, 16)

    for weight, name in zip(weights(module), ("1.weight", "3.weight"), strict=True):
        assert max(len(block.unique()) for block in weight.reshape(-1, 16)) <= 16
        np.testing.assert_array_equal(after[name], weight.numpy(), strict=True)


# ------------------------------------------------------------------ what cannot be


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "mlp", r"\[\[prepare\]\] needs its key 'name'"),
    ({"name": "mask"}, "mlp", "no preparation; did you mean 'masks'"),
    ({"name": 3}, "mlp", "prepare.name is 3"),
    ({"name": "quantized", "bits": 7}, "mlp", "prepare.bits is 7; it must be one of 8, 6, 5"),
    ({"name": "quantized", "bit": 4}, "mlp", "has no key 'bit'; did you mean 'bits'"),
    ({"name": "codebook", "bits": 9}, "mlp", "prepare.bits is 9; it must be"),
    ({"name": "masks"}, "mlp", "keeps zeros, and the chosen weights have none"),
    ({"name": "masks", "pattern": "4:2"}, "mlp", "it must be N:M"),
    ({"name": "masks", "pattern": "2:4", "sparsity": 0.5}, "mlp", "sparsity or pattern, not both"),
    ({"name": "masks", "pattern": "2:5"}, "mlp", "'1' has 64 inputs, which are no groups of 5"),
    ({"name": "sparsity", "sparsity": 1.5}, "mlp", "prepare.sparsity is 1.5; it must be"),
    ({"name": "sparsity", "begin": 0.8, "end": 0.2}, "mlp", "the end comes after"),
    ({"name": "binary", "layers": ["head"]}, "mlp", "'head' is no Linear, Conv or Embedding"),
    ({"name": "binary", "skip": ["*"]}, "mlp", "has no weight"),
    ({"name": "binary", "min_elements": 9999}, "mlp", "lower min_elements"),
    ({"name": "binary"}, "tied", r"weight of '1' is shared, as 1\.weight and 2\.weight"),
]


@pytest.mark.parametrize(("prepare", "factory", "message"), BAD)
def test_what_cannot_be_prepared_is_told(
    prepare: dict[str, Any], factory: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config_of(table(prepare, factory=factory)))


def test_no_process_of_a_pipeline_chooses_among_all_weights() -> None:
    given = table({"name": "sparsity", "scope": "global"})
    given["strategy"] = {"name": "pipeline", "stages": ["3"]}

    with pytest.raises(ConfigError, match="no process of a pipeline has all weights; use 'layer'"):
        preparations_of(config_of(given))
