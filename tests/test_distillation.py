"""Losses against closed forms, teachers of both kinds, and what a student may not be told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import ConfigError

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("sklearn")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from graphopt.training import config_of, train  # noqa: E402
from graphopt.training import distillation_losses as losses  # noqa: E402
from graphopt.training.distillation import Distillation, labeled, objective_of  # noqa: E402
from graphopt.training.exporting import exported  # noqa: E402
from graphopt.training.features import adapter_of  # noqa: E402
from graphopt.training.teachers import ModuleTeacher, OnnxTeacher  # noqa: E402


def no_module() -> Any:
    return [1]


def logits(seed: int, *shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(width: int = 12, classes: int = 10) -> Any:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def noisy_teacher() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(net(), nn.Dropout(0.5))


# ------------------------------------------------------------------ losses


def test_hintons_loss_is_the_divergence_of_softened_probabilities() -> None:
    student, teacher = logits(0, 5, 4), logits(1, 5, 4)

    p, q = (z / 3.0 for z in (teacher, student))
    p, q = p.exp() / p.exp().sum(1, True), q.exp() / q.exp().sum(1, True)
    expected = 9.0 * (p * (p / q).log()).sum(1).mean()

    assert losses.hinton(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_gradient_at_high_temperature_is_that_of_the_squared_difference() -> None:
    """Hinton et al., section 2.1: (z - v) / N for logits of mean 0, with the factor T^2."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in (logits(0, 1, 6), logits(1, 1, 6)))
    student.requires_grad_()

    (gradient,) = torch.autograd.grad(losses.hinton(student, teacher, 1e5), student)

    torch.testing.assert_close(gradient, (student.detach() - teacher) / 6, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_two_parts_of_dkd_make_up_hintons_loss(temperature: float) -> None:
    """KL = TCKD + (1 - p_t) NCKD, for each sample."""
    student, teacher, target = logits(0, 1, 7), logits(1, 1, 7), torch.tensor([2])
    rest = 1 - (teacher / temperature).softmax(1)[0, 2].item()

    parts = losses.decoupled(student, teacher, target, temperature, 1.0, rest)

    whole = losses.hinton(student, teacher, temperature)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_dkd_weighs_its_parts() -> None:
    student, teacher, target = logits(0, 4, 5), logits(1, 4, 5), torch.tensor([0, 1, 4, 4])

    def of(alpha: float, beta: float) -> float:
        return losses.decoupled(student, teacher, target, 2.0, alpha, beta).item()  # type: ignore[no-any-return]

    assert of(2.0, 3.0) == pytest.approx(2 * of(1.0, 0.0) + 3 * of(0.0, 1.0))
    # Among the others, the logit of the target has no say.
    moved = student + 5.0 * functional.one_hot(target, 5)
    assert losses.decoupled(moved, teacher, target, 2.0, 0.0, 1.0).item() == pytest.approx(
        of(0.0, 1.0)
    )


def test_positions_count_like_samples() -> None:
    student, teacher, target = logits(0, 2, 5, 3), logits(1, 2, 5, 3), torch.ones(2, 3).long()
    rows = [z.movedim(1, 2).reshape(6, 5) for z in (student, teacher)]

    for one, other in (
        (losses.hinton(student, teacher, 2.0), losses.hinton(rows[0], rows[1], 2.0)),
        (
            losses.decoupled(student, teacher, target, 2.0, 1.0, 8.0),
            losses.decoupled(rows[0], rows[1], target.reshape(6), 2.0, 1.0, 8.0),
        ),
    ):
        assert one.item() == pytest.approx(other.item(), rel=1e-12)


def test_standardized_logits_do_not_depend_on_range_and_offset() -> None:
    student = logits(0, 3, 8)

    scaled = losses.standardized(7.0 * student + 2.0)

    torch.testing.assert_close(scaled, losses.standardized(student), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scaled.var(1, correction=0), torch.ones(3).double())


def test_features_are_compared_relative_to_the_teachers_size() -> None:
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[2.0, 0.0], [1.0, 3.0]])

    assert losses.normalized_squared(student, teacher).item() == pytest.approx((1 / 4 + 4 / 10) / 2)
    assert losses.normalized_squared(9 * student, 9 * teacher).item() == pytest.approx(0.325)


def test_a_sample_without_a_label_adds_nothing_and_counts() -> None:
    outputs, targets = logits(0, 4, 5), torch.tensor([1, -100, 3, -100])

    loss = labeled(functional.cross_entropy, outputs, targets)

    known = functional.cross_entropy(outputs[[0, 2]], targets[[0, 2]])
    assert loss.item() == pytest.approx(known.item() / 2)
    nothing = labeled(functional.cross_entropy, outputs, torch.full((4,), -100))
    assert nothing.item() == 0.0


# ------------------------------------------------------------------ adapters


def test_an_adapter_maps_channels_and_compares_images_at_the_smaller_size() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    adapter = adapter_of("layer", student, teacher)

    pooled = functional.avg_pool2d(student, 2)
    kernel = adapter.map.weight[:, :, None, None]
    mapped = functional.conv2d(pooled, kernel, adapter.map.bias)
    expected = losses.normalized_squared(mapped, teacher)

    torch.testing.assert_close(adapter(student, teacher), expected)


def test_an_adapter_finds_a_linear_map_that_is_there() -> None:
    torch.manual_seed(0)
    student = torch.randn(64, 7, 4)
    teacher = student @ torch.randn(4, 6) + 1.0
    adapter = adapter_of("layer", student, teacher)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        adapter(student, teacher).backward()
        optimizer.step()

    assert adapter(student, teacher).item() < 1e-3


def test_features_of_unlike_shapes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'layer' gives shape \[2, 3\] and the teacher \[2, 3, 4"
    ):
        adapter_of("layer", torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))


# ------------------------------------------------------------------ teachers


def test_a_teacher_is_in_evaluation_mode_and_gives_no_gradients() -> None:
    teacher = ModuleTeacher(noisy_teacher(), ["0.1"], torch.device("cpu"))
    images = torch.randn(3, 1, 8, 8, requires_grad=True)

    first, second = teacher((images,)), teacher((images,))

    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=0)
    assert not first.logits.requires_grad and not first.features["0.1"].requires_grad
    assert first.features["0.1"].shape == (3, 12, 8, 8)


def test_an_onnx_teacher_says_what_the_module_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, images = net(), torch.randn(3, 1, 8, 8)
    model = exported(module, (images,), ["image"], [], {"image": {0: "batch"}}, 18)
    hidden = next(n.outputs[0].name for n in model.graph if n.op_type == "Relu")
    path = tmp_path / "teacher.onnx"
    import onnx_ir as ir

    ir.save(model, path)

    lesson = OnnxTeacher(path, [hidden])((images[:2],))

    with torch.no_grad():
        torch.testing.assert_close(lesson.logits, module(images[:2]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lesson.features[hidden], module[:2](images[:2]))


# ------------------------------------------------------------------ of a configuration


def table(**distill: Any) -> dict[str, Any]:
    return {
        "model": {"factory": "test_distillation:net", "options": {"width": 4}},
        "data": {"factory": "graphopt_models.digits:samples"},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"epochs": 1},
        "distill": {"teacher": "test_distillation:noisy_teacher", **distill},
    }


def of(table: dict[str, Any], folder: Path = Path()) -> Distillation:
    torch.manual_seed(0)
    images = (torch.zeros(2, 1, 8, 8),)
    config = config_of(table, folder)
    return objective_of(config, functional.cross_entropy, net(4), images, torch.device("cpu"))


def test_the_loss_is_the_weighed_sum_of_labels_logits_and_features() -> None:
    objective = of(
        table(
            label_weight=0.25,
            teacher_weight=2.0,
            feature_weight=3.0,
            temperature=5.0,
            features={"1": "0.1"},
        )
    )
    torch.manual_seed(1)
    student, images, targets = net(4), torch.randn(6, 1, 8, 8), torch.arange(6)
    (adapter,) = objective._adapters.values()
    teacher = ModuleTeacher(noisy_teacher(), ["0.1"], torch.device("cpu"))((images,))

    outputs = student(images)
    expected = (
        0.25 * functional.cross_entropy(outputs, targets)
        + 2.0 * losses.hinton(outputs, teacher.logits, 5.0)
        + 3.0 * adapter(student[:2](images), teacher.features["0.1"])
    )

    loss = objective(student, (images,), targets)
    torch.testing.assert_close(loss, expected)
    assert len(list(objective.parameters())) == 2
    loss.backward()
    assert all(p.grad is not None for p in (*student.parameters(), *adapter.parameters()))


def test_without_targets_the_teacher_alone_is_learnt_from() -> None:
    objective = of(table(label_weight=1.0, teacher_weight=0.5, loss="mse"))
    torch.manual_seed(1)
    student, images = net(4), torch.randn(6, 1, 8, 8)
    lesson = ModuleTeacher(noisy_teacher(), [], torch.device("cpu"))((images,))

    expected = 0.5 * functional.mse_loss(student(images), lesson.logits)

    torch.testing.assert_close(objective(student, (images,), None), expected)
    torch.testing.assert_close(objective.on_outputs(student(images), (images,), None), expected)


@pytest.mark.parametrize(
    "distill",
    [
        {},
        {"loss": "dkd", "standardize": True, "label_weight": 1.0},
        {"loss": "mse", "label_weight": 0.0, "features": {"1": "0.1"}},
    ],
)
def test_a_student_comes_near_to_its_teacher(distill: dict[str, Any]) -> None:
    given = table(**distill)
    given["training"]["epochs"] = 3

    trained = train(config_of(given))

    assert trained.module is not None
    assert trained.losses[-1] < 0.95 * trained.losses[0]
    assert not [name for name, _ in trained.module.named_parameters() if "adapter" in name]


def test_a_student_learns_from_an_onnx_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.zeros(2, 1, 8, 8)
    model = exported(noisy_teacher(), (images,), ["image"], [], {"image": {0: "batch"}}, 18)
    import onnx_ir as ir

    ir.save(model, tmp_path / "teacher.onnx")
    by_file = table(teacher="teacher.onnx", label_weight=0.0)

    from_file = train(config_of(by_file, tmp_path)).losses
    from_module = train(config_of(table(label_weight=0.0))).losses

    np.testing.assert_allclose(from_file, from_module, rtol=1e-4, atol=1e-6)


def test_weights_of_a_teacher_are_read_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(9)
    module, images = noisy_teacher(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    torch.save(module.state_dict(), tmp_path / "teacher.pt")

    objective = of(table(weights="teacher.pt"), tmp_path)

    with torch.no_grad():
        torch.testing.assert_close(objective._teacher((images,)).logits, module.eval()(images))


def save_other(folder: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), folder / "other.pt")
    (folder / "text.pt").write_text("no state")
    (folder / "text.onnx").write_text("no model")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"loss": "hintom"}, "distill.loss is 'hintom'; it must be one of hinton, dkd, mse"),
    ({"temperatur": 1.0}, "has no key 'temperatur'; did you mean 'temperature'"),
    ({"temperature": 0.0}, "distill.temperature is 0.0; it must be"),
    ({"label_weight": 0.0, "teacher_weight": 0.0}, "nothing would be learnt"),
    ({"teacher": "nowhere.onnx"}, "no such file"),
    ({"teacher": "text.onnx"}, "distill.teacher"),
    ({"teacher": "test_distillation:nett"}, "did you mean 'net'"),
    ({"teacher": "test_distillation:no_module"}, "must return a torch.nn"),
    ({"options": {"width": 4}}, "distill.teacher: its options do not fit"),
    ({"teacher": "test_distillation:net", "options": {"classes": 7}}, r"of \[2, 7\]; they must be"),
    ({"weights": "nowhere.pt"}, "nowhere.pt cannot be read"),
    ({"weights": "text.pt"}, "holds no state of a module"),
    ({"weights": "other.pt"}, "is it of another module"),
    ({"teacher": "text.onnx", "weights": "other.pt"}, "an ONNX file has its weights"),
    ({"features": {"9": "0.1"}}, "the student has no module '9'"),
    ({"features": {"1": "0.9"}}, "the teacher has no module '0.9'"),
    ({"features": {"1": "0.4"}}, "'1' gives shape"),
]


@pytest.mark.parametrize(("distill", "message"), BAD)
def test_what_cannot_be_learnt_is_told(
    distill: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_other(tmp_path)

    with pytest.raises(ConfigError, match=message):
        of(table(**distill), tmp_path)


def test_a_pipeline_learns_from_outputs_alone() -> None:
    given = {**table(features={"1": "0.1"}), "strategy": {"name": "pipeline", "stages": ["4"]}}

    with pytest.raises(ConfigError, match=r"distill\.features cannot be learnt by a pipeline"):
        of(given)


def test_dkd_needs_labels() -> None:
    objective = of(table(loss="dkd"))
    images = torch.zeros(2, 1, 8, 8)

    for targets in (None, torch.tensor([1, -100])):
        with pytest.raises(ConfigError, match="samples without a label; use 'hinton'"):
            objective.on_outputs(net(4)(images), (images,), targets)
    assert math.isfinite(objective(net(4), (images,), torch.tensor([1, 2])).item())
