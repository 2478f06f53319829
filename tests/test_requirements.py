import pytest

from graphopt.errors import SpecError
from graphopt.requirements import Requirement, parse_requirements


def test_parses_several_with_spaces_and_both_signs() -> None:
    assert parse_requirements("size<=0.3, latency <0.9,error<= 1e-2") == (
        Requirement("size", 0.3),
        Requirement("latency", 0.9, strict=True),
        Requirement("error", 0.01),
    )


@pytest.mark.parametrize("text", ["size<=0.3", "latency<0.9", "error<=1e-05", "nodes<=1.0"])
def test_prints_back_to_its_text(text: str) -> None:
    assert str(parse_requirements(text)[0]) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a requirement; write FIGURE<=LIMIT, for example size<=0.3"),
        ("size", "'size' is not a requirement"),
        ("size<=0.3,", "'' is not a requirement"),
        ("<=0.3", "'<=0.3' is not a requirement"),
        ("size <= 0 . 3", "is not a requirement"),
        ("sice<=0.3", "unknown figure 'sice'; did you mean 'size'?"),
        ("memory<=0.3", "unknown figure 'memory'; there is error, latency, nodes, size"),
        ("size>=0.3", "'size>=0.3' compares by '>='; every figure is better when it is lower"),
        ("size=0.3", "compares by '='"),
        ("size<==0.3", "compares by '<=='"),
        ("size<=", "has the limit ''; it must be a number"),
        ("size<=30%", "has the limit '30%'; it must be a number"),
        ("size<=nan", "has the limit 'nan'; it must be a number"),
        ("size<=-1", "has the limit '-1'; it must be a number"),
    ],
)
def test_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_requirements(text)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size", "reason"),
    [
        ("size<=0.3", 0.3, None),
        ("size<0.3", 0.3, "size<0.3 is required, and size is 0.3"),
        ("size<0.3", 0.2999, None),
        ("size<=0.3", 0.3001, "size<=0.3 is required, and size is 0.3001"),
        ("size<=0.3", None, "size<=0.3 is required, and size was not measured"),
        ("size<=0.3", float("nan"), "size<=0.3 is required, and size is nan"),
        ("size<=0.3", float("inf"), "size<=0.3 is required, and size is inf"),
    ],
)
def test_judges_a_figure(text: str, size: float | None, reason: str | None) -> None:
    (requirement,) = parse_requirements(text)

    assert requirement.why_failed({"size": size, "latency": 0.0}) == reason


def test_a_figure_that_is_missing_was_not_measured() -> None:
    (requirement,) = parse_requirements("error<=1")

    assert requirement.why_failed({}) == "error<=1.0 is required, and error was not measured"
