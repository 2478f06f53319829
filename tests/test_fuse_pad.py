from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Sample
from graphopt.operators import all_graphs
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.fuse.fuse_pad import FusePad


def model_text(
    reader: str = "Conv <kernel_shape = [3, 3]> (p, w)",
    pads: str = "0, 0, 1, 2, 0, 0, 3, 0",
    arguments: str = "x, pads",
    opset: int = 21,
    more: str = "",
) -> str:
    return f"""
    <ir_version: 7, opset_import: ["" : {opset}]>
    agraph (float[2,3,9,8] x, float[4,3,3,3] w) => (float[2,N,H,W] y)
    <int64[{pads.count(",") + 1}] pads = {{{pads}}}{more}>
    {{
        p = Pad({arguments})
        y = {reader}
    }}
    """


def model(**options: object) -> ir.Model:
    text = model_text(**options)  # type: ignore[arg-type]
    return parse(text, w=np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32))


def attributes(changed: ir.Model) -> dict[str, object]:
    (node,) = changed.graph
    return {name: a.value for name, a in node.attributes.items()}


def assert_fuses(changed: ir.Model, pads: list[int]) -> None:
    before = changed.clone()
    change = apply_pass(FusePad(), changed)
    assert change, change.skips
    assert list(attributes(changed)["pads"]) == pads  # type: ignore[call-overload]
    assert_equivalent(before, changed)


def reasons(unchanged: ir.Model) -> list[str]:
    return [skip.reason for skip in assert_unchanged(FusePad(), unchanged).skips]


def test_adds_to_the_pads_of_conv() -> None:
    change = assert_rewrites(
        FusePad(),
        """
        agraph (float[1,1,4,4] x) => (float[1,1,6,10] y)
        <int64[8] pads = {0, 0, 1, 2, 0, 0, 0, 3}, float[1,1,1,1] w = {2.0}>
        {
            p = Pad(x, pads)
            y = Conv <pads = [1, 0, 0, 1]> (p, w)
        }
        """,
        """
        agraph (float[1,1,4,4] x) => (float[1,1,6,10] y)
        <float[1,1,1,1] w = {2.0}, int64[8] pads = {0, 0, 1, 2, 0, 0, 0, 3}>
        {
            y = Conv <pads = [2, 2, 0, 4]> (x, w)
        }
        """,
    )

    assert change.counts == {"Pad fused into Conv": 1}


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ("", (0, 0, 0, 0)),
        ("pads = [1, 2, 3, 4], strides = [2, 1],", (1, 2, 3, 4)),
        ('auto_pad = "VALID",', (0, 0, 0, 0)),
        ('auto_pad = "NOTSET", dilations = [2, 2],', (0, 0, 0, 0)),
    ],
)
def test_fuses_into_any_conv_without_automatic_pads(options: str, own: tuple[int, ...]) -> None:
    changed = model(reader=f"Conv <{options} kernel_shape = [3, 3]> (p, w)")

    assert_fuses(changed, [a + b for a, b in zip(own, (1, 2, 3, 0), strict=True)])

    assert "auto_pad" not in attributes(changed)


def test_fuses_an_explicit_zero_and_axes() -> None:
    assert_fuses(
        model(
            pads="2, 1, 0, 3",
            arguments="x, pads, zero, axes",
            more=", float zero = {-0.0}, int64[2] axes = {-1, 2}",
        ),
        [1, 2, 3, 0],
    )


def test_fuses_axes_without_a_number_and_constants_by_node() -> None:
    text = model_text(pads="2, 1, 0, 3", arguments="x, pads, , axes")
    text = text.replace("p = Pad", "axes = Constant <value_ints = [3, 2]> ()\n p = Pad")
    weight = np.ones((4, 3, 3, 3), np.float32)
    changed = parse(text, w=weight)
    before = changed.clone()

    assert apply_pass(FusePad(), changed)

    assert [node.op_type for node in changed.graph] == ["Constant", "Conv"]
    assert_equivalent(before, changed)


def test_fuses_the_attributes_of_opset_10() -> None:
    arguments = "x"
    text = model_text(arguments=arguments, opset=10).replace(
        "Pad(x)", "Pad <pads = [0, 0, 1, 2, 0, 0, 3, 0]> (x)"
    )
    weight = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
    assert_fuses(parse(text, w=weight), [1, 2, 3, 0])


def test_leaves_another_number_as_attribute_of_opset_10() -> None:
    text = model_text(arguments="x", opset=10).replace(
        "Pad(x)", "Pad <pads = [0, 0, 1, 2, 0, 0, 3, 0], value = 1.0> (x)"
    )
    unchanged = parse(text, w=np.ones((4, 3, 3, 3), np.float32))
    assert reasons(unchanged) == ["it pads with another number than zero"]


def test_fuses_two_in_a_row() -> None:
    text = model_text().replace("p = Pad(x, pads)", "q = Pad(x, pads)\n p = Pad(q, pads)")
    changed = parse(text, w=np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype("f4"))

    assert_fuses(changed, [2, 4, 6, 0])


def test_fuses_in_the_body_of_an_if() -> None:
    changed = parse(
        """
        agraph (bool k, float[1,1,4,4] x, float[1,1,2,2] w) => (float[1,1,H,W] y)
        <int64[8] pads = {0, 0, 1, 2, 0, 0, 0, 3}>
        {
            y = If(k) <
                then_branch = then () => (float[1,1,A,B] t) { p = Pad(x, pads) t = Conv(p, w) },
                else_branch = other () => (float[1,1,C,D] e) { e = Conv(x, w) }
            >
        }
        """,
        w=np.ones((1, 1, 2, 2), np.float32),
    )
    before = changed.clone()

    change = apply_pass(FusePad(), changed)

    operators = [node.op_type for graph in all_graphs(changed) for node in graph]
    assert operators == ["If", "Conv", "Conv"]
    assert change.counts == {"Pad fused into Conv": 1}
    x = np.random.default_rng(2).standard_normal((1, 1, 4, 4)).astype(np.float32)
    samples: list[Sample] = [{"k": np.array(k), "x": x} for k in (True, False)]
    assert_equivalent(before, changed, samples=samples)


@pytest.mark.parametrize(
    ("options", "pads"),
    [
        ("count_include_pad = 1", [1, 2, 2, 0]),
        ("count_include_pad = 1, pads = [1, 0, 0, 1]", [2, 2, 2, 1]),
        ("count_include_pad = 0", [1, 2, 2, 0]),
        ("strides = [2, 3]", [1, 2, 2, 0]),
        ('auto_pad = "VALID"', [1, 2, 2, 0]),
        ("dilations = [2, 1]", [1, 2, 2, 0]),
    ],
)
def test_fuses_into_average_pool(options: str, pads: list[int]) -> None:
    changed = model(
        reader=f"AveragePool <kernel_shape = [3, 3], {options}> (p)", pads="0, 0, 1, 2, 0, 0, 2, 0"
    )

    assert_fuses(changed, pads)

    assert attributes(changed)["count_include_pad"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("pads = [1, 0, 0, 1]", "AveragePool leaves its own pads out of the mean"),
        ("ceil_mode = 1, count_include_pad = 1", "AveragePool in ceil mode reaches over its pads"),
        (
            'auto_pad = "SAME_UPPER"',
            "AveragePool chooses its pads by the size of its input (SAME_UPPER)",
        ),
    ],
)
def test_leaves_an_average_pool_that_counts_otherwise(options: str, reason: str) -> None:
    reader = f"AveragePool <kernel_shape = [3, 3], {options}> (p)"
    assert reasons(model(reader=reader, pads="0, 0, 1, 2, 0, 0, 2, 0")) == [reason]


def test_leaves_an_average_pool_with_a_smaller_kernel() -> None:
    reader = "AveragePool <kernel_shape = [3, 3]> (p)"
    assert reasons(model(reader=reader)) == ["AveragePool cannot pad by as much as its kernel"]


def test_leaves_max_pool() -> None:
    reader = "MaxPool <kernel_shape = [3, 3]> (p)"
    assert reasons(model(reader=reader)) == ["MaxPool pads with minus infinity, not with zero"]


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_leaves_automatic_pads(auto_pad: str) -> None:
    reader = f'Conv <auto_pad = "{auto_pad}"> (p, w)'
    reason = f"Conv chooses its pads by the size of its input ({auto_pad})"
    assert reasons(model(reader=reader)) == [reason]


@pytest.mark.parametrize("pads", ["1, 0, 1, 2, 0, 0, 3, 0", "1, 0, 1, 2, 0, 0, 0, 0"])
def test_leaves_pads_of_the_batch(pads: str) -> None:
    assert reasons(model(pads=pads)) == ["it pads the batch or the channels"]


def test_leaves_pads_of_the_channels() -> None:
    text = model_text(pads="0, 1, 1, 1, 0, 0, 1, 1").replace("[2,3,9,8] x", "[2,2,9,8] x")
    unchanged = parse(text, w=np.ones((4, 3, 3, 3), np.float32))
    assert reasons(unchanged) == ["it pads the batch or the channels"]


def test_leaves_negative_pads() -> None:
    assert reasons(model(pads="0, 0, 1, -1, 0, 0, 1, 1")) == ["it has negative pads"]


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_leaves_other_modes(mode: str) -> None:
    text = model_text().replace("Pad(", f'Pad <mode = "{mode}"> (')
    unchanged = parse(text, w=np.ones((4, 3, 3, 3), np.float32))
    assert reasons(unchanged) == [f"its mode is {mode}"]


def test_leaves_another_number() -> None:
    unchanged = model(arguments="x, pads, one", more=", float one = {1.0}")
    assert reasons(unchanged) == ["it pads with another number than zero"]


def test_leaves_pads_of_nothing_to_another_pass() -> None:
    assert reasons(model(pads="0, 0, 0, 0, 0, 0, 0, 0")) == []


@pytest.mark.parametrize("name", ["pads", "zero", "axes"])
def test_leaves_what_a_caller_can_override(name: str) -> None:
    unchanged = model(
        pads="1, 2, 3, 0",
        arguments="x, pads, zero, axes",
        more=", float zero = {0.0}, int64[2] axes = {2, 3}",
    )
    unchanged.graph.inputs.append(unchanged.graph.initializers[name])
    what = "the number that it pads with is" if name == "zero" else f"its {name} are"
    assert reasons(unchanged) == [f"{what} not constant"]


def test_leaves_a_pad_that_others_read_too() -> None:
    text = model_text().replace("=> (", "=> (float[2,3,C,D] z, ")
    text = text.replace("(p, w)\n", "(p, w)\n z = Relu(p)\n")
    unchanged = parse(text, w=np.ones((4, 3, 3, 3), np.float32))
    reason = "its output is read by other nodes, or an output of the graph"
    assert reasons(unchanged) == [reason]


def test_leaves_a_pad_that_is_an_output() -> None:
    text = model_text().replace("=> (", "=> (float[2,3,C,D] p, ")
    unchanged = parse(text, w=np.ones((4, 3, 3, 3), np.float32))
    reason = "its output is read by other nodes, or an output of the graph"
    assert reasons(unchanged) == [reason]


def test_leaves_a_padded_weight() -> None:
    text = model_text(reader="Conv(x, p)", arguments="w, pads")
    unchanged = parse(text, w=np.ones((4, 3, 3, 3), np.float32))
    assert reasons(unchanged) == ["its output is the weight or bias of Conv"]


def test_leaves_a_pad_that_a_subgraph_reads() -> None:
    unchanged = parse(
        """
        agraph (bool k, float[1,1,4,4] x, float[1,1,2,2] w) => (float[1,1,H,W] y)
        <int64[8] pads = {0, 0, 1, 2, 0, 0, 0, 3}>
        {
            p = Pad(x, pads)
            y = If(k) <
                then_branch = then () => (float[1,1,A,B] t) { t = Conv(p, w) },
                else_branch = other () => (float[1,1,C,D] e) { e = Conv(x, w) }
            >
        }
        """,
        w=np.ones((1, 1, 2, 2), np.float32),
    )
    assert reasons(unchanged) == ["its output is read in a subgraph"]


@pytest.mark.parametrize("seed", range(24))
def test_any_pads_keep_the_outputs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rank = int(generator.integers(1, 4))
    kernel = [int(n) for n in generator.integers(2, 4, rank)]
    own = [int(n) for n in generator.integers(0, 2, 2 * rank)]
    before, after = ([int(generator.integers(0, size)) for size in kernel] for _ in range(2))
    before[0] = 1
    pads = [a + b for a, b in zip(own, before + after, strict=True)]
    pool = seed % 2 and all(a < b for a, b in zip(pads, kernel * 2, strict=True))
    reader = "AveragePool" if pool else "Conv"
    extra = "count_include_pad = 1" if pool else "dilations = [" + ", ".join("2" * rank) + "]"
    arrays = {} if pool else {"w": generator.standard_normal((2, 3, *kernel)).astype(np.float32)}
    padded = ", ".join(str(n) for n in [0, 0, *before, 0, 0, *after])
    changed = parse(
        f"""
        agraph (float[N,{", ".join(["3", *["7"] * rank])}] x{"" if pool else ", float[1] w"})
            => (float[{", ".join("NABCD"[: rank + 2])}] y)
        <int64[{2 * rank + 4}] pads = {{{padded}}}>
        {{
            p = Pad(x, pads)
            y = {reader} <kernel_shape = {kernel}, pads = {own}, {extra}>
                (p{"" if pool else ", w"})
        }}
        """,
        **arrays,
    )

    assert_fuses(changed, pads)
