import pytest

from kerasfactory._text import as_html, visible

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
