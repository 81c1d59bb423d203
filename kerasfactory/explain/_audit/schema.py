"""What the record of an audit may hold. It is checked before anything is rendered or computed from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

NAME, VERSION = "kerasfactory.audit", 3
SCHEMA = f"{NAME}/{VERSION}"  # one string: each number in an audit is under the checksum

VERDICTS = ("supported", "refuted", "undetermined", "needed, not claimed")
_LARGEST = 1e100  # of any number: sums and differences of such numbers are finite
_LARGEST_INTEGER = 2**63 - 1
_LARGEST_STATEMENT = (50, 100, 10_000)  # entries, characters of a name, characters of a text
# Claims whose verdicts stand beside a figure.
_SHOWN = ("ranking-comprehensiveness", "ranking-sufficiency", "randomization", "seeds")


class _Kind(NamedTuple):
    """A value that is no container, or one that is checked as a whole."""

    said: str
    fits: Callable[[Any], bool]


class _Maybe(NamedTuple):
    """Null, or what the rule says."""

    rule: Any


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_index(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST_INTEGER


def _integer(low: int, high: int = _LARGEST_INTEGER) -> _Kind:
    return _Kind(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _number(low: float = -_LARGEST, high: float = _LARGEST) -> _Kind:
    return _Kind(f"a number from {low:g} to {high:g}", lambda value: type(value) is float and low <= value <= high)


def _above_0(below: float) -> _Kind:
    return _Kind(f"a number above 0 and below {below:g}", lambda value: type(value) is float and 0 < value < below)


def _one_of(*texts: str) -> _Kind:
    return _Kind(f"one of {', '.join(texts)}", lambda value: _is_text(value) and value in texts)


def _is_target(value: Any) -> bool:
    parts = value if type(value) is list and value else [value]
    return all(_is_text(part) or _is_index(part) for part in parts)


def _is_mask(value: Any, axes: int = 8) -> bool:
    if type(value) is dict:
        return axes == 8 and bool(value) and all(_is_text(name) and _is_mask(value[name], axes - 1) for name in value)
    if type(value) is list and axes:
        return bool(value) and all(_is_mask(entry, axes - 1) for entry in value)
    return _is_index(value) and axes < 8


def _is_shape(value: Any, inputs: bool = True) -> bool:
    if type(value) is dict:
        return inputs and bool(value) and all(_is_text(name) and _is_shape(value[name], False) for name in value)
    return type(value) is list and bool(value) and all(_COUNT.fits(size) for size in value)


def _is_statement(value: Any) -> bool:
    entries, of_name, of_text = _LARGEST_STATEMENT
    return (
        type(value) is dict
        and 0 < len(value) <= entries
        and all(_is_text(name) and 0 < len(name) <= of_name for name in value)
        and all(_is_text(text) and len(text) <= of_text for text in value.values())
    )


_TEXT = _Kind("a text", _is_text)
_TEXTS = _Kind("a list of texts", lambda value: type(value) is list and all(map(_is_text, value)))
_HASH = _Kind(
    "a SHA-256 in hexadecimal",
    lambda value: _is_text(value) and len(value) == 64 and not set(value) - set("0123456789abcdef"),
)
_COUNT, _SIZE, _SHARE, _ANY = _integer(0), _integer(1, 2**31 - 1), _number(0, 1), _number()
_INDEX_OR_TEXT = _Kind("an integer or a text", lambda value: _is_text(value) or _is_index(value))
_INTERVAL = _Maybe((_ANY, _ANY))
_EITHER = _Kind(
    "a number from 0", lambda value: (type(value) is float and 0 <= value <= _LARGEST) or _COUNT.fits(value)
)

# A dictionary stands for an object with these keys in this order, a tuple for a list of these entries, and a list for
# one or more entries of one kind.
SETTINGS = {
    "method": _TEXT,
    "task": _Maybe(_TEXT),
    "target": _Maybe(_Kind("an integer, a text, or a list of these", _is_target)),
    "query": _Maybe(_INDEX_OR_TEXT),
    "layers": _Maybe([_TEXT]),
    "feature_names": _Maybe([_TEXT]),
    "feature_mask": _Maybe(_Kind("integers, in lists as deep as a sample, for one input or each", _is_mask)),
    "special_tokens": _Maybe([_INDEX_OR_TEXT]),
    "block": _Maybe(_SIZE),
    "max_samples": _SIZE,
    "tolerance": _above_0(_LARGEST),
    "level": _above_0(0.5),
    "batch_size": _Maybe(_SIZE),
    "seed": _COUNT,
}
STATEMENT = _Kind(
    "a dictionary with {} entries at most, from names of 1 to {} characters to texts of up to {:,} characters".format(
        *_LARGEST_STATEMENT
    ),
    _is_statement,
)
CALIBRATION = {
    "summary": _TEXT,
    "n": _COUNT,
    "strength": _ANY,
    "own_skill": _Maybe(_ANY),
    "method": _TEXT,
    "level": _above_0(0.5),
    "seed": _COUNT,
    "outcomes": [{"outcome": _TEXT, "count": _COUNT, "share": _SHARE, "interval": (_SHARE, _SHARE)}],
}
_CONTROL = {
    "control": _TEXT,
    "share": _SHARE,
    "median_change": _ANY,
    "mean_change": _ANY,
    "interval": _INTERVAL,
    "median_distance": _ANY,
    "p_value": _SHARE,
    "p_opposite": _SHARE,
}
_LOSS = {
    "name": _TEXT,
    "value": _ANY,
    "increase": _ANY,
    "interval": _INTERVAL,
    "p_value": _SHARE,
    "p_opposite": _SHARE,
}
_RANKING = {
    "removed": [_EITHER],
    "mean_change": [_ANY],
    "aopc": _ANY,
    "interval": _INTERVAL,
    "observed": _ANY,
    "null": [_ANY],
    "p_value": _SHARE,
    "p_opposite": _SHARE,
}
_CLAIM = {
    "id": _TEXT,
    "claim": _TEXT,
    "feature": _Maybe(_TEXT),
    "verdict": _one_of(*VERDICTS),
    "statistic": {"name": _TEXT, "value": _Maybe(_ANY)},
    "p_value": _Maybe(_SHARE),
    "p_opposite": _Maybe(_SHARE),
    "p_adjusted": _Maybe(_SHARE),
    "is_made": _Kind("true or false", lambda value: type(value) is bool),
    "interval": _INTERVAL,
    "reason": _TEXT,
}
RECORD = {
    "schema": _one_of(SCHEMA),
    "settings": SETTINGS,
    "model": {
        "name": _TEXT,
        "class": _TEXT,
        "parameters": _COUNT,
        "weights": _HASH,
        "configuration": _Maybe(_HASH),
    },
    "data": {
        "x": _HASH,
        "shape": _Kind("the shape of `x`, or those of its inputs", _is_shape),
        "dtype": _TEXT,
        "feature_names": [_TEXT],
        "labels": _Maybe(_HASH),
        "background": _Maybe(_HASH),
        "groups": _Maybe(_HASH),
        "tested": _SIZE,
    },
    "environment": dict.fromkeys(("kerasfactory", "python", "keras", "backend", "numpy", "scipy", "xarray"), _TEXT),
    "capture": {
        "tolerance": _ANY,
        "prediction_difference": _Maybe(_ANY),
        "not_captured": _TEXTS,
        "layers": [
            {"layer": _TEXT, "class": _TEXT, "masks": _TEXT, "heads": _COUNT, "recomposition_error": _Maybe(_ANY)}
        ],
    },
    "attribution": {
        "method": _TEXT,
        "query": _INDEX_OR_TEXT,
        "target": _INDEX_OR_TEXT,
        "features": [{"feature": _TEXT, "attribution": _ANY, "interval": _INTERVAL}],
    },
    "skill": _Maybe(
        {
            "loss": _Maybe(_ANY),
            "base_loss": _Maybe(_ANY),
            "largest_share": _Maybe(_SHARE),
            "skill": _Maybe(_ANY),
            "skill_interval": _INTERVAL,
        }
    ),
    "controls": _Maybe(
        {
            "change": _TEXT,
            "tolerance": _above_0(_LARGEST),
            "smallest_share": _SHARE,
            "draws": _COUNT,
            "samples": _COUNT,
            "controls": [_CONTROL],
            "loss": _Maybe(_LOSS),
        }
    ),
    "faithfulness": _Maybe(
        {
            **dict.fromkeys(("removal", "background", "change"), _TEXT),
            "target": _INDEX_OR_TEXT,
            "draws": _COUNT,
            "null_samples": _COUNT,
            "tests": tuple({"name": _one_of(name), **_RANKING} for name in ("comprehensiveness", "sufficiency")),
        }
    ),
    "randomization": _Maybe(
        {
            "tolerance": _ANY,
            "draws": _COUNT,
            "samples": _COUNT,
            "median_kept": _Maybe(_ANY),
            "interval": _INTERVAL,
            "distance": [_ANY],
            "chance": [_ANY],
            "p_value": _SHARE,
            "p_opposite": _SHARE,
        }
    ),
    "seeds": _Maybe(
        {
            "models": [_HASH],
            "top_k": _COUNT,
            "draws": _COUNT,
            "chance": _SHARE,
            "overlap": _SHARE,
            "interval": _INTERVAL,
            "null": [_SHARE],
            "p_value": _SHARE,
            "p_opposite": _SHARE,
            "features": [{"feature": _TEXT, "mean": _Maybe(_ANY), "spread": _Maybe(_ANY)}],
        }
    ),
    "features": _Maybe({"margin": _SHARE, "draws": _COUNT, "clusters": _COUNT, "copies": _COUNT}),
    "claims": [_CLAIM],
    "calibration": _Maybe(CALIBRATION),
    "statement": _Maybe(STATEMENT),
    "checksum": _HASH,
}


def problem(value: Any, rule: Any, name: str) -> str:
    """The first thing in which a value is not what a rule says, or ""."""
    if isinstance(rule, _Maybe):
        return "" if value is None else problem(value, rule.rule, name)
    if isinstance(rule, _Kind):
        return "" if rule.fits(value) else f"{name} must be {rule.said}"
    if isinstance(rule, dict):
        if type(value) is not dict or list(value) != list(rule):
            return f"{name} must have the keys {', '.join(rule)}, and no others"
        parts = [(value[key], rule[key], key) for key in rule]
    else:
        rules = rule if isinstance(rule, tuple) else rule * len(value) if isinstance(value, list) else []
        if type(value) is not list or not value or len(value) != len(rules):
            return f"{name} must be a list of {len(rule) if isinstance(rule, tuple) else 'one or more'} entries"
        parts = [(*pair, number) for number, pair in enumerate(zip(value, rules, strict=True))]
    found = (problem(part, its_rule, f"{name}/{key}") for part, its_rule, key in parts)
    return next(filter(None, found), "")


def problem_of_record(record: Any) -> str:
    """The first thing in a record that `audit` never writes, or ""."""
    if found := problem(record, RECORD, "record"):
        return found.replace("record/", "", 1)
    ids = [claim["id"] for claim in record["claims"]]
    if len(set(ids)) < len(ids) or not set(_SHOWN) <= set(ids):
        return "claims must be those of an audit, and have an id each, which two features with one name do not"
    for claim in record["claims"]:
        if claim["feature"] is not None and claim["id"] != f"feature/{claim['feature']}":
            return "a claim about a feature must have its id"
    for test in (record["faithfulness"] or {"tests": ()})["tests"]:
        if len(test["removed"]) != len(test["mean_change"]):
            return "faithfulness must have a change for each number of features"
    return ""
