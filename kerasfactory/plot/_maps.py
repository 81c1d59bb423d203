"""What to draw of scores: one form for all that `explain` returns, short enough to be read."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from kerasfactory._arguments import positive_integer

BINS = 64  # along an axis without names: more, and a key that a head picks out is thinner than a line
_LONGEST_NAME = 24


class Side(NamedTuple):
    """The queries or the keys of a map, as drawn: by name, or from position to position."""

    names: list[str] | None
    edges: np.ndarray

    def cells(self) -> list[str]:
        """What each cell stands for."""
        if self.names is not None:
            return self.names
        ends = zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), strict=True)
        return [str(start) if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in ends]

    def binned(self) -> bool:
        """Whether a cell stands for more than one position."""
        return self.names is None and bool((np.diff(self.edges) > 1).any())


class Maps(NamedTuple):
    """Maps of one layer, ready to be drawn."""

    values: np.ndarray  # (sample, head, query, key)
    samples: list[str]
    heads: list[str]
    queries: Side
    keys: Side
    title: str  # the layer, and what was averaged
    note: str  # what was left out


def maps(scores: Any, mean: Sequence[str], top: int, samples: int | None = None) -> Maps:
    """The scores of one layer, averaged over the dimensions in `mean`, with at most `top` names to an axis.

    An average is over the queries that may look at any key, as in `explain.summarize`.
    """
    top = positive_integer("top", top)
    array, queries, keys = _array(scores)
    if samples is not None and "sample" in array.dims:
        array = array.isel(sample=slice(samples))
    title = [str(array.name)] if array.name is not None else []
    selected = [dim for dim in ("sample", "head") if dim in array.coords and not array[dim].ndim]
    title += [f"{dim} {array[dim].item()}" for dim in selected]
    averaged = [dim for dim in mean if array.sizes.get(dim, 1) > 1]
    if averaged:
        title.append("mean over " + " and ".join(f"{array.sizes[dim]} {dim}s" for dim in averaged))
        looks = (array != 0).any("key").sum(averaged)
        array = array.sum(averaged, skipna=False) / looks.clip(1)
    array = array.expand_dims([dim for dim in ("sample", "head") if dim not in array.dims])
    array = array.transpose("sample", "head", "query", "key")
    values = array.to_numpy().astype("float64")
    _check_values(values)

    note = ""
    if keys.names is not None and len(keys.names) > top:
        received = values.sum(axis=(0, 1, 2))
        chosen = np.argsort(-received, kind="stable")[:top]
        share = received[chosen].sum() / received.sum() if received.any() else 0
        note = f"{top} of {len(keys.names)} features, to which {share:.0%} of the attention goes, most first"
        if queries.names == keys.names:
            values, queries = values[:, :, chosen], _chosen(queries, chosen)
        values, keys = values[..., chosen], _chosen(keys, chosen)
    if queries.names is not None and len(queries.names) > top:
        queries = Side(None, queries.edges)  # no order to choose by
    if keys.names is None and values.shape[-1] > BINS:
        edges = _edges(values.shape[-1])
        values, keys = np.add.reduceat(values, edges[:-1], axis=-1), Side(None, keys.edges[edges])
    if queries.names is None and values.shape[-2] > BINS:
        edges = _edges(values.shape[-2])
        looking = np.add.reduceat(values.any(axis=-1, keepdims=True).astype(int), edges[:-1], axis=-2)
        values = np.add.reduceat(values, edges[:-1], axis=-2) / looking.clip(1)
        queries = Side(None, queries.edges[edges])
    if keys.binned() or queries.binned():
        note = ", ".join([note] * bool(note) + ["positions in bins"])
    return Maps(values, _labels(array, "sample"), _labels(array, "head"), queries, keys, ", ".join(title), note)


def short(name: str) -> str:
    """A name that leaves room for the picture."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half].strip()}…{name[1 - half :].strip()}"


def scale(values: np.ndarray, vmax: float | None) -> tuple[float, str]:
    """The end of the color scale, which starts at 0, and the words for it."""
    if vmax is None:
        largest = float(f"{values.max():.6g}")  # else a sum that is a rounding below 1 has no tick at 1
        return largest or 1.0, f"from 0 to {largest:.2g}, the largest" if largest else "all 0"
    if not vmax > 0:
        raise ValueError(f"`vmax` must be a number above 0, where the color scale ends. Received: vmax={vmax!r}")
    return float(vmax), f"from 0 to {vmax:.2g}"


def _array(scores: Any) -> tuple[xr.DataArray, Side, Side]:
    if isinstance(scores, Mapping) and not isinstance(scores, xr.Dataset):
        if len(scores) != 1:
            raise ValueError(
                "`scores` must be those of one layer: choose one, as with `scores[name]`. Received the layers: "
                f"{list(scores)}"
            )
        ((name, scores),) = scores.items()
        if isinstance(scores, xr.DataArray):
            scores = scores.rename(name)
    if isinstance(scores, xr.Dataset) and "map" in scores:
        array = scores["map"].rename({"query_bin": "query", "key_bin": "key"}).rename(scores.attrs.get("layer"))
        sides = [
            Side(_names(scores, dim, array.sizes[dim]), _bin_edges(scores, f"{dim}_bin")) for dim in ("query", "key")
        ]
        array = array.drop_vars(["query", "key"])
    elif isinstance(scores, xr.DataArray):
        array = scores
        sides = [Side(_names(array, dim, size), np.arange(size + 1)) for dim, size in array.sizes.items()][-2:]
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


def _names(of: xr.DataArray | xr.Dataset, dim: Hashable, size: int) -> list[str] | None:
    return [str(name) for name in of[dim].values] if dim in of.coords and of.sizes[dim] == size else None


def _bin_edges(summary: xr.Dataset, dim: str) -> np.ndarray:
    return np.append(summary[dim].values, summary[f"{dim}_end"].values[-1:])


def _edges(size: int) -> np.ndarray:
    return np.arange(BINS + 1) * size // BINS


def _chosen(side: Side, chosen: np.ndarray) -> Side:
    assert side.names is not None
    return Side([side.names[index] for index in chosen], np.arange(len(chosen) + 1))


def _labels(array: xr.DataArray, dim: str) -> list[str]:
    return [str(label) for label in array[dim].values]


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
