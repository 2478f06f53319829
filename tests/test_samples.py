from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from graphopt.contract import Sample
from graphopt.errors import SampleError
from graphopt.random_samples import random_samples
from graphopt.sample_files import read_npz, write_npz
from graphopt.samples import Samples, digest, read_samples
from graphopt.signature import Input, check_sample, signature
from graphopt.testing import parse

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
X = (Input("x", FLOAT, ("N", 3)),)
XY = (Input("x", FLOAT, ("N", 3)), Input("y", INT, ("N",)))


def _rows(count: int, start: int = 0, size: int = 2) -> list[Sample]:
    """Samples that tell which one they are by their first number."""
    return [{"x": np.full((size, 3), start + i, FLOAT)} for i in range(count)]


def _marks(samples: Samples) -> list[float]:
    return [float(sample["x"].flat[0]) for sample in samples]


def _write(folder: Path, samples: list[Sample], names: str = "{:03}.npz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(samples):
        np.savez(folder / names.format(index), **sample)  # type: ignore[arg-type]
    return folder


# ------------------------------------------------------------------ every form


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = _write(tmp_path / "s", _rows(11))
    (folder / "notes.txt").write_text("not a sample")

    assert _marks(read_samples(folder, X)) == list(range(11))
    assert _marks(read_samples(str(folder), X)) == list(range(11))


def test_one_sample_in_one_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.ones((2, 3), FLOAT))
    np.savez_compressed(tmp_path / "small.npz", x=np.ones((2, 3), FLOAT))
    np.save(tmp_path / "one.npy", np.ones((2, 3), FLOAT))

    for name in ("one.npz", "small.npz", "one.npy"):
        (sample,) = read_samples(tmp_path / name, X)
        assert sample["x"].shape == (2, 3)


def test_many_samples_along_a_leading_axis(tmp_path: Path) -> None:
    stacked = np.arange(4, dtype=FLOAT).repeat(6).reshape(4, 2, 3)
    np.savez(tmp_path / "stacked.npz", x=stacked)
    np.savez_compressed(tmp_path / "compressed.npz", x=stacked)
    np.savez(tmp_path / "columns.npz", x=np.asfortranarray(stacked))
    np.save(tmp_path / "stacked.npy", stacked)

    for name in ("stacked.npz", "compressed.npz", "columns.npz", "stacked.npy"):
        samples = read_samples(tmp_path / name, X)
        assert _marks(samples) == [0, 1, 2, 3]
        assert _marks(samples) == [0, 1, 2, 3], "they can be read again"
        assert {sample["x"].shape for sample in samples} == {(2, 3)}


def test_a_folder_may_hold_stacked_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 1, 3), FLOAT))
    np.save(tmp_path / "b.npy", np.ones((1, 3), FLOAT))

    assert _marks(read_samples(tmp_path, X)) == [0, 0, 1]


def test_stacked_inputs_must_have_the_same_number_of_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.zeros((4, 2, 3), FLOAT), y=np.zeros((5, 2), INT))

    with pytest.raises(SampleError, match=r"different numbers of samples: \[4, 5\]"):
        read_samples(tmp_path / "s.npz", XY)


def test_an_iterable_is_read_once_and_may_reuse_its_arrays() -> None:
    buffer = np.zeros((2, 3), FLOAT)
    reads = []

    def generate() -> Iterator[Sample]:
        for index in range(3):
            reads.append(index)
            buffer[:] = index
            yield {"x": buffer}

    samples = read_samples(generate(), X)

    assert _marks(samples) == _marks(samples) == [0, 1, 2]
    assert reads == [0, 1, 2]


def test_an_iterable_of_strings_may_reuse_its_arrays() -> None:
    buffer = np.array([""], object)

    def generate() -> Iterator[Sample]:
        for word in ("a", "b"):
            buffer[0] = word
            yield {"t": buffer}

    samples = read_samples(generate(), [Input("t", np.dtype(object), (1,))])

    assert [sample["t"].tolist() for sample in samples] == [["a"], ["b"]]
    assert len(set(samples.digests)) == 2


def test_python_objects_in_an_iterable_are_refused() -> None:
    rows = [{"t": np.array(["a"], object)}, {"t": np.array([None], object)}]

    with pytest.raises(SampleError, match=r"sample 1: 't' holds a Python object \(NoneType\)"):
        read_samples(rows, [Input("t", np.dtype(object), (1,))])


def test_the_samples_live_as_long_as_one_iterates_over_them() -> None:
    iterator = iter(read_samples(_rows(3), X))

    assert [float(sample["x"].flat[0]) for sample in iterator] == [0, 1, 2]


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a/b:0", "../up", "x.npy", "naïve"])
def test_an_input_may_have_any_name(name: str, tmp_path: Path) -> None:
    expected = [Input(name, FLOAT, (None,))]
    write_npz(tmp_path / "s.npz", {name: np.ones(2, FLOAT)})

    for source in ([{name: np.ones(2, FLOAT)}], tmp_path / "s.npz"):
        (sample,) = read_samples(source, expected)
        assert sample[name].tolist() == [1, 1]


@pytest.mark.parametrize(
    "dtype",
    [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, np.complex64, np.bool_],
)
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)])
def test_unusual_types_come_back_as_they_were(
    dtype: type, shape: tuple[int, ...], tmp_path: Path
) -> None:
    array = np.ones(shape, dtype)
    expected = [Input("x", np.dtype(dtype), shape)]
    write_npz(tmp_path / "s.npz", {"x": array})

    for source in ([{"x": array}], tmp_path / "s.npz"):
        (sample,) = read_samples(source, expected)
        assert sample["x"].dtype == dtype
        assert sample["x"].tobytes() == array.tobytes()


def test_text_may_be_in_numpys_own_string_type(tmp_path: Path) -> None:
    expected = [Input("t", np.dtype(object), (None,))]
    np.savez(tmp_path / "s.npz", t=np.array(["a", "bcd"]))

    (sample,) = read_samples(tmp_path / "s.npz", expected)
    assert sample["t"].tolist() == ["a", "bcd"]


# ------------------------------------------------------------------ errors


def _check(sample: Sample, inputs: tuple[Input, ...] = XY) -> str:
    with pytest.raises(SampleError) as caught:
        check_sample(sample, inputs, "sample 3", set())
    return str(caught.value)


def test_says_which_name_is_wrong_and_which_is_near() -> None:
    message = _check({"pixels": np.ones(1)}, (Input("pixel_values", FLOAT, None),))
    assert message == "sample 3: the model has no input 'pixels'; did you mean 'pixel_values'?"
    assert _check({"q": np.ones(1)}).endswith("the model has no input 'q'; there is x, y")


def test_says_what_is_missing() -> None:
    assert _check({"x": np.ones((1, 3), FLOAT)}) == "sample 3: input 'y' (int64[N]) is missing"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.ones((2, 3)),
            "sample 3: input 'x' is float64[2, 3]; the model expects float32[N, 3]: wrong element "
            "type",
        ),
        (np.ones((2, 3), ">f4"), "wrong element type"),
        (np.ones((2, 3), object), "wrong element type"),
        (np.array("a"), "wrong element type"),
        (np.ones(3, FLOAT), "input 'x' is float32[3]; the model expects float32[N, 3]: wrong rank"),
        (np.float32(3), "wrong rank"),
        (np.ones((2, 4), FLOAT), "input 'x' is float32[2, 4]; the model expects float32[N, 3]"),
    ],
)
def test_says_what_does_not_fit(array: np.ndarray, message: str) -> None:
    assert message in _check({"x": np.asarray(array), "y": np.ones(2, INT)})


def test_a_named_dimension_has_one_size_in_all_inputs_of_a_sample() -> None:
    message = _check({"x": np.ones((2, 3), FLOAT), "y": np.ones(4, INT)})

    assert message == "sample 3: dimension 'N' is 4 in input 'y' but 2 in input 'x'"


def test_dynamic_dimensions_may_differ_between_samples() -> None:
    sizes = (1, 5, 2)
    rows = [{"x": np.ones((n, 3), FLOAT), "y": np.ones(n, INT)} for n in sizes]

    assert tuple(len(sample["y"]) for sample in read_samples(rows, XY)) == sizes


def test_unnamed_dimensions_and_free_ranks_may_have_any_size() -> None:
    inputs = (Input("a", FLOAT, (None, None)), Input("b", FLOAT, (None,)), Input("c", FLOAT, None))

    arrays = {"a": np.ones((2, 7), FLOAT), "b": np.ones(3, FLOAT), "c": np.ones((1, 1, 1), FLOAT)}
    check_sample(arrays, inputs, "s", set())


def test_an_input_with_a_default_may_be_missing_and_a_given_one_is_checked() -> None:
    inputs = (*X, Input("scale", FLOAT, (), required=False))
    check_sample(_rows(1)[0], inputs, "s", set())

    assert "wrong rank" in _check({**_rows(1)[0], "scale": np.ones(1, FLOAT)}, inputs)


def test_the_message_names_the_file(tmp_path: Path) -> None:
    folder = _write(tmp_path / "s", [*_rows(2), {"x": np.ones((2, 4), FLOAT)}])

    with pytest.raises(SampleError, match=r"002\.npz: input 'x'"):
        read_samples(folder, X)


def test_an_iterable_must_give_mappings() -> None:
    with pytest.raises(SampleError, match="sample 1 is a list; it must map input names to arrays"):
        read_samples([_rows(1)[0], [1, 2]], X)  # type: ignore[list-item]


@pytest.mark.parametrize("make", [list, lambda: iter(())])
def test_no_samples_are_an_error(make: object) -> None:
    with pytest.raises(SampleError, match="the samples are empty: no sample in them"):
        read_samples(make(), X)  # type: ignore[operator]


def test_an_empty_folder_a_missing_path_and_an_empty_stack_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "none.npy", np.ones((0, 2, 3), FLOAT))

    with pytest.raises(SampleError, match=r"has no \.npz or \.npy files"):
        read_samples(tmp_path / "empty", X)
    with pytest.raises(SampleError, match="no such file or folder"):
        read_samples(tmp_path / "nowhere.npz", X)
    with pytest.raises(SampleError, match="no sample in them"):
        read_samples(tmp_path / "none.npy", X)


def test_python_objects_are_refused(tmp_path: Path) -> None:
    objects = np.array([{}, []], object)
    np.savez(tmp_path / "o.npz", x=objects)
    np.save(tmp_path / "o.npy", objects)

    for name in ("o.npz", "o.npy"):
        with pytest.raises(SampleError, match=rf"{name}: .*Python objects; save"):
            read_samples(tmp_path / name, X)


def test_an_npy_file_serves_one_input_only(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 3), FLOAT))

    with pytest.raises(SampleError, match=r"has x, y: use \.npz keyed by input name"):
        read_samples(tmp_path / "x.npy", XY)


@pytest.mark.parametrize("kept_bytes", [0, 1, 10, 100, 200, 330])
@pytest.mark.parametrize("shape", [(2, 3), (4, 2, 3)])
@pytest.mark.parametrize("name", ["s.npz", "s.npy"])
def test_a_truncated_file_is_an_error_that_names_it(
    name: str, shape: tuple[int, ...], kept_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    array = np.ones(shape, FLOAT)
    np.savez(path, x=array) if name == "s.npz" else np.save(path, array)
    data = path.read_bytes()
    path.write_bytes(data[: min(kept_bytes, len(data) - 1)])

    with pytest.raises(SampleError, match=rf"{name}: cannot be read as \.np"):
        read_samples(path, X)


@pytest.mark.parametrize("shape", [(2000, 3), (40, 50, 3)])
@pytest.mark.parametrize("compressed", [True, False])
def test_damage_inside_a_file_is_an_error(
    shape: tuple[int, ...], compressed: bool, tmp_path: Path
) -> None:
    path = tmp_path / "s.npz"
    array = np.random.default_rng(1).standard_normal(shape).astype(FLOAT)
    (np.savez_compressed if compressed else np.savez)(path, x=array)
    data = bytearray(path.read_bytes())
    data[5000:5100] = bytes(100)
    path.write_bytes(data)

    with pytest.raises(SampleError, match=r"s\.npz: cannot be read"):
        read_samples(path, X)


def test_a_file_of_the_other_kind_is_an_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones((1, 3), FLOAT))
    (tmp_path / "s.npy").write_bytes(buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("x.npy", b"not an array")
    (tmp_path / "s.txt").write_text("text")

    for name in ("s.npy", "s.npz", "s.txt"):
        with pytest.raises(SampleError, match="cannot be read as"):
            read_samples(tmp_path / name, X)


# ------------------------------------------------------------------ the split


def test_fewer_than_eight_samples_serve_both() -> None:
    samples = read_samples(_rows(7), X)

    assert samples.split() == (samples, samples)


@pytest.mark.parametrize(
    ("total", "gate"), [(8, 4), (20, 4), (25, 5), (100, 20), (320, 64), (400, 64)]
)
def test_a_fifth_is_for_the_gate_between_4_and_64(total: int, gate: int) -> None:
    calibration, judged = read_samples(_rows(total, size=1), X).split()

    assert (len(judged), len(calibration)) == (gate, total - gate)
    assert sorted(_marks(judged) + _marks(calibration)) == list(range(total))


def test_the_split_depends_on_content_alone(tmp_path: Path) -> None:
    rows = _rows(20)
    plain = read_samples(_write(tmp_path / "a", rows), X)
    turned = read_samples(_write(tmp_path / "b", rows[::-1], "sample-{}.npz"), X)
    stacked = tmp_path / "all.npz"
    np.savez(stacked, x=np.stack([row["x"] for row in rows]))

    splits = [s.split() for s in (plain, turned, read_samples(stacked, X), read_samples(rows, X))]

    assert len({frozenset(_marks(gate)) for _, gate in splits}) == 1
    assert len({frozenset(_marks(rest)) for rest, _ in splits}) == 1


def test_what_the_gate_has_seen_no_pass_gets_even_when_it_is_there_twice() -> None:
    calibration, gate = read_samples(_rows(20) * 2, X).split()

    assert not set(_marks(calibration)) & set(_marks(gate))
    assert len(gate) == 8


def test_copies_of_one_sample_serve_both() -> None:
    samples = read_samples(_rows(1) * 10, X)

    assert samples.split() == (samples, samples)


def test_the_number_for_the_gate_can_be_given() -> None:
    samples = read_samples(_rows(10), X)

    assert [len(part) for part in samples.split(7)] == [3, 7]
    assert [len(part) for part in samples.split(1)] == [9, 1]
    assert [len(part) for part in samples.split(10)] == [10, 10]
    assert [len(part) for part in samples.split(99)] == [10, 10]
    assert [len(part) for part in read_samples(_rows(3), X).split(1)] == [2, 1]
    for number in (0, -1):
        with pytest.raises(SampleError, match="it needs at least 1"):
            samples.split(number)


def test_the_digest_sees_names_types_shapes_and_values() -> None:
    base = np.zeros((2, 3), np.int32)
    variants: list[Sample] = [
        {"x": base},
        {"y": base},
        {"x": base.astype(np.float32)},
        {"x": base.T},
        {"x": base + 1},
        {"x": base, "y": base},
        {},
    ]

    assert len({digest(v) for v in variants}) == len(variants)
    assert digest({"a": base, "b": base + 1}) == digest({"b": base + 1, "a": base})
    assert digest({"x": np.asfortranarray(base)}) == digest({"x": base})


# ------------------------------------------------------------------ sequences

STATEFUL = (*X, Input("state", FLOAT, (1, 4)))


def test_with_state_a_folder_is_a_sequence_and_each_subfolder_one_more(tmp_path: Path) -> None:
    _write(tmp_path, _rows(2))
    _write(tmp_path / "b", _rows(3, 20))
    _write(tmp_path / "a", _rows(1, 10))
    (tmp_path / "c").mkdir()

    samples = read_samples(tmp_path, STATEFUL, [("stateN", "state")])

    sequences = [[float(s["x"].flat[0]) for s in steps] for steps in samples.roll_outs()]
    assert sequences == [[0, 1], [10], [20, 21, 22]]


def test_without_state_subfolders_are_left_alone_and_every_sample_stands_alone(
    tmp_path: Path,
) -> None:
    _write(tmp_path, _rows(2))
    _write(tmp_path / "b", _rows(3, 20))

    samples = read_samples(tmp_path, X)

    assert samples.sequences == ((0,), (1,))
    assert _marks(samples) == [0, 1]


def test_an_iterable_with_state_is_one_sequence_whose_state_may_be_missing() -> None:
    rows = _rows(3)
    rows[0] = {**rows[0], "state": np.ones((1, 4), FLOAT)}

    samples = read_samples(rows, STATEFUL, [("stateN", "state")])

    assert samples.sequences == ((0, 1, 2),)
    with pytest.raises(SampleError, match=r"input 'state' \(float32\[1, 4\]\) is missing"):
        read_samples(rows, STATEFUL)


def test_sequences_are_split_whole(tmp_path: Path) -> None:
    for number in range(10):
        _write(tmp_path / f"{number}", _rows(3, 10 * number))

    calibration, gate = read_samples(tmp_path, STATEFUL, [("stateN", "state")]).split()

    assert (len(calibration.sequences), len(gate.sequences)) == (6, 4)
    for part in (calibration, gate):
        for steps in part.roll_outs():
            first, *rest = [float(s["x"].flat[0]) for s in steps]
            assert rest == [first + 1, first + 2]


def test_the_first_few_cut_a_long_sequence(tmp_path: Path) -> None:
    _write(tmp_path / "a", _rows(3))
    _write(tmp_path / "b", _rows(3, 10))
    samples = read_samples(tmp_path, STATEFUL, [("stateN", "state")])

    assert [len(samples.first(n)) for n in (1, 3, 4, 6, 99)] == [1, 3, 4, 6, 6]
    assert _marks(samples.first(4)) == [0, 1, 2, 10]
    assert samples.first(4).sequences == ((0, 1, 2), (3,))


# ------------------------------------------------------------------ random samples


def test_random_samples_fit_the_signature_and_repeat() -> None:
    model = parse(
        """
        agraph (float[N, 3] x, int64[N] i, bool[M] b, uint8[2] u, string[N] s, float16 h)
            => (float[N, 3] y) { y = Identity(x) }
        """
    )
    samples = random_samples(model, 5)

    for sample in samples:
        check_sample(sample, signature(model), "s", set())
        assert len(sample["x"]) == len(sample["i"]) == len(sample["s"])
    assert [digest(s) for s in samples] == [digest(s) for s in random_samples(model, 5)]
    assert digest(samples[0]) != digest(random_samples(model, 1, seed=1)[0])
    assert len({len(s["x"]) for s in samples}) > 1


def test_random_indices_stay_inside_the_smallest_table_they_reach() -> None:
    model = parse(
        """
        agraph (int64[N] i, int32[N] j, int64[N] free, float[7, 2] wide, float[2, 5] low)
            => (float[N, 2] a, float[2, N] b, float[N] c)
        {
            a = Gather(wide, i)
            k = Cast<to=7>(j)
            l = Unsqueeze(k, axes)
            axes = Constant<value_ints=[0]>()
            m = Reshape(l, shape)
            shape = Constant<value_ints=[-1]>()
            b = Gather<axis=1>(low, m)
            d = Gather(wide, m)
            c = Cast<to=1>(free)
        }
        """,
        wide=np.ones((7, 2), FLOAT),
        low=np.ones((2, 5), FLOAT),
    )
    samples = random_samples(model, 40)

    assert {int(v) for s in samples for v in s["i"]} == set(range(7))
    assert {int(v) for s in samples for v in s["j"]} == set(range(5))
    assert {int(v) for s in samples for v in s["free"]} == {0, 1}


def test_other_sizes_are_tried_until_the_model_runs() -> None:
    model = parse("agraph (float[N] x) => (float[N] y) { y = Identity(x) }")

    samples = random_samples(model, 3, lambda s: s["x"].size == 16)
    assert [s["x"].size for s in samples] == [16, 16, 16]
    with pytest.raises(SampleError, match=r"give real ones \(x: float32\[N\]\)"):
        random_samples(model, 1, lambda _: False)


def test_inputs_that_samples_cannot_hold_are_refused() -> None:
    model = parse("agraph (seq(float[N]) x) => (seq(float[N]) y) { y = Identity(x) }")

    with pytest.raises(SampleError, match=r"input 'x' is a .*samples can only hold tensors"):
        signature(model)


# ------------------------------------------------------------------ memory

_ITERATE = """
import sys
from pathlib import Path
import numpy as np
from graphopt.samples import read_samples
from graphopt.signature import Input

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

inputs = [Input("x", np.dtype(np.float32), (None, 1000))]
before_bytes = peak_bytes()
samples = read_samples(sys.argv[1], inputs)
assert sum(1 for sample in samples if sample["x"].sum() >= 0) == 100
print(peak_bytes() - before_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    path = tmp_path / "stacked.npz"
    np.savez(path, x=np.zeros((100, 500, 1000), FLOAT))  # 200 MB

    done = subprocess.run(
        [sys.executable, "-c", _ITERATE, str(path)], capture_output=True, text=True, check=True
    )

    assert int(done.stdout) < 60e6


def test_read_npz_gives_back_what_was_written(tmp_path: Path) -> None:
    write_npz(tmp_path / "s.npz", {"a": np.arange(3), "b": np.float32(2)})

    arrays = read_npz(tmp_path / "s.npz")
    assert arrays["a"].tolist() == [0, 1, 2]
    assert (arrays["b"].shape, float(arrays["b"])) == ((), 2)


# ------------------------------------------------------------------ names


def test_samples_are_called_by_their_files(tmp_path: Path) -> None:
    folder = _write(tmp_path / "s", _rows(3), "clip{}.npz")
    (folder / "labels.json").write_text("[0, 1, 2]")
    samples = read_samples(folder, X)

    assert samples.names == ("clip0", "clip1", "clip2")
    assert samples.select([2, 0]).names == ("clip2", "clip0")
    assert samples.first(2).names == ("clip0", "clip1")
    assert read_samples(folder / "clip1.npz", X).names == ("clip1",)
    assert read_samples(_rows(2), X).names == ("0", "1")


def test_names_go_with_their_samples_when_these_are_split(tmp_path: Path) -> None:
    samples = read_samples(_write(tmp_path / "s", _rows(20), "{}.npz"), X)

    for part in samples.split():
        assert [float(name) for name in part.names] == _marks(part)


def test_samples_of_one_file_or_of_subfolders_are_told_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", np.zeros((2, 1, 3), FLOAT))
    assert read_samples(tmp_path / "all.npy", X).names == ("all[0]", "all[1]")
    np.savez(tmp_path / "all.npz", x=np.zeros((2, 1, 3), FLOAT))
    assert read_samples(tmp_path / "all.npz", X).names == ("all[0]", "all[1]")

    (tmp_path / "runs").mkdir()
    for folder in ("b", "a"):
        _write(tmp_path / "runs" / folder, _rows(2), "{}.npz")
    assert read_samples(tmp_path / "runs", X, [("y", "x")]).names == ("a/0", "a/1", "b/0", "b/1")
