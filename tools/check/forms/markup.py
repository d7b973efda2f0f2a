"""HTML and SVG that is made of calls: whatever is no markup yet is escaped, so a text cannot become a tag by oversight.

tag("p", "a < b", tag("b", "bold"), class_="note")  ->  <p class="note">a &lt; b<b>bold</b></p>
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

Content = str | None | Iterable["Content"]  # nothing, a text, markup, or several of them

# HTML forbids them; a tab and a line end are fine.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
VOID = {"meta", "img", "br", "col"}


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


def markup(content: Content) -> Markup:
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(html.escape(CONTROL.sub("\ufffd", content)))
    return Markup("".join(map(markup, content or ())))


def tag(name: str, /, *content: Content, **attributes: str | float | None) -> Markup:
    """`class_` is class, and `aria_label` is aria-label."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{markup(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{told}>" if name in VOID else f"<{name}{told}>{markup(content)}</{name}>")
