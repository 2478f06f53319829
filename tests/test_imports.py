"""Data flows one way through the modules, and importing graphopt costs little."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import graphopt
import graphopt_passes

ENGINE = Path(graphopt.__file__).parent
PASSES = Path(graphopt_passes.__file__).parent
FILES = sorted([*ENGINE.rglob("*.py"), *PASSES.rglob("*.py")])


@dataclass(frozen=True)
class _Import:
    module: str
    lazy: bool
    """Inside a function, so that it happens when the function is called."""


def _name(path: Path) -> str:
    root = (ENGINE if path.is_relative_to(ENGINE) else PASSES).parent
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@cache
def _imports(path: Path) -> tuple[_Import, ...]:
    return tuple(_walk(ast.parse(path.read_text()), lazy=False))


def _walk(node: ast.AST, lazy: bool) -> Iterator[_Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (_Import(alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            # The name may be that of a module in a package, or of a thing in a module.
            yield from (_Import(f"{child.module}.{alias.name}", lazy) for alias in child.names)
        elif not _is_for_types_only(child):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, lazy or inside)


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _offenders(paths: list[Path], *packages: str) -> list[str]:
    return [
        f"{_name(path)} imports {found.module}"
        for path in paths
        for found in _imports(path)
        if any(_within(found.module, package) for package in packages)
    ]


def test_the_rules_see_every_kind_of_import() -> None:
    tree = ast.parse(
        "import a.b\nfrom c import d\ndef f():\n  import e\n"
        "class K:\n  def g(self):\n    from h import i\n"
        "try:\n  import j\nexcept ImportError: pass\n"
        "if TYPE_CHECKING:\n  import t\n"
    )

    assert [(i.module, i.lazy) for i in _walk(tree, lazy=False)] == [
        ("a.b", False),
        ("c.d", False),
        ("e", True),
        ("h.i", True),
        ("j", False),
    ]
    assert _name(ENGINE / "spec.py") == "graphopt.spec"
    assert _name(ENGINE / "__init__.py") == "graphopt"
    assert _name(PASSES / "simplify" / "__init__.py") == "graphopt_passes.simplify"


def test_the_engine_knows_no_plugin() -> None:
    engine = [p for p in FILES if p.is_relative_to(ENGINE)]

    assert _offenders(engine, "graphopt_passes", "graphopt_models") == []


def test_passes_do_not_need_the_models() -> None:
    assert _offenders(FILES, "graphopt_models") == []


def test_only_the_runtime_imports_onnxruntime() -> None:
    allowed = [ENGINE / "runtime.py", *(ENGINE / "training").rglob("*.py")]
    engine = [p for p in FILES if p.is_relative_to(ENGINE) and p not in allowed]

    assert _offenders(engine, "onnxruntime", "onnxruntime_tools") == []


def test_passes_import_two_parts_of_onnxruntime_when_they_run_and_no_other() -> None:
    allowed = ("onnxruntime.transformers", "onnxruntime.quantization")
    wrong = [
        f"{_name(path)} imports {found.module}"
        for path in FILES
        if path.is_relative_to(PASSES)
        for found in _imports(path)
        if _within(found.module, "onnxruntime")
        if not (found.lazy and any(_within(found.module, part) for part in allowed))
    ]

    assert wrong == []


def test_only_training_imports_torch() -> None:
    allowed = list((ENGINE / "training").rglob("*.py"))

    assert _offenders([p for p in FILES if p not in allowed], "torch", "torchvision") == []


def test_only_figures_import_plotly_and_only_the_report_imports_figures() -> None:
    allowed = {
        "plotly": ["figures.py"],
        "graphopt.figures": ["html_report.py"],
        "graphopt.html_report": ["command_line.py"],
    }

    for package, names in allowed.items():
        others = [path for path in FILES if path not in [ENGINE / name for name in names]]
        assert _offenders(others, package) == []


def test_pages_are_loaded_only_where_one_is_asked_for() -> None:
    loaded = [
        f"{_name(path)} imports {found.module}"
        for path in FILES
        for found in _imports(path)
        if not found.lazy and _target(found.module, _PAGES) in _PAGES
        if path.name not in ("html_report.py", "html_sections.py")
    ]

    assert loaded == []


_PAGES = ("graphopt.html_report", "graphopt.html_sections")


@pytest.mark.parametrize("lazy", [False, True])
def test_only_the_command_line_loads_training(lazy: bool) -> None:
    wrong = [
        f"{_name(path)} imports {found.module}"
        for path in FILES
        if not path.is_relative_to(ENGINE / "training")
        for found in _imports(path)
        if _within(found.module, "graphopt.training") and found.lazy is lazy
        if not (lazy and path == ENGINE / "cli.py")
    ]

    assert wrong == []


def _target(imported: str, modules: Container[str]) -> str:
    """The module that `from x.y import z` loads: x.y.z, else x.y; empty for one of others."""
    while imported and imported not in modules:
        imported = imported.rpartition(".")[0]
    return imported


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {_name(path): path for path in FILES}
    graph = {
        name: {_target(i.module, modules) for i in _imports(path) if not i.lazy} - {name, ""}
        for name, path in modules.items()
    }

    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_importing_graphopt_loads_neither_the_heavy_parts_nor_the_plugins() -> None:
    code = "import json, sys, graphopt; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    heavy = {"torch", "onnxruntime", "onnxruntime_tools", "graphopt_passes", "graphopt_models"}
    assert loaded & {*heavy, "plotly"} == set()
