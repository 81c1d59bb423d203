"""From attributions to the tokens of texts to those of words, and of a whole corpus."""

from typing import Any

import numpy as np
import xarray as xr

from kerasfactory._warnings import warn
from kerasfactory.explain._engine.view import carried_view

_PREFIXES = {"##": "WordPiece", "▁": "SentencePiece", "Ġ": "GPT-2"}


def merge(attribution: xr.DataArray, *, words: Any = None) -> xr.DataArray:
    r"""Turns an attribution to pieces of words, as a tokenizer makes them, into an attribution to whole words.

    The attribution of a word is the sum over its pieces, so each row keeps its sum.

    The strings say which pieces belong together, in one of three ways:

    - `"##"`: a piece that starts with it continues the word before it (WordPiece, as of BERT).
    - `"▁"`: a piece that starts with it begins a word, and others continue one (SentencePiece, as of Gemma and T5).
    - `"Ġ"`: the same, and each character stands for a byte (GPT-2, as of Llama 3). The bytes are decoded as UTF-8.

    With the latter two, a word is what is between spaces, and punctuation belongs to it. Tokens out of view, such as
    padding and the `special_tokens` of `attribute`, stay words of their own.

    Args:
        attribution: (sample, feature) with the coordinate `feature_token`, as from `attribute` with the pieces in
            `feature_names`.
        words: `"##"`, `"▁"` or `"Ġ"`; the one that is found in the pieces if not given. Or an array of integers
            (sample, feature): the number of the word that a piece belongs to, in any order, and -1 for a piece that is
            a word of its own.

    Returns:
        xr.DataArray: (sample, feature), with as many features as the longest text has words. The coordinates are
        `feature_token`, the words, with `""` as padding, and `in_view`: whether a piece of the word is in view.
        `sample` and the attributes are those of `attribution`. Use it for reading. `faithfulness` takes the pieces,
        because only they can be removed.

    Raises:
        ValueError: If `attribution` is not (sample, feature), or has no `feature_token`; if none or several of the
            three prefixes are found; if `words` is something else, or not of the shape of `attribution`.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import explain

        pieces = [["un", "##believ", "##able", "film"], ["a", "film", "", ""]]
        attribution = xr.DataArray(
            np.array([[0.2, 0.4, 0.3, 0.1], [0.5, 0.5, 0.0, 0.0]]),
            dims=("sample", "feature"),
            coords={"feature_token": (("sample", "feature"), pieces)},
        )
        merged = explain.merge(attribution)
        print(merged["feature_token"].values.tolist())
        #> [['unbelievable', 'film'], ['a', 'film']]
        print(merged.round(1).values.tolist())
        #> [[0.9, 0.1], [0.5, 0.5]]
        ```
    """
    values, pieces, in_view = _checked(attribution)
    prefix = _prefix(pieces, words)
    numbers = _numbers(pieces, in_view, prefix) if words is None or isinstance(words, str) else _given(words, pieces)
    shape = len(values), int(numbers.max()) + 1
    sums, seen = np.zeros(shape, "float64"), np.zeros(shape, bool)
    members: dict[tuple[int, int], list[str]] = {}
    for position in np.ndindex(pieces.shape):
        word = position[0], int(numbers[position])
        members.setdefault(word, []).append(str(pieces[position]))
        sums[word] += values[position]
        seen[word] |= in_view[position]
    strings = np.full(shape, "", object)
    for word, parts in members.items():
        strings[word] = _joined(parts, prefix)
    used = np.flatnonzero(np.any((strings != "") | (sums != 0) | seen, axis=0))
    kept = slice(0, used[-1] + 1 if len(used) else 1)
    dims = ("sample", "feature")
    coordinates = {"in_view": (dims, seen[:, kept]), "feature_token": (dims, strings[:, kept])}
    of_samples = {name: one for name, one in attribution.coords.items() if one.dims == ("sample",)}
    result = xr.DataArray(sums[:, kept].astype(values.dtype), coordinates, dims, attribution.name, attribution.attrs)
    return result.assign_coords(of_samples)


def by_token(attribution: xr.DataArray) -> xr.Dataset:
    r"""Ranks the tokens of many texts by their mean attribution.

    Each place of a token that is in view is an occurrence. With the attribution \(a_{sf}\) to feature \(f\) of sample
    \(s\), and the set \(O_t\) of the occurrences of token \(t\),

    $$
    \operatorname{mean}_t = \frac{1}{|O_t|} \sum_{(s, f) \in O_t} a_{sf} .
    $$

    All occurrences count alike, whatever the length of the text. Shares that sum to 1 are larger in short texts, so
    tokens of short texts come first. `by_token(attribution * attribution["in_view"].sum("feature"))` compares multiples
    of the uniform share instead.

    Args:
        attribution: (sample, feature) with the coordinate `feature_token`, as from `attribute` with `feature_names` for
            each sample, or from `merge`.

    Returns:
        xr.Dataset: With these variables (token), of the tokens that are in view anywhere, largest `mean` first.

        - `mean`: of the attribution over the occurrences, in its unit.
        - `count`: the number of occurrences. A mean of few occurrences says little. `tokens.sel(token=tokens["count"]
          >= 10)` leaves out tokens with fewer than 10.
        - `share`: the share of the samples that contain the token, from 0 to 1.

        The attributes are those of `attribution`, and the number of `samples`.

    Raises:
        ValueError: If `attribution` is not (sample, feature), has no `feature_token`, or no token in view.

    Example:
        ```python
        import numpy as np
        import xarray as xr

        from kerasfactory import explain

        words = [["good", "film", ""], ["good", "good", "film"], ["bad", "film", ""]]
        attribution = xr.DataArray(
            np.array([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25], [0.75, 0.25, 0.0]]),
            dims=("sample", "feature"),
            coords={"feature_token": (("sample", "feature"), words)},
        )
        tokens = explain.by_token(attribution)
        for token in tokens["token"].values:
            found = tokens.sel(token=token)
            share = found["share"].round(2).item()
            print(token, found["mean"].item(), found["count"].item(), share)
            #> bad 0.75 1 0.33
            #> good 0.5 3 0.67
            #> film 0.25 3 1.0
        ```
    """
    values, words, in_view = _checked(attribution)
    seen = in_view & (words != "")
    if not seen.any():
        raise ValueError(
            "`attribution` has no word in view. Check its coordinates `in_view` and `feature_token`: everything may be "
            "masked or padding."
        )
    unknown = seen & np.isnan(values)
    if unknown.any():
        warn(
            f"The attribution is NaN at {unknown.sum()} words, the first of them {words[unknown][0]!r}: no mean "
            "includes these words. Look for NaN in the samples, and in the model's weights."
        )
        seen &= ~unknown
    tokens, numbers = np.unique(words[seen].astype(str), return_inverse=True)
    samples, count = len(values), np.bincount(numbers)
    mean = np.bincount(numbers, values[seen]) / count
    places = np.unique(numbers * samples + np.nonzero(seen)[0])  # of each token in each sample
    share = np.bincount(places // samples) / samples
    order = np.argsort(-mean, kind="stable")
    variables = {"mean": mean, "count": count, "share": share}
    return xr.Dataset(
        {name: ("token", numbers[order]) for name, numbers in variables.items()},
        {"token": tokens[order]},
        attribution.attrs | {"samples": samples},
    )


def _checked(attribution: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The attribution, its words and what is in view of it, (sample, feature) each."""
    dims = ("sample", "feature")
    if not isinstance(attribution, xr.DataArray) or set(attribution.dims) != set(dims):
        raise ValueError(
            "`attribution` must be a DataArray with the dimensions (sample, feature), as `explain.attribute` returns "
            f"it. Received: {getattr(attribution, 'dims', type(attribution).__name__)}"
        )
    token = attribution.coords.get("feature_token")
    if token is None or set(token.dims) != set(dims):
        raise ValueError(
            "`attribution` has no words: it needs the coordinate `feature_token` (sample, feature). Give "
            "`feature_names` to `explain.attribute`, as an array of strings (sample, key) or a function from ids."
        )
    words = token.transpose(*dims).values.astype(object)
    in_view = carried_view(attribution)
    return attribution.transpose(*dims).values, words, words != "" if in_view is None else in_view


def _prefix(pieces: np.ndarray, words: Any) -> str | None:
    """The one of `_PREFIXES` that says what a word is. With an array of `words` it may be any or none."""
    if isinstance(words, str):
        if words not in _PREFIXES:
            raise ValueError(
                f"`words` must be one of {', '.join(map(repr, _PREFIXES))}, or an array of integers (sample, feature). "
                f"Received: words={words!r}"
            )
        return words
    known = set(pieces.flat)
    found = [prefix for prefix in _PREFIXES if any(_has(one, prefix) for one in known)]
    if len(found) != 1 and words is None:
        raise ValueError(
            "The tokens do not show which of them are pieces of one word. Of the prefixes "
            f"{', '.join(map(repr, _PREFIXES))} they have: {', '.join(map(repr, found)) or 'none'}. Say which is "
            'meant, as with `words="##"`, or give the number of the word that each belongs to, an array of integers '
            "(sample, feature)."
        )
    return found[0] if len(found) == 1 else None


def _has(piece: str, prefix: str | None) -> bool:
    return prefix is not None and piece.startswith(prefix) and piece != "##"


def _numbers(pieces: np.ndarray, in_view: np.ndarray, prefix: str | None) -> np.ndarray:
    """The number of the word that each piece belongs to, from 0 in each sample."""
    has_prefix = np.array([_has(piece, prefix) for piece in pieces.flat]).reshape(pieces.shape)
    begins = ~has_prefix if prefix == "##" else has_prefix
    begins |= ~in_view | (pieces == "")
    begins[:, 1:] |= ~in_view[:, :-1] | (pieces[:, :-1] == "")
    begins[:, 0] = True
    return np.cumsum(begins, axis=1) - 1


def _given(words: Any, pieces: np.ndarray) -> np.ndarray:
    """The numbers that were given, counted from 0 in the order in which words begin."""
    given = np.asarray(words)
    if given.shape != pieces.shape or given.dtype.kind not in "iu" or given.min() < -1:
        raise ValueError(
            f"`words` must hold the number of a word, or -1, for each token, {pieces.shape}. Received: an array of "
            f"shape {given.shape} and dtype {given.dtype}"
        )
    alone = -1 - np.arange(given.shape[1])
    numbers = np.empty(given.shape, int)
    for row, of_sample in zip(np.where(given < 0, alone, given), numbers, strict=True):
        _, first, number = np.unique(row, return_index=True, return_inverse=True)
        of_sample[:] = np.argsort(np.argsort(first))[number]
    return numbers


def _joined(pieces: list[str], prefix: str | None) -> str:
    """The word that the pieces make."""
    if prefix == "##":
        return "".join([pieces[0], *(piece.removeprefix("##") for piece in pieces[1:])])
    joined = "".join(pieces)
    if prefix == "▁":
        joined = joined.replace("▁", " ")
    elif prefix == "Ġ" and all(character in _BYTES for character in joined):
        joined = bytes(_BYTES[character] for character in joined).decode(errors="replace")
    return joined.strip() or "".join(pieces)  # a space is a token, and no padding


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be printed stand for themselves, the others follow from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _bytes_of_characters()
