"""What is unsure goes, what is sure stays, and where all is sure it is prune-importance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest
from on_codes import normal
from pruned_models import MODELS, error, products, pruned, samples, weights
from pruned_models import share_of_zeros as zeros_in

import graphopt
from graphopt.contract import Context, Sample
from graphopt.errors import GraphoptError, SampleError, SpecError
from graphopt.registry import parse_passes
from graphopt.saving import stored_bytes
from graphopt.testing import canonical, parse
from graphopt_passes.prune.prune_importance import PruneImportance
from graphopt_passes.prune.prune_stability import PruneStability
from graphopt_passes.prune.stability import Mode

MODES: tuple[Mode, ...] = get_args(Mode)
DENSE = PruneStability(min_elements=100, form="dense")
PLAIN = PruneImportance(min_elements=100, form="dense")


def assert_same_bits(first: ir.Model, second: ir.Model) -> None:
    assert canonical(first) == canonical(second)
    for name, value in first.graph.initializers.items():
        one, other = value.const_value, second.graph.initializers[name].const_value
        assert one is not None and other is not None
        assert one.tobytes() == other.tobytes(), name


# ------------------------------------------------------------------ where all is sure


@pytest.mark.parametrize(
    "name, count",
    [
        ("products", 1),
        ("products", 3),
        pytest.param("products", 20, marks=pytest.mark.slow),
        pytest.param("convs", 3, marks=pytest.mark.slow),
        pytest.param("lstm", 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_the_same_in_all_chunks_is_pruned_by_importance(
    mode: Mode, count: int, name: str
) -> None:
    model = MODELS[name]()
    given = samples(model, 1) * count
    sure, change = pruned(replace(DENSE, mode=mode), model, given)
    plain, other = pruned(PLAIN, model, given)

    assert_same_bits(sure, plain)
    assert change.counts == other.counts and change.skips == other.skips
    assert [note for note in change.notes if "Jaccard" in note] == [
        "masks of 3 weights are alike between resamples of the samples to a Jaccard index of "
        "1.0000; by importance alone, 1.0000"
    ]


@pytest.mark.slow
def test_also_within_an_error() -> None:
    model = products()
    given = samples(model, 1) * 2
    sure, _ = pruned(replace(DENSE, error=0.1), model, given)
    plain, _ = pruned(replace(PLAIN, error=0.1), model, given)
    assert 0.1 < zeros_in(sure) < 0.9
    assert_same_bits(sure, plain)


# ------------------------------------------------------------------ where it is not


def rare() -> tuple[ir.Model, list[Sample]]:
    """A product whose first inputs are as large on the mean as the others, by one sample alone."""
    model = parse(
        "agraph (float[N,32] x, float[32,24] w) => (float[A,B] y) { y = MatMul(x, w) }",
        w=np.sign(normal(0, 32, 24)) * (1 + 0.05 * np.abs(normal(1, 32, 24))),
    )
    rng = np.random.default_rng(3)
    given = []
    for number in range(16):
        array = rng.normal(size=(40, 32)).astype(np.float32)
        array[:, :8] *= 5 if number == 5 else 0
        given.append({"x": array})
    return model, given


def kept(mode: Mode | None, **options: Any) -> float:
    """The share of the weights of rare inputs that stays."""
    model, given = rare()
    one = PLAIN if mode is None else replace(DENSE, mode=mode, **options)
    return float(np.mean(weights(pruned(one, model, given)[0])["w"][:8] != 0))


def test_what_only_few_samples_say_goes() -> None:
    plain, stable = kept(None), kept("stability")
    assert stable < 0.25 < 0.4 < plain


def test_keep_uncertain_keeps_it() -> None:
    plain = kept(None)
    found = [kept("keep-uncertain", kappa=kappa) for kappa in (0.0, 1.0)]
    assert found[0] == plain < 0.9 < found[1]


def test_a_selection_is_between() -> None:
    assert kept("stability") < kept("selection") < kept(None) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mode, name", list(zip(MODES, ("products", "lstm", "convs"), strict=True)))
def test_it_loses_hardly_more_than_importance(mode: Mode, name: str) -> None:
    model = MODELS[name]()
    given, held_out = samples(model, 5), samples(model, 4, seed=1)
    sure, change = pruned(replace(DENSE, mode=mode), model, given)
    plain, _ = pruned(PLAIN, model, given)
    assert zeros_in(sure) == pytest.approx(zeros_in(plain), abs=1e-3)
    assert error(model, sure, held_out) < 1.25 * error(model, plain, held_out)
    (note,) = change.notes
    assert note.startswith("masks of 3 weights are alike")


# ------------------------------------------------------------------ checkpoints


def checkpoint(folder: Path, name: str, **changed: np.ndarray) -> str:
    """A file of the products with other weights."""
    model = products()
    for weight, array in changed.items():
        value = model.graph.initializers[weight]
        value.const_value = ir.tensor(array, name=weight)
        value.shape = ir.Shape(array.shape)
    path = folder / name
    ir.save(model, path)
    return str(path)


def test_checkpoints_that_are_the_model_change_nothing(tmp_path: Path) -> None:
    model = products()
    given = samples(model, 4)
    same = (checkpoint(tmp_path, "a.onnx"), checkpoint(tmp_path, "b.onnx"))
    with_them, change = pruned(replace(DENSE, checkpoints=same), model, given)
    without, _ = pruned(DENSE, model, given)
    assert_same_bits(with_them, without)
    assert change.notes[-1] == "3 of 3 weights are in checkpoints, too"


@pytest.mark.slow
def test_what_differs_between_checkpoints_goes(tmp_path: Path) -> None:
    model = products()
    given, own = samples(model, 4), weights(products())["u"]
    restless = np.random.default_rng(5).random(own.shape) < 0.3
    paths = (
        checkpoint(tmp_path, "a.onnx", u=np.where(restless, -own, own)),
        checkpoint(tmp_path, "b.onnx", u=np.where(restless, 3 * own, own)),
    )
    after, _ = pruned(replace(DENSE, checkpoints=paths), model, given)
    plain, _ = pruned(DENSE, model, given)
    gone = [float(np.mean(weights(m)["u"][restless] == 0)) for m in (after, plain)]
    assert gone[0] > gone[1] + 0.15


@pytest.mark.slow
def test_other_shapes_and_no_numbers_are_not_looked_at(tmp_path: Path) -> None:
    model = products()
    given = samples(model, 2)
    bad = normal(1, 32, 32)
    bad[3, 4:6] = np.nan, np.inf
    paths = (
        checkpoint(tmp_path, "a.onnx", u=bad, v=normal(0, 16, 30)),
        checkpoint(tmp_path, "b.onnx"),
    )
    after, change = pruned(replace(DENSE, checkpoints=(paths[0],)), model, given)
    without, _ = pruned(DENSE, model, given)
    assert_same_bits(after, without)
    assert change.notes[-1] == "1 of 3 weights are in checkpoints, too"


def test_a_checkpoint_that_is_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    one = replace(DENSE, checkpoints=(str(tmp_path / "text.onnx"),))

    with pytest.raises(GraphoptError, match=r"text\.onnx"):
        pruned(one, products(), samples(products(), 2))


def test_checkpoints_can_be_given_as_text(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "a b.onnx")
    (one,) = parse_passes(f'prune-stability{{checkpoints=("{path}","{path}")}}')
    assert isinstance(one, PruneStability) and one.checkpoints == (path, path)
    assert parse_passes(str(one)) == (one,)


# ------------------------------------------------------------------ as a pass


@pytest.mark.parametrize("number, mode", list(zip([0.0, 1000.0, np.nan], MODES, strict=True)))
def test_inputs_that_say_nothing(mode: Mode, number: float) -> None:
    model = products()
    given = [{"x": np.full((6, 24), number, np.float32)}] * 3
    after, _ = pruned(replace(DENSE, mode=mode), model, given)
    assert all(np.isfinite(array).all() for array in weights(after).values())
    assert zeros_in(after) >= 0.5


def test_a_run_keeps_it_and_tells() -> None:
    model = parse(
        "agraph (float[N,64] x, float[64,96] w, float[96,64] v) => (float[A,B] y)"
        "{ a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }",
        w=normal(0, 64, 96),
        v=normal(1, 96, 64),
    )
    run = graphopt.optimize(
        model,
        passes="prune-stability{sparsity=0.6,numbers=float16}",
        samples=samples(model, 20),
        max_error=0.5,
        benchmark=False,
    )
    (step,) = run.steps
    assert step.kept, step.reason
    assert any("Jaccard index" in note for note in step.notes)
    assert stored_bytes(run.model) < 0.35 * stored_bytes(model)


def test_without_samples_it_does_not_run() -> None:
    with pytest.raises(SampleError, match="prune-stability needs samples"):
        graphopt.optimize(products(), passes="prune-stability", benchmark=False)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("kappa=2", "kappa is of mode=keep-uncertain"),
        ("mode=selection,kappa=0.5", "kappa is of mode=keep-uncertain"),
        ("mode=sure", "stability"),
        ("kappa=-1,mode=keep-uncertain", "0"),
        ("sparsity=1", "0.99"),
        ("pattern=2x4", "pattern"),
    ],
)
def test_wrong_options_are_told_in_words(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        parse_passes(f"prune-stability{{{text}}}")


def test_milder_forms_come_to_an_end() -> None:
    one: PruneStability | None = PruneStability(sparsity=0.5, mode="keep-uncertain", kappa=2.0)
    found = []
    while one is not None:
        found.append((one.sparsity, one.kappa))
        one = one.narrow()
    assert found == [(0.5, 2), (0.4, 2), (0.3, 2), (0.2, 2), (0.1, 2)]
    milder = PruneStability(error=0.02).narrow()
    assert milder is not None and milder.error == 0.01
    assert PruneStability(error=0.005).narrow() is None


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "missing.onnx")
    model = products()
    context = Context(lambda: model)

    reason = PruneStability(checkpoints=(path,)).refuse(model, context)

    assert reason == f"there is no checkpoint at {path}"
