"""Processes that heal beside the first: one that dies ends the run, and none is left over."""

from __future__ import annotations

import multiprocessing
import threading
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from graphopt.errors import GraphoptError  # noqa: E402
from graphopt.testing import parse  # noqa: E402
from graphopt.training import heal  # noqa: E402

TEXT = """agraph (float[1,8] x, float[8,16] u, float[16,4] v) => (float[1,4] y) {
    h = MatMul(x, u)  r = Relu(h)  y = MatMul(r, v) }"""
SECONDS = 120
"""Far less than what a process is waited for that says nothing, and enough on a busy machine."""


def kill_all() -> bool:
    found = multiprocessing.active_children()
    for process in found:
        process.kill()
    return bool(found)


def kill_the_first_that_comes() -> None:
    while not kill_all():
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["start", "looking for values", "healing"])
def test_a_process_that_dies_ends_the_run(moment: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"u": (8, 16), "v": (16, 4)}
    weights = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    pruned = {n: np.where(np.abs(a) > 0.6, a, 0).astype(np.float32) for n, a in weights.items()}
    samples = [{"x": rng.normal(size=(1, 8)).astype(np.float32)} for _ in range(40)]
    killer = threading.Thread(target=kill_the_first_that_comes, daemon=True)
    if moment == "start":
        killer.start()

    def progress(text: str) -> None:
        if text.startswith(moment):
            kill_all()

    started = time.monotonic()
    with pytest.raises(GraphoptError, match="process 2 of 2 was killed by SIGKILL"):
        heal(
            parse(TEXT, **weights),
            parse(TEXT, **pruned),
            samples=samples,
            steps=1000,
            threads=2,
            processes=2,
            progress=progress,
        )

    assert time.monotonic() - started < SECONDS
    assert multiprocessing.active_children() == []
