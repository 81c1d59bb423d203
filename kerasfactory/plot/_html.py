"""Pieces of HTML that a page or a notebook shows, complete and safe to put between other text."""

import json
from typing import Any


class Html(str):
    """HTML as a text, which a notebook shows as what it is."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def as_script_data(data: Any) -> str:
    """The data as JSON to stand in a script: `<` could end it, and Markdown would read backticks as code."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("`", "\\u0060")


def one_line(code: str) -> str:
    """The code without line breaks, which Markdown would take for paragraphs."""
    return " ".join(line.strip() for line in code.splitlines() if line.strip())
