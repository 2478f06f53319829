"""What is imported is depended on, and what is depended on is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def normal(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    return name[0].lower().replace("_", "-").replace(".", "-")


BASE = {normal(one) for one in PROJECT["dependencies"]}
PINNED = {normal(line) for line in (ROOT / "constraints.txt").read_text().split()}


def imported_at_once(package: str) -> Iterator[str]:
    """What the modules of a package import as they are loaded."""
    for path in sorted(ROOT.glob(f"{package}/**/*.py")):
        if "training" in path.relative_to(ROOT).parts:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", ["graphopt", "passes/graphopt_passes"])
def test_what_is_imported_at_once_comes_with_the_base_install(package: str) -> None:
    others = {
        normal(name)
        for name in imported_at_once(package)
        if name not in sys.stdlib_module_names and not name.startswith("graphopt")
    }

    # figures.py is loaded for a report alone, and needs its extra; google is protobuf, of onnx.
    assert others - BASE <= {"plotly", "google"}
    assert "numpy" in others


@pytest.mark.parametrize("extra", ["", "cpu", "dask", "report", "train", "dev"])
def test_what_ci_installs_is_pinned(extra: str) -> None:
    wanted = {normal(one) for one in EXTRAS[extra]} if extra else BASE

    assert wanted <= PINNED


def test_constraints_are_one_exact_version_each_and_sorted() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()

    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    assert lines == sorted(lines, key=str.lower)
    assert len(PINNED) == len(lines)


def test_ci_installs_dask() -> None:
    assert any(normal(one) == "dask" for one in EXTRAS["dev"])
