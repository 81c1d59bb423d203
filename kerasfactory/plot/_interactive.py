"""A heat map to try in a browser, in one piece of HTML."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kerasfactory._arguments import positive_integer
from kerasfactory._text import as_html
from kerasfactory.plot._html import Html, as_script_data, one_line
from kerasfactory.plot._maps import Side, maps, quantity, scale, short

_STYLE = """
.kerasfactory-map{color:inherit;font:14px/1.5 system-ui,sans-serif;max-width:100%;margin:1em 0}
.kerasfactory-map p{margin:.3em 0;overflow-wrap:anywhere}
.kerasfactory-map label{display:inline-flex;align-items:center;gap:.5em;margin:0 1.5em .3em 0}
.kerasfactory-map input{width:9em;min-width:4em;accent-color:#1769c4}
.kerasfactory-map b{font-weight:600;min-width:2em}
.kerasfactory-map [role=application]{overflow:auto;max-width:100%;width:fit-content;outline-offset:2px}
.kerasfactory-map [role=application]:focus-visible{outline:2px solid currentColor}
.kerasfactory-map svg{display:block;max-width:none;color:inherit}
.kerasfactory-map text{fill:currentColor;font:11px system-ui,sans-serif}
.kerasfactory-map .ink{fill:color-mix(in srgb,currentColor 45%,#1769c4)}
.kerasfactory-map .line{fill:none;stroke:currentColor}
.kerasfactory-map .scale{display:inline-block;width:8em;height:.8em;margin:0 .5em;border:1px solid currentColor;
background:linear-gradient(to right,transparent,color-mix(in srgb,currentColor 45%,#1769c4))}
"""

# Each fragment brings its script. The script starts all fragments that hold its data and have not been started, so that
# a page may hold the same fragment twice.
_SCRIPT = """
(() => {
const data = DATA;
for (const root of document.querySelectorAll('.kerasfactory-map[data-map="HASH"]:not([data-alive])')) {
  root.dataset.alive = "";
  const [box, status] = root.querySelectorAll("[role=application],[role=status]");
  const sliders = [...root.querySelectorAll("input")];
  const rows = data.queries.length, columns = data.keys.length, size = data.cell, left = data.left, top = 6;
  const width = left + columns * size + 8, height = top + rows * size + data.bottom;
  const draw = (parent, name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  };
  const svg = draw(box, "svg", {width, height, "aria-hidden": "true"});
  const cells = [];
  for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
    const place = {x: left + column * size, y: top + row * size, width: size, height: size};
    cells.push(draw(svg, "rect", {...place, class: "ink"}));
  }
  draw(svg, "rect", {x: left, y: top, width: columns * size, height: rows * size, class: "line", "stroke-opacity": .4});
  const marked = draw(svg, "rect", {width: size, height: size, class: "line", "stroke-width": 2, visibility: "hidden"});
  for (const [index, name] of data.queryTicks)
    draw(svg, "text", {x: left - 6, y: top + (index + .5) * size + 4, "text-anchor": "end"}, name);
  for (const [index, name] of data.keyTicks) {
    const x = left + (index + .5) * size + 4, y = top + rows * size + 8;
    draw(svg, "text", {x, y, "text-anchor": "end", transform: `rotate(-90 ${x} ${y})`}, name);
  }
  draw(svg, "text", {x: left + columns * size / 2, y: height - 4, "text-anchor": "middle"}, "key (looked at)");
  const middle = top + rows * size / 2;
  const turned = {"text-anchor": "middle", transform: `rotate(-90 11 ${middle})`};
  draw(svg, "text", {x: 11, y: middle, ...turned}, "query (looking)");
  let row = 0, column = 0, weights = [];
  const announce = () => {
    marked.setAttribute("x", left + column * size);
    marked.setAttribute("y", top + row * size);
    marked.setAttribute("visibility", "visible");
    const weight = (weights[row * columns + column] / 1000).toFixed(3);
    status.textContent = `query ${data.queries[row]}, key ${data.keys[column]}: ${weight}`;
  };
  const show = () => {
    const chosen = {sample: 0, head: 0};
    for (const slider of sliders) {
      const name = slider.name, label = data[name + "s"][slider.value];
      chosen[name] = +slider.value;
      slider.setAttribute("aria-valuetext", label);
      slider.nextElementSibling.textContent = label;
    }
    weights = data.weights[chosen.sample][chosen.head];
    cells.forEach((cell, index) => cell.setAttribute("fill-opacity", Math.min(1, weights[index] / 1000 / data.end)));
    if (marked.getAttribute("visibility") === "visible") announce();
  };
  for (const slider of sliders) slider.addEventListener("input", show);
  const point = (event) => {
    const index = cells.indexOf(event.target);
    if (index < 0) return;
    [row, column] = [Math.floor(index / columns), index % columns];
    announce();
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  box.addEventListener("focus", () => box.matches(":focus-visible") && announce());
  box.addEventListener("keydown", (event) => {
    const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -columns], End: [0, columns]};
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    row = Math.max(0, Math.min(rows - 1, row + move[0]));
    column = Math.max(0, Math.min(columns - 1, column + move[1]));
    announce();
    const here = left + column * size, below = top + row * size;
    box.scrollLeft = Math.min(Math.max(box.scrollLeft, here + 2 * size - box.clientWidth), Math.max(0, here - size));
    box.scrollTop = Math.min(Math.max(box.scrollTop, below + 2 * size - box.clientHeight), Math.max(0, below - size));
  });
  show();
}
})();
"""


def interactive(
    scores: xr.DataArray | xr.Dataset | Mapping[str, Any],
    *,
    samples: int = 8,
    top_k: int = 40,
    vmax: float | None = None,
) -> Html:
    r"""A heat map to try, as a piece of HTML: sliders for head and sample, and the weight under the pointer.

    The piece is complete and loads nothing from the network. A notebook shows it as it is, and it works in
    your own page, and beside other maps. It follows the colors of the page, and the keyboard is enough to use it: tab
    to the map, then press the arrow keys. It shows the weights

    $$
    A_{shij} , \qquad 0 \le A_{shij} \le 1 ,
    $$

    of query \(i\) and key \(j\) in sample \(s\) and head \(h\), rounded to three decimals, on one color scale for all
    samples and heads. Many tokens are reduced as in `heatmap`.

    Args:
        scores: As for `heatmap`. Nothing is averaged.
        samples: The number of samples to include, from the first, at least 1. With 8 heads and 64 tokens, each adds
            about 0.1 MB.
        top_k: The largest number of names to show, at least 1. Those of the keys that receive most attention in these
            samples are shown.
        vmax: Where the color scale ends, above 0. By default, at the largest weight of all.

    Returns:
        str: HTML, a `<div>` with its style and script. The same scores give the same text.

    Raises:
        ValueError: As `heatmap`; also if `samples` is out of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        names = ["age", "pulse", "weight"]
        scores = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 4, 3))
        scores = xr.DataArray(scores, {"query": names, "key": names}, ["sample", "head", "query", "key"])

        fragment = plot.interactive(scores)
        print(fragment[:28], len(fragment) < 10_000, "http:" in fragment.replace("http://www.w3.org/2000/svg", ""))
        #> <div class="kerasfactory-map True False
        ```
    """
    samples = positive_integer("samples", samples)
    drawn = maps(scores, (), top_k, samples)
    end, description = scale(drawn.values, vmax)
    queries, keys = drawn.queries.cells(), drawn.keys.cells()
    cell = int(np.clip(280 // max(len(queries), len(keys)), 12, 30))  # a map of few cells fits on a phone
    query_ticks, key_ticks = _ticks(drawn.queries), _ticks(drawn.keys)
    data = {
        "samples": drawn.samples,
        "heads": drawn.heads,
        "queries": queries,
        "keys": keys,
        "queryTicks": query_ticks,
        "keyTicks": key_ticks,
        "cell": cell,
        "left": 26 + round(6.6 * max(len(name) for _, name in query_ticks)),
        "bottom": 28 + round(6.6 * max(len(name) for _, name in key_ticks)),
        "end": round(end, 6),
        "weights": np.rint(drawn.values * 1000).astype(int).reshape(*drawn.values.shape[:2], -1).tolist(),
    }
    text = as_script_data(data)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    script = _SCRIPT.replace("HASH", name).replace("DATA", text)
    sliders = "".join(
        f'<label>{dim}<input type="range" name="{dim}" min="0" max="{len(labels) - 1}" value="0"><b></b></label>'
        for dim, labels in (("sample", drawn.samples), ("head", drawn.heads))
        if len(labels) > 1
    )
    title = as_html("; ".join(filter(None, [drawn.title, drawn.note])))
    pieces = [
        # Notebooks look for formulas in what they show, unless one of these classes forbids it.
        f'<div class="kerasfactory-map mathjax_ignore tex2jax_ignore" data-map="{name}">',
        f"<style>{one_line(_STYLE)}</style>",
        f"<p>{title}</p>" if title else "",
        f"<p>{sliders}</p>" if sliders else "",
        '<div role="application" tabindex="0" aria-label="Heat map of attention. Arrow keys move between its cells.">'
        "</div>",
        '<p role="status">Point at a cell, or tab to the map and use the arrow keys.</p>',
        f'<p>{quantity(drawn)} {description}:<span class="scale"></span></p>',
        "<noscript>This map needs JavaScript.</noscript>",
        f"<script>{one_line(script)}</script>",
        "</div>",
    ]
    return Html("".join(pieces))


def _ticks(side: Side) -> list[tuple[int, str]]:
    """The cells that have a label, and the label: all names, or some positions."""
    if side.names is not None:
        return [(index, short(name)) for index, name in enumerate(side.names)]
    starts = side.edges[:-1].tolist()
    return [(index, side.position(starts[index])) for index in range(0, len(starts), max(1, len(starts) // 8))]
