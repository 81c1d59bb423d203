import html

import matplotlib as mpl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text

from kerasfactory._text import as_html, as_matplotlib, visible

pytestmark = pytest.mark.backend_independent


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("age", "age"),
        ("Größe in µm", "Größe in µm"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\ud800", r"\ud800"),
        ("abc\u202edef", r"abc\u202edef"),
        ("\u2028", r"\u2028"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        (3, "3"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text, shown):
    assert visible(text) == shown
    shown.encode("utf-8")


def test_no_tag_nor_attribute_can_begin():
    assert as_html("<b a=\"1\" c='2'>&\x00") == r"&lt;b a=&quot;1&quot; c=&#x27;2&#x27;&gt;&amp;\x00"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, r"\$5 \\$ a_b^2 {50%} \n #1 & ~"),  # the second one: a backslash, and then the escaped sign
        ({"text.parse_math": False}, r"$5 \$ a_b^2 {50%} \n #1 & ~"),
        (
            {"text.usetex": True},
            r"\$5 \textbackslash{}\$ a\_b\textasciicircum{}2 \{50\%\} \textbackslash{}n \#1 \& \textasciitilde{}",
        ),
    ],
)
def test_no_formula_can_begin_in_a_figure(settings, text):
    with mpl.rc_context(settings):
        assert as_matplotlib("$5 \\$ a_b^2 {50%} \n #1 & ~") == text
        assert as_matplotlib("one", 2, "") == "one\n2\n"


ANY_TEXT = st.text(st.one_of(st.characters(), st.sampled_from("$\\_^{}<>&'\"`\n\r\t\x00\u202e\ud800\u2028")))


@given(ANY_TEXT)
@settings(max_examples=300, derandomize=True, deadline=None)
def test_no_text_is_markup_and_all_of_it_is_there(text):
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert visible(shown) == shown
    assert not is_math_text(as_matplotlib(text))
    assert as_matplotlib(text).replace(r"\$", "$") == shown  # which is what matplotlib does with what is no formula
    assert not set(as_html(text)) & set("<>\"'")
    assert html.unescape(as_html(text)) == shown
