from __future__ import annotations

from dataclasses import replace

from graphopt.contract import Effect
from graphopt.explain import Explanation, Fate, Row
from graphopt.ledger import Size, Step
from graphopt.reasons import Reason
from graphopt.tables import (
    kernels_table,
    kernels_text,
    ledger_table,
    numerics_table,
    operators_text,
    sizes_text,
    us_text,
    what_would_change,
)
from graphopt.validation import OutputError

STEP = Step(
    spec="fold-constants",
    effect=Effect.EXACT,
    verdict="kept",
    reason=None,
    changes={"node folded": 3, "initializer removed": 1},
    skips=(),
    nodes_before=10,
    nodes_after=7,
    bytes_before=5000,
    bytes_after=3900,
    seconds=0.125,
    round=1,
)

ERROR = OutputError("y", "float32", 8, False, 0.5, 0.25, 2.0, 0.125, 18.06, 0.999, 0.25)


def test_a_step_is_a_row() -> None:
    slow = replace(
        STEP, verdict="too slow", reason="it takes 1.2", round=2, changes={}, notes=("one note",)
    )

    table = ledger_table([STEP, replace(STEP, latency_ratio=0.5), slow])

    assert table.columns[-1] == "verdict"
    did = "3 × node folded, 1 × initializer removed"
    rest = ("-3", "-1,100", "0.12", "kept")
    assert table.rows == (
        ("fold-constants", "EXACT", did, *rest),
        ("fold-constants", "EXACT", f"{did} (0.5 of the latency before)", *rest),
        (
            "fold-constants (round 2)",
            "EXACT",
            "one note: it takes 1.2",
            "",
            "",
            "0.12",
            "TOO SLOW",
        ),
    )


def test_outputs_that_cannot_be_compared_say_why() -> None:
    errors = (
        ERROR,
        replace(ERROR, name="same", identical=True, disagreement=None),
        replace(ERROR, name="gone", mismatch="is missing"),
    )

    rows = numerics_table({"as written": errors}).rows

    figures = ("5.00e-01", "2.50e-01", "1.25e-01", "18.1", "0.999000", "75.00%")
    assert rows == (
        ("y", "as written", *figures),
        ("same", "as written", "identical", "0", "0", "inf", "1", ""),
        ("gone", "as written", "is missing", "", "", "", "", ""),
    )


def _row(operators: tuple[str, ...], us: float, share: float, reason: Reason | None) -> Row:
    return Row(operators, operators[0] if operators else "Cast", "float", 2, us, share, reason)


def test_kernels_that_take_next_to_nothing_are_one_row() -> None:
    reason = Reason("converts", "it converts", "convert nothing")
    rows = (
        _row((), 0.1, 0.001, reason),
        _row(("Conv", "Relu"), 99.0, 0.99, None),
        _row(("Add",), 0.3, 0.003, None),
        _row(("Mul",), 0.2, 0.002, None),
    )
    fates = (Fate("a", "Conv", "runs", "Conv"), Fate("b", "Relu", "fused", "Conv"))
    found = Explanation(rows, (), fates, 99.6, 10, "cpu", 1, "1.0", "a cpu", ())

    assert kernels_table(found).rows == (
        ("(inserted)", "2", "Cast float", "0.1", "0.1%", "it converts"),
        ("Conv+Relu", "2", "Conv float", "99", "99.0%", ""),
        ("others", "4", "", "0.5", "0.5%", ""),
    )
    assert what_would_change(found) == ["it converts: convert nothing"]
    assert kernels_text(found).startswith("nodes 2 -> 0 (1 fused, 0 folded), 100 us per run, 0%")


def test_texts_are_short() -> None:
    assert operators_text(["A", "com.microsoft.B", "C", "D", "E", "F"]) == "A+B+C+D+2 more"
    assert (us_text(3.14159), us_text(12345.6)) == ("3.1", "12,346")
    assert sizes_text(Size(4, 1000, 17, 0), Size(2, 250, 21, 1)) == (
        "nodes 4 -> 2, of these 1 of operators that ONNX does not define, bytes 1,000 -> 250 "
        "(0.250x), opset 17 -> 21"
    )
