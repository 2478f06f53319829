from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.errors import SpecError, did_you_mean
from graphopt.spec import options_of, parse_pipeline


@dataclass(frozen=True)
class _Still(Pass):
    """A pass that does nothing."""

    name: ClassVar[str] = "stay-still"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        return Change()


@dataclass(frozen=True)
class _Every(_Still):
    """A pass with options of every kind."""

    name: ClassVar[str] = "try-everything"

    count: int = 3
    sparsity: Annotated[float, Bounds(0, 1)] = 0.5
    scale: float = 1.0
    symmetric: bool = True
    layer: str = ""
    mode: Literal["auto", "int8", "8-bit, odd"] = "auto"
    bits: Literal[2, 4, 8] = 8
    keep_first: Literal[True, "auto"] = "auto"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (0, "a")
    nested: tuple[tuple[float, ...], ...] = ()
    limit: int | None = None
    tag: str | None = None
    either: int | float | str = 0
    block_size: Annotated[int | None, Bounds(minimum=16)] = None
    depth: Annotated[int, Bounds(maximum=9)] = 0


@dataclass(frozen=True)
class _Demanding(_Still):
    """A pass that has an option without a default."""

    name: ClassVar[str] = "demand-path"

    path: str = dataclasses.field()
    level: int = 0


_KNOWN: dict[str, type[Pass]] = {c.name: c for c in (_Still, _Every, _Demanding)}


def _find(name: str) -> type[Pass]:
    if name not in _KNOWN:
        raise SpecError(f"there is no pass {name!r}{did_you_mean(name, _KNOWN)}")
    return _KNOWN[name]


def _parse(text: str) -> tuple[Any, ...]:
    return parse_pipeline(text, _find)


_NUMBERS = st.floats(allow_nan=False)
_TEXT = st.text(max_size=8) | st.sampled_from(
    ["none", "true", "1", "1e3", "nan", "-inf", "1_0", "(", "a,b", '"', "\\", "é", "\n", " x "]
)
_PASSES = st.builds(
    _Every,
    count=st.integers(),
    sparsity=st.floats(0, 1),
    scale=_NUMBERS | st.integers(-(2**53), 2**53),
    symmetric=st.booleans(),
    layer=_TEXT,
    mode=st.sampled_from(["auto", "int8", "8-bit, odd"]),
    bits=st.sampled_from([2, 4, 8]),
    keep_first=st.sampled_from([True, "auto"]),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    pair=st.tuples(st.integers(), _TEXT),
    nested=st.lists(st.lists(_NUMBERS, max_size=3).map(tuple), max_size=3).map(tuple),
    limit=st.none() | st.integers(),
    tag=st.none() | _TEXT,
    either=st.integers() | _NUMBERS | _TEXT,
    block_size=st.none() | st.integers(16),
    depth=st.integers(max_value=9),
)


@settings(deadline=None)
@given(_PASSES)
def test_the_text_of_a_pass_parses_back_to_an_equal_pass(tested: _Every) -> None:
    assert _parse(str(tested)) == (tested,)


@settings(deadline=None, max_examples=25)
@given(st.lists(_PASSES | st.just(_Still()), min_size=1, max_size=4))
def test_the_text_of_a_pipeline_parses_back(passes: list[Pass]) -> None:
    assert _parse(",".join(map(str, passes))) == tuple(passes)


@given(st.text(max_size=20) | st.text('stay-il{}=,()" ', max_size=20))
def test_any_text_is_a_pipeline_or_a_spec_error(text: str) -> None:
    try:
        _parse(text)
    except SpecError as error:
        assert str(error)


def test_only_what_differs_from_the_default_is_printed() -> None:
    assert str(_Every()) == "try-everything"
    assert str(_Every(count=4, symmetric=False)) == "try-everything{count=4,symmetric=false}"
    assert str(_Every(limit=1, tag="none")) == 'try-everything{limit=1,tag="none"}'
    assert str(_Every(nested=((0.5,), ()))) == "try-everything{nested=((0.5),())}"
    assert str(_Every(keep_first=True)) == "try-everything{keep-first=true}"


def test_spaces_and_underscores_are_let_pass() -> None:
    assert _parse(
        " stay-still ,\n try-everything { block_size = 32 , sizes = ( 1 , 2 , 3 ) } "
    ) == (
        _Still(),
        _Every(block_size=32, sizes=(1, 2, 3)),
    )
    assert _parse("stay-still{}") == (_Still(),)


def test_a_quoted_value_is_text_whatever_it_looks_like() -> None:
    assert _parse('try-everything{either="5",tag="none"}') == (_Every(either="5", tag="none"),)
    assert _parse("try-everything{either=5,tag=none}") == (_Every(either=5, tag=None),)


def test_numbers_of_numpy_are_printed_as_numbers() -> None:
    tested = _Every(scale=np.float64(0.25))

    assert str(tested) == "try-everything{scale=0.25}"
    assert _parse(str(tested)) == (tested,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of a pass in the passes text, here: '' >>> ''"),
        ("stay-still,", "expected the name of a pass"),
        ("stay-stil", "there is no pass 'stay-stil'; did you mean 'stay-still'?"),
        ("stay-still stay-still", "expected ',' between passes in the passes text, here: "),
        ("stay-still{count=1}", "'stay-still' has no options, so no 'count'"),
        ("try-everything{", "expected the name of an option"),
        ("try-everything{count}", "expected '='"),
        ("try-everything{count=}", "expected a value"),
        ("try-everything{count=1", "expected ','"),
        ("try-everything{count=1,}", "expected the name of an option"),
        ("try-everything{sizes=(1,2}", "expected ','"),
        ('try-everything{layer="a}', "a quoted value is not closed"),
        (
            "try-everything{sparcity=1}",
            "'try-everything' has no option 'sparcity'; did you mean 'sparsity'?",
        ),
        ("try-everything{count=1,count=2}", "option 'count' of 'try-everything' is given twice"),
        ("try-everything{block-size=16,block_size=16}", "is given twice"),
        (
            "try-everything{count=1.5}",
            "option 'count' of 'try-everything' is '1.5'; it must be a whole number",
        ),
        ('try-everything{count="1"}', "is '1'; it must be a whole number"),
        ("try-everything{count=none}", "is 'none'; it must be a whole number"),
        ("try-everything{scale=big}", "is 'big'; it must be a number"),
        ("try-everything{scale=nan}", "is nan; it must be a number"),
        ("try-everything{symmetric=1}", "is '1'; it must be true or false"),
        ("try-everything{symmetric=True}", "is 'True'; it must be true or false"),
        ("try-everything{mode=int9}", "is 'int9'; it must be one of auto, int8, 8-bit, odd"),
        ("try-everything{bits=3}", "is '3'; it must be one of 2, 4, 8"),
        ("try-everything{keep-first=false}", "it must be one of true, auto"),
        ("try-everything{sizes=1}", "is '1'; it must be a list like (a whole number, ...)"),
        ("try-everything{sizes=(1,x)}", "is ('1', 'x'); it must be a list like"),
        ("try-everything{pair=(1)}", "option 'pair' of 'try-everything' is ('1')"),
        ("try-everything{pair=(1,a,b)}", "option 'pair' of 'try-everything' is"),
        ("try-everything{layer=(a)}", "is ('a'); it must be text"),
        ("try-everything{limit=x}", "is 'x'; it must be a whole number or none"),
        (
            "try-everything{sparsity=1.5}",
            "option 'sparsity' of 'try-everything' is 1.5; it must be from 0 to 1",
        ),
        ("try-everything{block-size=8}", "is 8; it must be at least 16"),
        ("try-everything{depth=10}", "is 10; it must be at most 9"),
        ("demand-path", "'demand-path' needs its option 'path', which is text"),
        ("demand-path{level=1}", "'demand-path' needs its option 'path', which is text"),
    ],
)
def test_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        _parse(text)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"count": 1.0},
        {"count": True},
        {"count": "1"},
        {"scale": True},
        {"scale": float("nan")},
        {"sparsity": 1.0001},
        {"symmetric": 1},
        {"mode": "x"},
        {"bits": 8.0},
        {"keep_first": 1},
        {"sizes": [1, 2]},
        {"sizes": (1, 2.5)},
        {"pair": (1, "a", "b")},
        {"nested": (1.0,)},
        {"limit": "none"},
        {"block_size": 15},
    ],
)
def test_a_pass_made_in_python_is_checked_as_well(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="it must be"):
        _Every(**options)


def test_an_option_says_what_it_is() -> None:
    option = options_of(_Every)["block-size"]

    assert (option.field, option.default, str(option.bounds)) == ("block_size", None, "at least 16")
