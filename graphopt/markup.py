"""HTML in which every text is escaped, because there is no other way to make it."""

from __future__ import annotations

import html
import re

_VOID = frozenset({"link", "meta"})

_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that an HTML file must not hold."""


class Markup(str):
    """Finished HTML; every other string is text, and is escaped where it is put into one."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """A text as HTML; finished HTML is left as it is."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", text)))


def joined(*content: str) -> Markup:
    """Texts and HTML, one after the other."""
    return Markup("".join(map(escaped, content)))


def element(name: str, /, *content: str, **attributes: str) -> Markup:
    """An HTML element.

    Args:
        name: of the element.
        content: texts and HTML.
        attributes: by name, in which `_` stands for `-`; one at the end is dropped, as in `class_`.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(*content)}</{name}>")
