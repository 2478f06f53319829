"""Training in one process: what a configuration may say, and what comes of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

import training_runs  # noqa: E402
from torch import nn  # noqa: E402
from training_runs import POSITIONS, WIDTH, Points, record_of, table, write_toml  # noqa: E402

from graphopt import cli  # noqa: E402
from graphopt.errors import ConfigError, GraphoptError, ModelError, TrainingFailed  # noqa: E402
from graphopt.runtime import Reference, Session  # noqa: E402
from graphopt.training import Trained, config_of, read_config, train  # noqa: E402
from graphopt.training.batches import order_of, shares_of  # noqa: E402
from graphopt.training.config import Schedule  # noqa: E402
from graphopt.training.objectives import cross_entropy  # noqa: E402
from graphopt.training.optimizers import learning_rate_factor  # noqa: E402
from graphopt.training.precision import FIRST_SCALE, GROWTH_STEPS, LossScale  # noqa: E402

MLP = {"factory": "training_runs:Mlp"}
DIGITS = Path(__file__).parent.parent / "models" / "digits_cnn.toml"


def _train(folder: Path = Path(), **sections: Any) -> Trained:
    return train(config_of(table(**sections), folder))


# ------------------------------------------------------------------ factories of the tests


class Unexportable(training_runs.Mlp):
    """Its forward depends on values, which no exported graph can follow."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features * 2 if features.sum() > 0 else features)


class Two(nn.Module):
    """Takes two inputs and returns two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layer(left), self.layer(right)


class Pairs:
    """Samples of two inputs, as arrays."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[tuple[np.ndarray, np.ndarray], np.float32]:
        features = np.full(WIDTH, index / 10, np.float32)
        return (features, -features), np.float32(index)


def pairs() -> tuple[Pairs, None]:
    return Pairs(), None


def difference(outputs: tuple[torch.Tensor, ...], targets: torch.Tensor) -> torch.Tensor:
    left, right = outputs
    return ((left - right)[:, 0] - targets).square().mean()


def without_targets() -> tuple[list[Any], None]:
    return [(torch.zeros(POSITIONS, WIDTH), None)] * 4, None


def broken() -> None:
    raise ValueError("this factory is broken")


def worse_and_worse(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """A metric that is best when it is asked first."""
    worse_and_worse.asked += 1  # type: ignore[attr-defined]
    return -float(worse_and_worse.asked)  # type: ignore[attr-defined]


def padded() -> tuple[list[Any], list[Any]]:
    """Sequences with a class for each position, of which more and more have none."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, WIDTH, 5, generator=generator)
    targets = features[:, :3].argmax(1)
    for number, target in enumerate(targets):
        target[number % 6 :] = -100
    samples = list(zip(features, targets, strict=True))
    return samples, samples[:6]


def raising() -> tuple[Points, None]:
    class Raising(Points):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if index == 40:
                raise KeyError("no such file")
            return super().__getitem__(index)

    return Raising(50, seed=0), None


def uneven() -> tuple[list[Any], None]:
    return [(torch.zeros(3 if i == 7 else 4), torch.tensor(0)) for i in range(8)], None


def several_targets() -> tuple[list[Any], None]:
    return [(torch.zeros(3), (1, 2))] * 4, None


def named_inputs() -> tuple[list[Any], None]:
    return [({"features": torch.zeros(3)}, 1)] * 4, None


def one_number(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets).reshape(1)


def single_rows() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(POSITIONS * WIDTH), nn.Linear(32, 3))


def never(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """A metric that has a value from the second epoch on."""
    never.asked += 1  # type: ignore[attr-defined]
    return math.nan if never.asked < 3 else 1.0  # type: ignore[attr-defined]


def no_mean(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def constant(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.detach().mean()


def frozen() -> nn.Module:
    return training_runs.Mlp().requires_grad_(False)


NOT_CALLABLE = 3
ONE_SPLIT = staticmethod(lambda: Points(5, seed=0))


def empty() -> tuple[list[Any], None]:
    return [], None


# ------------------------------------------------------------------ what training does


def test_training_learns_and_says_what_it_did(tmp_path: Path) -> None:
    trained = _train(tmp_path, training={"epochs": 8}, log={"path": "run.jsonl", "every_steps": 5})

    assert trained.steps == len(trained.losses) == 8 * 7
    assert np.mean(trained.losses[-7:]) < 0.5 * np.mean(trained.losses[:7])
    assert len(trained.scores) == 8
    assert trained.best is not None and trained.best[0] == max(trained.scores)
    lines = record_of(tmp_path / "run.jsonl")
    assert {line["schema_version"] for line in lines} == {1}
    assert lines[0]["event"] == "start"
    assert lines[0]["config"]["training"]["epochs"] == 8
    steps = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    assert steps == {step: trained.losses[step - 1] for step in range(5, 57, 5)}
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert [line["score"] for line in epochs] == list(trained.scores)
    assert all(line["samples_per_second"] > 0 for line in epochs)
    assert [line["loss"] for line in epochs] == [
        pytest.approx(np.mean(trained.losses[at : at + 7])) for at in range(0, 56, 7)
    ]
    assert all(line["seconds"] > 0 for line in lines if line["event"] == "step")


def test_runs_repeat_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()

    first, second = _train(), _train()

    assert torch.equal(torch.get_rng_state(), before)
    assert first.losses == second.losses
    assert _train(training={"seed": 1}).losses != first.losses


def test_the_loss_is_that_of_plain_pytorch() -> None:
    trained = _train(model=MLP, schedule={"name": "constant", "warmup_steps": 0})

    torch.manual_seed(0)
    module, data = training_runs.Mlp(), Points(training_runs.SAMPLES, seed=1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for epoch in range(3):
        order = order_of(len(data), 0, epoch)
        for at in range(0, len(order), 15):
            batch = order[at : at + 15]
            loss = nn.functional.cross_entropy(module(data.features[batch]), data.classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert trained.losses == pytest.approx(losses, abs=1e-6)


def test_a_smaller_last_batch_may_be_left_out() -> None:
    whole, dropped = _train(training={"epochs": 1}), _train(data={"drop_last": True})

    assert (whole.steps, dropped.steps) == (7, 18)


def test_accumulated_parts_give_the_curve_of_whole_batches() -> None:
    whole = _train()

    # Parts of 4, 4, 4 and 3 samples, and a batch of one sample.
    parts = _train(training={"accumulation": 4})

    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("samples", [1, 2, 7, 16])
def test_shares_are_the_batch_whatever_the_processes(samples: int, parts: int, ranks: int) -> None:
    batch = list(range(100, 100 + samples))

    shares = [shares_of(batch, parts, rank, ranks) for rank in range(ranks)]

    counts = {len(own) for own in shares}
    assert counts == {min(parts, samples)}, "processes meet in each part"
    flat = [share for own in shares for share in own]
    assert all(share.indices for share in flat), "an empty share is stood in for"
    assert sorted(i for s in flat if s.count for i in s.indices) == batch
    assert sum(share.weight for share in flat) == pytest.approx(1)
    assert all(share.weight == share.count / samples for share in flat)


def test_the_order_is_another_one_in_each_epoch_and_for_each_seed() -> None:
    orders = [tuple(order_of(50, seed, epoch)) for seed in range(5) for epoch in range(5)]

    assert len(set(orders)) == 25
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_gradients_are_clipped_to_a_norm() -> None:
    free = _train(training={"epochs": 1})
    clipped = _train(training={"epochs": 1, "gradient_clip_norm": 1e-20})

    assert free.losses[0] == clipped.losses[0]
    untrained = _train(training={"epochs": 1}, optimizer={"learning_rate": 0.0})
    assert clipped.losses == pytest.approx(untrained.losses, abs=1e-6)
    assert free.losses != pytest.approx(untrained.losses, abs=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_float32_weights(precision: str) -> None:
    trained = _train(training={"precision": precision, "epochs": 6})

    assert trained.module is not None
    assert {p.dtype for p in trained.module.parameters()} == {torch.float32}
    assert np.mean(trained.losses[-7:]) < 0.6 * np.mean(trained.losses[:7])


def test_the_scale_of_the_loss_halves_at_overflow_and_doubles_after_a_while() -> None:
    scale = LossScale.of("float16")

    assert not scale.update(math.inf)
    assert scale.factor == FIRST_SCALE / 2
    assert all(scale.update(1.0) for _ in range(GROWTH_STEPS))
    assert scale.factor == FIRST_SCALE
    restored = LossScale.of("float16")
    restored.restore({"factor": 8.0, "good_steps": 3.0})
    assert restored == LossScale(8.0, 3, True)
    assert LossScale.of("float32").update(math.nan), "without a scale nothing is skipped"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant"), [1, 1, 1, 1]),
        (Schedule("linear"), [1, 0.75, 0.5, 0.25]),
        (Schedule("linear", final_factor=0.5), [1, 0.875, 0.75, 0.625]),
        (Schedule("linear", warmup_steps=1), [0.5, 1, 2 / 3, 1 / 3]),
        (Schedule("cosine"), [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        (Schedule("one-cycle", warmup_steps=1), [0.04, 1, 0.5, 0]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: Schedule, expected: list[float]) -> None:
    found = [learning_rate_factor(schedule, step, 4) for step in range(4)]

    assert found == pytest.approx(expected)


def test_the_best_epoch_is_what_stays() -> None:
    metric = {"metric": "test_train:worse_and_worse", "batch_size": 100}
    constant = {"name": "constant", "warmup_steps": 0}

    worse_and_worse.asked = 0  # type: ignore[attr-defined]
    best = _train(validation=metric, schedule=constant)

    first = _train(training={"epochs": 1}, schedule=constant)
    last = _train(validation={**metric, "keep_best": False}, schedule=constant)
    # It was asked once before training, whether it can be taken of the outputs at all.
    assert best.scores == (-2.0, -3.0, -4.0)
    assert best.best == (-2.0, 1)
    states = [run.module.state_dict() for run in (best, first, last) if run.module is not None]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_of_epochs_as_good_as_each_other_the_last_one_stays() -> None:
    constant = _train(validation={"metric": "training_runs:one"})

    assert constant.best == (1.0, 3)


def test_arrays_and_several_inputs_and_outputs_are_trained(tmp_path: Path) -> None:
    trained = _train(
        tmp_path,
        model={"factory": "test_train:Two"},
        data={"factory": "test_train:pairs", "batch_size": 4},
        training={"loss": "test_train:difference", "epochs": 40},
        export={"path": "two.onnx", "output_names": ["a", "b"]},
    )

    assert trained.losses[-1] < 0.1 * trained.losses[0]
    session = Session(tmp_path / "two.onnx", Reference.AS_WRITTEN)
    assert set(session.inputs) == {"left", "right"}
    ones = np.ones((3, WIDTH), np.float32)
    assert set(session.run({"left": ones, "right": ones})) == {"a", "b"}


def test_workers_load_the_same_batches() -> None:
    assert _train(data={"workers": 1}, training={"epochs": 1}).losses == pytest.approx(
        _train(training={"epochs": 1}).losses
    )


def test_the_caller_gets_the_whole_module_in_evaluation_mode() -> None:
    trained = _train(model=MLP)

    assert isinstance(trained.module, training_runs.Mlp)
    assert not trained.module.training


PADDED: dict[str, Any] = {
    "model": {
        "factory": "torch.nn:Conv1d",
        "options": {"in_channels": WIDTH, "out_channels": 3, "kernel_size": 1},
    },
    "data": {"factory": "test_train:padded", "batch_size": 8},
    "schedule": {"warmup_steps": 0},
}


def test_targets_without_a_label_count_the_same_in_whatever_parts() -> None:
    whole = _train(**PADDED)

    parts = _train(**PADDED, training={"accumulation": 8})

    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)
    assert parts.scores == pytest.approx(whole.scores)
    assert whole.module is not None
    features, targets = (torch.stack(items) for items in zip(*padded()[1], strict=True))
    known = targets != -100
    right = whole.module(features).argmax(1)[known] == targets[known]
    assert whole.best is not None
    assert whole.best[0] == pytest.approx(float(right.float().mean()))


def test_the_loss_of_labels_is_that_of_pytorch_to_the_bit() -> None:
    logits = torch.randn(64, 10, 3, requires_grad=True)
    targets = torch.randint(10, (64, 3))

    losses = [f(logits, targets) for f in (cross_entropy, nn.functional.cross_entropy)]

    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_what_is_random_in_samples_is_the_same_in_workers() -> None:
    noisy = {"factory": "training_runs:noisy_points"}

    alone, beside = _train(data=noisy), _train(data={**noisy, "workers": 1})

    assert alone.losses == beside.losses
    assert alone.scores == beside.scores


def test_a_loss_may_be_an_array_of_one_number() -> None:
    assert _train(training={"loss": "test_train:one_number"}).losses == _train().losses


def test_a_score_that_is_no_number_is_worse_than_any() -> None:
    never.asked = 0  # type: ignore[attr-defined]

    trained = _train(validation={"metric": "test_train:never", "batch_size": 100})

    assert trained.best == (1.0, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_raises_is_named(workers: int) -> None:
    data = {"factory": "test_train:raising", "workers": workers}

    with pytest.raises(TrainingFailed, match=r"sample 40 raised KeyError: 'no such file' \(.*line"):
        _train(data=data)


def test_samples_of_several_shapes_are_named() -> None:
    with pytest.raises(TrainingFailed, match=r"samples .*7.* cannot be put into a batch"):
        _train(
            model={"factory": "torch.nn:Linear", "options": {"in_features": 4, "out_features": 2}},
            data={"factory": "test_train:uneven", "batch_size": 8},
            schedule={"warmup_steps": 0},
        )


def test_a_batch_that_a_module_cannot_train_on_is_told() -> None:
    expected = r"step 7 \(epoch 1\) cannot be computed: ValueError: Expected more than 1 value"

    with pytest.raises(TrainingFailed, match=expected) as caught:
        _train(model={"factory": "test_train:single_rows"})

    assert "data.drop_last" in str(caught.value)


# ------------------------------------------------------------------ export and optimize


def test_the_export_has_free_dimensions_and_the_names_of_the_module(tmp_path: Path) -> None:
    trained = _train(tmp_path, model=MLP, export={"path": "mlp.onnx", "output_names": ["logits"]})

    assert trained.module is not None
    model = onnx.load(tmp_path / "mlp.onnx")
    assert [value.name for value in model.graph.input] == ["features"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    names = {tensor.name for tensor in model.graph.initializer}
    assert set(dict(trained.module.named_parameters())) <= names
    features = Points(5, seed=4).features
    (found,) = (
        Session(tmp_path / "mlp.onnx", Reference.AS_WRITTEN)
        .run({"features": features.numpy()})
        .values()
    )
    with torch.no_grad():
        assert np.abs(found - trained.module(features).numpy()).max() < 1e-5
    assert trained.delivery.numerics[0].rel_l2 < 1e-5


def test_the_export_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    _train(tmp_path, model=MLP, training={"epochs": 1}, export={"path": "mlp.onnx"})

    content = (tmp_path / "mlp.onnx").read_bytes()
    assert b".py" not in content
    assert str(Path(training_runs.__file__).parent).encode() not in content


def test_a_run_ends_in_an_optimized_file(tmp_path: Path) -> None:
    trained = _train(
        tmp_path,
        model=MLP,
        export={"path": "mlp.onnx"},
        optimize={"passes": "quantize-weights", "benchmark": False, "output": "small.onnx"},
        log={"path": "run.jsonl"},
    )

    assert trained.delivery.run is not None
    assert trained.delivery.optimized == tmp_path / "small.onnx"
    assert onnx.load(trained.delivery.optimized).graph.node
    line = record_of(tmp_path / "run.jsonl")[-1]
    assert line["event"] == "optimize"
    assert line["result"]["steps"] == json.loads(json.dumps(line["result"]["steps"]))


def test_a_module_that_cannot_be_exported_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot export the module"):
        _train(
            tmp_path,
            model={"factory": "test_train:Unexportable"},
            training={"epochs": 1},
            export={"path": "never.onnx"},
        )

    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ configurations


def _with(section: str, **values: Any) -> dict[str, Any]:
    return table(**{section: values})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"data": {"factory": "training_runs:points"}}, r"section \[model\] is missing"),
    (table(modell={}), "no section .modell.; did you mean 'model'"),
    (table(model={"factory": None}), "model.factory is None; it must be text"),
    ({**table(), "model": {}}, r"\[model\] needs its key 'factory'"),
    ({**table(), "model": 3}, r"model is 3; it must be a section"),
    (table(prepare={}), r"write \[\[prepare\]\]"),
    (table(distill={}), r"\[distill\] needs its key 'teacher'"),
    (_with("model", factory="Transformer"), "import path like package.module:name"),
    (_with("model", factory="nowhere_at_all:x"), "nowhere_at_all cannot be imported"),
    (_with("model", factory="training_runs:Transfomer"), "did you mean 'Transformer'"),
    (_with("model", factory="test_train:NOT_CALLABLE"), "must be callable"),
    (_with("model", options={"depth": 3}), "options do not fit"),
    (_with("model", factory="test_train:broken"), "ValueError: this factory is broken"),
    (_with("model", factory="training_runs:points"), "must return a torch.nn.Module"),
    (_with("model", factory="test_train:frozen"), "no parameters to train"),
    (_with("data", factory="test_train:ONE_SPLIT"), "must return a pair"),
    (_with("data", factory="test_train:empty"), "no train samples"),
    (
        table(data={"factory": "test_train:without_targets"}, schedule={"warmup_steps": 0}),
        "the loss needs targets",
    ),
    (_with("data", batch_size=0), "data.batch_size is 0; it must be at least 1"),
    (_with("data", batch_size=1.5), "data.batch_size is 1.5; it must be a whole number"),
    (_with("data", batch_size=92, drop_last=True), "data.drop_last leaves nothing"),
    (_with("data", batch=3), r"\[data\] has no key 'batch'; did you mean 'batch_size'"),
    (_with("optimizer", name="adamm"), "no optimizer; did you mean 'adam'"),
    (_with("optimizer", name="lbfgs"), "which is no optimizer"),
    (_with("optimizer", name="training_runs:points"), "must name a class"),
    (_with("optimizer", options={"momentun": 1}), "did you mean 'momentum'"),
    (_with("optimizer", options={"momentum": -1}), "does not take its options"),
    (_with("optimizer", learning_rate=-1), "learning_rate is -1; it must be from 0"),
    (_with("optimizer", learning_rate=math.nan), "learning_rate is nan; it must be a number"),
    (_with("optimizer", learning_rate="high"), "learning_rate is 'high'; it must be a number"),
    (_with("schedule", name="cosin"), "must be one of constant, linear, cosine, one-cycle"),
    (_with("schedule", warmup_steps=21), "the run has 21 steps"),
    (_with("training", loss="crossentropy"), "no loss; did you mean 'cross-entropy'"),
    (_with("training", loss="mse"), "the loss of the first samples cannot be computed: Runtime"),
    (_with("training", loss="test_train:no_mean"), r"the loss is \[2\]; it must be one number"),
    (_with("data", options={"count": 3}, batch_size=4), "the run has 3 steps"),
    (_with("data", factory="test_train:several_targets"), "has a target of tuple; it must be a"),
    (_with("data", factory="test_train:named_inputs"), "inputs of dict; .* several as a tuple"),
    (_with("export", output_names=["y", "y"]), "each name may be there once"),
    (_with("export", output_names=["features"]), "'features', which is the name of an input"),
    (_with("export", dynamic_axes={"features": {"0": "a b"}}), "'a b' is no name of a dimension"),
    (_with("checkpoint", folder="/dev/null/x"), "cannot write to checkpoint.folder"),
    (_with("training", loss="test_train:constant"), "does not depend on any parameter"),
    (_with("training", precision="float8"), "must be one of float32, bfloat16, float16"),
    (_with("training", epochs=0), "training.epochs is 0"),
    (_with("validation", metric="acuracy"), "no metric; did you mean 'accuracy'"),
    (_with("validation", metric="training_runs:points"), "cannot be taken of the outputs"),
    (_with("strategy", name="dpp"), "did you mean 'ddp'"),
    (_with("strategy", name="ddp", sizes=[2]), "takes 2 processes, and there are 1; start them"),
    (_with("strategy", name="ddp x tensor"), "needs 2 sizes"),
    (_with("strategy", name="single", sizes=[0]), "needs 1 sizes, each at least 1"),
    (_with("strategy", plan={"a": 1}), "plan is .*it must be a table of text"),
    (_with("strategy", timeout_s=0), "timeout_s is 0"),
    (_with("export", path="no/such/folder/x.onnx"), "there is no folder"),
    (_with("export", path="x.onnx", input_names=["a", "b"]), "the samples have 1 inputs"),
    (_with("export", path="x.onnx", dynamic_axes={"a": {"0": "n"}}), "there is no input 'a'"),
    (_with("export", path="x.onnx", dynamic_axes={"features": {"7": "n"}}), "no axis '7'"),
    (_with("optimize", recipe="basic"), "state export.path"),
    (
        table(export={"path": "x.onnx"}, optimize={"output": "./x.onnx"}),
        "the exported file itself",
    ),
    (table(export={"path": "x.onnx"}, optimize={"recipe": "basik"}), "did you mean 'basic'"),
    (table(export={"path": "x.onnx"}, optimize={"passes": "fold{"}), "fold"),
    (table(export={"path": "x.onnx"}, optimize={"max_error": ["much"]}), "not an error budget"),
    (table(export={"path": "x.onnx"}, optimize={"require": "much"}), "much"),
    (_with("log", path="no/such/folder/log"), "cannot write log.path"),
]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_configuration_is_told_what_is_wrong(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GraphoptError, match=message) as raised:
        train(config_of(content, tmp_path))

    assert raised.value.exit_code == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"the loss is (nan|inf) in step \d+ .epoch"):
        _train(tmp_path, optimizer={"learning_rate": 1e30}, log={"path": "run.jsonl"})

    assert record_of(tmp_path / "run.jsonl")[-1]["event"] == "stopped"


def test_a_file_is_read_with_values_in_place_of_others(tmp_path: Path) -> None:
    path = write_toml(tmp_path / "run.toml", table())

    read = read_config(
        path, ["training.epochs=7", "training.precision=bfloat16", "data.options.count=30"]
    )

    assert read.folder == tmp_path
    assert read.training.epochs == 7
    assert read.training.precision == "bfloat16"
    assert read.data.options == {"count": 30}
    assert replace(read, folder=Path()) == config_of(
        table(training={"epochs": 7, "precision": "bfloat16"}, data={"options": {"count": 30}})
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.epochs", "not of the form SECTION.KEY=VALUE"),
        ("epochs=3", "not of the form SECTION.KEY=VALUE"),
        ("training.epochs.more=3", "epochs is no section"),
        ("training.epoch=3", "did you mean 'epochs'"),
    ],
)
def test_a_wrong_setting_is_told_of(text: str, message: str, tmp_path: Path) -> None:
    path = write_toml(tmp_path / "run.toml", table())

    with pytest.raises(ConfigError, match=message):
        read_config(path, [text])


def test_a_file_that_is_not_there_or_no_toml_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_config(tmp_path / "bad.toml")


# ------------------------------------------------------------------ the command line


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["graphopt", "train", *arguments])
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_the_command_trains_exports_and_optimizes_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = tmp_path / "digits_cnn.toml"
    example.write_text(DIGITS.read_text())
    settings = ["training.epochs=2", "optimize.benchmark=false"]

    code = _run(monkeypatch, str(example), *(f"--set={text}" for text in settings), "--json", "-")

    assert code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 34 and len(told["losses"]) == 34
    assert told["run"]["recipe"] == "basic"
    assert Path(told["optimized"]).is_file()
    assert told["numerics"]["logits"]["as_written"]["rel_l2"] < 1e-5


def test_the_command_says_what_to_install_where_torch_is_not_there() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['graphopt', 'train', 'x.toml']\n"
        "from graphopt.cli import main; main()"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr == "graphopt: error: training needs torch: pip install 'graphopt[train]'\n"


def test_the_command_ends_with_a_line_and_a_code_at_a_bad_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_toml(tmp_path / "run.toml", table(training={"epochs": 0}))

    assert _run(monkeypatch, str(path)) == 2
    shown = capsys.readouterr()
    assert shown.err == "graphopt: error: training.epochs is 0; it must be at least 1\n"
    assert shown.out == ""
