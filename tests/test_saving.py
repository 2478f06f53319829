"""Saves that are killed: the target is the old model or the new one, whole, at every moment."""

from __future__ import annotations

import itertools
import json
import shutil
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
FEW_LINES_MAXIMUM = 25

# Saves on command, each in a fork of its own, and kills it after some seconds or at some line of
# the modules that write. It never loads onnxruntime, whose threads would not survive the fork.
SERVER = """
    import json, os, signal, sys, time
    from pathlib import Path
    import graphopt
    from graphopt import data_file, file_set, saving, sharing

    FILES = {module.__file__ for module in (data_file, file_set, saving, sharing)}

    def traced(count, last):
        def trace(frame, event, argument):
            if frame.f_code.co_filename not in FILES:
                return None
            if event == "line":
                count[0] += 1
                if count[0] == last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        return trace

    def save(order, lines):
        sys.settrace(traced(lines, order.get("line")) if "line" in order else None)
        if "share" in order:
            paths = [Path(path) for path in order["share"]]
            sharing.share(paths, Path(order["path"]), validate=False, progress=lambda _: None)
        else:
            graphopt.save(models[order["model"]], order["path"], external_data=order["external"],
                          reuse_data=order["reuse"])
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

    def save(
        self, model: str, external: bool, reuse: bool = False, **kill: float
    ) -> dict[str, Any]:
        path = str(self.path)
        return self.order(model=model, external=external, reuse=reuse, path=path, **kill)

    def share(self, folder: Path, paths: list[Path], **kill: float) -> dict[str, Any]:
        return self.order(share=[str(path) for path in paths], path=str(folder), **kill)

    def load(self, name: str, source: Path) -> None:
        """Let the server load a model, and know it by its outputs."""
        session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        (self.expected[name],) = session.run(None, {"x": self.x})
        self.order(model=name, load=str(source))

    def which_is_there(self, path: Path | None = None) -> str:
        """The name of the model that the target is, by its outputs."""
        session = ort.InferenceSession(path or self.path, providers=["CPUExecutionProvider"])
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
        saver.load(name, source)
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


def beside(saver: Saver, name: str, seed: int) -> None:
    """A model in the folder of the target: one weight in the graph, the other in a data file."""
    proto = two_layers(seed, 64)
    source = saver.path.with_name(f"{name}.onnx")
    onnx.save(proto, source, save_as_external_data=True, location=f"{name}.bin")
    mixed = onnx.load(source, load_external_data=False)
    mixed.graph.initializer[1].CopyFrom(onnx.load(source).graph.initializer[1])
    source.write_bytes(mixed.SerializeToString())
    saver.load(name, source)


@pytest.mark.parametrize("old", ["A", "C"], ids=["over all new data", "over reused data"])
def test_a_save_that_reuses_data_and_is_killed_at_any_line_leaves_a_whole_model(
    old: str, small: Saver
) -> None:
    for seed, name in enumerate("CD", start=2):
        beside(small, name, seed)
    sources = small.files()
    assert sources == {"C.onnx", "C.bin", "D.onnx", "D.bin"}
    small.save(old, True, old == "C")
    count = small.save("D", True, True, line=0)["lines"]
    seen = []
    for line in range(1, count + 1, -(-count // FEW_LINES_MAXIMUM)):
        small.save(old, True, old == "C")
        assert small.save("D", True, True, line=line)["killed"]
        seen.append(small.which_is_there())
        assert seen == sorted(seen)
    assert set(seen) == {old, "D"}
    for name in "CD":
        assert small.which_is_there(small.path.with_name(f"{name}.onnx")) == name
    small.save("D", True, True)
    (data,) = [name for name in small.files() - sources if name != "m.onnx"]
    assert data.startswith("m.onnx.")
    # Half of the weights: the others are in D.bin.
    assert small.path.with_name(data).stat().st_size == 4 * 64 * 64
    assert b"D.bin" in small.path.read_bytes()


def test_a_share_that_is_killed_at_any_line_leaves_whole_models(
    small: Saver, tmp_path: Path
) -> None:
    names = "CDEF"
    for seed, name in enumerate(names, start=2):
        (tmp_path / name).mkdir()
        source = tmp_path / name / ("one.onnx" if name in "CE" else "two.onnx")
        onnx.save(two_layers(seed, 64), source)
        small.load(name, source)
    folder = tmp_path / "shared"
    old = [tmp_path / "C" / "one.onnx", tmp_path / "D" / "two.onnx"]
    new = [tmp_path / "E" / "one.onnx", tmp_path / "F" / "two.onnx"]
    small.share(folder, old)
    shutil.copytree(folder, tmp_path / "old")
    count = small.share(folder, new, line=0)["lines"]
    seen = []
    for line in range(1, count + 1, -(-count // FEW_LINES_MAXIMUM)):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
        assert small.share(folder, new, line=line)["killed"]
        seen.append(
            "".join(small.which_is_there(folder / name) for name in ("one.onnx", "two.onnx"))
        )
        assert seen == sorted(seen)
    # In between, the first has its name and the second has not.
    assert {"CD", "EF"} <= set(seen) <= {"CD", "ED", "EF"}
    assert not small.share(folder, new)["killed"]
    assert len(list(folder.iterdir())) == 3
