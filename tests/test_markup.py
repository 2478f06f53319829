from __future__ import annotations

from html.parser import HTMLParser

import pytest

from graphopt.markup import Markup, element, escaped, joined


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def _read(markup: str) -> _Reader:
    reader = _Reader()
    reader.feed(markup)
    reader.close()
    return reader


HOSTILE = """<script>alert("1")</script> & 'x' <!-- ]]> &amp; &lt;"""


def test_text_is_read_back_as_it_was_and_makes_no_element() -> None:
    found = _read(element("p", HOSTILE, element("b", HOSTILE)))

    assert [tag for tag, _ in found.tags] == ["p", "b"]
    assert found.text == HOSTILE * 2


def test_an_attribute_is_read_back_as_it_was() -> None:
    hostile = """" onload="alert(1)' <x>"""

    found = _read(element("div", class_="a b", aria_label=hostile, name="n"))

    assert found.tags == [("div", {"class": "a b", "aria-label": hostile, "name": "n"})]


def test_finished_html_is_not_escaped_again() -> None:
    once = escaped("a < b")

    assert once == "a &lt; b"
    assert escaped(once) == once
    assert joined("<", once) == "&lt;a &lt; b"
    assert isinstance(joined("<"), Markup)


def test_void_elements_have_no_end() -> None:
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\x7f", "\x85", "\ud800"])
def test_what_a_file_must_not_hold_is_replaced(character: str) -> None:
    assert escaped(f"a{character}b") == "a\N{REPLACEMENT CHARACTER}b"


def test_line_breaks_and_other_scripts_stay() -> None:
    assert escaped("a\n\tб中\N{ARABIC LETTER ALEF}") == "a\n\tб中\N{ARABIC LETTER ALEF}"
