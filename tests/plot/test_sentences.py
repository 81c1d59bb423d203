"""Sentences say the weight of each word as a shade and as a number, in any script, and leave out what is hidden."""

import io
import itertools
import json
import re

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from kerasfactory import plot

pytestmark = pytest.mark.backend_independent

WORDS = [["not", "bad", "at", "all", "bad"], ["too", "long", "", "", ""]]
SHARES = [[0.52, 0.28, 0.024, 0.08, 0.096], [0.2, 0.8, 0.0, 0.0, 0.0]]


@pytest.fixture(autouse=True)
def headless():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def attribution_of(values=SHARES, words=WORDS, **coords):
    coords = {"sample": [0, 1], "feature_token": (("sample", "feature"), np.array(words, object))} | coords
    return xr.DataArray(np.array(values), coords, ["sample", "feature"], "attention")


def scores_of(words=WORDS, heads=3, seed=0):
    """Scores whose padding is masked, both as query and as key."""
    words = np.array(words, object)
    size = words.shape[1]
    values = np.random.default_rng(seed).dirichlet(np.full(size, 0.3), size=(len(words), heads, size))
    values *= (words != "")[:, None, None] * (words != "")[:, None, :, None]
    values /= np.maximum(values.sum(-1, keepdims=True), 1e-12)
    coords = {"head": range(heads), "key_token": (("sample", "key"), words)}
    return xr.DataArray(values, coords, ["sample", "head", "query", "key"], "block")


def spans(fragment):
    """Each word, with its classes, its share of the scale in percent, and its number."""
    found = re.findall(
        r'<span class="(word[^"]*)" style="--share:(\d+)%" title="([^"]*)">(.*?)<small dir="ltr">(.*?)</small>',
        fragment,
    )
    assert all(title == number for _, _, title, _, number in found)
    return [(word, classes.split()[1:], int(share), number) for classes, share, _, word, number in found]


def test_words_are_shaded_by_their_share_of_the_largest_and_say_their_number():
    fragment = plot.text(attribution_of(), top_k=1)
    assert spans(fragment) == [
        ("not", ["top"], 65, "0.52"),
        ("bad", [], 35, "0.28"),
        ("at", [], 3, "0.024"),
        ("all", [], 10, "0.08"),
        ("bad", [], 12, "0.096"),
        ("too", [], 25, "0.2"),
        ("long", ["top"], 100, "0.8"),
    ]
    assert re.findall(r'<p class="label">(.*?)</p>', fragment) == ["sample 0", "sample 1"]
    assert "attribution from 0 to 0.8, the largest" in fragment
    assert "<script" not in fragment


def test_values_with_a_sign_have_a_second_hue_a_line_and_a_minus():
    fragment = plot.text(attribution_of(values=np.array(SHARES) * [[1, -1, 1, 1, 1], [-1, 1, 1, 1, 1]]), top_k=2)
    assert spans(fragment)[:2] == [("not", ["top"], 65, "+0.52"), ("bad", ["top", "minus"], 35, "−0.28")]
    assert "from −0.8 to 0.8, the largest; orange and dotted: below 0; blue: above 0" in fragment
    assert ".minus{background:color-mix(in srgb,var(--minus)" in fragment
    assert "border-bottom:2px dotted" in fragment


def test_what_is_padding_or_out_of_view_is_hidden():
    in_view = np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], bool)
    shown = spans(plot.text(attribution_of(in_view=(("sample", "feature"), in_view))))
    assert [word for word, *_ in shown] == ["not", "bad", "at", "all", "long"]
    nan_in_padding = attribution_of().where(lambda a: a["feature_token"] != "")
    assert plot.text(nan_in_padding) == plot.text(attribution_of())


def test_names_that_are_the_same_for_all_samples_and_single_sentences_are_drawn():
    shared = xr.DataArray(SHARES, {"feature": list("abcde")}, ["sample", "feature"])
    assert [word for word, *_ in spans(plot.text(shared))] == list("abcdeabcde")
    assert [word for word, *_ in spans(plot.text(attribution_of()[1]))] == ["too", "long"]
    assert '<p class="label">liked it</p>' in plot.text(attribution_of(sample=["liked it", "$not$"])[0])


def test_scores_have_a_slider_over_the_mean_and_each_head():
    scores = scores_of()
    fragment = plot.text({"block": scores})
    data = json.JSONDecoder().raw_decode(fragment.partition("const data = ")[2])[0]
    live = scores.values[1, :, :2, :2]  # the second sample has two words
    expected = np.concatenate([live.mean(axis=(0, 1), keepdims=True)[0], live.mean(axis=1)])
    np.testing.assert_allclose(data["weights"][1], expected, rtol=0.06, atol=5e-4)
    assert data["heads"] == ["mean of 3", "0", "1", "2"]
    assert fragment.count('type="range" min="0" max="3"') == 1
    assert [float(number) for *_, number in spans(fragment)[5:]] == data["weights"][1][0]
    assert "block, mean over queries" in fragment
    one = plot.text(scores.isel(head=0, query=1))
    np.testing.assert_allclose([float(number) for *_, number in spans(one)][:5], scores[0, 0, 1], rtol=0.06, atol=5e-4)
    assert "<script" not in one


def test_queries_that_are_padding_do_not_dilute_the_mean():
    words = [["too", "long", ""]]
    tokens = {f"{dim}_token": (("sample", dim), words) for dim in ("query", "key")}
    rollout = xr.DataArray([[[0.7, 0.3, 0], [0.5, 0.5, 0], [0, 0, 1]]], tokens, ["sample", "query", "key"], "rollout")
    expected = [("too", ["top"], 100, "0.6"), ("long", ["top"], 67, "0.4")]
    assert spans(plot.text(rollout)) == spans(plot.text(rollout[0])) == expected
    assert [number for *_, number in spans(plot.text(rollout.isel(query=0)))] == ["0.7", "0.3"]


def test_the_piece_is_complete_and_cannot_be_broken_by_a_word():
    words = [["<b>", "</script>", '" onload="', "$x$", "two\nlines"], ["\u202eabc", " ", "`code`", "", ""]]
    for fragment in (plot.text(attribution_of(words=words)), plot.text(scores_of(words=words))):
        assert "\n" not in fragment
        assert " id=" not in fragment
        assert not re.search(r"https?:|src=|href=|@import|url\(|fetch\(", fragment)
        assert [word for word, *_ in spans(fragment)] == [
            *("&lt;b&gt;", "&lt;/script&gt;", "&quot; onload=&quot;", "$x$", r"two\nlines"),
            *(r"\u202eabc", "␣", "`code`"),
        ]
        assert 'class="kerasfactory-text mathjax_ignore tex2jax_ignore"' in fragment
        assert fragment._repr_html_() == fragment
        assert type(fragment._repr_html_()) is str


def luminance(color):
    channels = np.array(to_rgb(color) if isinstance(color, str) else color)
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ (
        0.2126,
        0.7152,
        0.0722,
    )


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_shade_leaves_the_word_a_contrast_of_4_5_to_1_in_light_and_dark():
    fragment = plot.text(attribution_of())
    pairs = dict(re.findall(r"--(\w+):light-dark\((#\w{6},#\w{6})\)", fragment))
    for scheme in (0, 1):
        ink, card, plus, minus = (pairs[name].split(",")[scheme] for name in ("ink", "card", "plus", "minus"))
        assert f"--ink:{ink}" in fragment or scheme == 1  # without `light-dark`, a browser takes the light ones
        for end in (plus, minus):
            mixes = [
                np.array(to_rgb(end)) * share + np.array(to_rgb(card)) * (1 - share) for share in np.linspace(0, 1)
            ]
            assert min(contrast(ink, mix) for mix in mixes) >= 4.5
            assert contrast(end, card) > 1.9  # a shade is seen
    _, ax = plt.subplots(figsize=(6, 3))
    plot.text(attribution_of(values=np.array(SHARES) * [[-1], [1]]), ax=ax)
    assert {text.get_color() for text in ax.texts} == {pairs["ink"].split(",")[0], plt.rcParams["text.color"]}
    assert (
        min(contrast(ink_of.get_color(), box.get_facecolor()[:3]) for ink_of in ax.texts for box in ax.patches) >= 4.5
    )


def rows_of(ax):
    """The drawn words in lines, as they are read from the left."""
    words = sorted((text.get_position()[1], text.get_window_extent().x0, text.get_text()) for text in ax.texts)
    return [[word for *_, word in line] for _, line in itertools.groupby(words, key=lambda word: word[0])]


def test_a_figure_wraps_the_words_at_the_width_of_its_axes(tmp_path):
    figure, ax = plt.subplots(figsize=(2.2, 4))
    attribution = attribution_of(words=[["first", "sentence", "wraps", "at", "last"], WORDS[1]])
    assert plot.text(attribution, ax=ax, top_k=1) is ax
    figure.draw_without_rendering()
    assert [[word for word in row if word] for row in rows_of(ax)] == [
        ["sample 0"],
        ["first", "0.52", "sentence"],
        ["wraps", "at", "last"],
        ["sample 1"],
        ["too", "long", "0.8"],
    ]
    limits = ax.get_window_extent()
    for text in ax.texts:
        box = text.get_window_extent()
        assert limits.x0 - 1 <= box.x0 <= box.x1 <= limits.x1 + 1
        assert limits.y0 - 1 <= box.y0 <= box.y1 <= limits.y1 + 1
    for name in ("words.png", "words.svg"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_a_sentence_that_is_written_from_right_to_left_starts_on_the_right():
    words = [["זה", "לא", "רע", "", ""], ["3", "too", "", "", ""]]
    fragment = plot.text(attribution_of(words=words))
    assert fragment.count('<p class="sentence" dir="auto">') == 2
    _, ax = plt.subplots(figsize=(6, 4))
    plot.text(attribution_of(words=words), ax=ax, top_k=1)
    rows = [[word for word in row if word] for row in rows_of(ax)]
    assert rows[1] == ["רע", "לא", "0.52", "זה"]
    assert rows[3] == ["3", "too", "0.8"]


def test_a_figure_of_scores_is_the_mean_over_heads_and_queries():
    scores = scores_of()
    _, ax = plt.subplots(figsize=(6, 4))
    plot.text(scores[1:], ax=ax, top_k=5)
    numbers = [float(text.get_text()) for text in ax.texts if re.fullmatch(r"[\d.]+", text.get_text())]
    np.testing.assert_allclose(numbers, scores.values[1, :, :2, :2].mean(axis=(0, 1)), rtol=0.06, atol=5e-4)
    assert ax.get_title() == "block, mean over queries\nmean over 3 heads"


def test_axes_that_are_too_small_say_how_high_the_figure_has_to_be():
    words = [[f"word{number}" for number in range(60)]] * 2
    attribution = attribution_of(values=np.full((2, 60), 1 / 60), words=words)
    _, ax = plt.subplots(figsize=(3, 1.5))
    with pytest.raises(ValueError, match=r"too small for 2 sentences: make the figure .* inches high") as error:
        plot.text(attribution, ax=ax)
    height = float(re.search(r"make the figure ([\d.]+) inches", str(error.value))[1])
    figure, ax = plt.subplots(figsize=(3, 2 * height))
    plot.text(attribution, ax=ax)
    figure.savefig(io.BytesIO())


def test_many_samples_are_cut_and_the_piece_says_so():
    fragment = plot.text(attribution_of(), samples=1)
    assert len(spans(fragment)) == 5
    assert "attention, 1 of 2 samples" in fragment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.drop_vars("feature_token"), r"must have words.*feature_names=words.*assign_coords"),
        (lambda a: a.values, "Received: ndarray"),
        (lambda a: a.rename(feature="column"), r"dimensions \('sample', 'column'\)"),
        (lambda a: a[:0], "must not be empty.*'sample': 0"),
        (lambda a: a * np.nan, r"must be finite\. 7 of 7.*dropna"),
        (lambda a: a.assign_coords(feature_token=("feature", [""] * 5)), "All words.*are hidden"),
        (lambda a: {"one": a, "other": a}, r"one layer.*attribution\[name\].*\['one', 'other'\]"),
        (lambda a: scores_of() - 0.5, r"must not be negative.*isel\(head=0, query=0\)"),
    ],
)
def test_what_has_no_sentences_is_refused(change, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plot.text(change(attribution_of()))


def test_the_advice_for_what_has_no_words_works():
    bare = attribution_of().drop_vars("feature_token")
    fragment = plot.text(bare.assign_coords(feature_token=(("sample", "feature"), WORDS)))
    assert fragment == plot.text(attribution_of())


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"top_k": 0}, {"vmax": 0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        plot.text(attribution_of(), **wrong)
