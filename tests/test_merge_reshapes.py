from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Context, Effect
from graphopt.errors import SampleError
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_rewrites,
    assert_unchanged,
    parse,
)
from graphopt_passes.simplify.merge_reshapes import MergeReshapes


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def chain_of(nodes: str, shape: str, **constants: np.ndarray) -> ir.Model:
    """Nodes from a to b between two others, so that both values are free to go."""
    inputs = "".join(f", int64[{len(array)}] {name}" for name, array in constants.items())
    model = parse(
        f"agraph (float[{shape}] x{inputs}) => (float[] y) {{ a = Exp(x) {nodes} y = Neg(b) }}",
        **constants,
    )
    infer_shapes(model)
    (before_last,) = model.graph[-1].inputs
    assert before_last is not None
    # The checker wants a rank, even where none can be inferred.
    model.graph.outputs[0].shape = before_last.shape or ir.Shape(["R"])
    return model


def merged(model: ir.Model) -> list[str]:
    """What lies between Exp and Neg, with its constant, after the pass."""
    before = model.clone()
    assert apply_pass(MergeReshapes(), model)
    assert_equivalent(before, model, Effect.EXACT)
    nodes = [n for n in model.graph if n.op_type not in ("Exp", "Neg")]
    return [n.op_type + _constant(n) for n in nodes]


def _constant(node: ir.Node) -> str:
    if len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return ""
    return str(node.inputs[1].const_value.numpy().tolist())


@pytest.mark.parametrize(
    ("nodes", "shape", "constants", "expected"),
    [
        # to a constant shape
        ("c = Reshape(a, s) b = Reshape(c, t)", "2, 6", {"s": ints(3, 4), "t": ints(4, 3)},
         ["Reshape[4, 3]"]),
        ("c = Flatten(a) b = Unsqueeze(c, s)", "2, 3, 4", {"s": ints(0)}, ["Reshape[1, 2, 12]"]),
        ("c = Squeeze(a) b = Reshape(c, s)", "1, 2, 1, 3", {"s": ints(6)}, ["Reshape[6]"]),
        ("c = Reshape(a, s) d = Unsqueeze(c, t) b = Flatten<axis=2>(d)", "2, 6",
         {"s": ints(0, 2, -1), "t": ints(-1)}, ["Reshape[4, 3]"]),
        # one dimension is not known
        ("c = Flatten(a) b = Unsqueeze(c, s)", "N, 3, 4", {"s": ints(1)}, ["Reshape[-1, 1, 12]"]),
        ("c = Reshape(a, s) b = Reshape(c, t)", "N, 3, 4",
         {"s": ints(0, 0, 2, 2), "t": ints(-1, 6)}, ["Reshape[-1, 6]"]),
        ("c = Reshape(a, s) b = Reshape(c, t)", "N, 4", {"s": ints(-1), "t": ints(-1, 2)},
         ["Reshape[-1, 2]"]),
        # several are not known, each is where it was
        ("c = Reshape(a, s) b = Reshape(c, t)", "N, M, 4",
         {"s": ints(0, 0, 2, 2), "t": ints(0, 0, 1, 4)}, ["Reshape[0, 0, 1, 4]"]),
        ("c = Reshape(a, s) b = Reshape(c, t)", "N, M, 4",
         {"s": ints(0, 0, 2, 2), "t": ints(0, -1)}, ["Reshape[0, -1]"]),
        # axes
        ("c = Unsqueeze(a, s) b = Unsqueeze(c, t)", "N, M", {"s": ints(0), "t": ints(-1)},
         ["Unsqueeze[0, 3]"]),
        ("c = Unsqueeze(a, s) b = Unsqueeze(c, t)", "2, 3", {"s": ints(1), "t": ints(1)},
         ["Unsqueeze[1, 2]"]),
        ("c = Squeeze(a, s) b = Squeeze(c, t)", "N, 1, M, 1", {"s": ints(1), "t": ints(-1)},
         ["Squeeze[1, 3]"]),
        # nothing changes
        ("c = Unsqueeze(a, s) b = Squeeze(c, s)", "N, M", {"s": ints(1)}, []),
        ("c = Reshape(a, s) b = Reshape(c, t)", "N, 3, 4",
         {"s": ints(0, 12), "t": ints(-1, 3, 4)}, []),
        ("c = Flatten(a) b = Reshape(c, t)", "N, 3, 4", {"t": ints(0, 3, 4)}, []),
        ("c = Reshape(a, s) b = Reshape(c, t)", "2, 6", {"s": ints(3, 4), "t": ints(2, 6)}, []),
        # dimensions of size 1 move
        ("c = Transpose<perm=[0, 3, 1, 2]>(a) b = Flatten(c)", "N, 1, 1, 8", {},
         ["Reshape[-1, 8]"]),
        ("c = Reshape(a, s) b = Transpose<perm=[1, 0, 2]>(c)", "N, 6", {"s": ints(-1, 1, 6)},
         ["Reshape[1, -1, 6]"]),
        # no elements
        ("c = Reshape(a, s) b = Reshape(c, t)", "0, 6", {"s": ints(0, 2, 3), "t": ints(0, 3, 2)},
         ["Reshape[0, 3, 2]"]),
        ("c = Flatten(a) b = Unsqueeze(c, s)", "3, 0, 2", {"s": ints(0)}, ["Reshape[1, 3, 0]"]),
    ],
)  # fmt: skip
def test_runs_become_one_node(
    nodes: str, shape: str, constants: dict[str, np.ndarray], expected: list[str]
) -> None:
    model = chain_of(nodes, shape, **constants)
    assert merged(model) == expected


def test_zero_is_written_as_zero_where_no_zero_can_be_copied() -> None:
    model = chain_of("c = Flatten(a) b = Unsqueeze(c, s)", "3, 0, 2", s=ints(0))

    merged(model)

    assert model.graph[1].attributes["allowzero"].as_int() == 1


@pytest.mark.parametrize(
    ("nodes", "shape", "constants"),
    [
        # two dimensions are not known and neither is where it was
        ("c = Flatten<axis=2>(a) b = Unsqueeze(c, s)", "N, M, K", {"s": ints(0)}),
        # -1 beside a dimension that may be 0 at run time has no meaning
        ("c = Unsqueeze(a, s) b = Flatten<axis=2>(c)", "N, M, K", {"s": ints(0)}),
        ("c = Squeeze(a) b = Unsqueeze(c, s)", "N, 3", {"s": ints(0)}),
        # a dimension that is dropped without saying which
        ("c = Unsqueeze(a, s) b = Squeeze(c, t)", "N, 1, M", {"s": ints(0), "t": ints(2)}),
        # a Transpose that moves elements
        ("c = Transpose<perm=[1, 0]>(a) b = Flatten<axis=0>(c)", "2, 3", {}),
        ("c = Transpose<perm=[1, 0]>(a) b = Transpose<perm=[1, 0]>(c)", "1, 3", {}),
        ("b = Reshape(a, s)", "2, 6", {"s": ints(3, 4)}),
        ("c = Reshape(a, s) d = Relu(c) b = Reshape(d, t)", "2, 6",
         {"s": ints(3, 4), "t": ints(12)}),
    ],
)  # fmt: skip
def test_leaves_alone(nodes: str, shape: str, constants: dict[str, np.ndarray]) -> None:
    assert_unchanged(MergeReshapes(), chain_of(nodes, shape, **constants))


def test_what_is_not_known_well_enough_is_told() -> None:
    model = chain_of("c = Flatten<axis=2>(a) b = Unsqueeze(c, s)", "N, M, K", s=ints(0))

    change = assert_unchanged(MergeReshapes(), model)

    assert [s.node for s in change.skips] == ["b"]


def test_batch_of_nothing_still_runs() -> None:
    model = chain_of("c = Flatten(a) b = Unsqueeze(c, s)", "N, 3, 4", s=ints(1))
    before = model.clone()

    assert apply_pass(MergeReshapes(), model)

    samples = [{"x": np.zeros((n, 3, 4), np.float32)} for n in (0, 1, 5)]
    assert_equivalent(before, model, Effect.EXACT, samples)


def test_long_runs_merge_as_a_whole_and_leave_one_constant() -> None:
    shapes = [ints(4, 6), ints(24), ints(2, 12), ints(3, 8), ints(6, 4), ints(2, 3, 4), ints(8, 3)]
    nodes = " ".join(f"v{i + 1} = Reshape(v{i}, s{i})" for i in range(len(shapes)))
    names = {f"s{i}": shape for i, shape in enumerate(shapes)}
    model = chain_of(f"v0 = Abs(a) {nodes} b = Relu(v{len(shapes)})", "2, 12", **names)

    assert merged(model) == ["Abs", "Reshape[8, 3]", "Relu"]
    assert len(model.graph.initializers) == len(shapes)


def test_values_inside_that_others_read_stay() -> None:
    assert_rewrites(
        MergeReshapes(),
        "agraph (float[2, 6] x) => (float[12] y, float[3, 4] z)"
        " <int64[2] s = {3, 4}, int64[1] t = {12}>"
        " { c = Reshape(x, s) y = Reshape(c, t) z = Exp(c) }",
        "agraph (float[2, 6] x) => (float[12] y, float[3, 4] z)"
        " <int64[2] s = {3, 4}, int64[1] t = {12}>"
        " { c = Reshape(x, s) y = Reshape(x, t) z = Exp(c) }",
    )


def test_run_between_input_and_output_becomes_identity() -> None:
    assert_rewrites(
        MergeReshapes(),
        "agraph (float[N, 6] x) => (float[N, 6] y) <int64[1] s = {0}>"
        " { c = Unsqueeze(x, s) y = Squeeze(c, s) }",
        "agraph (float[N, 6] x) => (float[N, 6] y) <int64[1] s = {0}> { y = Identity(x) }",
    )


def test_axes_are_attributes_in_old_opsets() -> None:
    assert_rewrites(
        MergeReshapes(),
        parse(
            '<ir_version: 7, opset_import: ["" : 11]>'
            " agraph (float[N, M] x) => (float[A, B, C, D] y)"
            " { c = Unsqueeze<axes=[0]>(x) b = Unsqueeze<axes=[3]>(c) y = Exp(b) }"
        ),
        parse(
            '<ir_version: 7, opset_import: ["" : 11]>'
            " agraph (float[N, M] x) => (float[A, B, C, D] y)"
            " { b = Unsqueeze<axes=[0, 3]>(x) y = Exp(b) }"
        ),
    )


def test_reaches_into_subgraphs() -> None:
    text = """
        agraph (bool c, float[2, 6] x) => (float[12] y) <int64[2] s = {3, 4}, int64[1] t = {12}>
        {
            y = If(c) <
                then_branch = then () => (float[12] u) { %s },
                else_branch = other () => (float[12] e) { e = Reshape(x, t) }
            >
        }
    """
    assert_rewrites(
        MergeReshapes(),
        text % "v = Reshape(x, s) u = Reshape(v, t)",
        text % "u = Reshape(x, t)",
    )


def test_shape_that_a_caller_can_override_is_not_constant() -> None:
    model = parse(
        "agraph (float[2, 6] x, int64[2] s) => (float[A, B] y)"
        " { a = Flatten(x) b = Reshape(a, s) y = Exp(b) }"
    )
    value = model.graph.inputs[1]
    value.const_value = ir.tensor(ints(3, 4), name="s")
    model.graph.register_initializer(value)

    apply_pass(MergeReshapes(), model)

    reshape = next(n for n in model.graph if n.op_type == "Reshape")
    assert reshape.inputs[1] is value


def test_refuses_ir_versions_without_constant_initializers() -> None:
    model = parse(
        '<ir_version: 3, opset_import: ["" : 8]> agraph (float[2] x) => (float[2] y) { y = Exp(x) }'
    )

    assert "IR version 3" in (MergeReshapes().refuse(model, Context(lambda: model)) or "")


# ------------------------------------------------------------------ random runs


@pytest.mark.parametrize("seed", range(40))
def test_random_runs_keep_every_result(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = [int(s) for s in generator.choice([1, 1, 2, 3, 4, 6], generator.integers(1, 4))]
    known = generator.random(len(sizes)) < 0.6
    text, constants = _random_run(generator, list(sizes), int(generator.integers(2, 6)))
    names = [str(s) if k else f"D{i}" for i, (s, k) in enumerate(zip(sizes, known, strict=True))]
    model = chain_of(text, ", ".join(names), **constants)
    before = model.clone()
    count = len(model.graph)

    apply_pass(MergeReshapes(), model)

    assert len(model.graph) <= count
    assert not apply_pass(MergeReshapes(), model), "a second application changes more"
    # Other sizes as well, also 0, wherever the model as it was accepts them.
    session = Session(before, Reference.AS_WRITTEN)
    samples = [{"x": generator.standard_normal(sizes).astype(np.float32)}]
    for size in (0, 1, 2, 5):
        other = [s if k else size for s, k in zip(sizes, known, strict=True)]
        sample = {"x": generator.standard_normal(other).astype(np.float32)}
        try:
            session.run(sample)
        except SampleError:
            continue
        samples.append(sample)
    assert_equivalent(before, model, Effect.EXACT, samples)


def _random_run(
    generator: np.random.Generator, sizes: list[int], length: int
) -> tuple[str, dict[str, np.ndarray]]:
    text, constants, value = "", {}, "a"
    for index in range(length):
        name = "b" if index == length - 1 else f"v{index}"
        kind = generator.choice(["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"])
        ones = [i for i, s in enumerate(sizes) if s == 1]
        if kind == "Flatten":
            axis = int(generator.integers(0, len(sizes) + 1))
            sizes = [int(np.prod(sizes[:axis])), int(np.prod(sizes[axis:]))]
            text += f" {name} = Flatten<axis={axis}>({value})"
        elif kind == "Squeeze" and ones:
            axis = int(generator.choice(ones))
            sizes = [s for i, s in enumerate(sizes) if i != axis]
            constants[f"c{index}"] = ints(axis)
            text += f" {name} = Squeeze({value}, c{index})"
        elif kind == "Unsqueeze":
            axis = int(generator.integers(0, len(sizes) + 1))
            sizes = [*sizes[:axis], 1, *sizes[axis:]]
            constants[f"c{index}"] = ints(axis)
            text += f" {name} = Unsqueeze({value}, c{index})"
        elif kind == "Transpose" and sizes:
            order = [int(i) for i in generator.permutation(len(sizes))]
            sizes = [sizes[i] for i in order]
            text += f" {name} = Transpose<perm={order}>({value})"
        else:
            sizes, target = _random_target(generator, sizes)
            constants[f"c{index}"] = ints(*target)
            text += f" {name} = Reshape({value}, c{index})"
        value = name
    return text, constants


def _random_target(generator: np.random.Generator, sizes: list[int]) -> tuple[list[int], list[int]]:
    """A shape of as many elements, and a way to ask for it with 0 and -1."""
    factors = [f for s in sizes for f in {1: [1], 4: [2, 2], 6: [2, 3]}.get(s, [s])]
    pieces = np.array_split(generator.permutation(factors or [1]), generator.integers(1, 4))
    keep = int(generator.integers(0, 2)) if sizes else 0
    if keep and int(np.prod(sizes[1:])) > 0:
        result = [sizes[0], int(np.prod(sizes[1:]))]
    else:
        result = [int(np.prod(p)) for p in pieces]
    target = [0 if i < len(sizes) and sizes[i] == r and generator.random() < 0.5 else r
              for i, r in enumerate(result)]  # fmt: skip
    if generator.random() < 0.5:
        target[int(generator.integers(len(target)))] = -1
    return result, target
