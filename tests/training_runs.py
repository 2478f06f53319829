"""What tests of training train: small models, little data, and processes to do it in."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from graphopt.training import config_of, train

WIDTH = 8
HEADS = 2
POSITIONS = 4
CLASSES = 3
SAMPLES = 91
"""An epoch is 6 batches of 15, which two processes share unequally, and a batch of one sample."""


class Mlp(nn.Module):
    """Two layers and a buffer that is no parameter."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(POSITIONS * WIDTH, width), nn.Tanh(), nn.Linear(width, CLASSES)
        )
        self.register_buffer("offset", torch.full((POSITIONS * WIDTH,), 0.1))
        self.offset: Tensor

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features.flatten(1) + self.offset)
        return logits


class Idle(Mlp):
    """A layer has no part in the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    """A transformer block whose code knows the number of heads, and has a buffer for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("turn", torch.tensor([1.0, -1.0, 1.0, -1.0]), persistent=False)
        self.turn: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        query, key, value = (
            layer(normed).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query * self.turn, key, value)
        tokens = tokens + self.output(mixed.transpose(1, 2).flatten(2))
        result: Tensor = tokens + self.down(nn.functional.gelu(self.up(tokens)))
        return result


class Transformer(nn.Module):
    """Two blocks, with a parameter of its own and an input that the last stage uses again."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(POSITIONS, WIDTH) * 0.02)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        tokens = features + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        logits: Tensor = self.head(tokens.mean(dim=1) + features.mean(dim=1))
        return logits


PLAN = {
    "layers.*.norm": "sequence",
    "layers.*.query": "column",
    "layers.*.key": "column",
    "layers.*.value": "column",
    "layers.*.output": "row",
    "layers.*.up": "column",
    "layers.*.down": "row",
    "head": "column-whole",
}


class Points:
    """Samples whose class is a function of their features."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(count, POSITIONS, WIDTH, generator=generator)
        self.classes = self.features.sum(dim=1)[:, :CLASSES].argmax(dim=1)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features[index], self.classes[index]


def points(count: int = SAMPLES) -> tuple[Points, Points]:
    """Samples to train on, and 31 to measure with."""
    return Points(count, seed=1), Points(31, seed=2)


def table(**sections: Any) -> dict[str, Any]:
    """A configuration that trains the transformer for 21 steps; sections are merged into it.

    Its optimizer takes gradients as they are, so that the curve shows a factor on them.
    """
    content: dict[str, Any] = {
        "model": {"factory": f"{__name__}:Transformer"},
        "data": {"factory": f"{__name__}:points", "batch_size": 15},
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "options": {"momentum": 0.9}},
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "training": {"epochs": 3, "threads": 1, "device": "cpu"},
    }
    for name, values in sections.items():
        merges = isinstance(values, dict) and name in content
        content[name] = {**content[name], **values} if merges else values
    return content


# ------------------------------------------------------------------ several processes


def in_processes(count: int, runs: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Train in processes that meet once for all runs; what the first of them had to tell of each.

    Args:
        count: of processes.
        runs: configurations by name.
        folder: that paths in them are relative to.
    """
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (count, dict(runs), str(folder), meeting)
        mp.spawn(_work, arguments, nprocs=count)
        told: dict[str, Any] = json.loads((Path(meeting) / "told.json").read_text())
    return told


def _work(
    rank: int, count: int, runs: dict[str, dict[str, Any]], folder: str, meeting: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    told = {name: tell(run, Path(folder)) for name, run in runs.items()}
    if rank == 0:
        (Path(meeting) / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def tell(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and say what came of it."""
    trained = train(config_of(run, folder))
    return {"losses": trained.losses, "scores": trained.scores, "best": trained.best}


def command(*arguments: str) -> list[str]:
    """`python -m graphopt.training` with arguments."""
    return [sys.executable, "-m", "graphopt.training", *arguments]


def torchrun(count: int, *arguments: str) -> list[str]:
    """`torchrun -m graphopt.training`, on a port that is free."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return [sys.executable, *launch, "-m", "graphopt.training", *arguments]


def start(arguments: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """Start a process that finds this file, with one thread."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def write_toml(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a configuration; strings, numbers, truth values, lists and tables of them."""
    lines = []
    for name, values in content.items():
        lines.append(f"[{name}]")
        lines += [f"{json.dumps(key)} = {_toml(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines))
    return path


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        items = ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{{items}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


def record_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a record."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Failing(Points):
    """Samples on which one process fails in a way of its own."""

    def __init__(self, how: str, rank: int) -> None:
        super().__init__(SAMPLES, seed=1)
        self.how = how
        self.fails = os.environ.get("RANK") == str(rank)
        self.asked = 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked += 1
        if self.fails and self.asked > 30:
            self._fail()
        return super().__getitem__(index)

    def _fail(self) -> None:
        if self.how == "raise":
            raise ValueError("the file of this sample is broken")
        if self.how == "exit":
            os._exit(3)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "sleep":
            time.sleep(3600)


def failing(how: str, rank: int = 1) -> tuple[Points, Points]:
    """Samples on which the process of a rank fails: raise, exit, kill or sleep."""
    return Failing(how, rank), Points(31, seed=2)


def one(outputs: Tensor, targets: Tensor) -> float:
    """A metric that is the same for every model."""
    return 1.0


class Dropping(nn.Module):
    """Layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(POSITIONS * WIDTH, WIDTH),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features.flatten(1))
        return logits


class NoisyPoints(Points):
    """The same samples, with noise of each of the global generators."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features, target = super().__getitem__(index)
        noise = torch.randn(()) + float(np.random.rand()) + random.random()
        return features + 0.1 * noise, target


def noisy_points() -> tuple[torch.utils.data.Subset[Any], torch.utils.data.Subset[Any]]:
    """Samples divided by chance, with noise."""
    train, validation = torch.utils.data.random_split(NoisyPoints(121, seed=1), [SAMPLES, 30])
    return train, validation


class SlowPoints(Points):
    """The same samples, slow enough for a run to be killed in its middle."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.002)
        return super().__getitem__(index)


def slow_points() -> tuple[Points, Points]:
    """The samples of `points`, slowly."""
    return SlowPoints(SAMPLES, seed=1), Points(31, seed=2)
