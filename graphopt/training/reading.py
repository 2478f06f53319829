"""Configurations of training runs, read from TOML (https://toml.io/en/v1.0.0)."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from graphopt.errors import ConfigError, did_you_mean
from graphopt.spec import describe_type, options_of
from graphopt.training import config as sections
from graphopt.training.config import Config, Section, Table

SECTIONS: tuple[type[Section], ...] = (
    sections.Model,
    sections.Data,
    sections.Optimizer,
    sections.Schedule,
    sections.Training,
    sections.Strategy,
    sections.Checkpoint,
    sections.Validation,
    sections.Export,
    sections.Optimize,
    sections.Log,
)
S = TypeVar("S", bound=Section)

FREE = ("distill", "prepare")
"""Sections whose keys are checked by what they are for."""


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file.

    Args:
        path: of the TOML file.
        overrides: values that take the place of those in the file, as `section.key=value` with the
            value in TOML; what is no TOML is taken as text.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or says something that a run cannot be.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for text in overrides:
        _override(table, text)
    return config_of(table, path.parent)


def config_of(table: Table, folder: Path = Path()) -> Config:
    """Make a configuration of nested tables, as TOML reads them.

    Args:
        table: by section and key.
        folder: that relative paths are relative to.

    Raises:
        ConfigError: a section or key is unknown or missing, or a value is wrong.
    """
    known = {cls.section: cls for cls in SECTIONS}
    for name in table:
        if name not in known and name not in FREE:
            near = did_you_mean(name, [*known, *FREE])
            raise ConfigError(f"there is no section [{name}]{near}")
    missing = [name for name in ("model", "data") if name not in table]
    if missing:
        raise ConfigError(f"the section [{missing[0]}] is missing; it states the {missing[0]}")
    values: dict[str, Any] = {
        name: section_of(cls, table[name]) for name, cls in known.items() if name in table
    }
    if "distill" in table:
        values["distill"] = _table("distill", table["distill"])
    if "prepare" in table:
        values["prepare"] = _tables("prepare", table["prepare"])
    return Config(folder=folder, **values)


def section_of(cls: type[S], table: Any) -> S:
    """One section of its keys and values.

    Raises:
        ConfigError: a key is unknown or missing, or a value is wrong.
    """
    known = {option.field: option for option in options_of(cls).values()}
    values: Table = {}
    for key, value in _table(cls.section, table).items():
        if key not in known:
            raise ConfigError(f"[{cls.section}] has no key {key!r}{did_you_mean(key, known)}")
        values[key] = tuple(value) if isinstance(value, list) else value
    for wanted in dataclasses.fields(cls):
        without = wanted.default is wanted.default_factory is dataclasses.MISSING
        if without and wanted.name not in values:
            kind = describe_type(known[wanted.name].type)
            raise ConfigError(f"[{cls.section}] needs its key {wanted.name!r}, which is {kind}")
    return cls(**values)


def _table(name: str, value: Any) -> Table:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {value!r}; it must be a section, [{name}] with keys below it")
    return value


def _tables(name: str, value: Any) -> tuple[Table, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"[{name}] may be there several times: write [[{name}]]")
    return tuple(_table(name, item) for item in value)


def _override(table: Table, text: str) -> None:
    place, mark, written = text.partition("=")
    section, dot, key = place.strip().partition(".")
    if not (mark and dot and section and key):
        raise ConfigError(f"--set {text!r} is not of the form SECTION.KEY=VALUE")
    *parents, last = key.split(".")
    for name in (section, *parents):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text!r}: {name} is no section")
    table[last] = _value(written.strip())


def _value(written: str) -> Any:
    """The TOML value, or the text itself where it is none: words need no quotes."""
    try:
        return tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return written
