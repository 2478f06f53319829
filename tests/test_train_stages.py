"""Models that are divided: where they can be, and what is said where they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training_runs import PLAN, WIDTH, Points, Transformer, table  # noqa: E402

from graphopt.errors import ConfigError  # noqa: E402
from graphopt.training import config_of, train  # noqa: E402
from graphopt.training.fsdp import layers_of  # noqa: E402
from graphopt.training.stages import run, split  # noqa: E402


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Path]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield tmp_path
    finally:
        dist.destroy_process_group()


class Skipping(nn.Module):
    """A value of the first layer is used by the last one, and so is the second input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 2.0))

    def forward(self, features: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        early = self.first(features) * self.scale
        late = self.third(self.second(early).relu()) + early * self.scale
        return late + shift, early


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(features))
        return result


def size(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of outputs of any shape."""
    return outputs.square().mean()


class Deciding(nn.Module):
    """Its forward depends on values outside of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(features)) if features.sum() > 0 else features
        return result


@pytest.mark.parametrize("starts", [["second"], ["third"], ["second", "third"]])
def test_stages_compute_what_the_whole_does(starts: list[str]) -> None:
    module = Skipping()
    inputs = torch.randn(2, 5, WIDTH).unbind()

    stages = split(module, starts)

    assert len(stages) == len(starts) + 1
    found = run(stages, inputs)[-1]
    assert all(map(torch.equal, found, module(*inputs)))  # type: ignore[arg-type]
    held = {name: p for stage in stages for name, p in stage.module.named_parameters()}
    whole = dict(module.named_parameters())
    assert held.keys() == whole.keys()
    assert all(held[name] is whole[name] for name in whole), "shared, under their names"


def test_stages_begin_within_lists_of_modules_and_take_inputs_where_they_use_them() -> None:
    module = Transformer().train()

    stages = split(module, ["layers.1", "head"])

    assert [list(stage.inputs) for stage in stages] == [["features"], ["features"], []]
    features = Points(4, seed=0).features
    assert torch.equal(run(stages, [features])[-1][0], module(features))  # type: ignore[arg-type]


class Positioned(nn.Module):
    """Positions and a mask are made of the size of the input, one of them from a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.arange(9))
        self.numbers: Tensor
        self.positions = nn.Embedding(9, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        count = features.shape[1]
        hidden = features + self.positions(self.numbers[:count])
        hidden = self.first(hidden) + self.positions(torch.arange(count, device=features.device))
        result: Tensor = self.last(torch.ones(count, count).tril() @ hidden)
        return result


def test_what_is_made_of_sizes_is_followed() -> None:
    module = Positioned()
    stages = split(module, ["last"])

    for positions in (4, 7):
        features = torch.randn(3, positions, WIDTH)
        (found,) = run(stages, [features])[-1]
        assert isinstance(found, Tensor)
        assert torch.equal(found, module(features))


@pytest.mark.parametrize(
    ("module", "starts", "message"),
    [
        (Skipping(), ["secnd"], "'secnd' is no module; did you mean 'second'"),
        (Skipping(), ["first"], "not the very first"),
        (Skipping(), ["third", "second"], "in the order in which they are called"),
        (Skipping(), ["second", "second"], "in the order in which they are called"),
        (Transformer(), ["layers"], "'layers' is not called as a module"),
        (Tied(), ["last"], "'last.weight' is used in stage 0 and in stage 1"),
        (Deciding(), ["last"], "must not depend on values"),
    ],
)
def test_where_a_model_cannot_be_taken_apart_it_is_told(
    module: nn.Module, starts: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        split(module, starts)


def test_layers_that_share_parameters_stay_together() -> None:
    module = nn.Sequential(Tied(), nn.Linear(WIDTH, WIDTH))
    assert layers_of(module, ()) == list(module)
    lists = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    lists[2].weight = lists[0].weight

    assert layers_of(lists, ()) == []
    with pytest.raises(ConfigError, match="'0' shares a parameter with a module outside"):
        layers_of(lists, ["0"])


def test_layers_are_the_elements_of_the_outermost_lists() -> None:
    module = Transformer()

    assert layers_of(module, ()) == list(module.layers)
    assert layers_of(module, ["layers.*.up", "layers.0"]) == [
        module.layers[0].up,
        module.layers[1].up,
        module.layers[0],
    ]
    with pytest.raises(ConfigError, match=r"'layer\.\*' is no module with parameters"):
        layers_of(module, ["layer.*"])


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"name": "tensor"}, {}, "strategy.plan is missing"),
    ({"name": "tensor", "plan": {"layer.*": "row"}}, {}, "matches no module"),
    ({"name": "tensor", "plan": {"head": "rows"}}, {}, "no style; did you mean 'row'"),
    ({"name": "tensor", "plan": {"layers.*.norm": "column"}}, {}, "column divides Linear"),
    ({"name": "tensor", "plan": {"layers.0": "sequence"}}, {}, "holds other modules"),
    ({"name": "tensor", "plan": {"head": "column"}}, {}, "gives other outputs"),
    (
        {"name": "tensor", "plan": {"first": "column", "last": "row"}},
        {
            "model": {"factory": "test_train_stages:Tied"},
            "training": {"loss": "test_train_stages:size"},
            "validation": {"metric": "test_train_stages:size"},
        },
        "'first' shares a parameter with another module, as 'last.weight'",
    ),
    ({"name": "tensor", "plan": PLAN}, {"prepare": [{}]}, "does not go with the strategy tensor"),
    ({"name": "fsdp", "layers": ["blocks"]}, {}, "is no module with parameters"),
    ({"name": "pipeline", "stages": ["head"]}, {}, "1 stages need 0 names"),
    ({"name": "pipeline"}, {"training": {"accumulation": 2}}, "strategy.microbatches divides"),
    ({"name": "pipeline", "microbatches": 4}, {}, "must be a multiple of 1 x 4"),
    ({"name": "ddp", "sizes": [2]}, {}, "takes 2 processes, and there are 1"),
]


@pytest.mark.parametrize(("strategy", "others", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_a_strategy_that_does_not_fit_is_told_what_is_wrong(
    strategy: dict[str, Any], others: dict[str, Any], message: str, alone: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config_of(table(strategy=strategy, **others), alone))


def test_processes_that_do_not_know_of_each_other_cannot_divide_the_work() -> None:
    with pytest.raises(ConfigError, match="start them with torchrun"):
        train(config_of(table(strategy={"name": "ddp"})))
