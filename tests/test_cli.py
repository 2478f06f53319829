"""The command line where nothing is wrong; what is wrong is in test_bad_input.py."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt_models
from graphopt import cli

ort = pytest.importorskip("onnxruntime")

DIGITS = str(graphopt_models.DIGITS_CNN)
SAMPLES = str(graphopt_models.DIGITS_CNN_SAMPLES)
SHORT = ["--passes", "lift-constants,drop-unused", "--random-samples", "2"]


@dataclass(frozen=True)
class Done:
    """What a run of the command line left."""

    code: int | str | None
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.out)
        return content


Graphopt = Callable[..., Done]


@pytest.fixture
def graphopt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Graphopt:
    """The command line, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["graphopt", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return Done(stopped.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def few_samples(tmp_path: Path) -> str:
    """Ten of the digits."""
    with np.load(SAMPLES) as arrays:
        np.savez(tmp_path / "ten.npz", image=arrays["image"][:10])
    return "ten.npz"


LOSSY = """
from dataclasses import dataclass
from typing import Annotated, ClassVar
import numpy as np
import onnx_ir as ir
from graphopt import Change, Effect, Pass
from graphopt.contract import Bounds

@dataclass(frozen=True)
class ScaleWeights(Pass):
    "Multiply every large weight."

    name: ClassVar[str] = "scale-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    max_error: ClassVar[float] = 0.1
    factor: Annotated[float, Bounds(0, 1)] = 0.999

    def apply(self, model, context):
        change = Change()
        for value in model.graph.initializers.values():
            array = value.const_value.numpy()
            if array.dtype == np.float32 and array.ndim == 4:
                value.const_value = ir.Tensor(array * np.float32(self.factor))
                change.count("weight scaled")
        return change
"""


@pytest.fixture
def lossy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a lossy pass, installed as another distribution would install its own."""
    site = tmp_path / "site"
    described = site / "scaling-1.0.dist-info"
    described.mkdir(parents=True)
    (site / "scaling_pass_of_a_test.py").write_text(LOSSY)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: scaling\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[graphopt.passes]\nscale-weights = scaling_pass_of_a_test:ScaleWeights\n"
    )
    monkeypatch.syspath_prepend(str(site))
    return "scale-weights"


def logits(path: str | Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    with np.load(SAMPLES) as arrays:
        (result,) = session.run(None, {"image": arrays["image"][:10, 0]})
    return np.asarray(result)


# ------------------------------------------------------------------ optimize


def test_optimize_writes_a_model_that_gives_the_same_digits(
    graphopt: Graphopt, tmp_path: Path
) -> None:
    done = graphopt("optimize", DIGITS, "-o", "o.onnx", "--samples", SAMPLES, "--no-benchmark")

    assert (done.code, done.err) == (0, "")
    onnx.checker.check_model("o.onnx")
    np.testing.assert_allclose(logits("o.onnx"), logits(DIGITS), rtol=1e-4, atol=1e-4)
    assert "nodes 53 -> " in done.out
    assert [f.name for f in tmp_path.iterdir()] == ["o.onnx"]


STEP = {
    "pass": str,
    "effect": str,
    "round": int,
    "kept": bool,
    "verdict": str,
    "reason": str | None,
    "max_error": str | None,
    "changes": dict,
    "skipped": list,
    "nodes_before": int,
    "nodes_after": int,
    "bytes_before": int,
    "bytes_after": int,
    "seconds": float,
    "latency_ratio": float | None,
    "notes": list,
}


def test_optimize_tells_everything_as_json(graphopt: Graphopt, few_samples: str) -> None:
    done = graphopt("optimize", DIGITS, "-o", "o.onnx", "--samples", few_samples, "--json", "-")

    assert (done.code, done.err) == (0, "")
    told = done.json
    assert told["schema_version"] == 1
    assert told["recipe"] == "basic"
    assert told["original"] == {
        "nodes": 53, "stored_bytes": Path(DIGITS).stat().st_size, "opset": 18, "other_nodes": 0
    }  # fmt: skip
    assert told["optimized"]["stored_bytes"] == Path("o.onnx").stat().st_size
    assert told["optimized"]["nodes"] < 53
    for step in told["steps"]:
        assert step.keys() == STEP.keys()
        assert all(isinstance(step[key], kind) for key, kind in STEP.items())
    first = told["steps"][0]
    assert first["nodes_before"] == 53
    assert first["bytes_before"] == told["original"]["stored_bytes"]
    assert told["numerics"].keys() == {"logits"}
    assert told["numerics"]["logits"].keys() == {"as_written", "as_deployed"}
    assert told["numerics"]["logits"]["as_written"]["rel_l2"] <= 1e-5
    check_benchmark(told, ["original", "optimized"])
    assert told["versions"]["onnxruntime"] == ort.__version__
    assert told["versions"]["onnx-ir"] == version("onnx-ir")


def check_benchmark(told: dict[str, Any], models: list[str]) -> None:
    assert list(told["benchmark"]) == models
    for row in told["benchmark"].values():
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["load_ms"] > 0
        assert row["ratio"] > 0
    assert told["benchmark"][models[0]]["ratio"] == 1.0


def test_json_goes_to_a_file_beside_the_text(graphopt: Graphopt) -> None:
    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", *SHORT, "--no-benchmark", "--json", "r.json"
    )

    assert done.code == 0
    assert "lift-constants" in done.out
    told = json.loads(Path("r.json").read_text())
    assert told["passes"] == "lift-constants,drop-unused"
    assert told["benchmark"] is None


def test_two_runs_write_the_same_bytes(graphopt: Graphopt, few_samples: str) -> None:
    common = ["optimize", DIGITS, "--samples", few_samples, "--no-benchmark"]

    assert graphopt(*common, "-o", "one.onnx").code == 0
    assert graphopt(*common, "-o", "two.onnx").code == 0

    assert Path("one.onnx").read_bytes() == Path("two.onnx").read_bytes()


def test_optimizing_the_result_again_changes_nothing_but_its_provenance(
    graphopt: Graphopt, few_samples: str
) -> None:
    options = ["--samples", few_samples, "--no-benchmark", "--json", "-"]
    graphopt("optimize", DIGITS, "-o", "one.onnx", *options)

    again = graphopt("optimize", "one.onnx", "-o", "two.onnx", *options)

    assert [s["pass"] for s in again.json["steps"] if s["kept"]] == []
    one, two = onnx.load("one.onnx"), onnx.load("two.onnx")
    assert one.graph.SerializeToString(True) == two.graph.SerializeToString(True)


def test_the_result_says_where_it_comes_from(graphopt: Graphopt) -> None:
    done = graphopt("optimize", DIGITS, "-o", "o.onnx", *SHORT, "--no-benchmark", "--json", "-")

    told = {p.key: p.value for p in onnx.load("o.onnx").metadata_props}
    assert told["graphopt.version"] == version("graphopt")
    assert told["graphopt.pipeline"] == "lift-constants,drop-unused"
    assert told["graphopt.input_sha256"] == done.json["input_sha256"]


def test_without_validation_nothing_is_compared(graphopt: Graphopt) -> None:
    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", "--no-validate", "--no-benchmark", "--json", "-"
    )

    assert done.code == 0
    assert done.json["validated"] is False
    assert done.json["numerics"] == {}
    np.testing.assert_allclose(logits("o.onnx"), logits(DIGITS), rtol=1e-4, atol=1e-4)


def test_opset_is_raised_on_request(graphopt: Graphopt) -> None:
    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", *SHORT, "--opset", "21", "--no-benchmark", "--json", "-"
    )

    assert done.code == 0
    assert done.json["optimized"]["opset"] == 21
    assert onnx.load("o.onnx").opset_import[0].version == 21


def test_a_requirement_that_holds_changes_nothing(graphopt: Graphopt) -> None:
    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", *SHORT, "--no-benchmark", "--require", "size<=1"
    )

    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("strict", [False, True])
def test_a_requirement_that_fails_exits_1_and_writes_unless_strict(
    strict: bool, graphopt: Graphopt
) -> None:
    more = ["--strict"] if strict else []

    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", *SHORT, "--no-benchmark", "--require", "size<=0.01",
        *more,
    )  # fmt: skip

    assert done.code == 1
    assert done.err.startswith("graphopt: failed: size<=0.01 is required, and size is ")
    assert "drop-unused" in done.out
    assert Path("o.onnx").exists() is not strict


def test_a_requirement_on_what_was_not_measured_fails(graphopt: Graphopt) -> None:
    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", *SHORT, "--no-benchmark", "--require", "latency<=9"
    )

    assert done.code == 1
    assert "latency was not measured" in done.err


def test_a_lossy_pass_within_its_budget_is_kept(
    graphopt: Graphopt, lossy: str, few_samples: str
) -> None:
    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", "--passes", lossy, "--samples", few_samples,
        "--no-benchmark", "--json", "-",
    )  # fmt: skip

    assert (done.code, done.err) == (0, "")
    (step,) = done.json["steps"]
    assert (step["verdict"], step["max_error"], step["effect"]) == ("kept", "0.1", "LOSSY")
    assert 0 < done.json["numerics"]["logits"]["as_deployed"]["rel_l2"] <= 0.1


@pytest.mark.parametrize("strict", [False, True])
def test_a_lossy_pass_over_its_budget_is_rolled_back_and_exits_1(
    strict: bool, graphopt: Graphopt, lossy: str, few_samples: str
) -> None:
    more = ["--strict"] if strict else []

    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", "--passes", f"{lossy}{{factor=0.5}}", "--samples",
        few_samples, "--no-benchmark", "--max-error", "0.001", *more,
    )  # fmt: skip

    assert done.code == 1
    assert "over the budget 0.001" in done.err
    assert Path("o.onnx").exists() is not strict
    if not strict:
        assert "ROLLED BACK" in done.out
        np.testing.assert_array_equal(logits("o.onnx"), logits(DIGITS))


def test_a_lossy_result_on_random_samples_is_marked(graphopt: Graphopt, lossy: str) -> None:
    done = graphopt(
        "optimize", DIGITS, "-o", "o.onnx", "--passes", lossy, "--random-samples", "4",
        "--no-benchmark",
    )  # fmt: skip

    assert done.code == 0
    assert "budget not verified on real data" in done.out


# ------------------------------------------------------------------ the other commands


@pytest.fixture
def scaled(graphopt: Graphopt, lossy: str, few_samples: str) -> str:
    """A model that differs a little from the digits classifier."""
    done = graphopt(
        "optimize", DIGITS, "-o", "scaled.onnx", "--passes", lossy, "--samples", few_samples,
        "--no-benchmark",
    )  # fmt: skip
    assert done.code == 0
    return "scaled.onnx"


def test_validate_tells_the_error_of_every_output(
    graphopt: Graphopt, scaled: str, few_samples: str
) -> None:
    done = graphopt("validate", DIGITS, scaled, "--samples", few_samples, "--json", "-")

    assert (done.code, done.err) == (0, "")
    assert done.json["schema_version"] == 1
    assert done.json["failure"] is None
    assert 0 < done.json["numerics"]["logits"]["as_deployed"]["rel_l2"] < 0.1


@pytest.mark.parametrize(("budget", "code"), [("0.1", 0), ("1e-6", 1), ("logits:1e-6max-abs", 1)])
def test_validate_exits_1_over_the_budget(
    budget: str, code: int, graphopt: Graphopt, scaled: str, few_samples: str
) -> None:
    done = graphopt("validate", DIGITS, scaled, "--samples", few_samples, "--max-error", budget)

    assert done.code == code
    assert ("over the budget" in done.err) == (code == 1)
    assert "as deployed" in done.out


def test_bisect_finds_a_pass_and_writes_a_reproducer_that_validate_fails(
    graphopt: Graphopt, few_samples: str, lossy: str
) -> None:
    done = graphopt(
        "bisect", DIGITS, "--passes", lossy, "--max-error", "1e-4", "--samples", few_samples,
        "-o", "reproducer",
    )  # fmt: skip

    assert done.code == 1
    assert f"pass {lossy}: output 'logits' has rel-l2 error" in done.out
    assert "the error begins at" in done.out
    assert done.err.startswith(f"graphopt: failed: {lossy}: output 'logits'")
    commands = [line.split() for line in done.out.splitlines() if "  graphopt validate" in line]
    (command,) = commands
    assert graphopt(*command[1:]).code == 1


def test_bisect_tells_everything_as_json(graphopt: Graphopt, few_samples: str) -> None:
    graphopt("optimize", DIGITS, "-o", "same.onnx", *SHORT, "--no-benchmark")

    done = graphopt("bisect", DIGITS, "same.onnx", "--samples", few_samples, "--json", "-")

    assert done.code == 0
    assert done.json["schema_version"] == 1
    assert done.json["found"] is False
    assert done.json["origin"] is done.json["reproducer"] is None
    assert done.json["numerics"]["logits"]["as_written"]["identical"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "give either a second model, or the passes or the recipe to run"),
        (["--passes", "drop-unused", "-o", "no/folder"], "there is no folder no"),
        (["missing.onnx"], "missing.onnx"),
    ],
)
def test_bisect_says_what_is_missing(graphopt: Graphopt, arguments: list[str], why: str) -> None:
    done = graphopt("bisect", DIGITS, *arguments, "--random-samples", "1")

    assert done.code == 2
    assert why in done.err and done.err.count("\n") == 1


def test_a_model_equals_itself(graphopt: Graphopt) -> None:
    done = graphopt("validate", DIGITS, DIGITS, "--random-samples", "2", "--max-error", "0")

    assert done.code == 0
    assert done.out.count("identical") == 2


def test_benchmark_times_models_side_by_side(graphopt: Graphopt, few_samples: str) -> None:
    done = graphopt("benchmark", DIGITS, DIGITS, "--samples", few_samples, "--json", "-")

    assert (done.code, done.err) == (0, "")
    check_benchmark(done.json, [DIGITS, f"{DIGITS} (2)"])
    assert done.json["conditions"]["threads"] == 1
    assert done.json["conditions"]["onnxruntime"] == ort.__version__


def test_inspect_shows_the_model_and_what_basic_would_do(graphopt: Graphopt) -> None:
    done = graphopt("inspect", DIGITS)

    assert (done.code, done.err) == (0, "")
    assert "image: float[batch, 1, 8, 8]" in done.out
    assert "logits: float[batch, 10]" in done.out
    assert "6 BatchNormalization" in done.out
    assert "basic would:" in done.out


def test_inspect_tells_the_same_as_json(graphopt: Graphopt, tmp_path: Path) -> None:
    done = graphopt("inspect", DIGITS, "--json", "-")

    assert done.code == 0
    assert done.json["inputs"][0]["name"] == "image"
    assert done.json["nodes"] == 53
    assert done.json["basic"]["optimized"]["nodes"] < 53
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_what_layers_cost_and_at_which_sizes(graphopt: Graphopt) -> None:
    done = graphopt("inspect", DIGITS)
    sized = graphopt("inspect", DIGITS, "--size", "batch=3")
    told = graphopt("inspect", DIGITS, "--size", "batch=3", "--json", "-").json

    assert re.search(r"^ +MACs +share +parameters +zeros +operator +layer$", done.out, re.MULTILINE)
    assert "note: MACs at batch = 1; --size NAME=N says another batch" in done.out
    assert "note: MACs at batch = 3\n" in sized.out
    (whole,) = re.findall(r"^ *([\d,]+) .* all$", done.out, re.MULTILINE)
    assert told["macs"] == 3 * int(whole.replace(",", ""))
    assert (told["sizes"], told["assumed"]) == ({"batch": 3}, [])
    assert sum(layer["macs"] for layer in told["layers"]) == told["macs"]
    assert sum(layer["macs_share"] for layer in told["layers"]) == pytest.approx(1)
    assert set(told["layers"][0]) == {
        "name", "op_type", "macs", "macs_share", "parameters", "weights", "zero_share", "body_of"
    }  # fmt: skip


def test_inspect_counts_at_the_sizes_of_samples(graphopt: Graphopt, few_samples: str) -> None:
    told = graphopt("inspect", DIGITS, "--samples", few_samples, "--json", "-").json

    assert (told["sizes"], told["assumed"]) == ({"batch": 1}, [])


@pytest.mark.parametrize(
    ("size", "why"),
    [
        ("batch", "--size 'batch' is not of the form NAME=N"),
        ("batch=-1", "--size 'batch=-1' is not of the form NAME=N"),
        ("=3", "--size '=3' is not of the form NAME=N"),
        ("bach=3", "no dimension is called 'bach'; did you mean 'batch'?"),
    ],
)
def test_sizes_that_say_nothing_are_refused(graphopt: Graphopt, size: str, why: str) -> None:
    done = graphopt("inspect", DIGITS, "--size", size)

    assert (done.code, done.out) == (2, "")
    assert why in done.err


def test_inspect_shows_the_largest_layers_and_what_it_could_not_count(
    graphopt: Graphopt, tmp_path: Path
) -> None:
    steps = " ".join(f"h{n + 1} = MatMul(h{n}, w)" for n in range(12))
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>'
        " agraph (float[2, 4, 8] q, float[8, 8] h0, float[8, 8] w) => (float[8, 8] y, float[A] z)"
        f"{{ {steps} y = Relu(h12) z = com.microsoft.GroupQueryAttention(q, q, q) }}"
    )
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())

    done = graphopt("inspect", "m.onnx")

    assert len(re.findall(r"^ +512 +8.3% +0 +MatMul +h\d+$", done.out, re.MULTILINE)) == 10
    assert re.search(r"^1,024 +16.7% +0 +3 more \(--json\)$", done.out, re.MULTILINE)
    assert "operator does: 1 com.microsoft.GroupQueryAttention" in done.out


def test_explain_shows_kernels_and_what_they_take(graphopt: Graphopt, few_samples: str) -> None:
    done = graphopt("explain", DIGITS, "--samples", few_samples)

    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("cpu, 1 thread, 20 runs, onnxruntime ")
    assert re.search(r"^Conv +6 +Conv float ", done.out, re.MULTILINE)
    assert "nodes 53 -> " in done.out


def test_explain_tells_everything_as_json(graphopt: Graphopt, tmp_path: Path) -> None:
    done = graphopt("explain", DIGITS, "--random-samples", "1", "--threads", "2", "--json", "-")

    assert (done.code, done.err) == (0, "")
    told = done.json
    assert told["schema_version"] == 1
    assert (told["provider"], told["threads"], told["runs"]) == ("cpu", 2, 20)
    assert len(told["fates"]) == 53
    assert {fate["how"] for fate in told["fates"]} == {"runs", "fused", "folded"}
    assert sum(row["count"] for row in told["rows"]) == len(told["kernels"])
    reasons = [row["reason"] for row in told["rows"] if row["reason"] is not None]
    assert all(reason.keys() == {"code", "why", "change"} for reason in reasons)
    assert told["versions"]["onnxruntime"] == ort.__version__
    assert list(tmp_path.iterdir()) == []


def test_names_that_look_like_markup_are_shown_as_they_are(
    graphopt: Graphopt, tmp_path: Path
) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> agraph (float[n] x) => (float[n] y) {y = Exp(x)}'
    )
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "x[/bold]:smile:"
    proto.graph.output[0].name = proto.graph.node[0].output[0] = "[red]y"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())

    shown = graphopt("inspect", "m.onnx")
    done = graphopt("validate", "m.onnx", "m.onnx", "--random-samples", "1")

    assert "x[/bold]:smile:: float[n]" in shown.out
    assert "[red]y" in done.out


def test_passes_lists_every_pass_and_recipe(graphopt: Graphopt) -> None:
    done = graphopt("passes")
    told = graphopt("passes", "--json", "-").json

    assert (done.code, done.err) == (0, "")
    assert {"fold-constants", "drop-unused", "merge-duplicates"} <= told["passes"].keys()
    assert all(name in done.out for name in told["passes"])
    assert "recipe basic: " in done.out
    assert told["recipes"]["basic"]["passes"].startswith("inline-functions,")
    assert re.search(r"^edge +size +cpu +the smallest file", done.out, re.MULTILINE)
    assert re.search(r"^clusters +256, .* share so many values", done.out, re.MULTILINE)
    assert told["treatments"]["zeros"]["options"] == ["0.3", "0.5", "0.7"]
    assert told["scenarios"]["server-cpu"]["objective"] == "latency"
    assert told["scenarios"]["server-cpu"]["trunks"][0]["name"] == "float"


def test_passes_name_shows_the_options_of_one_pass(graphopt: Graphopt) -> None:
    done = graphopt("passes", "fold-constants")

    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("fold-constants (ROUNDING)\n")
    assert "max-bytes" in done.out


def test_demo_optimizes_the_digits_classifier(graphopt: Graphopt, tmp_path: Path) -> None:
    done = graphopt("demo")

    assert (done.code, done.err) == (0, "")
    found = re.search(r"accuracy on 300 digits: (0\.\d+) -> (0\.\d+);", done.out)
    assert found is not None
    assert float(found[2]) >= float(found[1]) - 0.01 > 0.95
    assert "1 thread" in done.out
    assert ort.__version__ in done.out
    assert [f.name for f in tmp_path.iterdir()] == ["digits_cnn.optimized.onnx"]
    np.testing.assert_allclose(
        logits("digits_cnn.optimized.onnx"), logits(DIGITS), rtol=1e-4, atol=1e-4
    )
