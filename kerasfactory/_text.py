"""Text that users give, such as the names of features, on its way to a renderer: shown as it is, never as markup."""

import html
import unicodedata
from typing import Any

# Control characters, those that reorder others, surrogates and separators of lines. Two of the kind `Cf` are part of
# words and of emoji: joiners.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"
# What TeX takes for commands, if somebody lets it set the text of figures.
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "$%&#_{}"},
}


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


def as_matplotlib(*lines: Any) -> str:
    """The lines as matplotlib draws them in a figure: `$` is no formula, and with `text.usetex` nothing is a command.

    A label that starts with `_` is hidden from legends, and nothing within the text can change that: whoever makes a
    legend has to give it all its texts.
    """
    from matplotlib import rcParams  # all else here does without it

    texts = [visible(line) for line in lines]
    if rcParams["text.usetex"]:
        texts = ["".join(_TEX.get(character, character) for character in text) for text in texts]
    elif rcParams["text.parse_math"]:
        texts = [text.replace("$", r"\$") for text in texts]
    return "\n".join(texts)
