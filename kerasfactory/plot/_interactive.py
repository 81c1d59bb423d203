"""A heat map to try in a browser, in one piece of HTML."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from kerasfactory._arguments import positive_integer
from kerasfactory._text import as_html, visible
from kerasfactory.plot._html import Html, as_script_data, one_line
from kerasfactory.plot._maps import Maps, Side, all_maps, quantity, scale, short

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
.kerasfactory-map label[hidden]{display:none}
.kerasfactory-map .overview{overflow:auto;max-width:100%;max-height:42em;width:fit-content;margin:.5em 0;padding:3px}
.kerasfactory-map .overview div{display:flex;gap:4px;align-items:center;width:max-content;margin-bottom:4px}
.kerasfactory-map .overview span{width:7em;flex:none;font-size:11px;line-height:1.2;text-align:end;
overflow-wrap:anywhere}
.kerasfactory-map canvas{width:42px;height:42px;border:1px solid color-mix(in srgb,currentColor 40%,transparent);
image-rendering:pixelated;cursor:pointer}
.kerasfactory-map canvas.chosen{outline:2px solid currentColor}
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
  const overview = root.querySelector(".overview"), title = root.querySelector(".title");
  const sliders = [...root.querySelectorAll("input")];
  const slider = (name) => sliders.find((one) => one.name === name);
  const value = (name) => +(slider(name)?.value ?? 0);
  const draw = (parent, name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  };
  const top = 6;
  let layer, rows, columns, size, left, cells, marked, row = 0, column = 0, weights = [];
  const build = () => {
    [rows, columns, size, left] = [layer.queries.length, layer.keys.length, layer.cell, layer.left];
    [row, column] = [Math.min(row, rows - 1), Math.min(column, columns - 1)];
    const width = left + columns * size + 8, height = top + rows * size + layer.bottom;
    box.replaceChildren();
    const svg = draw(box, "svg", {width, height, "aria-hidden": "true"});
    cells = [];
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const place = {x: left + column * size, y: top + row * size, width: size, height: size};
      cells.push(draw(svg, "rect", {...place, class: "ink"}));
    }
    const frame = {x: left, y: top, width: columns * size, height: rows * size};
    draw(svg, "rect", {...frame, class: "line", "stroke-opacity": .4});
    marked = draw(svg, "rect", {width: size, height: size, class: "line", "stroke-width": 2, visibility: "hidden"});
    for (const [index, name] of layer.queryTicks)
      draw(svg, "text", {x: left - 6, y: top + (index + .5) * size + 4, "text-anchor": "end"}, name);
    for (const [index, name] of layer.keyTicks) {
      const x = left + (index + .5) * size + 4, y = top + rows * size + 8;
      draw(svg, "text", {x, y, "text-anchor": "end", transform: `rotate(-90 ${x} ${y})`}, name);
    }
    draw(svg, "text", {x: left + columns * size / 2, y: height - 4, "text-anchor": "middle"}, "key (looked at)");
    const middle = top + rows * size / 2;
    const turned = {"text-anchor": "middle", transform: `rotate(-90 11 ${middle})`};
    draw(svg, "text", {x: 11, y: middle, ...turned}, "query (looking)");
    if (title) title.textContent = layer.title;
    const heads = slider("head");
    if (heads) {
      heads.max = layer.heads.length - 1;
      heads.parentElement.hidden = layer.heads.length < 2;
    }
  };
  const announce = () => {
    marked.setAttribute("x", left + column * size);
    marked.setAttribute("y", top + row * size);
    marked.setAttribute("visibility", "visible");
    const weight = (weights[row * columns + column] / 1000).toFixed(3);
    status.textContent = `query ${layer.queries[row]}, key ${layer.keys[column]}: ${weight}`;
  };
  const opacity = (weight) => Math.min(1, weight / 1000 / data.end);
  const small = overview ? data.layers.flatMap((layer, number) => {
    const line = overview.appendChild(document.createElement("div"));
    line.appendChild(document.createElement("span")).textContent = layer.name;
    return layer.heads.map((name, head) => {
      const canvas = line.appendChild(document.createElement("canvas"));
      [canvas.width, canvas.height] = [layer.keys.length, layer.queries.length];
      canvas.title = `${layer.name}, head ${name}`;
      canvas.addEventListener("click", () => {
        slider("layer").value = number;
        show();
        if (slider("head")) slider("head").value = head;
        show();
      });
      return {canvas, layer, head};
    });
  }) : [];
  let painted;
  const paint = (sample) => {
    for (const {canvas, layer, head} of small) {
      canvas.classList.toggle("chosen", layer === data.layers[value("layer")] && head === value("head"));
      if (sample === painted) continue;
      const context = canvas.getContext("2d"), picture = context.createImageData(canvas.width, canvas.height);
      layer.weights[sample][head].forEach((weight, index) =>
        picture.data.set([61, 133, 216, Math.round(255 * opacity(weight))], 4 * index));
      context.putImageData(picture, 0, 0);
    }
    painted = sample;
  };
  const show = () => {
    const shown = data.layers[value("layer")], said = marked?.getAttribute("visibility") === "visible";
    if (shown !== layer) {
      layer = shown;
      build();
    }
    const labels = {layer: layer.name, sample: data.samples[value("sample")], head: layer.heads[value("head")]};
    for (const one of sliders) {
      one.setAttribute("aria-valuetext", labels[one.name]);
      one.nextElementSibling.textContent = labels[one.name];
    }
    weights = layer.weights[value("sample")][value("head")];
    cells.forEach((cell, index) => cell.setAttribute("fill-opacity", opacity(weights[index])));
    paint(value("sample"));
    if (said) announce();
  };
  for (const one of sliders) one.addEventListener("input", show);
  const point = (event) => {
    const index = cells.indexOf(event.target);
    if (index < 0) return;
    [row, column] = [Math.floor(index / columns), index % columns];
    announce();
  };
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
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
    r"""Draw an interactive heat map as HTML, with sliders for head and sample, and the weight under the pointer.

    The piece is complete and loads nothing from the network. A notebook displays it, and it works in your own page and
    beside other maps. It follows the colors of the page, and the keyboard is enough to use it: tab to the map, then
    press the arrow keys. It shows the weights

    $$
    A_{shij} , \qquad 0 \le A_{shij} \le 1 ,
    $$

    of query \(i\) and key \(j\) in sample \(s\) and head \(h\), rounded to three decimals, on one color scale for all
    samples and heads. Many tokens are reduced as in `heatmap`. With several layers, small maps of all their heads stand
    above the large one, on the same scale. A click on a small map chooses it, as the sliders do.

    Args:
        scores: As for `heatmap`, or a dictionary of several layers, as from `explain.capture`. Nothing is averaged.
        samples: The number of samples to include, from the first, at least 1. With 8 heads and 64 tokens, each adds
            about 0.1 MB for each layer.
        top_k: The largest number of names to show, at least 1. Those of the keys that receive most attention in these
            samples are shown.
        vmax: Where the color scale ends, above 0. By default, at the largest weight of all.

    Returns:
        str: HTML, a `<div>` with its style and script. The same scores give the same text.

    Raises:
        ValueError: As `heatmap`; also if layers differ in the number of samples, or if `samples` is out of range.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import plot

        names = ["age", "pulse", "weight"]
        scores = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 4, 3))
        dims = ["sample", "head", "query", "key"]
        scores = xr.DataArray(scores, {"query": names, "key": names}, dims)

        fragment = plot.interactive(scores)
        rest = fragment.replace("http://www.w3.org/2000/svg", "")  # the name of SVG itself
        print(fragment[:28], len(fragment) < 20_000, "http:" in rest)
        #> <div class="kerasfactory-map True False
        ```
    """
    samples, top_k = positive_integer("samples", samples), positive_integer("top_k", top_k)
    layers = all_maps(scores, (), top_k, samples)
    numbers = [len(drawn.samples) for drawn in layers]
    if len(set(numbers)) > 1:
        raise ValueError(
            "All layers must have the same samples: choose them, as with "
            f"`{{name: layer[:{min(numbers)}] for name, layer in scores.items()}}`. Received these numbers: {numbers}"
        )
    end, description = scale(np.concatenate([drawn.values.ravel() for drawn in layers]), vmax)
    data = {"samples": layers[0].samples, "end": round(end, 6), "layers": [_layer(drawn) for drawn in layers]}
    text = as_script_data(data)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    script = _SCRIPT.replace("HASH", name).replace("DATA", text)
    several = len(layers) > 1
    most_heads = max(len(drawn.heads) for drawn in layers)
    sliders = "".join(
        f'<label>{dim}<input type="range" name="{dim}" min="0" max="{number - 1}" value="0"><b></b></label>'
        for dim, number in (("layer", len(layers)), ("sample", numbers[0]), ("head", most_heads))
        if number > 1
    )
    title = as_html(_title(layers[0]))
    pieces = [
        # Notebooks look for formulas in what they show, unless one of these classes forbids it.
        f'<div class="kerasfactory-map mathjax_ignore tex2jax_ignore" data-map="{name}">',
        f"<style>{one_line(_STYLE)}</style>",
        f'<p class="title">{title}</p>' if title else "",
        f"<p>{sliders}</p>" if sliders else "",
        '<div class="overview" role="group" tabindex="0" aria-label="All layers and heads. The sliders choose one.">'
        "</div>"
        if several
        else "",
        '<div role="application" tabindex="0" aria-label="Heat map of attention. Arrow keys move between its cells.">'
        "</div>",
        '<p role="status">Point at a cell, or tab to the map and use the arrow keys.</p>',
        f'<p>{max(map(quantity, layers), key=len)} {description}:<span class="scale"></span>{_uniform(layers)}</p>',
        "<noscript>This map needs JavaScript.</noscript>",
        f"<script>{one_line(script)}</script>",
        "</div>",
    ]
    return Html("".join(pieces))


def _layer(drawn: Maps) -> dict[str, Any]:
    """What the script draws of a layer."""
    queries, keys = drawn.queries.cells(), drawn.keys.cells()
    query_ticks, key_ticks = _ticks(drawn.queries), _ticks(drawn.keys)
    return {
        "name": drawn.layer,
        "title": visible(_title(drawn)),
        "heads": drawn.heads,
        "queries": queries,
        "keys": keys,
        "queryTicks": query_ticks,
        "keyTicks": key_ticks,
        "cell": int(np.clip(280 // max(len(queries), len(keys)), 12, 30)),  # a map of few cells fits on a phone
        "left": 26 + round(6.6 * max(len(name) for _, name in query_ticks)),
        "bottom": 28 + round(6.6 * max(len(name) for _, name in key_ticks)),
        "weights": np.rint(drawn.values * 1000).astype(int).reshape(*drawn.values.shape[:2], -1).tolist(),
    }


def _title(drawn: Maps) -> str:
    return "; ".join(filter(None, [drawn.heading(), drawn.note]))


def _uniform(layers: list[Maps]) -> str:
    """The weight that every key would have in uniform attention, or its range."""
    ends = [end for drawn in layers for end in drawn.uniform or ()]
    texts = dict.fromkeys(f"{end:.2g}" for end in (min(ends), max(ends))) if ends else {}
    return f"uniform: {' to '.join(texts)}" if texts else ""


def _ticks(side: Side) -> list[tuple[int, str]]:
    """The cells that have a label, and the label: all names, or some positions."""
    if side.names is not None:
        return [(index, short(name)) for index, name in enumerate(side.names)]
    starts = side.edges[:-1].tolist()
    return [(index, side.position(starts[index])) for index in range(0, len(starts), max(1, len(starts) // 8))]
