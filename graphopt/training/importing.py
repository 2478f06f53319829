"""Things that a configuration names by import path, `package.module:name`."""

from __future__ import annotations

import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from graphopt.errors import ConfigError, GraphoptError, did_you_mean
from graphopt.training.config import Table

_OTHERS = (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("stdlib", "purelib")))
"""Where code lies that who writes a model has not written: here, Python's, and torch's."""


@contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Modules in a folder, and in the working directory, can be imported within."""
    added = [str(folder.resolve()), str(Path.cwd())]
    sys.path[:0] = added
    try:
        yield
    finally:
        for entry in added:
            sys.path.remove(entry)


def is_path(text: str) -> bool:
    """Whether the text is an import path, and not a word."""
    return ":" in text


def named(path: str, where: str) -> Callable[..., Any]:
    """The callable that an import path names.

    Args:
        path: `package.module:name`, the name possibly with dots.
        where: the key of the configuration, for messages.

    Raises:
        ConfigError: the path is not of that form, or there is no such callable.
    """
    module_name, mark, name = path.partition(":")
    if not (mark and module_name and name):
        raise ConfigError(f"{where} is {path!r}; write an import path like package.module:name")
    try:
        found: Any = import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{where}: {module_name} cannot be imported: {described(error)}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, [n for n in vars(found) if not n.startswith("_")])
            raise ConfigError(f"{where}: {module_name} has no {part!r}{near}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{where}: {path} is {type(found).__name__}; it must be callable")
    return found  # type: ignore[no-any-return]


def made_by(path: str, options: Table, where: str) -> Any:
    """What the callable of an import path returns for keyword arguments.

    Raises:
        ConfigError: there is no such callable, it does not take the options, or it raises.
    """
    factory = named(path, where)
    _check_options(factory, options, where)
    try:
        return factory(**options)
    except GraphoptError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: {path} raised {described(error)}") from error


def _check_options(factory: Callable[..., Any], options: Table, where: str) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:
        # Some callables written in C have none.
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(
            f"{where}: its options do not fit: {error}; it is called as {signature}"
        ) from None


def described(error: BaseException) -> str:
    """What an error of a user's code says, and where in that code it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_OTHERS)] or frames
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"
