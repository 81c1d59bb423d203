"""What to draw of scores: one form for everything that `explain` returns, small enough to be read."""

import contextlib
import textwrap
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from kerasfactory._arguments import positive_integer
from kerasfactory._text import visible

_BINS = 64  # along an axis without names: with more, a key that a head picks out would be thinner than a line
_LONGEST_NAME = 24
WIDTH = 4.9  # inches: on a phone of 390 pixels, letters of `LETTERS` points are then 9 pixels high
LETTERS = 9.0
# Units of dates and of durations, the coarsest first, in which all of them are whole.
_DATES = ["D", "m", "s", "ms", "us", "ns"]
_DURATIONS = {"D": "d", "h": "h", "m": "min", "s": "s", "ms": "ms", "us": "µs", "ns": "ns"}


class Side(NamedTuple):
    """The queries or the keys of a map, as drawn: with names, or as ranges of positions."""

    names: list[str] | None
    edges: np.ndarray  # where each cell starts, and where the last one ends
    times: list[str] | None = None  # the date or the duration of each position

    def cells(self) -> list[str]:
        """The name or the positions of each cell."""
        if self.names is not None:
            return self.names
        ends = zip(self.edges[:-1].tolist(), (self.edges[1:] - 1).tolist(), strict=True)
        return [
            self.position(first) if first == last else f"{self.position(first)} to {self.position(last)}"
            for first, last in ends
        ]

    def position(self, number: int) -> str:
        """What stands at a position of an axis without names."""
        return str(number) if self.times is None else self.times[number]

    def named(self, most: int) -> "Side":
        """With a name at each position, if these are dates, and not too many: of more, their order says more."""
        every = self.times is not None and len(self.edges) - 1 == len(self.times) <= most
        return Side(self.times, self.edges) if every else self

    def binned(self) -> bool:
        """Whether a cell stands for more than one position."""
        return self.names is None and bool((np.diff(self.edges) > 1).any())


class Maps(NamedTuple):
    """Maps of one layer, ready to be drawn."""

    values: np.ndarray  # (sample, head, query, key)
    dims: tuple[Hashable, ...]  # of the scores, before any mean
    samples: list[str]
    heads: list[str]
    queries: Side
    keys: Side
    layer: str  # empty if it has no name
    title: str  # the sample or the head, and what was averaged
    note: str  # what was left out
    uniform: tuple[float, float] | None  # the least and the largest share that uniform attention would draw

    def heading(self) -> str:
        """The layer, and what of it is drawn."""
        return ", ".join(filter(None, [self.layer, self.title]))


def maps(scores: Any, mean_over: Sequence[str], top_k: int, samples: int | None = None) -> Maps:
    """The scores of one layer, averaged over the dimensions `mean_over`, with at most `top_k` names on an axis.

    A mean counts only the queries that may look at any key, as in `explain.summarize`.
    """
    top_k = positive_integer("top_k", top_k)
    array, queries, keys = _array(scores)
    dims = array.dims
    if samples is not None and "sample" in dims:
        array = array.isel(sample=slice(samples))
    layer = short(array.name, 2 * _LONGEST_NAME) if array.name is not None else ""
    title = [
        f"{dim} {short(labels_of(array[dim])[0])}"
        for dim in ("sample", "head")
        if dim in array.coords and dim not in dims
    ]
    averaged = [dim for dim in mean_over if array.sizes.get(dim, 1) > 1]
    uniform = _uniform(array, np.diff(keys.edges))
    if averaged:
        title.append("mean over " + " and ".join(f"{array.sizes[dim]} {dim}s" for dim in averaged))
        counted = (array != 0).any("key").sum(averaged).clip(1)
        array, uniform = (of.sum(averaged, skipna=False) / counted for of in (array, uniform))
    array, uniform = (
        of.expand_dims([dim for dim in ("sample", "head") if dim not in of.dims])
        .transpose("sample", "head", "query", "key")
        .astype("float64")
        for of in (array, uniform)
    )
    _check_values(array.to_numpy())
    both, queries, keys, note = _shortened(np.stack([array, uniform]), queries, keys, top_k)
    sample_labels, head_labels = (labels_of(array[dim]) for dim in ("sample", "head"))
    values, shares = both
    seen = shares[shares > 0]
    ends = (float(seen.min()), float(seen.max())) if seen.size else None
    return Maps(values, dims, sample_labels, head_labels, queries, keys, layer, ", ".join(title), note, ends)


def all_maps(scores: Any, mean_over: Sequence[str], top_k: int, samples: int | None = None) -> list[Maps]:
    """The maps of each layer of a dictionary, or of the one layer that is given."""
    if not isinstance(scores, Mapping) or isinstance(scores, xr.Dataset):
        return [maps(scores, mean_over, top_k, samples)]
    if not scores:
        raise ValueError("`scores` must not be empty. Received: {}. Choose layers that `explain.capture` can read.")
    drawn = []
    for name, layer in scores.items():
        try:
            drawn.append(maps({name: layer}, mean_over, top_k, samples)._replace(layer=short(name, 2 * _LONGEST_NAME)))
        except ValueError as error:
            raise ValueError(f"Layer {name!r}: {error}") from error
    return drawn


def _uniform(array: xr.DataArray, sizes: np.ndarray) -> xr.DataArray:
    """What each weight would be if a query looked at all keys in its view alike. All 0 if that is not known.

    It is not if rows do not sum to 1. A weight of 0 is a key out of view, unless there are no masks: then a sharp head
    has rounded it. If masks are not known, it may be either. Of bins, `sizes` says how many keys they hold.
    """
    totals = array.sum("key").to_numpy()
    is_unclear = array.attrs.get("masks") == "not known" and (array == 0).any()
    if is_unclear or (np.abs(totals[totals != 0] - 1) > 0.01).any():
        return xr.zeros_like(array)
    seen = xr.ones_like(array) if array.attrs.get("masks") == "none" else array != 0
    in_view = seen * xr.DataArray(sizes, dims="key")
    return in_view / in_view.sum("key").clip(1)


def labels_of(coordinate: xr.DataArray) -> list[str]:
    """What a coordinate says, for people: dates as dates, durations with a unit, and all else as it is."""
    index: Any = (coordinate if coordinate.dims else coordinate.expand_dims("one")).to_index()
    values = np.asarray(index if getattr(index, "tz", None) is None else index.tz_localize(None))
    if values.dtype.kind == "M":
        texts = values.astype(f"M8[{_coarsest(values, _DATES)}]").astype(str).tolist()
        return ["NaT" if text == "NaT" else text.replace("T", " ") for text in texts]
    if values.dtype.kind == "m":
        unit = _coarsest(values, _DURATIONS)
        numbers = values.astype(f"m8[{unit}]")
        return ["NaT" if np.isnat(number) else f"{number.astype(int)} {_DURATIONS[unit]}" for number in numbers]
    return [visible(value) for value in index]


def _coarsest(values: np.ndarray, units: Iterable[str]) -> str:
    known, kind = values[~np.isnat(values)], values.dtype.kind
    return next((unit for unit in units if (known.astype(f"{kind}8[{unit}]") == known).all()), "ns")


def short(name: Any, longest: int = _LONGEST_NAME) -> str:
    """A name that leaves room for the picture: of a long one, what it starts and ends with."""
    text, half = visible(name), longest // 2
    return text if len(text) <= longest else f"{text[:half].strip()}…{text[1 - half :].strip()}"


def wrapped(text: Any, letters: int, lines: int = 2) -> list[str]:
    """A text in at most so many lines of so many letters."""
    longest, found = lines * letters, textwrap.wrap(short(text, lines * letters), letters)
    while len(found) > lines:  # words leave room at the ends of lines
        longest -= 1
        found = textwrap.wrap(short(text, longest), letters)
    return found


def quantity(drawn: Maps) -> str:
    """What a color stands for: attention, or what `explain.rollout` made of it, which is named so."""
    name = "rollout" if drawn.layer == "rollout" else "attention"
    return f"{name}, sum of a bin" if drawn.keys.binned() else name


def scale(values: np.ndarray, vmax: float | None) -> tuple[float, str]:
    """Where the color scale ends, which starts at 0, and a description of the scale."""
    if vmax is None:
        largest = float(f"{values.max():.6g}")  # so that the scale of a sum just below 1 has a tick at 1
        return largest or 1.0, f"from 0 to {largest:.2g}, the largest" if largest else "all 0"
    if not vmax > 0:
        raise ValueError(f"`vmax` must be a number above 0: it is where the color scale ends. Received: vmax={vmax!r}")
    return float(vmax), f"from 0 to {vmax:.2g}"


def one_layer(given: Any, argument: str) -> Any:
    """What a dictionary holds that has a single entry, with its name; anything else as it is."""
    if not isinstance(given, Mapping) or isinstance(given, xr.Dataset):
        return given
    if len(given) != 1:
        raise ValueError(
            f"`{argument}` must be those of one layer: choose one, as with `{argument}[name]`. Received the layers: "
            f"{list(given)}"
        )
    ((name, only),) = given.items()
    return only.rename(name) if isinstance(only, xr.DataArray) else only


def sample_titles(array: xr.DataArray) -> list[str]:
    """A title for each sample: a number says that it is one, and any other label stands as it is."""
    if "sample" not in array.coords:
        return []
    sample = array["sample"] if array["sample"].dims else array["sample"].expand_dims("sample")
    before = "sample " * (sample.dtype.kind in "iu")
    return [before + short(label, 2 * _LONGEST_NAME) for label in labels_of(sample)]


@contextlib.contextmanager
def glyphs_may_be_missing() -> Iterator[None]:
    """Measure text without the warning of a missing glyph, which comes when the figure is shown."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _array(scores: Any) -> tuple[xr.DataArray, Side, Side]:
    scores = one_layer(scores, "scores")
    if isinstance(scores, xr.Dataset) and "map" in scores:
        array = scores["map"].rename({"query_bin": "query", "key_bin": "key"}).rename(scores.attrs.get("layer"))
        sides = [
            _side(scores, dim, np.append(scores[f"{dim}_bin"], scores[f"{dim}_bin_end"][-1:]))
            for dim in ("query", "key")
        ]
        array = array.drop_vars(["query", "key"])
    elif isinstance(scores, xr.DataArray):
        array = scores
        sides = [_side(array, dim, np.arange(size + 1)) for dim, size in array.sizes.items()][-2:]
    else:
        raise ValueError(
            "`scores` must be a DataArray as from `explain.capture` or `explain.rollout`, or a Dataset as from "
            f"`explain.summarize`. Received: {type(scores).__name__}"
        )
    if "sequence" in array.dims:
        array = array.rename(sequence="sample")
    if array.dims[-2:] != ("query", "key") or not set(array.dims[:-2]) <= {"sample", "head"}:
        raise ValueError(
            "`scores` must have the dimensions (query, key), before these at most `sample` and `head`. Choose one "
            f"entry of any other, as with `scores.isel(axis_1=0)`. Received the dimensions: {array.dims}"
        )
    if 0 in array.shape:
        raise ValueError(f"`scores` must not be empty. Received the sizes: {dict(array.sizes)}")
    queries, keys = sides
    return array, queries, keys


def _side(labeled: xr.DataArray | xr.Dataset, dim: Hashable, edges: np.ndarray) -> Side:
    words = labeled.coords.get(f"{dim}_token")
    if words is not None and words.dims == (dim,) and words.size == len(edges) - 1:  # those of the one sample
        return Side([visible(word) for word in words.to_numpy()], edges)
    if dim not in labeled.coords:
        return Side(None, edges)
    labels = labels_of(labeled[dim])
    if labeled[dim].to_index().dtype.kind in "mM":
        return Side(None, edges, labels)
    return Side(labels if len(labels) == len(edges) - 1 else None, edges)


def _shortened(values: np.ndarray, queries: Side, keys: Side, top_k: int) -> tuple[np.ndarray, Side, Side, str]:
    """At most `top_k` names or 64 bins of positions on an axis, and a note that says what was left out.

    The first of the `values` (kind, sample, head, query, key) are the weights, which choose the names.
    """
    notes = []
    queries, keys = (side.named(top_k) for side in (queries, keys))
    if keys.names is not None and len(keys.names) > top_k:
        received = values[0].sum(axis=(0, 1, 2))
        chosen = np.argsort(-received, kind="stable")[:top_k]
        share = received[chosen].sum() / received.sum() if received.any() else 0
        notes.append(f"the {top_k} of {len(keys.names)} features with most attention ({share:.0%} of it), most first")
        shown = Side([keys.names[index] for index in chosen], np.arange(top_k + 1))
        if queries.names == keys.names:
            values, queries = values[..., chosen, :], shown
        values, keys = values[..., chosen], shown
    if queries.names is not None and len(queries.names) > top_k:
        queries = Side(None, queries.edges)  # nothing says which to choose
    # As in `explain.summarize`: the sum over the keys of a bin, the mean over its queries that may look at any key.
    if keys.names is None and values.shape[-1] > _BINS:
        starts, keys = _in_bins(keys)
        values = np.add.reduceat(values, starts, axis=-1)
    if queries.names is None and values.shape[-2] > _BINS:
        starts, queries = _in_bins(queries)
        counted = np.add.reduceat(values.any(axis=-1, keepdims=True).astype(int), starts, axis=-2)
        values = np.add.reduceat(values, starts, axis=-2) / counted.clip(1)
    if keys.binned() or queries.binned():
        notes.append("positions in bins")
    return values, queries, keys, ", ".join(notes)


def _in_bins(side: Side) -> tuple[np.ndarray, Side]:
    """The first cell of each bin, and the side in bins."""
    cells = np.arange(_BINS + 1) * (len(side.edges) - 1) // _BINS
    return cells[:-1], side._replace(edges=side.edges[cells])


def _check_values(values: np.ndarray) -> None:
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise ValueError(
            f"`scores` must be finite. {wrong.sum()} of {wrong.size} entries are NaN or infinite, as scores are where "
            "`x` is: leave these samples out, as with `scores.dropna('sample')`."
        )
    if values.min() < -1e-6:
        raise ValueError(
            "`scores` must not be negative: the colors start at 0. Draw two maps beside each other, not their "
            f"difference. Received: {values.min():.3g}"
        )
