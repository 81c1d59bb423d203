"""Text that users give, such as the names of features, on its way to a renderer: shown as it is, never as markup."""

import html
import unicodedata
from typing import Any

# Control characters, those that reorder others, surrogates and separators of lines. Two of the kind `Cf` are part of
# words and of emoji: joiners.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"


def visible(text: Any) -> str:
    r"""The text in which characters that a reader cannot see are written as Python writes them, as `\n`."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNSEEN and character not in _JOINERS
        else character
        for character in str(text)
    )


def as_html(text: Any) -> str:
    """The text as it stands in a page, between tags or within an attribute."""
    return html.escape(visible(text))
