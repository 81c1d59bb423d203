"""An audit of a model's attention: claims, each with its verdict and evidence, in a file that can be checked."""

import importlib
import json
import math
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import scipy
import xarray as xr
from keras import ops

import kerasfactory
from kerasfactory import _backend
from kerasfactory._arguments import checked_level
from kerasfactory.explain._attribution import attribute
from kerasfactory.explain._audit.claims import (
    SEED_CLAIM,
    as_float,
    attention_claims,
    bounds,
    capture_claim,
    claims_of_features,
    judge,
    randomization_claim,
    ranking_claims,
    seed_claim,
)
from kerasfactory.explain._audit.file import (
    ABSOLUTE,
    SCHEMA,
    as_json,
    differences,
    files_of,
    hash_of_json,
    hashed,
    intact,
    load,
    save,
)
from kerasfactory.explain._capture import capture, recomposition_error
from kerasfactory.explain._claims import feature_claims
from kerasfactory.explain._controls import attention_controls
from kerasfactory.explain._engine.data import progress_bar
from kerasfactory.explain._engine.observe import rounding_of
from kerasfactory.explain._engine.outputs import check_labels, loss_values, predictions, resolve_loss
from kerasfactory.explain._engine.statistics import bootstrap_interval
from kerasfactory.explain._engine.store import digest_of
from kerasfactory.explain._faithfulness import faithfulness
from kerasfactory.explain._sanity import parameter_randomization, seed_agreement

_EXACT = 1e-4  # the largest error of an exact capture, relative; in half precision it is that of its rounding
_DRAWS = 200


def audit(
    model: keras.Model,
    x: Any,
    y: Any = None,
    path: str | os.PathLike[str] = "audit.html",
    *,
    method: str = "attention",
    layers: str | Sequence[str] | None = None,
    models: Sequence[keras.Model] = (),
    feature_names: Sequence[str] | None = None,
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
      features relabeled at random, as in `faithfulness`. For sufficiency those that are at most as large count.
    - **The attribution is in the weights**: at most half of it is left when the weights of the attention layers are
      shuffled, as in `parameter_randomization`.
    - **It would come out again**: the models in `models`, trained alike from other seeds, rank the same features first,
      more than by chance, as in `seed_agreement`.
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
        models: The same model trained from other seeds, two or more if possible. Without them the claim about other
            seeds is undetermined.
        level: Of all tests, and 1 minus that of all intervals; between 0 and 0.5.
        batch_size: Samples in a batch.
        verbose: 0 for silence, 1 for a progress bar over the parts of the audit, 2 for one line; `"auto"` as for
            `capture`.
        seed: Of all that is drawn.

    Returns:
        pathlib.Path: The page. The JSON beside it has the keys `schema`, `settings`, `model`, `data`, `environment`,
            `capture`, `attribution`, `controls`, `faithfulness`, `randomization`, `seeds`, `features`, `claims`, `page`
            and `checksum`. Each claim has `claim` (a sentence), `feature` (or null), `verdict`, `statistic` (`name`,
            `value`), `p_value`, `p_adjusted`, `interval` (two bounds) and `reason`. What was not tested is null.

    Raises:
        ValueError: If `x`, `y` or `background` hold NaN or no numbers or do not fit each other; if `path` does not end
            in `.html`, or another argument is out of range; if two of `model` and `models` are copies; and as
            `attribute`, `faithfulness` and `recomposition_error`.
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
    html_file, json_file = files = files_of(path)
    if Path(path) != html_file:
        raise ValueError(f"`path` must end in .html; the JSON file goes beside it. Received: path={str(path)!r}")
    for file in files:
        if file.exists():
            try:
                load(file)
            except ValueError:
                raise FileExistsError(
                    f"{file} exists and is not an audit: it is not overwritten. Choose another `path`."
                ) from None
    if not html_file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(html_file.parent)!r} to write the audit into.")
    checked_level(level)
    settings = {
        "method": method,
        "layers": [layers] if isinstance(layers, str) else layers and list(layers),
        "feature_names": None if feature_names is None else list(feature_names),
        "level": float(level),
        "batch_size": batch_size,
        "seed": seed,
    }
    record = _record(model, x, y, background, models, settings, verbose)
    judge(record["claims"], level)
    save(record, html_file, json_file)
    return html_file


def verify(
    path: str | os.PathLike[str],
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    models: Sequence[keras.Model] = (),
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
        models: The models from other seeds, if the audit was made with such. Without them the claim about other seeds
            is not checked, and a warning says so.
        verbose: As for `audit`.

    Returns:
        list[str]: A sentence for each thing that does not hold any more: a changed file, other weights, another
            configuration, other data, labels or models, other verdicts, other numbers. Empty if all holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an audit, or one from a newer kerasfactory; if the background data are missing; and as
            `audit`.

    Warns:
        UserWarning: If labels or models are missing, or if the versions of Python, Keras, the backend or a library are
            not those of the audit. As the numbers were computed with the new ones, this alone is no finding.

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
    record, findings = intact(files_of(path), Path(path))
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

    now = json.loads(as_json(_record(model, x, y, background, models, record["settings"], verbose)))
    unchecked = set()
    if record["data"]["labels"] and y is None:
        now["data"]["labels"], now["features"] = record["data"]["labels"], record["features"]
        unchecked |= {claim["claim"] for claim in record["claims"] if claim["feature"] is not None}
        warnings.warn("Without labels, `y`, the claims about single features were not checked.", stacklevel=2)
    if record["seeds"] and not models:
        now["seeds"] = record["seeds"]
        unchecked |= {SEED_CLAIM}
        warnings.warn("Without `models`, the claim about models from other seeds was not checked.", stacklevel=2)
    before = {claim["claim"]: claim for claim in record["claims"] if claim["claim"] in unchecked}
    now["claims"] = [before.get(claim["claim"], claim) for claim in now["claims"]]
    judge(now["claims"], record["settings"]["level"])
    changed = [
        f"{name} {version}, now {now['environment'].get(name)}"
        for name, version in record["environment"].items()
        if version != now["environment"].get(name)
    ]
    if changed:
        warnings.warn(f"The audit was made with other versions: {'; '.join(changed)}.", stacklevel=2)
    return differences(record, now, max(ABSOLUTE, rounding_of(model)))


def _record(
    model: Any, x: Any, y: Any, background: Any, models: Any, settings: dict[str, Any], verbose: Any
) -> dict[str, Any]:
    """What an audit says, as JSON; its claims are still to be judged together."""
    x, y, background = _checked(x, y, background)
    digests = _checked_models(model, models)
    level, seed, batch_size = settings["level"], settings["seed"], settings["batch_size"]
    progress = progress_bar(7, verbose, "part")

    common = {"layers": settings["layers"], "batch_size": batch_size, "verbose": 0}
    names = settings["feature_names"]
    attribution = attribute(model, x, method=settings["method"], feature_names=names, seed=seed, **common)
    features = attribution.coords.get("feature", range(attribution.sizes["feature"]))
    features = [str(feature) for feature in np.asarray(features)]
    progress.add(1)
    count = 6 + len(features)  # of claims that a test decides
    few = f"{len(x)} samples are fewer than the {count} claims that they are to decide." if len(x) < count else ""
    alone = "There is one feature: nothing to rank." if len(features) < 2 else ""
    no_ranking = few or alone or _no_ranking(x, features)
    no_claims = no_ranking or _no_claims(model, x, y, batch_size)  # before anything that takes long

    captured = _captured(model, x, common)
    progress.add(1)
    controls = None if few else _controls(model, x, common, level, seed)
    progress.add(1)
    arguments = {"background": background, "level": level, "batch_size": batch_size, "seed": seed}
    draws = max(_DRAWS, math.ceil(count / level))  # so that one claim alone can be significant after the adjustment
    ranking = None if no_ranking else _ranking(model, x, attribution, {**arguments, "draws": draws})
    progress.add(1)
    randomization = None if few else _randomization(model, x, settings)
    progress.add(1)
    no_seeds = few or alone or ("" if models else "No models from other seeds were given, `models=[...]`.")
    seeds = None
    if not no_seeds:
        others = [
            attribute(other, x, method=settings["method"], feature_names=names, seed=seed, **common) for other in models
        ]
        seeds = _seeds([attribution, *others], digests, draws, features, level, seed)
    progress.add(1)
    of_features = None if no_claims else feature_claims(model, x, y, attribution, verbose=0, **arguments)
    progress.add(1)

    claims = [
        capture_claim(captured),
        *attention_claims(controls, few, level),
        *ranking_claims(ranking, no_ranking, settings["method"], level),
        randomization_claim(randomization, few, settings["method"]),
        seed_claim(seeds, no_seeds, level),
        *claims_of_features(of_features, no_claims, features),
    ]
    return {
        "schema": SCHEMA,
        "settings": settings,
        "model": _model_facts(model),
        "data": {
            "x": hashed(x),
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "feature_names": features,
            "labels": None if y is None else hashed(y),
            "background": None if background is None else hashed(background),
        },
        "environment": _environment(),
        "capture": captured,
        "attribution": {
            **{key: attribution.attrs[key] for key in ("method", "query", "target")},
            "features": [
                {
                    "feature": feature,
                    "attribution": float(values.mean()),
                    "interval": bounds(bootstrap_interval(values, np.mean, level, seed)),
                }
                for feature, values in zip(features, attribution.values.T.astype("float64"), strict=True)
            ],
        },
        "controls": controls,
        "faithfulness": ranking,
        "randomization": randomization,
        "seeds": seeds,
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


def _checked_models(model: Any, models: Any) -> list[str]:
    """The hashes of the weights of models from other seeds."""
    if isinstance(models, keras.Model) or not all(isinstance(other, keras.Model) for other in models):
        raise ValueError(
            "`models` must be a list of `keras.Model`, the same model trained from other seeds. Received: "
            f"models={models!r}"
        )
    digests = [digest_of(weight.value for weight in other.weights) for other in (model, *models)]
    if len(set(digests)) < len(digests):
        raise ValueError(
            "Some of `model` and `models` have the same weights: a copy would agree with itself. Leave copies out, and "
            "train each from a seed of its own, `keras.utils.set_random_seed`."
        )
    return digests[1:]


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


def _captured(model: Any, x: np.ndarray, common: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = capture(model, x[: common["batch_size"] or 32], **common)
    errors = recomposition_error(model, x, **common)
    return {
        "tolerance": max(_EXACT, rounding_of(model)),
        "prediction_difference": as_float(max(array.attrs["prediction_difference"] for array in scores.values())),
        "not_captured": [str(one.message) for one in caught if "are not captured" in str(one.message)],
        "layers": [
            {
                "layer": name,
                "class": array.attrs["class"],
                "masks": array.attrs["masks"],
                "heads": array.sizes["head"],
                "recomposition_error": as_float(errors[name]),
            }
            for name, array in scores.items()
        ],
    }


def _controls(model: Any, x: np.ndarray, common: dict[str, Any], level: float, seed: int) -> dict[str, Any]:
    """What the output does when the model attends otherwise, and tests of that against the tolerance."""
    found = attention_controls(model, x, seed=seed, level=level, **common)
    controls = []
    for control in found["control"].values.tolist():
        here = found.sel(control=control)
        controls.append(
            {
                "control": control,
                "median_change": float(here["median_change"]),
                "interval": bounds(here["interval"].values),
                "median_distance": float(here["jsd"].median()),
                "p_value": here["p_value"].item(),
                "p_opposite": here["p_opposite"].item(),
            }
        )
    keys = ("change", "tolerance", "draws", "steps")
    return {**{key: found.attrs[key] for key in keys}, "samples": found.sizes["sample"], "controls": controls}


def _no_ranking(x: np.ndarray, features: list[str]) -> str:
    """Why no feature can be removed, if so."""
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
                "interval": bounds(found["interval"].values),
                "observed": observed,
                "null": null.tolist(),
                "p_value": float((1 + np.sum(sign * (null - observed) >= -rounding)) / (1 + len(null))),
                "p_opposite": float((1 + np.sum(sign * (null - observed) <= rounding)) / (1 + len(null))),
            }
        )
    keys = ("removal", "background", "change", "target", "draws", "null_samples")
    return {**{key: removed.attrs[key] for key in keys}, "tests": tests}


def _randomization(model: Any, x: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """How much of the attribution is left when the weights of the attention layers are shuffled."""
    keys = ("method", "layers", "level", "seed")
    found = parameter_randomization(model, x, verbose=0, **{key: settings[key] for key in keys})
    return {
        **{key: found.attrs[key] for key in ("tolerance", "draws", "samples")},
        "median_kept": as_float(found["median_kept"].item()),
        "interval": bounds(found["interval"].values),
        "distance": found["distance"].values.tolist(),
        "chance": found["null"].mean("relabeling").values.tolist(),
        "p_value": found["p_value"].item(),
        "p_opposite": found["p_opposite"].item(),
    }


def _seeds(
    attributions: list[xr.DataArray], digests: list[str], draws: int, features: list[str], level: float, seed: int
) -> dict[str, Any]:
    """What the audited model ranks first, beside what models from other seeds do."""
    found = seed_agreement(attributions, draws=draws, level=level, seed=seed)
    return {
        "models": digests,
        **{key: found.attrs[key] for key in ("top_k", "draws", "chance")},
        "overlap": found["overlap"].item(),
        "interval": bounds(found["interval"].values),
        "null": found["null"].values.tolist(),
        "p_value": found["p_value"].item(),
        "p_opposite": found["p_opposite"].item(),
        "features": [
            {"feature": feature, "mean": float(mean), "spread": float(spread)}
            for feature, mean, spread in zip(features, found["mean"].values, found["spread"].values, strict=True)
        ],
    }


def _no_claims(model: Any, x: np.ndarray, y: np.ndarray | None, batch_size: int | None) -> str:
    """Why nothing can be said of single features, if so. Labels that the loss does not take raise a `ValueError`."""
    if y is None:
        return "Without labels, `y`, there is no telling what the feature says about the outcome."
    if x.ndim != 2:
        return "Claims about single features are tested for tables, (sample, feature), alone."
    if getattr(model, "loss", None) is None:
        return "The model is not compiled with a loss: there is no telling what is worse without the feature."
    try:
        loss = resolve_loss(model, None)
    except ValueError as error:
        return f"The loss that the model is compiled with cannot be used. {error}"
    outputs, labels = predictions(model, x, batch_size), y.reshape(len(y), -1)
    check_labels(loss, labels, outputs)
    try:
        loss_values(loss, labels, outputs)
    except Exception as error:  # somebody's own function may raise anything
        return f"The loss that the model is compiled with cannot be used. {error}"
    return ""


def _model_facts(model: Any) -> dict[str, Any]:
    try:
        config = json.loads(model.to_json())
        config.pop("compile_config", None)  # how it was trained, which a model may be saved without
        configuration = hash_of_json(config)
    except (NotImplementedError, TypeError):
        configuration = None  # of a subclass that does not say
    return {
        "name": model.name,
        "class": type(model).__name__,
        "parameters": model.count_params(),
        "weights": digest_of(weight.value for weight in model.weights),
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
