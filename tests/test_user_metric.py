"""A metric of the user's own, and what is said when it is not what it should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import GraphoptError, SampleError, SpecError
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.scores import Judge, Scores, drops
from graphopt.signature import signature
from graphopt.testing import parse
from graphopt.user_metric import PartSamples, UserMetric

MODEL = "g (float[N] x) => (float[N] y) {y = Identity(x)}"
DOUBLED = "g (float[N] x) => (float[N] y) {y = Sum(x, x)}"


def _feed(tmp_path: Path, state: tuple[tuple[str, str], ...] = ()) -> Feed:
    folder = tmp_path / "samples"
    folder.mkdir(exist_ok=True)
    for n in range(3):
        np.savez(folder / f"clip{n}.npz", x=np.array([n / 10], np.float32))
    inputs = signature(parse(MODEL))
    return Feed(read_samples(folder, inputs, state), inputs, state)


def _judge(tmp_path: Path, code: str, name: str = "score") -> Judge:
    file = tmp_path / "mine.py"
    file.write_text(code)
    feed, model = _feed(tmp_path), parse(MODEL)
    (judge,) = UserMetric(file, name).judges(model, Session(model), feed, [feed])
    return judge


def _scores(tmp_path: Path, code: str, model: str = MODEL) -> Scores:
    return _judge(tmp_path, code)(Session(parse(model)))


def test_one_number_for_all(tmp_path: Path) -> None:
    code = "import numpy as np\ndef score(run):\n    return run({'x': np.ones(1, 'f')})['y'][0]\n"

    scores = _scores(tmp_path, code, DOUBLED)

    assert scores.value == 2
    assert scores.per_item is None
    assert (scores.low, scores.high, scores.unit) == (-np.inf, np.inf, "")
    with pytest.raises(SampleError, match="return a score for each item"):
        drops(scores, scores)


EACH = "def score(run, samples):\n    return [run(s)['y'].sum() for s in samples]\n"


def test_one_number_for_each_sample(tmp_path: Path) -> None:
    judge = _judge(tmp_path, EACH)

    first, second = judge(Session(parse(MODEL))), judge(Session(parse(DOUBLED)))

    assert first.per_item == pytest.approx([0, 0.1, 0.2])
    assert second.per_item == pytest.approx([0, 0.2, 0.4])
    assert second.value == pytest.approx(0.2)
    with pytest.raises(SampleError, match=r"score\.bounds = \(0, 1\)"):
        drops(first, second)


def test_bounds_are_taken_at_their_word_and_held_to_it(tmp_path: Path) -> None:
    judge = _judge(tmp_path, EACH + "score.bounds = (0, 0.3)\n")

    scores = judge(Session(parse(MODEL)))

    assert (scores.low, scores.high) == (0, 0.3)
    found = drops(scores, scores)
    assert (found.lower, found.upper, list(found.values)) == (-0.3, 0.3, [0, 0, 0])
    with pytest.raises(SampleError, match=r"from 0 to 0\.4, outside of its bounds, 0 to 0\.3"):
        judge(Session(parse(DOUBLED)))


def test_samples_have_names_and_can_be_read_again(tmp_path: Path) -> None:
    samples = PartSamples(_feed(tmp_path))

    assert samples.names == ("clip0", "clip1", "clip2")
    assert [float(s["x"][0]) for s in samples] == pytest.approx([0, 0.1, 0.2])
    assert [float(s["x"][0]) for s in samples] == pytest.approx([0, 0.1, 0.2])
    assert len(samples) == 3
    assert float(samples[-1]["x"][0]) == pytest.approx(0.2)
    assert len(samples[1:]) == 2
    with pytest.raises(IndexError):
        samples[3]


def test_of_a_stateful_model_a_sample_is_a_list_of_steps(tmp_path: Path) -> None:
    samples = PartSamples(_feed(tmp_path, state=(("y", "x"),)))

    assert samples.names == ("clip0",)
    assert [float(step["x"][0]) for step in samples[0]] == pytest.approx([0, 0.1, 0.2])


def test_what_lies_beside_the_file_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("ANSWER = 42\n")

    code = "from beside_mine import ANSWER\ndef score(run):\n    return ANSWER\n"

    assert _scores(tmp_path, code).value == 42


@pytest.mark.parametrize(
    "head, given",
    [
        ("run", 1),
        ("run, samples", 2),
        ("run, samples=None", 2),
        ("*all", 2),
        ("run, *, threshold=0.5", 1),
    ],
)
def test_it_is_called_with_what_it_takes(tmp_path: Path, head: str, given: int) -> None:
    code = f"def score({head}):\n    n = dict(locals())\n    n.pop('threshold', 0)\n"
    code += "    return len(n['all']) if 'all' in n else len(n)\n"

    assert _scores(tmp_path, code).value == given


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    "code, said",
    [
        ("def scores(run): return 1\n", r"has no function 'score'; did you mean 'scores'\?"),
        ("score = 3\n", "score is a int, no function"),
        ("def score(run) return 1\n", r"mine\.py, line 1: SyntaxError"),
        ("import numpy\nimport nothing_of_that_name\n", r"line 2: ModuleNotFoundError: No module"),
        ("def score(): return 1\n", r"takes \(\); it must take \(run\) or \(run, samples\)"),
        ("def score(a, b, c): return 1\n", r"takes \(a, b, c\)"),
        ("def score(run, *, k): return 1\n", r"takes \(run, \*, k\)"),
        ("def score(run): return 1\nscore.bounds = 5\n", r"its bounds are 5; they must be"),
        ("def score(run): return 1\nscore.bounds = (1, 0)\n", r"bounds are \(1, 0\)"),
        ("def score(run): return 1\nscore.bounds = (0, float('inf'))\n", r"bounds are \(0, inf\)"),
    ],
)
def test_functions_that_cannot_be_used(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        _judge(tmp_path, code)


@pytest.mark.parametrize(
    "code, said",
    [
        ("def score(run):\n    x = 1\n    return x / 0\n", "line 3: ZeroDivisionError: division"),
        (
            "import numpy as np\ndef low(v):\n    return np.ones(2) @ np.ones(3)\n"
            "def score(run):\n    return low(1)\n",
            "line 3: ValueError",
        ),
        ("def score(run): return None\n", "returned None; return one number"),
        ("def score(run): return 'good'\n", "returned 'good'; return one number"),
        ("def score(run): return '5'\n", "returned '5'; return one number"),
        ("def score(run): return [1, None, 3]\n", r"returned \[1, None, 3\]; return one number"),
        ("def score(run): return [1, 2]\n", r"shape \[2\], and there are 3 samples"),
        ("def score(run): return []\n", r"shape \[0\], and there are 3 samples"),
        ("def score(run): return [[1], [2], [3]]\n", r"shape \[3, 1\]"),
        ("def score(run): return [1, [2], 3]\n", r"returned \[1, \[2\], 3\]"),
        ("def score(run): return float('nan')\n", "NaN or infinity"),
        (
            "def score(run):\n    return run({'z': 1})\n",
            r"line 2: the model has no input 'z'; there",
        ),
        ("def score(run):\n    return run(5)\n", r"line 2: run was given a int"),
        ("def score(run):\n    return run({})\n", r"line 2: .*x"),
        ("def score(run):\n    return run({'x': [[1.0]]})\n", r"line 2: "),
    ],
)
def test_what_it_raises_or_returns_is_told_with_its_line(
    tmp_path: Path, code: str, said: str
) -> None:
    with pytest.raises(GraphoptError, match=said) as caught:
        _scores(tmp_path, code)

    assert str(tmp_path / "mine.py") in str(caught.value)
    assert "user_metric" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    model = parse(MODEL)
    feed = _feed(tmp_path)
    with pytest.raises(SpecError, match="there is no file"):
        UserMetric(tmp_path / "none.py", "f").judges(model, Session(model), feed, [feed])
