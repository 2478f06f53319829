"""The text form of a pass, both ways: `name{option=value,option=value}`.

A pass is a frozen dataclass and its fields are its options, so the text form is derived from the
dataclass alone. `parse(str(p)) == p` for every pass. Only options that differ from their default
are printed.

Grammar::

    pipeline := pass ("," pass)*
    pass     := name [ "{" option "=" value ("," option "=" value)* "}" ]
    value    := word | '"' JSON string '"' | "(" [ value ("," value)* ] ")"
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from graphopt.errors import SpecError, did_you_mean

_WORD = re.compile(r'[^\s,{}()="]+')


@dataclass(frozen=True)
class Bounds:
    """Inclusive limits of a number, written `Annotated[float, Bounds(0, 1)]` on an option."""

    minimum: float | None = None
    maximum: float | None = None

    def __contains__(self, number: float) -> bool:
        above = self.minimum is None or number >= self.minimum
        return above and (self.maximum is None or number <= self.maximum)

    def __str__(self) -> str:
        # Equal bounds read alike: Python keeps one of `Annotated` types that are equal.
        least, most = (str(x).removesuffix(".0") for x in (self.minimum, self.maximum))
        if self.maximum is None:
            return f"at least {least}"
        if self.minimum is None:
            return f"at most {most}"
        return f"from {least} to {most}"


@dataclass(frozen=True)
class Option:
    """One option of a pass: its name in text form, its Python field, type, bounds and default."""

    name: str
    field: str
    type: Any
    bounds: Bounds | None
    default: Any


def options_of(cls: type) -> dict[str, Option]:
    """The options of a pass class by their name in text form (hyphens, not underscores)."""
    if not dataclasses.fields(cls):
        return {}
    # Reading the hints of a class takes longer than all else that is done with its options.
    hints = typing.get_type_hints(cls, include_extras=True)
    options = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        metadata = getattr(hint, "__metadata__", ())
        bounds = next((b for b in metadata if isinstance(b, Bounds)), None)
        plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        name = field.name.replace("_", "-")
        options[name] = Option(name, field.name, plain, bounds, field.default)
    return options


def check_options(instance: Any) -> None:
    """Raise SpecError where a field of the pass has the wrong type or is out of its bounds."""
    for option in options_of(type(instance)).values():
        value = getattr(instance, option.field)
        if not has_type(value, option.type):
            raise SpecError(_mismatch(instance.name, option, repr(value)))
        if option.bounds is not None and value is not None and value not in option.bounds:
            raise SpecError(
                f"option {option.name!r} of {instance.name!r} is {value}; "
                f"it must be {option.bounds}"
            )


def format_pass(instance: Any) -> str:
    """The text form of a pass."""
    parts = [
        f"{option.name}={_format_value(getattr(instance, option.field))}"
        for option in options_of(type(instance)).values()
        if getattr(instance, option.field) != option.default
    ]
    return str(instance.name) + ("{" + ",".join(parts) + "}" if parts else "")


def parse_pipeline(text: str, find: Callable[[str], type]) -> tuple[Any, ...]:
    """The passes that a text names.

    Args:
        text: for example `fold-constants,prune-magnitude{sparsity=0.7}`.
        find: gives the class of a pass by its name; raises SpecError for an unknown one.

    Raises:
        SpecError: the text is not of the form, or an option is unknown or has a wrong value.
    """
    return _Reader(text).pipeline(find)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def pipeline(self, find: Callable[[str], type]) -> tuple[Any, ...]:
        passes = [self.one_pass(find)]
        while self.take(","):
            passes.append(self.one_pass(find))
        if self.at != len(self.text):
            raise self.wrong("expected ',' between passes")
        return tuple(passes)

    def one_pass(self, find: Callable[[str], type]) -> Any:
        cls: Any = find(self.word("the name of a pass"))
        values: dict[str, Any] = {}
        if self.take("{") and not self.take("}"):
            self.option(cls, values)
            while not self.take("}"):
                if not self.take(","):
                    raise self.wrong("expected ',' or '}' after an option")
                self.option(cls, values)
        for option in options_of(cls).values():
            if option.default is dataclasses.MISSING and option.field not in values:
                kind = describe_type(option.type)
                raise SpecError(f"{cls.name!r} needs its option {option.name!r}, which is {kind}")
        return cls(**values)

    def option(self, cls: Any, values: dict[str, Any]) -> None:
        written = self.word("the name of an option")
        known = options_of(cls)
        option = known.get(written.replace("_", "-"))
        if option is None and not known:
            raise SpecError(f"{cls.name!r} has no options, so no {written!r}")
        if option is None:
            raise SpecError(f"{cls.name!r} has no option {written!r}{did_you_mean(written, known)}")
        if option.field in values:
            raise SpecError(f"option {written!r} of {cls.name!r} is given twice")
        self.need("=")
        raw = self.value()
        value, fits = _convert(raw, option.type)
        if not fits:
            raise SpecError(_mismatch(cls.name, option, _as_text(raw)))
        values[option.field] = value

    def value(self) -> Any:
        """A word as _Word, a quoted string as str, a parenthesized list as tuple."""
        self.skip_space()
        if self.text.startswith('"', self.at):
            return self.quoted()
        if not self.take("("):
            return _Word(self.word("a value"))
        items: list[Any] = []
        while not self.take(")"):
            if items:
                self.need(",")
            items.append(self.value())
        return tuple(items)

    def quoted(self) -> str:
        try:
            value, length = json.JSONDecoder().raw_decode(self.text[self.at :])
        except json.JSONDecodeError:
            raise self.wrong("a quoted value is not closed") from None
        self.at += length
        return str(value)

    def word(self, what: str) -> str:
        self.skip_space()
        match = _WORD.match(self.text, self.at)
        if match is None:
            raise self.wrong(f"expected {what}")
        self.at = match.end()
        return match.group()

    def take(self, mark: str) -> bool:
        self.skip_space()
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        self.skip_space()
        return True

    def need(self, mark: str) -> None:
        if not self.take(mark):
            raise self.wrong(f"expected {mark!r}")

    def skip_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def wrong(self, what: str) -> SpecError:
        before, after = self.text[: self.at], self.text[self.at :]
        return SpecError(f"{what} in the passes text, here: {before!r} >>> {after!r}")


class _Word(str):
    """A bare word: may stand for a number, a truth value or None; a quoted string may not."""


def _convert(raw: Any, hint: Any) -> tuple[Any, bool]:
    """The value of that type which the text stands for, and whether there is one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        tries = [_convert(raw, a) for a in sorted(arguments, key=lambda a: a is str)]
        return next((t for t in tries if t[1]), (None, False))
    if origin is Literal:
        return next(((a, True) for a in arguments if _plain_text(a) == str(raw)), (None, False))
    if origin is tuple:
        return _convert_tuple(raw, arguments)
    if hint is str:
        return str(raw), isinstance(raw, str)
    if not isinstance(raw, _Word):
        return None, False
    if hint is bool:
        return raw == "true", raw in ("true", "false")
    if hint is type(None):
        return None, raw == "none"
    try:
        return hint(raw), True
    except ValueError:
        return None, False


def _convert_tuple(raw: Any, arguments: tuple[Any, ...]) -> tuple[Any, bool]:
    if not isinstance(raw, tuple):
        return None, False
    hints = [arguments[0]] * len(raw) if arguments[1:] == (...,) else list(arguments)
    items = [_convert(r, h) for r, h in zip(raw, hints, strict=False)]
    return tuple(v for v, _ in items), len(raw) == len(hints) and all(fits for _, fits in items)


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field is annotated with."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(has_type(value, a) for a in arguments)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(hints) and all(map(has_type, value, hints))
    if origin is dict:
        return isinstance(value, dict) and all(has_type(v, arguments[1]) for v in value.values())
    if hint is Any:
        return True
    if hint is float:
        # NaN is left out: it is no limit and no size, and not equal to itself.
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(map(_format_value, value)) + ")"
    if isinstance(value, str):
        plain = _WORD.fullmatch(value) and value not in ("true", "false", "none")
        return value if plain and not _is_number(value) else json.dumps(value)
    return _plain_text(value)


def _plain_text(value: Any) -> str:
    """A value without quotes. Subclasses of numbers (numpy's, enums) are printed as numbers."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, int):
        return int.__repr__(value)
    return float.__repr__(value) if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as_text(raw: Any) -> str:
    return f"({', '.join(map(_as_text, raw))})" if isinstance(raw, tuple) else repr(str(raw))


def _mismatch(name: str, option: Option, given: str) -> str:
    return f"option {option.name!r} of {name!r} is {given}; it must be {describe_type(option.type)}"


def describe_type(hint: Any) -> str:
    """The type of an option in words, as error messages and `graphopt passes` show it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe_type, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(_plain_text, arguments))
    if origin is tuple:
        return f"a list like ({describe_type(arguments[0])}, ...)"
    if origin is dict:
        return "a table" if arguments[1] is Any else f"a table of {describe_type(arguments[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, "none")
