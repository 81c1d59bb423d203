"""Which keys are in view of a model's attention, sample by sample, and what is drawn at random within the view."""

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasfactory import _backend
from kerasfactory.explain._engine.attention import Call, attention_axes
from kerasfactory.explain._engine.data import samples_in, token_ids
from kerasfactory.explain._engine.observe import Found, observe
from kerasfactory.explain._engine.texts import Words

_NAMED = 20  # features, at most, in an error


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


def keys_in_view(model: keras.Model, x: Any, keys: int, batch_size: int | None) -> np.ndarray:
    """The keys that any query attends to in any layer, (sample, key), of arrays `x`.

    All are in view if the model has no attention over as many keys, or if it cannot be read, or has no mask.
    """
    everything = np.ones((samples_in(x), keys), bool)
    views = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about what cannot be read
        seen = observe(model, x, None, batch_size, 0, _reached_keys, only_scores=True)
        try:
            for batch in seen:
                found = {
                    name: call
                    for name, call in batch.found.items()
                    if tuple(batch.measured[name].shape) == (batch.size, keys)
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


def view_of(
    attribution: Any, model: keras.Model, x: Any, keys: int, special_tokens: Any, batch_size: int | None
) -> np.ndarray:
    """Which keys are in view, (sample, key): as the attribution says, else as the masks of the model do."""
    in_view = carried_view(attribution)
    in_view = keys_in_view(model, x, keys, batch_size) if in_view is None else in_view
    return in_view & ~special_keys(special_tokens, x, keys, names_of(attribution))


def background_view(
    attribution: Any, model: keras.Model, background: Any, keys: int, special_tokens: Any, batch_size: int | None
) -> np.ndarray:
    """`view_of` for samples that the attribution is not about."""
    attributes = getattr(attribution, "attrs", {})
    if special_tokens is None:
        special_tokens = attributes.get("special_tokens")
    names = names_of(attribution)
    if names is not None and names.ndim == 2 and any(isinstance(token, str) for token in special_tokens or ()):
        raise ValueError(
            "`special_tokens` names words of `x`; those of `background` are not known. Give the ids of these tokens to "
            f"`attribute`, as in `special_tokens=[0, 2]`. Received: special_tokens={special_tokens!r}"
        )
    special = special_keys(special_tokens, background, keys, names)
    if attributes.get("masks") == "none":
        return np.broadcast_to(~special, (samples_in(background), keys))
    return keys_in_view(model, background, keys, batch_size) & ~special


def names_of(attribution: Any) -> np.ndarray | None:
    """Names of features, (feature,), or words, (sample, feature)."""
    coordinates = getattr(attribution, "coords", {})
    if "feature_token" in coordinates:
        return coordinates["feature_token"].transpose("sample", "feature").values
    return coordinates["feature"].values if "feature" in coordinates else None


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


def reworded_rankings(
    ranks: np.ndarray, in_view: np.ndarray, words: np.ndarray, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Without end, rankings by word that know nothing: all words, (sample, key), get each other's mean rank."""
    numbers = np.unique(words[in_view], return_inverse=True)[1]
    shares = (ranks / np.maximum(in_view.sum(axis=1, keepdims=True), 1))[in_view]
    mean = np.bincount(numbers, shares) / np.bincount(numbers)
    place = np.zeros(words.shape, int)
    place[in_view] = numbers
    while True:
        values = np.where(in_view, rng.permutation(mean)[place], np.inf)
        yield np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1)


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


def special_keys(special_tokens: Any, x: Any, keys: int, names: Any) -> np.ndarray:
    """Where keys stand for no feature: (sample, key), or (1, key) if it is the same in all samples.

    `special_tokens` are ids, to be found in `x`, or `names` of features, (key,), or words, (sample, key).
    """
    named = named_keys(special_tokens, names, keys)
    ids = [token for token in _checked_tokens(special_tokens) if not isinstance(token, str)]
    return named | np.isin(_token_ids(x, keys), ids) if ids else named


def named_keys(special_tokens: Any, names: Any, keys: int) -> np.ndarray:
    """`special_keys` of those among the `special_tokens` that are names."""
    tokens = [token for token in _checked_tokens(special_tokens) if isinstance(token, str)]
    if not tokens:
        return np.zeros((1, keys), bool)
    names = np.empty((1, 0), object) if names is None else np.atleast_2d(np.asarray(names, object))
    known = list(dict.fromkeys(map(str, names.flat)))
    of_features = len(names) < 2  # a word need not occur in these texts
    for token in tokens:
        if token not in known and of_features:
            near = difflib.get_close_matches(token, known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            there_are = (
                f"There are: {', '.join(known[:_NAMED])}{', …' if len(known) > _NAMED else ''}"
                if known
                else "They have no names: give `feature_names` to `attribute`."
            )
            raise ValueError(f"`special_tokens` names no feature: {token!r}. {hint}{there_are}")
    return np.isin(names, tokens)


def ids_of(special_tokens: Any, x: Any, words: Words) -> list[int]:
    """The ids of `special_tokens`, of which some are words, (sample, key)."""
    ids, received = token_ids(x)
    if ids is None:
        raise ValueError(f"The words in `special_tokens` need one array of token ids as `x`. Received x: {received}")
    special = special_keys(special_tokens, x, words.length, words.of_samples())
    found = np.unique(ids[special])
    if (np.isin(ids, found) != special).any():
        raise ValueError(
            "Words in `special_tokens` must have ids that no other words have. Give the ids themselves, as in "
            f"`special_tokens=[0, 2]`. Received: special_tokens={special_tokens!r}"
        )
    return found.tolist()


def _checked_tokens(special_tokens: Any) -> list[int | str]:
    if special_tokens is None:
        return []
    is_list = isinstance(special_tokens, Sequence | np.ndarray) and not isinstance(special_tokens, str)
    tokens = list(special_tokens) if is_list else []
    if not tokens or not all(isinstance(token, int | np.integer | str) for token in tokens):
        raise ValueError(
            "`special_tokens` must be a list of token ids, such as [0, 2], or of names of features, such as "
            f"['class']. Received: special_tokens={special_tokens!r}"
        )
    return [str(token) if isinstance(token, str) else int(token) for token in tokens]


def _token_ids(x: Any, keys: int) -> np.ndarray:
    """The one array of ids in `x` that holds one for each key."""
    ids, received = token_ids(x, keys)
    if ids is not None:
        return ids
    raise ValueError(
        f"Token ids in `special_tokens` are looked up in `x`: it must be, or hold, one array of integers, (sample, "
        f"{keys}), an id for each key that the layers attend to. Convert it with `x.astype(int)` if it holds ids as "
        f"floats; else give names of features, with `feature_names`. Received x: {received}"
    )
