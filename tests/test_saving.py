"""Saves that are killed: the target is the old model or the new one, whole, at every moment."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

ort = pytest.importorskip("onnxruntime")

KILLS = 50
LINES_MAXIMUM = 50

# Saves on command, each in a fork of its own, and kills it after some seconds or at some line of
# saving.py and data_file.py. It never loads onnxruntime, whose threads would not survive the fork.
SERVER = """
    import json, os, signal, sys, time
    import graphopt
    from graphopt import data_file, saving

    def traced(count, last):
        def trace(frame, event, argument):
            if frame.f_code.co_filename not in (saving.__file__, data_file.__file__):
                return None
            if event == "line":
                count[0] += 1
                if count[0] == last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        return trace

    def save(order, lines):
        sys.settrace(traced(lines, order.get("line")) if "line" in order else None)
        graphopt.save(models[order["model"]], order["path"], external_data=order["external"])
        sys.settrace(None)

    models = {}
    for text in sys.stdin:
        order = json.loads(text)
        if "load" in order:
            models[order["model"]] = graphopt.load(order["load"])
            print("{}", flush=True)
            continue
        reader, writer = os.pipe()
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            lines = [0]
            save(order, lines)
            os.write(writer, str(lines[0]).encode())
            os._exit(0)
        if "seconds" in order:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        seconds = time.perf_counter() - started
        os.close(writer)
        lines = os.read(reader, 100).decode()
        os.close(reader)
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"killed": killed, "status": status, "seconds": seconds,
                          "lines": int(lines or 0)}), flush=True)
"""


@dataclass
class Saver:
    """The server, and the models that it saves."""

    process: subprocess.Popen[str]
    path: Path
    expected: dict[str, np.ndarray]
    x: np.ndarray

    def order(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer.get("status", 0) in (0, 9)
        return answer

    def save(self, model: str, external: bool, **kill: float) -> dict[str, Any]:
        return self.order(model=model, external=external, path=str(self.path), **kill)

    def which_is_there(self) -> str:
        """The name of the model that the target is, by its outputs."""
        session = ort.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        (result,) = session.run(None, {"x": self.x})
        (name,) = [n for n, value in self.expected.items() if np.array_equal(value, result)]
        return name

    def files(self) -> set[str]:
        return {file.name for file in self.path.parent.iterdir()}


def two_layers(seed: int, width: int) -> onnx.ModelProto:
    generator = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]>'
        f"agraph (float[n, {width}] x) => (float[n, {width}] y)"
        " { a = MatMul(x, w1)  b = Tanh(a)  y = MatMul(b, w2) }"
    )
    for name in ("w1", "w2"):
        weight = generator.standard_normal((width, width), np.float32) / np.float32(width**0.5)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return proto


def start(folder: Path, width: int) -> Iterator[Saver]:
    code = textwrap.dedent(SERVER)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    x = np.linspace(-1, 1, width, dtype=np.float32).reshape(1, width)
    (folder / "out").mkdir()
    saver = Saver(process, folder / "out" / "m.onnx", {}, x)
    for seed, name in enumerate("AB"):
        source = folder / f"{name}.onnx"
        # Weights of B are copied from file to file, those of A from memory.
        onnx.save(two_layers(seed, width), source, save_as_external_data=name == "B")
        session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        (saver.expected[name],) = session.run(None, {"x": x})
        saver.order(model=name, load=str(source))
    yield saver
    process.communicate()


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Saver]:
    """Saves models of 4 MB."""
    yield from start(tmp_path, 724)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Saver]:
    """Saves models of 32 kB."""
    yield from start(tmp_path, 64)


# Each way of saving comes after each other one: external data over external data, and so on.
WAYS = [True, True, False, False]


def check_end(saver: Saver, model: str, external: bool) -> None:
    """An undisturbed save leaves the model and nothing else."""
    assert not saver.save(model, external)["killed"]
    assert saver.which_is_there() == model
    assert len(saver.files()) == 1 + external
    assert not any(name.endswith(".tmp") for name in saver.files())


def test_a_save_that_is_killed_at_any_time_leaves_a_whole_model(large: Saver) -> None:
    there = "A"
    took = max(large.save(there, external)["seconds"] for external in WAYS)
    delays = np.random.default_rng(0).uniform(0, 1.2 * took, KILLS)
    killed = 0
    for delay, external in zip(delays, itertools.cycle(WAYS), strict=False):
        model = "B" if there == "A" else "A"
        answer = large.save(model, external, seconds=float(delay))
        killed += answer["killed"]
        now = large.which_is_there()
        assert now == model or answer["killed"]
        there = now
    assert killed
    check_end(large, "A", True)
    check_end(large, "B", False)


@pytest.mark.parametrize("external", [True, False], ids=["external", "inline"])
@pytest.mark.parametrize("old_external", [True, False], ids=["over external", "over inline"])
def test_a_save_that_is_killed_at_any_line_leaves_a_whole_model(
    external: bool, old_external: bool, small: Saver
) -> None:
    small.save("A", old_external)
    count = small.save("B", external, line=0)["lines"]
    seen = []
    for line in range(1, count + 1, -(-count // LINES_MAXIMUM)):
        small.save("A", old_external)
        assert small.save("B", external, line=line)["killed"]
        seen.append(small.which_is_there())
        # Before the commit all of A is there, after it all of B: there is no way back.
        assert seen == sorted(seen)
    assert set(seen) == {"A", "B"}
    check_end(small, "B", external)
