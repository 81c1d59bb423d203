"""Sentences whose words are shaded by their weight, as HTML or in a figure."""

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple, overload

import numpy as np
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.patches import Rectangle

from kerasfactory._arguments import positive_integer
from kerasfactory._text import as_html, as_matplotlib
from kerasfactory.plot._html import Html, as_script_data, one_line
from kerasfactory.plot._maps import LETTERS, glyphs_may_be_missing, labels_of, one_layer, sample_titles, short
from kerasfactory.plot._shades import DARK, LIGHT, amount, mappable, rounded, shades

# The piece is a card with its own colors, because the contrast on a shade has to hold on any page. Whether the card is
# light or dark is up to the page, whose `color-scheme` it inherits.
_STYLE = """
.kerasfactory-text{LIGHT;color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:.4em;
padding:.5em 1em;margin:1em 0;font:16px/1.9 system-ui,sans-serif;max-width:44em;box-sizing:border-box}
@supports(color:light-dark(#000,#fff)){.kerasfactory-text{BOTH}}
.kerasfactory-text p{margin:.2em 0 .6em;color:var(--ink);overflow-wrap:anywhere}
.kerasfactory-text .label{margin:.6em 0 0;font-weight:600;font-size:14px;line-height:1.5}
.kerasfactory-text .note{font-size:14px;line-height:1.5}
.kerasfactory-text label{display:inline-flex;align-items:center;gap:.5em;margin-inline-end:1.5em}
.kerasfactory-text [hidden]{display:none}
.kerasfactory-text input{accent-color:#1769c4}
.kerasfactory-text input[type=range]{width:9em;min-width:4em}
.kerasfactory-text .word{position:relative;padding:.15em .2em;border-radius:.2em;color:var(--ink);
forced-color-adjust:none;print-color-adjust:exact;-webkit-print-color-adjust:exact;
-webkit-box-decoration-break:clone;box-decoration-break:clone;
background:color-mix(in srgb,var(--plus) var(--share),var(--card))}
.kerasfactory-text .minus{background:color-mix(in srgb,var(--minus) var(--share),var(--card));
border-bottom:2px dotted var(--ink)}
.kerasfactory-text small{font-size:.7em;opacity:1;margin:0 .25em;user-select:none;-webkit-user-select:none}
.kerasfactory-text:not(:has(:checked)) .word:not(.top) small{position:absolute;width:1px;height:1px;margin:0;
overflow:hidden;clip-path:inset(50%)}
.kerasfactory-text .scale{display:inline-block;width:8em;height:.8em;margin:0 .5em;border:1px solid var(--line);
print-color-adjust:exact;-webkit-print-color-adjust:exact;
background:linear-gradient(to right,var(--card),var(--plus))}
.kerasfactory-text .signed{background:linear-gradient(to right,var(--minus),var(--card),var(--plus))}
"""

# As in `interactive`: the script starts all pieces that hold its data and have not been started.
_SCRIPT = """
(() => {
const data = DATA;
for (const root of document.querySelectorAll('.kerasfactory-text[data-text="HASH"]:not([data-alive])')) {
  root.dataset.alive = "";
  const slider = root.querySelector("input[type=range]");
  const sentences = [...root.querySelectorAll(".sentence")];
  slider.closest("label").hidden = false;
  const show = () => {
    const name = data.heads[slider.value];
    slider.setAttribute("aria-valuetext", name);
    slider.nextElementSibling.textContent = name;
    sentences.forEach((sentence, number) => {
      const weights = data.weights[number][slider.value];
      const order = weights.map((_, index) => index).sort((one, other) => weights[other] - weights[one]);
      sentence.querySelectorAll(".word").forEach((word, index) => {
        const weight = weights[index];
        word.title = word.lastElementChild.textContent = weight;
        word.style.setProperty("--share", `${Math.round(Math.min(1, weight / data.end) * 100)}%`);
        word.classList.toggle("top", weight > 0 && order.indexOf(index) < data.top);
      });
    });
  };
  slider.addEventListener("input", show);
  show();
}
})();
"""

_SMALLEST, _LARGEST = 6.0, 11.0  # font sizes of words, in points


class _Texts(NamedTuple):
    """Sentences, without what is hidden."""

    titles: list[str]  # one for each sample, or none
    words: list[list[str]]
    weights: list[np.ndarray]  # (head, word)
    heads: list[str]
    note: str  # the layer or method, what was averaged or left out
    quantity: str

    def means(self) -> list[np.ndarray]:
        """The weight of each word, the mean over heads."""
        return [_mean(weights) for weights in self.weights]


@overload
def text(attribution: Any, *, ax: None = None, samples: int = 8, top_k: int = 3, vmax: float | None = None) -> Html: ...
@overload
def text(attribution: Any, *, ax: Axes, samples: int = 8, top_k: int = 3, vmax: float | None = None) -> Axes: ...
def text(
    attribution: xr.DataArray | Mapping[str, xr.DataArray],
    *,
    ax: Axes | None = None,
    samples: int = 8,
    top_k: int = 3,
    vmax: float | None = None,
) -> Html | Axes:
    r"""Draw sentences with each word shaded by its weight: as HTML, or on your axes.

    The HTML is one complete piece that loads nothing from the network. A notebook displays it, it works in your own
    page, and `pathlib.Path("words.html").write_text(...)` makes a file of it. With `ax`, matplotlib draws the same
    sentences.

    Color is not the only sign. The words with the largest weights have their number beside them, a checkbox shows the
    numbers of all words, the pointer shows the number of a word, and screen readers read it. Weights of at least 0 are
    shades of blue. If any is negative, positive words are blue, and negative ones are orange, with a dotted line and a
    minus.

    For scores, the weight of a word is the mean over the queries that may look at any key and are not padding,

    $$
    w_{shj} = \frac{1}{|L_{sh}|} \sum_{i \in L_{sh}} A_{shij} ,
    $$

    and the HTML has a slider for the heads \(h\), which starts at their mean. To see what one query looks at, choose it
    first, as with `scores.isel(query=0)`.

    Words are `feature_token` or `key_token`, coordinates (sample, feature) or (sample, key) that may repeat a word, or
    else the names along `feature` or `key`. These are hidden: words that are `""`, such as padding, features that are
    not `in_view`, and keys that receive nothing from any query.

    Args:
        attribution: A DataArray with the dimension `feature`, as from `explain.attribute`, or `key`, as from
            `explain.capture` and `explain.rollout`. Before it come at most `sample`, `head` and `query`. Or a
            dictionary with one such DataArray. Values have no unit; with `head` or `query`, they are at least 0. The
            coordinate `sample` is the title of the sentence: set it to your labels or predictions.
        ax: The axes to draw on. Words wrap at their width, and scores are averaged over the heads. In a figure with
            `layout="constrained"`, the scale has room below them. By default, HTML.
        samples: The number of samples to show, from the first, at least 1. Choose others with `isel(sample=[...])`.
        top_k: The number of words in a sentence that have their number beside them, at least 1.
        vmax: Where the color scale ends, above 0. By default, at the largest absolute weight of all sentences.

    Returns:
        str | matplotlib.axes.Axes: HTML, or the axes if they were given.

    Raises:
        ValueError: If `attribution` has no words, other dimensions, no samples or nothing but hidden words; if a weight
            is NaN or infinite, or negative where a mean is taken; if the axes are too small for the sentences; if
            `samples`, `top_k` or `vmax` is out of range.

    Example:
        ```python
        import xarray as xr

        from kerasfactory import plot

        words = [["not", "bad", "at", "all"], ["too", "long", "", ""]]
        shares = [[0.5, 0.3, 0.1, 0.1], [0.2, 0.8, 0, 0]]
        coords = {
            "feature_token": (("sample", "feature"), words),
            "sample": ["liked it", "did not"],
        }
        attribution = xr.DataArray(shares, coords, ["sample", "feature"])

        fragment = plot.text(attribution, top_k=1)
        print(fragment.count('class="word'), "http" in fragment)
        #> 6 False
        ```
    """
    samples, top_k = positive_integer("samples", samples), positive_integer("top_k", top_k)
    texts = _read(attribution, samples)
    shown = texts.means() if ax is not None else [np.vstack([_mean(one), one]) for one in texts.weights]
    end, signed, description = shades(np.concatenate([one.ravel() for one in shown]), vmax)
    if ax is not None:
        return _draw(ax, texts, end, signed, f"{texts.quantity} {description}", top_k)
    return _page(texts, shown, end, signed, f"{texts.quantity} {description}", top_k)


def _read(given: Any, samples: int) -> _Texts:
    array = one_layer(given, "attribution")
    axis = array.dims[-1] if isinstance(array, xr.DataArray) and array.dims else None
    if axis not in ("feature", "key") or not set(array.dims[:-1]) <= {"sample", "head", "query"}:
        raise ValueError(
            "`attribution` must be a DataArray with the last dimension `feature`, as from `explain.attribute`, or "
            "`key`, as from `explain.capture`, and before it at most `sample`, `head` and `query`. Received: "
            f"{type(array).__name__}{f' with the dimensions {array.dims}' if isinstance(array, xr.DataArray) else ''}"
        )
    if 0 in array.shape:
        raise ValueError(f"`attribution` must not be empty. Received the sizes: {dict(array.sizes)}")
    notes = [short(array.name, 48)] if array.name is not None else []
    if array.sizes.get("sample", 1) > samples:
        notes.append(f"{samples} of {array.sizes['sample']} samples")
        array = array.isel(sample=slice(samples))
    titles = sample_titles(array)
    array = array.expand_dims([dim for dim in ("sample", "head", "query") if dim not in array.dims])
    array = array.transpose("sample", "head", "query", axis)
    words = _words(array, str(axis))
    values = array.to_numpy().astype("float64")
    queries = array.coords.get("query_token")
    if queries is not None and "query" in queries.dims:  # padding looks somewhere too, as at itself in a rollout
        padding = np.broadcast_to(queries.to_numpy() == "", (len(values), values.shape[2]))
        values = np.where(padding[:, None, :, None], 0, values)
    averages = values.shape[1] * values.shape[2] > 1
    kept = words != ""
    if "in_view" in array.coords:
        kept &= np.broadcast_to(array["in_view"].to_numpy().astype(bool), kept.shape)
    if axis == "key":
        kept &= (values != 0).any(axis=(1, 2))
    _check(values, kept, averages)
    if values.shape[2] > 1:
        notes.append("mean over queries")
    weights = [np.stack([_mean(head) for head in sample])[:, seen] for sample, seen in zip(values, kept, strict=True)]
    seen_words = [row[seen].tolist() for row, seen in zip(words, kept, strict=True)]
    quantity = "attribution" if axis == "feature" else "attention"
    return _Texts(titles, seen_words, weights, labels_of(array["head"]), ", ".join(notes), quantity)


def _words(array: xr.DataArray, axis: str) -> np.ndarray:
    """The words (sample, word)."""
    if f"{axis}_token" in array.coords:
        words = array[f"{axis}_token"].to_numpy().astype(object)
    elif axis in array.coords:
        words = np.array(labels_of(array[axis]), object)
    else:
        raise ValueError(
            f"`attribution` must have words: a coordinate `{axis}_token` (sample, {axis}), or names along `{axis}`. "
            "Give them to the function that made it, as with `explain.attribute(..., feature_names=words)`, or add "
            f"them, as with `attribution.assign_coords({axis}_token=(('sample', '{axis}'), words))`. Received the "
            f"coordinates: {[str(name) for name in array.coords]}"
        )
    return np.broadcast_to(words, (array.sizes["sample"], array.sizes[axis]))


def _check(values: np.ndarray, kept: np.ndarray, averages: bool) -> None:
    if not kept.any():
        raise ValueError(
            'All words of `attribution` are hidden: each is "", is not `in_view`, or has an attribution of 0. Received '
            f"{kept.size} words in {len(kept)} samples: check whether the words stand at the same positions as the "
            "data."
        )
    shown = np.moveaxis(values, 3, 1)[kept]
    wrong = ~np.isfinite(shown)
    if wrong.any():
        raise ValueError(
            f"`attribution` must be finite. {wrong.sum()} of {wrong.size} entries are NaN or infinite: leave these "
            "samples out, as with `attribution.dropna('sample')`."
        )
    if averages and shown.min() < -1e-6:
        raise ValueError(
            "Weights of heads and queries must not be negative, because they would cancel in the mean. Choose one, as "
            f"with `attribution.isel(head=0, query=0)`. Received: {shown.min():.3g}"
        )


def _mean(rows: np.ndarray) -> np.ndarray:
    """The mean over the rows (row, word) that look at any word."""
    return np.nan_to_num(rows).sum(axis=0) / max(1, np.count_nonzero(np.nan_to_num(rows).any(axis=1)))


def _page(texts: _Texts, shown: list[np.ndarray], end: float, signed: bool, legend: str, top_k: int) -> Html:
    several = len(texts.heads) > 1
    paragraphs = []
    for number, (words, weights) in enumerate(zip(texts.words, shown, strict=True)):
        if texts.titles:
            paragraphs.append(f'<p class="label">{as_html(texts.titles[number])}</p>')
        paragraphs.append(f'<p class="sentence" dir="auto">{_sentence(words, weights[0], end, signed, top_k)}</p>')
    slider = (
        f'<label hidden>head<input type="range" min="0" max="{len(texts.heads)}" value="0"><b></b></label>'
        if several
        else ""
    )
    data = {
        "heads": [f"mean of {len(texts.heads)}", *texts.heads],
        "weights": [[[rounded(weight, end) for weight in row] for row in weights] for weights in shown],
        "end": end,
        "top": top_k,
    }
    encoded = as_script_data(data)
    name = hashlib.sha256(encoded.encode()).hexdigest()[:12]
    meaning = "; orange and dotted: below 0; blue: above 0" if signed else ""
    colors = {mark: f"--{mark}:{color}" for mark, color in LIGHT.items()}
    both = ";".join(f"--{mark}:light-dark({color},{DARK[mark]})" for mark, color in LIGHT.items())
    pieces = [
        f'<div class="kerasfactory-text mathjax_ignore tex2jax_ignore" data-text="{name}">',
        f"<style>{one_line(_STYLE.replace('LIGHT', ';'.join(colors.values())).replace('BOTH', both))}</style>",
        f'<p class="note">{as_html(texts.note)}</p>' if texts.note else "",
        f'<p class="note">{slider}<label><input type="checkbox">all numbers</label></p>',
        *paragraphs,
        f'<p class="note">{as_html(legend)}{meaning}<span class="scale{" signed" * signed}"></span></p>',
        f"<script>{one_line(_SCRIPT.replace('HASH', name).replace('DATA', encoded))}</script>" if several else "",
        "</div>",
    ]
    return Html("".join(pieces))


def _sentence(words: list[str], weights: np.ndarray, end: float, signed: bool, top_k: int) -> str:
    top = _top(weights, top_k)
    spans = []
    for index, (word, weight) in enumerate(zip(words, weights.tolist(), strict=True)):
        share = round(100 * min(1, abs(weight) / end))
        classes = "word" + " top" * (index in top) + " minus" * (share > 0 and weight < 0)
        number = amount(weight, end, signed)
        spans.append(
            f'<span class="{classes}" style="--share:{share}%" title="{number}">{as_html(_seen(word))}'
            f'<small dir="ltr">{number}</small></span>'
        )
    return " ".join(spans) or "(no words)"


def _top(weights: np.ndarray, top_k: int) -> list[int]:
    """The words of largest absolute weight, none of which is 0."""
    order = np.argsort(-np.abs(weights), kind="stable")[:top_k]
    return [index for index in order.tolist() if weights[index]]


def _seen(word: str) -> str:
    """The word, or a mark for each space of which it is made."""
    return word if word.strip() else "␣" * len(word)


def _draw(ax: Axes, texts: _Texts, end: float, signed: bool, legend: str, top_k: int) -> Axes:
    figure = ax.get_figure(root=True)
    assert figure is not None
    averaged = f"mean over {len(texts.heads)} heads" if len(texts.heads) > 1 else ""
    ax.set_title(as_matplotlib(*filter(None, [texts.note, averaged])), fontsize="medium")
    ax.set_axis_off()
    colors = mappable(LIGHT["card"], end, signed)
    bar = figure.colorbar(colors, ax=ax, orientation="horizontal", shrink=0.5, aspect=30, pad=0.02)
    bar.set_label(as_matplotlib(legend), fontsize=LETTERS)
    bar.ax.tick_params(labelsize=LETTERS)
    with glyphs_may_be_missing():
        figure.draw_without_rendering()  # the axes have their size only after this
    box = ax.get_window_extent()
    width, height = (72 * length / figure.dpi for length in (box.width, box.height))
    ax.set(xlim=(0, width), ylim=(height, 0))  # in points, as fonts are
    tokens = [
        _tokens(ax, words, weights, end, signed, top_k)
        for words, weights in zip(texts.words, texts.means(), strict=True)
    ]
    for size in np.arange(_LARGEST, _SMALLEST - 0.1, -0.5):
        lines = [_lines(sentence, width / size) for sentence in tokens]
        needed = size * sum(2 * len(sentence) + 1.8 * bool(texts.titles) for sentence in lines)
        if needed <= height:
            break
    else:
        inches = figure.get_figheight() + (needed - height) / 72
        raise ValueError(
            f"The axes are too small for {len(lines)} sentences: make the figure {inches + 0.1:.1f} inches high, as "
            f"with `plt.subplots(figsize=({figure.get_figwidth():.3g}, {inches + 0.1:.1f}))`, or draw fewer `samples`."
        )
    _place(ax, texts.titles, lines, colors, size, width)
    return ax


class _Token(NamedTuple):
    """A word to draw. Widths are those at a font size of 1."""

    word: str
    number: str  # empty if it is not shown
    weight: float
    width: float  # of the word
    whole: float  # of the word, its number and its box


def _tokens(ax: Axes, words: list[str], weights: np.ndarray, end: float, signed: bool, top_k: int) -> list[_Token]:
    figure = ax.get_figure(root=True)
    assert figure is not None
    ruler, top = ax.text(0, 0, "", fontsize=10), _top(weights, top_k)

    def width_of(text: str) -> float:
        ruler.set_text(text)
        return 7.2 * ruler.get_window_extent().width / figure.dpi

    tokens = []
    with glyphs_may_be_missing():
        for index, (word, weight) in enumerate(zip(words, weights.tolist(), strict=True)):
            shown = as_matplotlib(short(_seen(word)))
            number = amount(weight, end, signed) if index in top else ""
            width = width_of(shown)
            whole = width + (0.7 * width_of(number) + 0.3 if number else 0) + 0.4
            tokens.append(_Token(shown, number, weight, width, whole))
    ruler.remove()
    return tokens


def _lines(tokens: list[_Token], room: float) -> list[list[tuple[float, _Token]]]:
    """The tokens in lines of so much room, each with the place where it starts."""
    lines: list[list[tuple[float, _Token]]] = [[]]
    place = 0.0
    for token in tokens:
        if lines[-1] and place + token.whole > room:
            lines.append([])
            place = 0.0
        lines[-1].append((place, token))
        place += token.whole + 0.2
    return lines


def _place(
    ax: Axes,
    titles: list[str],
    sentences: list[list[list[tuple[float, _Token]]]],
    colors: ScalarMappable,
    size: float,
    width: float,
) -> None:
    """Draw the sentences below each other. Those that are written from right to left start on the right."""
    top = 0.0
    ground: dict[str, Any] = {"color": plt.rcParams["text.color"]}  # what is drawn outside of the words' boxes
    style: dict[str, Any] = {"color": LIGHT["ink"], "va": "baseline"}
    for number, lines in enumerate(sentences):
        if titles:
            ax.text(0, top + 1.2 * size, as_matplotlib(short(titles[number], 60)), weight="bold", size=size, **ground)
            top += 1.8 * size
        leftward = _is_leftward([token.word for line in lines for _, token in line])
        for line in lines:
            for place, token in line:
                length = size * token.whole
                left = width - size * place - length if leftward else size * place
                color, base = colors.to_rgba(np.array(token.weight)), top + 1.25 * size
                ax.add_patch(Rectangle((left, top + 0.1 * size), length, 1.6 * size, facecolor=color, linewidth=0))
                if token.weight < 0:
                    ax.plot([left, left + length], [top + 1.7 * size] * 2, ":", linewidth=1, **ground)
                sides = (length - 0.2 * size, 0.2 * size) if leftward else (0.2 * size, length - 0.2 * size)
                aligned = ("right", "left") if leftward else ("left", "right")
                ax.text(left + sides[0], base, token.word, size=size, ha=aligned[0], **style)
                ax.text(left + sides[1], base, token.number, size=0.7 * size, ha=aligned[1], **style)
            top += 2 * size


def _is_leftward(words: list[str]) -> bool:
    """Whether the first letter that has a direction is written from right to left."""
    directions = (unicodedata.bidirectional(character) for word in words for character in word)
    return next((direction != "L" for direction in directions if direction in ("L", "R", "AL")), False)
