"""An audit of a model's attention: claims, each with its verdict and evidence, in a file that can be checked."""

import hashlib
import importlib
import json
import math
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import scipy
import xarray as xr
from keras import ops
from scipy import stats

import kerasfactory
from kerasfactory import _backend
from kerasfactory.explain._attribution import attribute
from kerasfactory.explain._audit_page import escaped, page, with_data, without_data
from kerasfactory.explain._capture import _rounding, capture, recomposition_error
from kerasfactory.explain._claims import feature_claims
from kerasfactory.explain._controls import attention_controls
from kerasfactory.explain._faithfulness import faithfulness
from kerasfactory.explain._observe import progress_bar
from kerasfactory.explain._outputs import _interval
from kerasfactory.explain._store import _digest

_SCHEMA, _VERSION = "kerasfactory.audit", 1  # written as one string: each number in an audit is under the checksum
_EXACT = 1e-4  # the largest error of an exact capture, relative; in half precision it is that of its rounding
_DRAWS = 200
# How far numbers that are computed again may lie from those that were written.
_RELATIVE, _ABSOLUTE, _PROBABILITY = 1e-3, 1e-5, 0.02


def audit(
    model: keras.Model,
    x: Any,
    y: Any = None,
    path: str | os.PathLike[str] = "audit.html",
    method: str = "attention",
    feature_names: Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    background: Any = None,
    level: float = 0.05,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> Path:
    r"""Writes down what a model attends to, and which claims about it hold, in a file that others can check.

    Two files are written: a page that opens in any browser without a network, and beside it the same data as JSON. They
    say what the model is, on what data and with which versions it was audited, and give for each claim a verdict,
    `supported`, `refuted` or `undetermined`, with the numbers behind it.

    - **The capture is exact**: the `recomposition_error` of each layer, and the outputs with and without observation,
      differ by rounding.
    - **Attention matters**: the output changes if all keys get the same weight, and if the weights are dealt out to the
      keys at random. Two sign tests of the median change against a tolerance of 0.02 (total variation of probabilities;
      else standard deviations of the output).
    - **The ranking is faithful**: two tests, of comprehensiveness and of sufficiency, against the same ranking with its
      features relabelled at random, as in `faithfulness`. For sufficiency those that are at most as large count.
    - **Each feature** of which the attribution is above the mean tells the model what the other features do not. Its
      values are drawn anew, given the other features, and the model's loss is set against that with the true ones
      (conditional permutation importance, Strobl et al. 2008,
      [*Conditional Variable Importance for Random Forests*](https://doi.org/10.1186/1471-2105-9-307)). A copy of
      another feature, and a shortcut that does not hold in `x`, do not pass. It takes a table, `y` and a compiled loss.

    The p-values \(p_{(1)} \le \dots \le p_{(m)}\) of all but the first claim are adjusted together,

    $$
    \tilde p_{(i)} = \min_{j \ge i} \min\!\left(\frac{m}{j}\, p_{(j)},\, 1\right)
    $$

    (Benjamini & Hochberg 1995, [*Controlling the False Discovery
    Rate*](https://doi.org/10.1111/j.2517-6161.1995.tb02031.x)). A claim is supported only if that is at most `level`.
    It is refuted if the data speak against it: an interval that ends below the tolerance or the margin, or a ranking
    that does worse than all but a share `level` of those that know nothing. Where the data leave it open, or cannot be
    tested, the claim is undetermined, and the reason is given. With fewer samples than claims, no test is made.

    The same call writes the same files: no time, host or path is in them, and not the data either. Weights,
    configuration, data and labels are there as SHA-256. A checksum makes changes noticeable. It is no signature: who
    changes a number and its checksums is found out by `verify`, which computes all of it again. Sign the files if you
    must know who made them.

    Args:
        model: A `keras.Model`, as for `capture`, with one output of shape (sample,) or (sample, output).
        x: Held-out data, an array of finite numbers with the features along axis 1: (sample, feature),
            (sample, position, channel) or token ids, (sample, position).
        y: Labels, one for each sample, in the form that the model's loss takes. Without them, claims about single
            features are undetermined.
        path: The page, `*.html`. The data go beside it, `*.json`. An earlier audit is overwritten; other files are not.
        method: Of the attribution, as for `attribute`.
        feature_names: Names of the features, as for `capture`.
        layers: Names of the layers, as for `capture`.
        background: Samples like `x` to draw values of removed features from; `x` itself if not given.
        level: Of all tests, and 1 minus that of all intervals; between 0 and 0.5.
        batch_size: Samples in a batch.
        verbose: 0 for silence, 1 for a progress bar over the parts of the audit, 2 for one line; `"auto"` as for
            `capture`.
        seed: Of all that is drawn.

    Returns:
        pathlib.Path: The page. The JSON beside it has the keys `schema`, `settings`, `model`, `data`, `environment`,
            `capture`, `attribution`, `controls`, `faithfulness`, `features`, `claims`, `page` and `checksum`. Each
            claim has `claim` (a sentence), `feature` (or null), `verdict`, `statistic` (`name`, `value`), `p_value`,
            `p_adjusted`, `interval` (two bounds) and `reason`. What was not tested is null.

    Raises:
        ValueError: If `x`, `y` or `background` hold NaN or no numbers or do not fit each other; if `path` does not end
            in `.html`, or another argument is out of range; and as `attribute`, `faithfulness` and
            `recomposition_error`.
        FileExistsError: If one of the files is there and is no audit.
        FileNotFoundError: If there is no folder for them.

    Warns:
        UserWarning: As `capture`.

    Example:
        ```python
        import json
        import tempfile
        from pathlib import Path

        import keras
        import numpy as np

        from kerasfactory import explain
        from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

        inputs = keras.Input((3,))
        tokens = FeatureTokenizer(8, feature_names=["age", "pulse", "weight"])(inputs)
        attended = InterpretableMultiHeadAttention(4, 2, name="attention")(tokens)
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))

        x = np.random.default_rng(0).normal(size=(60, 3))
        folder = Path(tempfile.mkdtemp())
        page = explain.audit(model, x, path=folder / "audit.html", verbose=0)

        claims = json.loads((folder / "audit.json").read_text())["claims"]
        print(claims[0]["claim"], claims[0]["verdict"])
        #> The captured scores are those that the model uses, and capturing them changes nothing. supported
        print(explain.verify(page, model, x, verbose=0))
        #> []
        ```
    """
    html_file, json_file = files = _files(path)
    if Path(path) != html_file:
        raise ValueError(f"`path` must end in .html; the JSON file goes beside it. Received: path={str(path)!r}")
    for file in files:
        if file.exists():
            try:
                _load(file)
            except ValueError:
                raise FileExistsError(
                    f"{file} exists and is not an audit: it is not overwritten. Choose another `path`."
                ) from None
    if not html_file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(html_file.parent)!r} to write the audit into.")
    if not 0 < level < 0.5:
        raise ValueError(f"`level` must be a number between 0 and 0.5. Received: level={level!r}")
    settings = {
        "method": method,
        "layers": [layers] if isinstance(layers, str) else layers and list(layers),
        "feature_names": None if feature_names is None else list(feature_names),
        "level": float(level),
        "batch_size": batch_size,
        "seed": seed,
    }
    _save(_record(model, x, y, background, settings, verbose), html_file, json_file)
    return html_file


def verify(
    path: str | os.PathLike[str],
    model: keras.Model,
    x: Any,
    y: Any = None,
    background: Any = None,
    verbose: int | str = "auto",
) -> list[str]:
    """Computes an audit again and says what no longer holds.

    First the two files are checked: whether their data have the checksum with which they were written, whether the page
    shows what it did, and whether the two agree. If not, that is the answer, and nothing is computed. Otherwise the
    audit is made again, for this model and these data, with the settings that it was made with, and compared: hashes,
    verdicts and names must be the same. Numbers may differ by 0.001 of their value, or by 1e-5 if that is more (by
    0.02 in half precision); p-values by 0.02. Other processors and backends round otherwise, and may differ by more.

    Args:
        path: The page or the JSON file of an audit. The other is looked for beside it.
        model: The model that is to be the one that was audited.
        x: The data that are to be those of the audit, as for `audit`.
        y: The labels, if the audit was made with labels. Without them the claims about single features are not
            checked, and a warning says so.
        background: The background data, if the audit was made with such.
        verbose: As for `audit`.

    Returns:
        list[str]: A sentence for each thing that does not hold any more: a changed file, other weights, another
            configuration, other data or labels, other verdicts, other numbers. Empty if all holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an audit, or one from a newer kerasfactory; if the background data are missing; and as
            `audit`.

    Warns:
        UserWarning: If labels are missing, or if the versions of Python, Keras, the backend or a library are not those
            of the audit. As the numbers were computed with the new ones, this alone is no finding.

    Example:
        ```python
        import tempfile
        from pathlib import Path

        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((4, 8))
        attended = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")(inputs, inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(attended)))

        x = np.random.default_rng(0).normal(size=(60, 4, 8))
        page = explain.audit(model, x, path=Path(tempfile.mkdtemp()) / "audit.html", verbose=0)

        x[3, 0, 0] = 0
        print(explain.verify(page, model, x, verbose=0)[0])
        #> The data are not those of the audit.
        ```
    """
    record, findings = _intact(_files(path), Path(path))
    if findings:
        return findings
    x = _array("x", x)
    if list(x.shape[1:]) != record["data"]["shape"][1:]:
        return [
            f"The data are not those of the audit: a sample has shape {list(x.shape[1:])}, and had "
            f"{record['data']['shape'][1:]}. Nothing else was checked."
        ]
    if record["data"]["background"] and background is None:
        raise ValueError("The audit was made with background data: give them, `background=...`.")

    now = json.loads(_json(_record(model, x, y, background, record["settings"], verbose)))
    if record["data"]["labels"] and y is None:
        now["data"]["labels"] = record["data"]["labels"]
        now["features"] = record["features"]
        now["claims"] = [claim for claim in now["claims"] if claim["feature"] is None]
        now["claims"] += [claim for claim in record["claims"] if claim["feature"] is not None]
        _judge(now["claims"], record["settings"]["level"])
        warnings.warn("Without labels, `y`, the claims about single features were not checked.", stacklevel=2)
    changed = [
        f"{name} {version}, now {now['environment'].get(name)}"
        for name, version in record["environment"].items()
        if version != now["environment"].get(name)
    ]
    if changed:
        warnings.warn(f"The audit was made with other versions: {'; '.join(changed)}.", stacklevel=2)
    return _differences(record, now, max(_ABSOLUTE, _rounding(model)))


def _record(model: Any, x: Any, y: Any, background: Any, settings: dict[str, Any], verbose: Any) -> dict[str, Any]:
    """What an audit says, as JSON."""
    x, y, background = _checked(x, y, background)
    level, seed, batch_size = settings["level"], settings["seed"], settings["batch_size"]
    progress = progress_bar(5, verbose, "part")

    common = {"layers": settings["layers"], "batch_size": batch_size, "verbose": 0}
    names = settings["feature_names"]
    attribution = attribute(model, x, settings["method"], feature_names=names, seed=seed, **common)
    features = attribution.coords.get("feature", range(attribution.sizes["feature"]))
    features = [str(feature) for feature in np.asarray(features)]
    progress.add(1)
    captured = _captured(model, x, common)
    progress.add(1)

    count = 4 + len(features)  # of claims that a test decides
    few = f"{len(x)} samples are fewer than the {count} claims that they are to decide." if len(x) < count else ""
    controls = None if few else _controls(model, x, common, level, seed)
    progress.add(1)
    no_ranking = few or _no_ranking(x, features)
    arguments = {"background": background, "level": level, "batch_size": batch_size, "seed": seed}
    draws = max(_DRAWS, math.ceil(count / level))  # so that one claim alone can be significant after the adjustment
    ranking = None if no_ranking else _ranking(model, x, attribution, {**arguments, "draws": draws})
    progress.add(1)
    no_claims = no_ranking or _no_claims(model, x, y)
    of_features = None if no_claims else feature_claims(model, x, y, attribution, **arguments)
    progress.add(1)

    claims = [
        _capture_claim(captured),
        *_attention_claims(controls, few, level),
        *_ranking_claims(ranking, no_ranking, settings["method"], level),
        *_feature_claims(of_features, no_claims, features),
    ]
    _judge(claims, level)
    return {
        "schema": f"{_SCHEMA}/{_VERSION}",
        "settings": settings,
        "model": _model_facts(model),
        "data": {
            "x": _hash(x),
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "feature_names": features,
            "labels": None if y is None else _hash(y),
            "background": None if background is None else _hash(background),
        },
        "environment": _environment(),
        "capture": captured,
        "attribution": {
            **{key: attribution.attrs[key] for key in ("method", "query", "target")},
            "features": [
                {
                    "feature": feature,
                    "attribution": float(values.mean()),
                    "interval": _bounds(_interval(values, np.mean, level, seed)),
                }
                for feature, values in zip(features, attribution.values.T.astype("float64"), strict=True)
            ],
        },
        "controls": controls,
        "faithfulness": ranking,
        "features": of_features and {key: of_features.attrs[key] for key in ("base_loss", "loss", "margin", "draws")},
        "claims": claims,
    }


def _checked(x: Any, y: Any, background: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    x = _array("x", x)
    if x.ndim < 2:
        raise ValueError(f"`x` must have its features along axis 1. Received an array of shape {x.shape}")
    if background is not None:
        background = _array("background", background)
        if background.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"A sample of `background` must have the shape of one of `x`, {x.shape[1:]}. Received: "
                f"{background.shape[1:]}"
            )
    if y is not None:
        y = _array("y", y)
        if len(y) != len(x):
            raise ValueError(f"`y` must hold one label for each sample in `x`, {len(x)}. Received: {len(y)}")
    return x, y, background


def _array(name: str, given: Any) -> np.ndarray:
    if not hasattr(given, "__array__") and not (name == "y" and isinstance(given, list | tuple)):
        raise ValueError(
            f"`{name}` must be an array with the samples along axis 0. Received: {name} of type {type(given).__name__}"
        )
    array = _backend.as_numpy(given) if ops.is_tensor(given) else np.asarray(given)
    if array.ndim == 0 or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must hold numbers, and at least one sample. Received an array of shape {array.shape} and dtype "
            f"{array.dtype}"
        )
    bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`{name}` must hold finite numbers: {len(bad)} of {len(array)} samples have NaN or infinite ones, the "
            f"first is number {bad[0]}. Fill them as in the training data, or leave these samples out."
        )
    return array


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape} {array.dtype} ".encode() + array.tobytes()).hexdigest()


def _captured(model: Any, x: np.ndarray, common: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = capture(model, x[: common["batch_size"] or 32], **common)
    errors = recomposition_error(model, x, **common)
    return {
        "tolerance": max(_EXACT, _rounding(model)),
        "prediction_difference": _float(max(array.attrs["prediction_difference"] for array in scores.values())),
        "not_captured": [str(one.message) for one in caught if "are not captured" in str(one.message)],
        "layers": [
            {
                "layer": name,
                "class": array.attrs["class"],
                "masks": array.attrs["masks"],
                "heads": array.sizes["head"],
                "recomposition_error": _float(errors[name]),
            }
            for name, array in scores.items()
        ],
    }


def _controls(model: Any, x: np.ndarray, common: dict[str, Any], level: float, seed: int) -> dict[str, Any]:
    """What the output does when the model attends otherwise, and tests of that against the tolerance."""
    found = attention_controls(model, x, seed=seed, level=level, **common)
    tolerance, samples = found.attrs["tolerance"], found.sizes["sample"]
    controls = []
    for control in found["control"].values.tolist():
        here = found.sel(control=control)
        more = int((here["change"] > tolerance).sum())
        controls.append(
            {
                "control": control,
                "median_change": float(here["median_change"]),
                "interval": _bounds(here["interval"].values),
                "median_distance": float(here["jsd"].median()),
                # Sign tests: that the median is larger than the tolerance, and that it is smaller.
                "p_value": stats.binomtest(more, samples, alternative="greater").pvalue,
                "p_opposite": stats.binomtest(more, samples, alternative="less").pvalue,
            }
        )
    keys = ("change", "tolerance", "draws", "steps")
    return {**{key: found.attrs[key] for key in keys}, "samples": samples, "controls": controls}


def _no_ranking(x: np.ndarray, features: list[str]) -> str:
    """Why no feature can be removed, if so."""
    if len(features) < 2:
        return "There is one feature: nothing to rank."
    if x.shape[1] != len(features):
        return (
            f"The attribution is to {len(features)} keys, and axis 1 of `x` has {x.shape[1]} entries: there is no "
            "telling which of them to remove."
        )
    return ""


def _ranking(model: Any, x: np.ndarray, attribution: xr.DataArray, arguments: dict[str, Any]) -> dict[str, Any]:
    """The output without the features that come first, and with these alone, beside rankings that know nothing."""
    removed = faithfulness(model, x, attribution, verbose=0, **arguments)
    counts = removed["removed"].values
    features = attribution.sizes["feature"]
    # To keep k features is to remove those that come first in the reversed ranking.
    shares = sorted({(features - count) / features for count in counts.tolist() if count < features})
    kept = faithfulness(model, x, -attribution, fractions=shares, verbose=0, **arguments)
    tests = []
    for name, found, sign in (("comprehensiveness", removed, 1), ("sufficiency", kept, -1)):
        null, observed = found["null"].values, found.attrs["observed"]
        rounding = 1e-6 * np.abs([*null, observed]).max()
        tests.append(
            {
                "name": name,
                "removed": found["removed"].values.tolist(),
                "mean_change": found["comprehensiveness"].mean("sample").values.tolist(),
                "aopc": float(found["aopc_comprehensiveness"]),
                "interval": _bounds(found["interval"].values),
                "observed": observed,
                "null": null.tolist(),
                "p_value": float((1 + np.sum(sign * (null - observed) >= -rounding)) / (1 + len(null))),
                "p_opposite": float((1 + np.sum(sign * (null - observed) <= rounding)) / (1 + len(null))),
            }
        )
    keys = ("removal", "background", "change", "target", "draws", "null_samples")
    return {**{key: removed.attrs[key] for key in keys}, "tests": tests}


def _claim(
    claim: str,
    name: str,
    value: float | None = None,
    p_value: float | None = None,
    interval: list[float] | None = None,
    verdict: str = "undetermined",
    reason: str = "",
    feature: str | None = None,
) -> dict[str, Any]:
    return {
        "claim": claim,
        "feature": feature,
        "verdict": verdict,
        "statistic": {"name": name, "value": value},
        "p_value": p_value,
        "p_adjusted": None,
        "interval": interval,
        "reason": reason,
    }


def _capture_claim(captured: dict[str, Any]) -> dict[str, Any]:
    errors = [captured["prediction_difference"], *(layer["recomposition_error"] for layer in captured["layers"])]
    worst = None if None in errors else max(errors)
    if captured["not_captured"] or worst is None:
        verdict, reason = "undetermined", " ".join(captured["not_captured"]) or "An error is not a number."
    else:
        exact = worst <= captured["tolerance"]
        verdict = "supported" if exact else "refuted"
        reason = f"It is {'at most' if exact else 'above'} {captured['tolerance']:g}, the largest that rounding makes."
    return _claim(
        "The captured scores are those that the model uses, and capturing them changes nothing.",
        "largest relative error",
        worst,
        verdict=verdict,
        reason=reason,
    )


def _attention_claims(controls: dict[str, Any] | None, why_not: str, level: float) -> Iterator[dict[str, Any]]:
    said = {
        "uniform": "The output depends on where the model attends: it changes if all keys get the same weight.",
        "permuted": "The output depends on which key gets which weight: it changes if they are dealt out at random.",
    }
    for control, claim in said.items():
        name = "median change of the output"
        if controls is None:
            yield _claim(claim, name, reason=why_not)
            continue
        (found,) = (found for found in controls["controls"] if found["control"] == control)
        low, high = found["interval"]
        tolerance = controls["tolerance"]
        verdict, reason = "undetermined", f"The interval does not decide whether it is more than {tolerance:g}."
        if low > tolerance and found["p_value"] <= level:
            verdict, reason = "supported", f"It is more than {tolerance:g}."
        elif high <= tolerance and found["p_opposite"] <= level:
            verdict, reason = "refuted", f"It is not more than {tolerance:g}."
        numbers = (found["median_change"], found["p_value"], found["interval"])
        yield _claim(claim, name, *numbers, verdict, f"{reason} Unit: {controls['change']}.")


def _ranking_claims(
    ranking: dict[str, Any] | None, why_not: str, method: str, level: float
) -> Iterator[dict[str, Any]]:
    said = {
        "comprehensiveness": f"The output needs the features that “{method}” ranks first, more than others.",
        "sufficiency": f"The features that “{method}” ranks first are enough for the output, more than others.",
    }
    for name, claim in said.items():
        if ranking is None:
            yield _claim(claim, f"AOPC {name}", reason=why_not)
            continue
        (found,) = (found for found in ranking["tests"] if found["name"] == name)
        verdict = "undetermined"
        if found["p_value"] <= level:
            verdict = "supported"
        elif found["p_opposite"] <= level:
            verdict = "refuted"
        worse = np.mean(np.sign(np.subtract(found["null"], found["observed"])) == (-1 if name[0] == "c" else 1))
        reason = f"It does better than {worse:.0%} of {len(found['null'])} rankings that know nothing."
        yield _claim(claim, f"AOPC {name}", found["aopc"], found["p_value"], found["interval"], verdict, reason)


def _no_claims(model: Any, x: np.ndarray, y: np.ndarray | None) -> str:
    """Why nothing can be said of single features, if so."""
    if y is None:
        return "Without labels, `y`, there is no telling what the feature says about the outcome."
    if x.ndim != 2:
        return "Claims about single features are tested for tables, (sample, feature), alone."
    if getattr(model, "loss", None) is None:
        return "The model is not compiled with a loss: there is no telling what is worse without the feature."
    return ""


def _feature_claims(found: xr.Dataset | None, why_not: str, features: list[str]) -> Iterator[dict[str, Any]]:
    for number, feature in enumerate(features):
        claim = f"{feature}: its attribution is high, and it tells the model what the other features do not."
        name = "increase of the loss without it"
        if found is None:
            yield _claim(claim, name, reason=why_not, feature=feature)
            continue
        here = found.isel(feature=number)
        verdict, effect = str(here["verdict"].item()), _float(here["effect"].item())
        if effect is None:
            reason = "It cannot be tested: it is constant, or there are too few samples."
            yield _claim(claim, name, reason=reason, feature=feature)
            continue
        if verdict == "supported":
            reason = "The loss is larger when its values are drawn anew, given the others."
        elif verdict == "refuted":
            reason = (
                f"At most {found.attrs['margin']:.0%} of the base loss: the others say the same, or it says nothing."
            )
        elif here["attribution"] <= found["attribution"].mean():
            reason = "Its attribution is not above the mean of all: it is not claimed to be high."
        else:
            reason = "The test neither finds an increase nor rules one out."
        numbers = (effect, here["p_value"].item(), _bounds(here["interval"].values))
        yield _claim(claim, name, *numbers, verdict, reason, feature)


def _judge(claims: list[dict[str, Any]], level: float) -> None:
    """Adjusts the p-values for all claims together; what is not significant then is not supported."""
    tested = [claim for claim in claims if claim["p_value"] is not None]
    if tested:
        adjusted = stats.false_discovery_control([claim["p_value"] for claim in tested])
        for claim, p_adjusted in zip(tested, adjusted, strict=True):
            claim["p_adjusted"] = float(p_adjusted)
            if claim["verdict"] == "supported" and p_adjusted > level:
                claim["verdict"] = "undetermined"
                claim["reason"] += f" But adjusted for {len(tested)} claims its p-value is above {level:g}."


def _model_facts(model: Any) -> dict[str, Any]:
    try:
        config = json.loads(model.to_json())
        config.pop("compile_config", None)  # how it was trained, which a model may be saved without
        configuration = hashlib.sha256(_canonical(config).encode()).hexdigest()
    except (NotImplementedError, TypeError):
        configuration = None  # of a subclass that does not say
    return {
        "name": model.name,
        "class": type(model).__name__,
        "parameters": model.count_params(),
        "weights": _digest(weight.value for weight in model.weights),
        "configuration": configuration,
    }


def _environment() -> dict[str, str]:
    backend = keras.config.backend()
    return {
        "kerasfactory": kerasfactory.__version__,
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": f"{backend} {importlib.import_module(backend).__version__}",
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "xarray": xr.__version__,
    }


def _float(number: float) -> float | None:
    """JSON has no NaN."""
    return float(number) if math.isfinite(number) else None


def _bounds(interval: np.ndarray) -> list[float] | None:
    return interval.tolist() if np.isfinite(interval).all() else None


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _checksum(record: dict[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _files(path: Any) -> tuple[Path, Path]:
    """The page, and the data beside it. Either tells the other."""
    file = Path(path)
    if file.suffix not in (".html", ".json"):
        raise ValueError(f"`path` must end in .html, or .json. Received: path={str(path)!r}")
    return file.with_suffix(".html"), file.with_suffix(".json")


def _save(record: dict[str, Any], html_file: Path, json_file: Path) -> None:
    shown = page(record)
    record = {**record, "page": hashlib.sha256(shown.encode()).hexdigest()}
    record["checksum"] = _checksum(record)
    text = _json(record)
    contents = {json_file: text, html_file: with_data(shown, text)}
    partial = {file: file.with_name(f"{file.name}.{os.getpid()}.partial") for file in contents}
    try:
        for file, content in contents.items():
            partial[file].write_text(content, encoding="utf-8", newline="\n")
        for file in contents:  # nobody sees half a file
            os.replace(partial[file], file)
    finally:
        for file in contents:
            partial[file].unlink(missing_ok=True)


def _load(file: Path) -> tuple[dict[str, Any], str, str]:
    """What is in one of the two files: the record, the page without it, and the record as it is written there."""
    try:
        text = file.read_text(encoding="utf-8")
        shown, data = without_data(text) if file.suffix == ".html" else ("", text)
        record = json.loads(data)
        name, _, version = record["schema"].partition("/")
        newer = int(version) > _VERSION
        if name != _SCHEMA:
            raise ValueError(f"its schema is {name!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not an audit made by `explain.audit`, or it is damaged: {error}") from None
    if newer:
        raise ValueError(
            f"{file} was made by a newer kerasfactory: it has schema {version}, and this one reads up to {_VERSION}. "
            "Verify it with that."
        )
    return record, shown, data


def _intact(files: tuple[Path, Path], given: Path) -> tuple[dict[str, Any], list[str]]:
    """The record in the given one of the two files, and what was done to either since they were written."""
    loaded = {given: _load(given)}
    findings = []
    for file in files:
        if file not in loaded:
            try:
                loaded[file] = _load(file)
            except (FileNotFoundError, ValueError) as error:
                findings.append(f"{file.name} is missing." if isinstance(error, FileNotFoundError) else str(error))
                continue
        record, shown, data = loaded[file]
        text = _json(record) if "NaN" not in data else ""
        if record.get("checksum") != _checksum(record):
            findings.append(f"The data in {file.name} were changed: they do not have their checksum any more.")
        elif data != (escaped(text) if shown else text):
            findings.append(f"The data in {file.name} are not written as an audit writes them.")
        elif shown and hashlib.sha256(shown.encode()).hexdigest() != record["page"]:
            findings.append(f"What {file.name} shows was changed.")
        elif shown and record["environment"]["kerasfactory"] == kerasfactory.__version__ and shown != page(record):
            findings.append(f"{file.name} does not show what its data say.")
    if len(loaded) == 2:
        one, other = (dict(_leaves(loaded[file][0])) for file in files)
        paths = [path for path in {**one, **other} if repr(one.get(path)) != repr(other.get(path))]
        if paths:
            findings.append(f"{files[0].name} and {files[1].name} differ in {_some_of(paths)}.")
    return loaded[given][0], findings


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(entry, f"{path}/{key}" if path else str(key))
    else:
        yield path, value


_SAID_OF_HASHES = {
    "model/weights": "The weights of the model are not those that were audited.",
    "model/configuration": "The configuration of the model is not the one that was audited.",
    "data/x": "The data are not those of the audit.",
    "data/labels": "The labels are not those of the audit.",
    "data/background": "The background data are not those of the audit.",
}


def _differences(before: dict[str, Any], now: dict[str, Any], absolute: float) -> list[str]:
    """What two records say differently, in sentences; numbers if they lie further apart than rounding puts them."""
    findings = []
    for old, new in zip(before["claims"], now["claims"], strict=False):
        if old["verdict"] != new["verdict"]:
            findings.append(f"“{old['claim']}” was {old['verdict']} and is now {new['verdict']}. {new['reason']}")
    by_section: dict[str, list[str]] = {}
    one, other = dict(_leaves(before)), dict(_leaves(now))
    for path in {**one, **other}:
        section, _, rest = path.partition("/")
        if section in ("environment", "page", "checksum") or rest.endswith(("/verdict", "/reason")):
            continue
        old, new = one.get(path), other.get(path)
        if not _same(old, new, _PROBABILITY if "/p_" in path else absolute):
            if path in _SAID_OF_HASHES:
                findings.append(_SAID_OF_HASHES[path])
            else:
                by_section.setdefault(section, []).append(f"{rest} was {old} and is now {new}")
    return findings + [f"In “{section}”, {_some_of(differing)}." for section, differing in by_section.items()]


def _same(old: Any, new: Any, absolute: float) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=_RELATIVE, abs_tol=absolute)
    return bool(old == new)


def _some_of(entries: list[str]) -> str:
    return "; ".join(entries[:3]) + (f"; and {len(entries) - 3} more" if len(entries) > 3 else "")
