"""tune and sensitivity as a user meets them: the command line, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt import cli, demo
from graphopt.recipes import plan
from graphopt.testing import parse

ort = pytest.importorskip("onnxruntime")

README = Path(__file__).parent.parent / "README.md"
COUNT = 60
"""Of the digits: enough to divide, and soon run."""


@dataclass(frozen=True)
class Done:
    """What a run of the command line left."""

    code: int | str | None
    out: str
    err: str


def _run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Done:
    monkeypatch.setattr(sys, "argv", ["graphopt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return Done(stopped.value.code, *capsys.readouterr())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, samples and labels, and what was found before."""
    folder = tmp_path_factory.mktemp("digits")
    written = demo.write_files(folder)
    for path in sorted(written.samples.glob("*.npz"))[COUNT:]:
        path.unlink()
    return folder


@dataclass(frozen=True)
class Tuned:
    """A run of the command line, and the files that it left."""

    done: Done
    folder: Path

    @property
    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "tuned.json").read_text())
        return content


def _common(digits: Path) -> list[str]:
    return [
        str(digits / "digits_cnn.onnx"),
        *("--samples", str(digits / "samples"), "--cache", str(digits / "cache"), "--jobs", "1"),
    ]


SOON = ("--scenario", "llm-decode")
"""Builds few models."""


def _tune(digits: Path, *more: str) -> list[str]:
    return ["tune", *_common(digits), "--max-drop", "5", "-o", str(digits / "tuned.onnx"), *more]


@pytest.fixture(scope="module")
def tuned(digits: Path) -> Tuned:
    """In a process of its own, whose output is no terminal."""
    files = ["--json", str(digits / "tuned.json"), "--report", str(digits / "tuned.html")]
    pytest.importorskip("plotly")
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", *_tune(digits, *files)],
        capture_output=True,
        text=True,
    )
    return Tuned(Done(done.returncode, done.stdout, done.stderr), digits)


# ------------------------------------------------------------------ tune


def test_tune_writes_a_smaller_model_and_says_what_is_known_of_it(tuned: Tuned) -> None:
    assert (tuned.done.code, tuned.done.err) == (0, "")
    onnx.checker.check_model(str(tuned.folder / "tuned.onnx"))
    size = (tuned.folder / "tuned.onnx").stat().st_size
    assert size < 0.5 * (tuned.folder / "digits_cnn.onnx").stat().st_size
    out = tuned.done.out
    assert out.startswith("asked: the least size on cpu for a drop of at most 5 points of accuracy")
    assert re.search(r"^samples: \d+ to fit by, \d+ to search by, 12 to verify by", out, re.M)
    assert len(re.findall(r" chosen$", out, re.M)) == 1
    # What was too small for codes is narrow, too.
    assert tuned.json["passes"].endswith("},convert-numbers{weights-only=true},shorten-names")
    assert re.search(
        r"^not certified: 12 samples cannot prove a drop of at most 5: at least \d+ ", out, re.M
    )
    assert re.search(
        r"^measured by 12 samples: accuracy [\d.]+ -> [\d.]+ %, a (drop|gain)", out, re.M
    )
    assert re.search(rf"^bytes 112,949 -> {size:,} \(0\.\d+x\), latency .* ms ", out, re.M)
    assert "\nlayers: " in out


@pytest.mark.slow
def test_its_passes_run_by_hand(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they are fitted to are other samples then, so numbers differ."""
    arguments = [
        "optimize", str(tuned.folder / "digits_cnn.onnx"), "-o", str(tuned.folder / "again.onnx"),
        "--samples", str(tuned.folder / "samples"), "--passes", tuned.json["passes"],
        "--no-benchmark", "--max-error", "10", "--json", "-",
    ]  # fmt: skip

    done = _run(arguments, monkeypatch, capsys)

    assert (done.code, done.err) == (0, "")

    def lossy(told: dict[str, Any]) -> list[tuple[str, str]]:
        found = [s for s in told["steps"] if s["effect"] == "LOSSY"]
        return [(s["pass"].partition("{")[0], s["verdict"]) for s in found]

    assert lossy(json.loads(done.out)) == lossy(tuned.json) != []


SCHEMA = {
    "schema_version": int,
    "passes": str,
    "original": dict,
    "optimized": dict,
    "steps": list,
    "numerics": dict,
    "benchmark": dict,
    "notes": list,
    "failures": list,
    "versions": dict,
    "scenario": str,
    "objective": str,
    "metric": str,
    "unit": str,
    "certify": bool,
    "certificate": dict,
    "points": list,
    "probes": list,
    "samples": dict,
    "evaluations": int,
    "minutes": float,
}


def test_tune_tells_everything_as_json(tuned: Tuned) -> None:
    told = tuned.json

    assert all(isinstance(told[key], kind) for key, kind in SCHEMA.items())
    assert (told["scenario"], told["objective"], told["metric"]) == ("size", "size", "accuracy")
    assert told["samples"] == {"fitted": 32, "searched": 16, "verified": 12}
    assert told["certificate"]["certified"] is False
    assert told["certificate"]["limit"] == 5
    (chosen,) = [point for point in told["points"] if point["chosen"]]
    assert chosen["built"]
    assert told["passes"].endswith(str(plan(None, chosen["passes"], None)))
    layers = {probe["layer"] for probe in told["probes"]}
    assert chosen["options"].keys() <= layers
    given = {(p["layer"], f"{p['treatment']} {p['option']}") for p in told["probes"]}
    assert chosen["options"].items() <= given
    assert any(not point["built"] for point in told["points"])
    assert told["optimized"]["stored_bytes"] == (tuned.folder / "tuned.onnx").stat().st_size


def test_its_page_has_the_search_and_the_evidence(tuned: Tuned) -> None:
    text = (tuned.folder / "tuned.html").read_text()

    titles = re.findall(r"<h2 id=[^>]*>([^<]*)</h2>", text)
    assert titles[:5] == [
        "Summary", "What was tried", "Options by layer", "Sensitivity by layer", "Ledger"
    ]  # fmt: skip
    assert {"Outputs", "Error by layer", "Latency", "Time by operator and kernel"} <= {*titles}
    assert "not certified: 12 samples cannot prove" in text
    assert '"name":"expected"' in text and '"name":"allowed"' in text
    assert "★ " in text


def test_with_certify_nothing_is_written_unless_it_is_proven(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = digits / "certified.onnx"

    done = _run(_tune(digits, *SOON, "--certify", "-o", str(output)), monkeypatch, capsys)

    assert done.code == 1
    assert done.err.startswith(
        "graphopt: failed: no model is proven to lose at most 5 points: 12 samples cannot prove"
    )
    assert "failed: no model is proven" in done.out
    assert not output.exists()


STRICT = """
import numpy

def score(run, samples):
    "Nothing but the very same numbers is good enough."
    return [float(run(s)["logits"].astype("float64").sum() * 1e9) for s in samples]
"""


def test_where_nothing_is_within_the_drop_or_as_required_that_is_told_and_the_model_written(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, metric = digits / "lossless.onnx", digits / "strict.py"
    metric.write_text(STRICT)

    asked = ["--metric", f"{metric}:score", "--max-drop", "0", "--require", "size<=0.001"]

    done = _run(_tune(digits, *SOON, *asked, "-o", str(output)), monkeypatch, capsys)

    assert done.code == 1
    assert done.err.startswith("graphopt: failed: no lossy model was found that loses at most 0:")
    assert "; size<=0.001 is required, and size is 0.9" in done.err
    assert output.exists()
    image = {"image": np.load(digits / "samples" / "000.npz")["image"]}
    before, after = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, image)[0]
        for path in (digits / "digits_cnn.onnx", output)
    )
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ sensitivity


@pytest.fixture(scope="module")
def shown(digits: Path) -> Done:
    arguments = [
        *("sensitivity", *_common(digits), "--json", str(digits / "s.json")),
        *("--report", str(digits / "s.html")),
    ]
    pytest.importorskip("plotly")
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", *arguments], capture_output=True, text=True
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_sensitivity_shows_what_each_option_does_to_each_layer(digits: Path, shown: Done) -> None:
    assert (shown.code, shown.err) == (0, "")
    told = json.loads((digits / "s.json").read_text())
    assert told["schema_version"] == 1
    assert {"bits", "clusters", "int8-static", "zeros"} <= told["treatments"].keys()
    worst = {
        layer: max(p["divergence"] for p in told["probes"] if p["layer"] == layer)
        for layer in told["layers"]
    }
    assert list(worst.values()) == sorted(worst.values(), reverse=True)
    rows = shown.out.splitlines()
    order = [line.split()[0] for line in rows if ".weight" in line]
    assert order == told["layers"]
    assert all(p["measured"] == (p["loss"] is not None) for p in told["probes"])
    assert "clusters: the numbers of the weight share so many values" in shown.out


def test_its_page_has_a_row_for_each_layer(digits: Path, shown: Done) -> None:
    text = (digits / "s.html").read_text()

    told = json.loads((digits / "s.json").read_text())
    assert all(f'scope="row">{layer}</th>' in text for layer in told["layers"])
    assert ">Sensitivity by layer</h2>" in text


@pytest.mark.slow
def test_a_treatment_alone_has_all_its_options_tried(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--treatments", " zeros", "--every", "--json", "-"]

    done = _run(["sensitivity", *_common(digits), *more], monkeypatch, capsys)

    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["treatments"].keys() == {"zeros"}
    assert {p["option"] for p in told["probes"]} == {"0.3", "0.5", "0.7"}
    assert all(p["measured"] for p in told["probes"])


def test_a_model_without_layers_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = parse("agraph (float[n] x) => (float[n] y) { y = Relu(x) }")
    onnx.save(_proto(model), "m.onnx")

    done = _run(["sensitivity", "m.onnx", "--cache", "c"], monkeypatch, capsys)

    assert (done.code, done.err) == (0, "")
    assert "no layer of the model can be treated" in done.out
    assert "note: no samples were given: judged on 4 random ones" in done.out


def _proto(model: Any) -> onnx.ModelProto:
    import onnx_ir

    return onnx_ir.to_proto(model)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--samples", "nowhere"], "nowhere"),
        (["--max-drop", "a bit"], "max-drop is 'a bit'; it must be a number in the unit of"),
        (["--max-drop", "-1"], "max-drop is '-1'; it must be"),
        (["--max-drop", "nan"], "max-drop is 'nan'; it must be"),
        (["--scenario", "edgy"], "there is no scenario 'edgy'; did you mean 'edge'?"),
        (["--objective", "sise"], "there is no objective 'sise'; did you mean 'size'?"),
        (
            ["--scenario", "edge", "--objective", "latency"],
            "the scenario 'edge' is for size, and not for latency",
        ),
        (
            ["--scenario", "server-cpu", "--provider", "cuda"],
            "the scenario 'server-cpu' is for cpu, and not for cuda",
        ),
        (["--metric", "acuracy"], "there is no metric 'acuracy'; did you mean 'accuracy'?"),
        (["--metric", "mine.py:score"], "there is no file mine.py"),
        (["--labels", "nowhere.json"], "there is no file nowhere.json"),
        (["--confidence", "95"], "confidence is 95; it must be between 0 and 1, as 0.95"),
        (["--budget-minutes", "0"], "budget_minutes is 0; it must be above 0"),
        (["--require", "size>=1"], "compares by '>='"),
        (["--state", "x"], "--state 'x' is not of the form OUTPUT=INPUT"),
        (["--executor", "threads"], "'threads' is no executor; write processes, or dask://"),
        (["--json", "o.onnx"], "o.onnx is asked for twice"),
    ],
)
def test_tune_says_what_is_wrong_and_writes_nothing(
    more: list[str],
    why: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    done = _run(_tune(digits, "-o", "o.onnx", *more), monkeypatch, capsys)

    assert (done.code, done.out) == (2, "")
    assert why in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_used_is_told_before_any_work(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = _run(_tune(digits, "--cache", __file__), monkeypatch, capsys)

    assert (done.code, done.out) == (1, "")
    assert "cannot be used (File exists); give another folder with --cache" in done.err


def test_accuracy_without_labels_is_refused_and_agreement_offered(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "0.npz").write_bytes((digits / "samples" / "000.npz").read_bytes())

    done = _run(
        _tune(digits, "--samples", str(samples), "--metric", "accuracy"), monkeypatch, capsys
    )

    assert done.code == 2
    assert "needs labels, and there is no labels.json in " in done.err
    assert "--metric agreement" in done.err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--treatments", "cluster"], "there is no treatment 'cluster'; did you mean 'clusters'?"),
        (["--random-samples", "2"], "give samples or a number of random samples, not both"),
        (["--report", "no/such.html"], "there is no folder no"),
    ],
)
def test_sensitivity_says_what_is_wrong(
    more: list[str],
    why: str,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = _run(["sensitivity", *_common(digits), *more], monkeypatch, capsys)

    assert (done.code, done.out) == (2, "")
    assert why in done.err and done.err.count("\n") == 1


# ------------------------------------------------------------------ the story of the README


def _commands_of_the_readme() -> list[str]:
    found = README.read_text(encoding="utf-8").partition("## Find the best by itself")[2]
    script = re.search(r"```\n(.*?)```", found, re.DOTALL)
    assert script is not None
    return re.split(r"\n(?=graphopt |python )", script[1].strip())


def _answers(model: Path, samples: Path) -> dict[str, int]:
    session = ort.InferenceSession(model)
    files = sorted(samples.glob("*.npz"))
    return {file.stem: int(session.run(None, dict(np.load(file)))[0].argmax()) for file in files}


@pytest.mark.slow
def test_the_five_commands_of_the_readme_run_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    told = []
    for command in _commands_of_the_readme():
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), command
        told.append(done.stdout)

    demonstrated, sensitivity, tuned, validated, deployed = told
    given, found = tmp_path / "digits" / "digits_cnn.onnx", tmp_path / "tuned.onnx"
    samples = given.parent / "samples"
    labels = json.loads((samples / "labels.json").read_text())
    assert demonstrated.startswith("written: digits/digits_cnn.onnx, 300 samples")
    layers = [node for node in onnx.load(given).graph.node if node.op_type in ("Conv", "Gemm")]
    assert sensitivity.startswith(f"{len(layers)} layers of the model after basic")
    assert " chosen\n" in tuned
    assert f"-> {found.stat().st_size:,} (" in tuned
    assert found.stat().st_size < given.stat().st_size / 4
    assert (tmp_path / "tuned.html").stat().st_size > 100_000
    before, after = _answers(given, samples), _answers(found, samples)
    same = np.mean([after[name] == answer for name, answer in before.items()])
    assert validated.splitlines()[-1].endswith(f" {same:.2%}")
    assert deployed.strip() == str(after["000"]) == str(labels["000"])


def test_demo_writes_its_files_to_try_commands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    done = _run(["demo", "--files", "a folder"], monkeypatch, capsys)

    assert (done.code, done.err) == (0, "")
    assert {p.name for p in Path("a folder").iterdir()} == {"digits_cnn.onnx", "samples"}
    assert len(list(Path("a folder/samples").iterdir())) == 301
    command = next(line for line in done.out.splitlines() if line.startswith("try: "))
    assert shlex.split(command)[2:4] == ["tune", "a folder/digits_cnn.onnx"]


def test_demo_files_that_cannot_be_written_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")

    done = _run(["demo", "--files", str(tmp_path / "file")], monkeypatch, capsys)

    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
