"""The README is current. `python tests/test_readme.py` brings its generated table up to date."""

from __future__ import annotations

import re
from pathlib import Path

from graphopt.contract import Effect
from graphopt.registry import pass_class, pass_names

README = Path(__file__).parent.parent / "README.md"
MARKS = {Effect.EXACT: "", Effect.ROUNDING: "~", Effect.LOSSY: "≈"}
TABLE = re.compile(r"(?<=<!-- passes -->\n).*?(?=<!-- /passes -->)", re.DOTALL)


def pass_table() -> str:
    """A row for each folder of passes; those that may round, or change more, are marked."""
    folders: dict[str, list[str]] = {}
    for name in pass_names():
        cls = pass_class(name)
        package, folder, *_ = cls.__module__.split(".")
        if package == "graphopt_passes":
            folders.setdefault(folder, []).append(f"`{name}`{MARKS[cls.effect]}")
    lines = ["| | passes |", "|---|---|"]
    lines += [f"| {folder} | {', '.join(names)} |" for folder, names in sorted(folders.items())]
    return "\n".join(lines) + "\n"


def test_the_table_of_passes_is_current() -> None:
    found = TABLE.search(README.read_text(encoding="utf-8"))

    assert found is not None
    assert found.group() == pass_table(), "run: python tests/test_readme.py"


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda _: pass_table(), text), encoding="utf-8")
