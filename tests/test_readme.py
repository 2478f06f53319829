"""The README is current. `python tests/test_readme.py` brings its generated table up to date."""

from __future__ import annotations

import re
from pathlib import Path

from graphopt.json_report import summary
from graphopt.registry import pass_class, pass_names

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- passes -->\n).*?(?=<!-- /passes -->)", re.DOTALL)


def pass_table() -> str:
    lines = ["| pass | effect | what it does |", "|---|---|---|"]
    for name in pass_names():
        cls = pass_class(name)
        if cls.__module__.startswith("graphopt_passes"):
            lines.append(f"| `{name}` | {cls.effect.name.lower()} | {summary(cls)} |")
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
