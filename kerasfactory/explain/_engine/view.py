"""Which keys are in view of a model's attention, sample by sample."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops, tree

from kerasfactory import _backend
from kerasfactory.explain._engine.observe import Found


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
            there_are = f"There are: {', '.join(known)}." if known else "They have no names: give `feature_names`."
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
