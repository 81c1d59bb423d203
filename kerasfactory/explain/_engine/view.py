"""Which keys are in view of a model's attention, sample by sample, and what is drawn at random within the view."""

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory.explain._engine.attention import Call, attention_axes
from kerasfactory.explain._engine.observe import Found, observe


def reached(scores: np.ndarray, masks: str) -> np.ndarray:
    """Which keys queries attend to in any head, (sample, query, key), of scores (sample, head, query, key).

    Where no mask is in force, a weight of 0 is rounding, and all keys count. NaN counts as well.
    """
    if masks == "none":
        return np.ones((len(scores), *scores.shape[2:]), bool)
    return np.any(scores, axis=1)


def masks_of(found: Mapping[str, Found]) -> str:
    """The masks in force in any of the calls, by the names of Keras' arguments; "none" if there are none."""
    masks = {mask: None for call in found.values() for mask in call.masks.split(", ") if mask != "none"}
    return ", ".join(masks) or "none"


def keys_in_view(model: keras.Model, x: np.ndarray, batch_size: int | None) -> np.ndarray:
    """The positions of axis 1 that any query attends to in any layer, (sample, position).

    All are in view if the model has no attention over as many keys, or if it cannot be read, or has no mask.
    """
    everything = np.ones(x.shape[:2], bool)
    views = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about what cannot be read
        seen = observe(model, x, None, batch_size, 0, _reached_keys, only_scores=True)
        try:
            for batch in seen:
                found = {
                    name: call
                    for name, call in batch.found.items()
                    if tuple(batch.measured[name].shape) == (batch.size, x.shape[1])
                }
                if not found or any(call.masks == "none" for call in found.values()):
                    return everything
                views.append(np.any([_backend.as_numpy(batch.measured[name]) for name in found], axis=0))
        except ValueError:  # no attention can be read; what is wrong with `x` shows when the model predicts
            return everything
    return np.concatenate(views)


def _reached_keys(call: Call) -> Any:
    """(sample, key), or something else if keys are not the positions of one axis."""
    if len(call.scores.shape) != 4 or len(attention_axes(call.layer)) != 1:
        return ops.zeros((0,))
    return ops.any(ops.not_equal(call.scores, 0), axis=(1, 2))


def carried_view(attribution: Any) -> np.ndarray | None:
    """What the coordinate `in_view` of an attribution says, (sample, feature), if there is one."""
    coordinate = getattr(attribution, "coords", {}).get("in_view")
    if coordinate is None or set(coordinate.dims) != {"sample", "feature"}:
        return None
    return coordinate.transpose("sample", "feature").values.astype(bool)


def view_of(attribution: Any, model: keras.Model, x: np.ndarray, special_tokens: Any, batch_size: Any) -> np.ndarray:
    """Which positions of `x` are in view, (sample, feature): as the attribution says, else as the model's masks do."""
    in_view = carried_view(attribution)
    in_view = keys_in_view(model, x, batch_size) if in_view is None else in_view
    return in_view & ~special_keys(special_tokens, x, x.shape[1], _names(attribution))


def background_view(
    attribution: Any, model: keras.Model, background: np.ndarray, special_tokens: Any, batch_size: Any
) -> np.ndarray:
    """`view_of` for samples that the attribution is not about."""
    attributes = getattr(attribution, "attrs", {})
    if special_tokens is None:
        special_tokens = attributes.get("special_tokens")
    special = special_keys(special_tokens, background, background.shape[1], _names(attribution))
    if attributes.get("masks") == "none":
        return np.broadcast_to(~special, background.shape[:2])
    return keys_in_view(model, background, batch_size) & ~special


def _names(attribution: Any) -> list[str] | None:
    coordinates = getattr(attribution, "coords", {})
    return [str(name) for name in coordinates["feature"].values] if "feature" in coordinates else None


def relabeling(permutation: np.ndarray, in_view: np.ndarray) -> np.ndarray:
    """Where each key gets its value from, (sample, key), if `permutation` relabels all: within the view of each sample.

    A key in view gets the value of the first key in view that the permutation leads to, again and again. For a uniform
    permutation of all keys this is a uniform one of those in view, and samples with the same view have the same.
    """
    if in_view.all():
        return np.broadcast_to(permutation, in_view.shape)
    order, first, last = _cycles(permutation)
    steps = np.arange(len(order))
    along = in_view[:, order]
    # The next key in view at or after each step, along all cycles: `len(order)` if there is none.
    coming = np.minimum.accumulate(np.where(along, steps, len(order))[:, ::-1], axis=1)[:, ::-1]
    coming = np.pad(coming, ((0, 0), (0, 1)), constant_values=len(order))
    following = coming[:, steps + 1]
    following = np.where(following > last, coming[:, first], following)  # around the cycle
    result = np.empty(in_view.shape, int)
    result[:, order] = order[np.where(along, following, steps)]
    return result


def relabeled_rankings(ranks: np.ndarray, in_view: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Without end, rankings that know nothing and are else like `ranks`, (sample, key), from 0, in view first.

    All keys are relabeled by one permutation, as if everything were in view, and those in view are ranked again. For
    this each ranking is completed by keys out of view. In this way a ranking that is the same in all samples gives one
    that is the same in all samples, which relabeling within the view of each sample does not.
    """
    if in_view.all():
        while True:
            yield ranks[:, rng.permutation(ranks.shape[1])]
    complete = _completed(ranks, in_view, rng)
    somewhere = np.any(in_view, axis=0, keepdims=True)
    while True:
        labels = relabeling(rng.permutation(ranks.shape[1]), np.asarray(somewhere))[0]
        yield np.argsort(np.argsort(np.where(in_view, complete[:, labels], np.inf), axis=1), axis=1)


def _completed(ranks: np.ndarray, in_view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Numbers that order all keys of each sample, (sample, key): those in view as `ranks` does.

    The others stand where they stand in another sample with more keys in view, drawn at random; if there is none, at
    random.
    """
    sizes = in_view.sum(axis=1)
    by_size = np.argsort(-sizes, kind="stable")
    complete = rng.random(ranks.shape)
    for size in np.unique(sizes)[::-1]:
        samples, larger = np.flatnonzero(sizes == size), by_size[: np.count_nonzero(sizes > size)]
        if len(larger):
            complete[samples] = complete[rng.choice(larger, len(samples))]
        seen = in_view[samples]
        ascending = np.sort(np.where(seen, complete[samples], np.inf), axis=1)
        own = np.take_along_axis(ascending, np.where(seen, ranks[samples], 0), axis=1)
        complete[samples] = np.where(seen, own, complete[samples])
    return complete


def _cycles(permutation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All keys, cycle by cycle, and for each step the first and the last step of its cycle."""
    order: list[int] = []
    first, last, visited = [], [], set()
    for start in range(len(permutation)):
        begin, key = len(order), start
        while key not in visited:
            visited.add(key)
            order.append(key)
            key = int(permutation[key])
        first += [begin] * (len(order) - begin)
        last += [len(order) - 1] * (len(order) - begin)
    return np.array(order), np.array(first), np.array(last)


def special_keys(special_tokens: Any, x: Any, keys: int, names: Sequence[str] | None) -> np.ndarray:
    """Where keys stand for no feature: (sample, key), or (1, key) if it is the same in all samples.

    `special_tokens` are ids, to be found in `x`, or names of features.
    """
    if special_tokens is None:
        return np.zeros((1, keys), bool)
    tokens = _checked_tokens(special_tokens)
    ids = [token for token in tokens if not isinstance(token, str)]
    known = [] if names is None else [str(name) for name in names]
    for token in tokens:
        if isinstance(token, str) and token not in known:
            near = difflib.get_close_matches(token, known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            there_are = (
                f"There are: {', '.join(known)}."
                if known
                else "They have no names: give `feature_names` to `attribute`."
            )
            raise ValueError(f"`special_tokens` names no feature: {token!r}. {hint}{there_are}")
    named = np.isin(known, tokens)[np.newaxis] if known else np.zeros((1, keys), bool)
    return named | np.isin(_token_ids(x, keys), ids) if ids else named


def _checked_tokens(special_tokens: Any) -> list[int | str]:
    is_list = isinstance(special_tokens, Sequence | np.ndarray) and not isinstance(special_tokens, str)
    tokens = list(special_tokens) if is_list else []
    if not tokens or not all(isinstance(token, int | np.integer | str) for token in tokens):
        raise ValueError(
            "`special_tokens` must be a list of token ids, such as [0, 2], or of names of features, such as "
            f"['class']. Received: special_tokens={special_tokens!r}"
        )
    return [str(token) if isinstance(token, str) else int(token) for token in tokens]


def _token_ids(x: Any, keys: int) -> np.ndarray:
    """The one array of ids in `x`, if it holds one for each key."""
    given = tree.flatten(x) if isinstance(x, dict | list | tuple) or hasattr(x, "__array__") else []
    arrays = [_backend.as_numpy(array) if ops.is_tensor(array) else np.asarray(array) for array in given]
    if len(arrays) == 1 and arrays[0].dtype.kind in "iu" and arrays[0].shape[1:] == (keys,):
        return arrays[0]
    shapes = [f"{array.dtype} of shape {array.shape}" for array in arrays]
    raise ValueError(
        f"Token ids in `special_tokens` are looked up in `x`: it must be one array of integers, (sample, {keys}), an "
        "id for each key that the layers attend to. Convert `x` with `x.astype(int)` if it holds ids as floats; else "
        "give names of features, with `feature_names`. "
        f"Received x: {', '.join(shapes) or type(x).__name__}"
    )
