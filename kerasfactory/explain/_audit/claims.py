"""The claims of an audit: how each is tested, the sentence, the verdict and the numbers behind it.

A new claim is a new function in `TESTS`, or one more claim from a function that is there. No other file lists them;
`schema.py` describes what each function measures.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import xarray as xr

from kerasfactory._arguments import generator
from kerasfactory.explain._attribution import attribute
from kerasfactory.explain._capture import capture, recomposition_error
from kerasfactory.explain._claims import feature_claims
from kerasfactory.explain._controls import attention_controls
from kerasfactory.explain._engine.attention import reads_tokens
from kerasfactory.explain._engine.data import named_inputs, rows_of
from kerasfactory.explain._engine.features import features_of, match
from kerasfactory.explain._engine.observe import rounding_of
from kerasfactory.explain._engine.outputs import (
    NoSpreadError,
    check_labels,
    compiled_loss,
    loss_values,
    predictions,
    resolve_loss,
)
from kerasfactory.explain._engine.skill import skill_of
from kerasfactory.explain._engine.statistics import focused_bh
from kerasfactory.explain._faithfulness import faithfulness
from kerasfactory.explain._sanity import parameter_randomization, seed_agreement

_EXACT = 1e-4  # the largest error of an exact capture, relative; in half precision it is that of its rounding

_OF_ATTRIBUTE = ("method", "task", "target", "query", "feature_names", "special_tokens")

Claim = dict[str, Any]
Result = tuple[dict[str, Any] | None, list[Claim]]  # what was measured, as JSON, and the claims that it decides


class Keys(NamedTuple):
    """Which of the keys of an attribution are features of the data."""

    kept: np.ndarray  # (feature,)
    mask: Any  # the `feature_mask` that says which entries they are; nothing if these are those of axis 1
    unclear: str  # why there is no telling, or ""


def keys_of(attribution: xr.DataArray, x: Any, feature_mask: Any) -> Keys:
    """Raises a `ValueError` for a `feature_mask` that does not fit `x`."""
    reason = ""
    counts = {} if feature_mask is None else {"mask": features_of(x, feature_mask).total}
    if feature_mask is None or getattr(x, "ndim", 0) == 2:  # the keys may be columns that the mask puts together
        try:
            counts["axis"] = features_of(x, None).total
        except ValueError as error:
            reason = str(error)
    for source, count in counts.items():
        try:
            kept = match(attribution, x, (count,), None).kept
        except ValueError as error:
            reason = reason or str(error)
        else:
            return Keys(kept, feature_mask if source == "mask" else None, "")
    return Keys(np.arange(attribution.sizes["feature"]), None, reason)


class Subject(NamedTuple):
    """What is audited, and with which settings."""

    model: keras.Model
    x: Any  # an array (sample, feature, ...), or a dictionary or list of arrays
    y: np.ndarray | None  # (sample, ...)
    background: Any  # like `x`, or nothing
    groups: np.ndarray | None  # (sample,): labels of what belongs together
    models: Sequence[keras.Model]  # from other seeds
    digests: list[str]  # of their weights
    attribution: xr.DataArray  # (sample, feature), to all keys
    keys: "Keys"
    settings: dict[str, Any]  # those of the record
    batch_size: int | None  # that it runs with
    draws: int  # of the nulls
    unusable_loss: str  # why the loss of single samples cannot be computed, or ""
    untestable: str  # why no claim can be tested, or ""
    verbose: Any = 0  # where what takes long shows its progress

    @property
    def features(self) -> list[str]:
        names = self.attribution.coords.get("feature", range(self.attribution.sizes["feature"]))
        return [str(name) for name in np.asarray(names)[self.keys.kept]]

    @property
    def clusters(self) -> dict[str, Any]:
        return {"groups": self.groups, **self.chosen("block")}

    @property
    def running(self) -> dict[str, Any]:
        return {**self.chosen("layers"), "batch_size": self.batch_size, "verbose": 0}

    def chosen(self, *names: str) -> dict[str, Any]:
        return {name: self.settings[name] for name in names}

    def of(self, rows: np.ndarray, clusters: np.ndarray) -> "Subject":
        """The same with some of the samples."""
        are_grouped = self.groups is not None or self.settings["block"] is not None
        return self._replace(
            x=rows_of(self.x, rows),
            y=None if self.y is None else self.y[rows],
            attribution=self.attribution.isel(sample=rows),
            groups=clusters[rows] if are_grouped else None,
            settings=self.settings | {"block": None},
        )


def _claim(
    identifier: str,
    sentence: str,
    statistic: str,
    reason: str,
    verdict: str = "undetermined",
    value: float | None = None,
    p_value: float | None = None,
    interval: list[float] | None = None,
    p_opposite: float | None = None,
) -> Claim:
    return {
        "id": identifier,
        "claim": sentence,
        "feature": None,
        "verdict": verdict,
        "statistic": {"name": statistic, "value": value},
        "p_value": p_value,
        "p_opposite": p_opposite,
        "p_adjusted": None,
        "is_made": True,
        "interval": interval,
        "reason": reason,
    }


def exact_capture(subject: Subject) -> tuple[dict[str, Any], list[Claim]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = capture(subject.model, rows_of(subject.x, slice(subject.batch_size or 32)), **subject.running)
    errors = recomposition_error(subject.model, subject.x, **subject.running)
    found: dict[str, Any] = {
        "tolerance": max(_EXACT, rounding_of(subject.model)),
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
    all_errors = [found["prediction_difference"], *(layer["recomposition_error"] for layer in found["layers"])]
    worst = None if None in all_errors else max(all_errors)
    if found["not_captured"] or worst is None:
        verdict, reason = "undetermined", " ".join(found["not_captured"]) or "One of the errors is NaN."
    else:
        exact = worst <= found["tolerance"]
        verdict = "supported" if exact else "refuted"
        reason = f"It is {'at most' if exact else 'above'} {found['tolerance']:g}, the most that rounding explains."
    sentence = "The captured scores are those that the model uses, and capturing them changes nothing."
    return found, [_claim("capture", sentence, "largest relative error", reason, verdict, worst)]


def _attention(subject: Subject) -> Result:
    sentences = {
        "uniform": "The output depends on where the model attends: it changes if all keys get the same weight.",
        "permuted": "The output depends on which key gets which weight: it changes if weights are shuffled.",
    }
    worse = "The model does worse without its attention: its loss rises if all keys get the same weight."
    statistics = {**dict.fromkeys(sentences, "share of rows whose output changes"), "loss": "increase of the loss"}

    def untested(reason):
        said = {**sentences, "loss": worse}
        return None, [_claim(f"attention-{name}", said[name], statistics[name], reason) for name in said]

    if subject.untestable:
        return untested(subject.untestable)
    no_loss = subject.unusable_loss
    settings = {**subject.chosen("task", "target", "layers", "tolerance", "level", "seed"), **subject.clusters}
    labels = None if no_loss else subject.y
    try:
        result = attention_controls(
            subject.model,
            subject.x,
            labels,
            steps=0,
            batch_size=subject.batch_size,
            verbose=subject.verbose,
            **settings,
        )
    except NoSpreadError as error:
        return untested(str(error))
    controls, claims = [], []
    for name in result["control"].values.tolist():
        control = result.sel(control=name)
        controls.append(
            {
                "control": name,
                **{key: float(control[key]) for key in ("share", "median_change", "mean_change")},
                "interval": bounds(control["interval"].values),
                "median_distance": float(control["jsd"].median()),
                "p_value": control["p_value"].item(),
                "p_opposite": control["p_opposite"].item(),
            }
        )
        if name in sentences:
            verdict, reason = _verdict_on_change(controls[-1], result.attrs, subject.settings["level"])
            found = (controls[-1]["share"], controls[-1]["p_value"], controls[-1]["interval"])
            opposite = controls[-1]["p_opposite"]
            statistic = statistics[name]
            claims.append(
                _claim(f"attention-{name}", sentences[name], statistic, reason, verdict, *found, p_opposite=opposite)
            )
    measured = {key: result.attrs[key] for key in ("change", "tolerance", "smallest_share", "draws")}
    measured |= {"samples": result.sizes["sample"], "controls": controls, "loss": None}
    if no_loss:
        claims.append(_claim("attention-loss", worse, statistics["loss"], no_loss))
    else:
        measured["loss"], claim = _loss_of_attention(result, worse, statistics["loss"], subject.settings["level"])
        claims.append(claim)
    return measured, claims


def _verdict_on_change(control: dict[str, Any], attributes: dict[str, Any], level: float) -> tuple[str, str]:
    """Whether the output changes under a control, and why that is the verdict."""
    tolerance, least = attributes["tolerance"], attributes["smallest_share"]
    changed = f"by more than {tolerance:g}, {attributes['change']},"
    if control["p_value"] <= level:
        return "supported", f"The output changes {changed} in more than {least:.0%} of the rows."
    if control["mean_change"] > tolerance:
        reason = f"The output is not shown to change {changed} in more than {least:.0%} of the rows."
        return "undetermined", f"{reason} But its mean change is larger than that: a few rows decide."
    if control["p_opposite"] <= level:
        return (
            "refuted",
            f"The output changes {changed} in less than {least:.0%} of the rows, and its mean change is smaller.",
        )
    return (
        "undetermined",
        f"There are too few rows to tell whether the output changes {changed} in {least:.0%} of them.",
    )


def _loss_of_attention(result: xr.Dataset, sentence: str, statistic: str, level: float) -> tuple[dict[str, Any], Claim]:
    """What uniform attention makes of the loss, and the claim that it makes it larger."""
    found: dict[str, Any] = {
        "name": result.attrs["loss"],
        "value": result.attrs["loss_value"],
        "increase": result["loss_increase"].item(),
        "interval": bounds(result["mean_interval"].values),
        "p_value": result["p_value_loss"].item(),
        "p_opposite": result["p_opposite_loss"].item(),
    }
    most = f"{result.attrs['tolerance']:.0%} of the loss"
    verdict, reason = "undetermined", f"The data do not decide whether it is above 0 or at most {most}."
    if found["p_opposite"] <= level:
        verdict, reason = "refuted", f"It is at most {most}."
    elif found["p_value"] <= level and found["interval"] and found["interval"][0] > 0:
        verdict, reason = "supported", "The interval lies above 0."
    numbers = (found["increase"], found["p_value"], found["interval"])
    return found, _claim(
        "attention-loss", sentence, statistic, reason, verdict, *numbers, p_opposite=found["p_opposite"]
    )


def _ranking(subject: Subject) -> Result:
    method = subject.settings["method"]
    sentences = {
        "comprehensiveness": f"The output depends on the features that “{method}” ranks first more than on others.",
        "sufficiency": f"The features that “{method}” ranks first suffice for the output better than others do.",
    }
    if untestable := _no_ranking(subject):
        return None, [_claim(f"ranking-{name}", said, f"AOPC {name}", untestable) for name, said in sentences.items()]
    result = faithfulness(
        subject.model,
        subject.x,
        subject.attribution,
        background=subject.background,
        draws=subject.draws,
        batch_size=subject.batch_size,
        verbose=subject.verbose,
        feature_mask=subject.keys.mask,
        **subject.chosen("task", "target", "special_tokens", "level", "seed"),
        **subject.clusters,
    )
    first, others = _removed(result, subject.attribution.coords["in_view"].values[:, subject.keys.kept])
    tests, claims = [], []
    for name, suffix, removed in (("comprehensiveness", "", first), ("sufficiency", "_sufficiency", others)):
        found: dict[str, Any] = {
            "name": name,
            "removed": removed.tolist(),
            "mean_change": result[name].mean("sample").values.tolist(),
            "aopc": float(result[f"aopc_{name}"]),
            "interval": bounds(result[f"interval{suffix}"].values),
            "observed": result.attrs[f"observed{suffix}"],
            "null": result[f"null{suffix}"].values.tolist(),
            "p_value": result[f"p_value{suffix}"].item(),
            "p_opposite": result[f"p_opposite{suffix}"].item(),
        }
        tests.append(found)
        sign = 1 if name == "comprehensiveness" else -1
        worse = int((sign * result[f"null{suffix}"].values < sign * found["observed"]).sum())
        reason = f"The ranking does better than {worse} of {subject.draws} rankings that know nothing."
        numbers = (found["aopc"], found["p_value"], found["interval"])
        verdict = _against_chance(found, subject)
        sentence, statistic = sentences[name], f"AOPC {name}"
        claims.append(_claim(f"ranking-{name}", sentence, statistic, reason, verdict, *numbers, found["p_opposite"]))
    keys = ("removal", "background", "change", "target", "draws", "null_samples")
    return {**{key: result.attrs[key] for key in keys}, "tests": tests}, claims


def _removed(result: xr.Dataset, in_view: np.ndarray) -> tuple[np.ndarray, ...]:
    """How many features were removed, first and instead the others, (fraction,): means where samples differ."""
    ranked = result["comprehensiveness"].notnull().all("fraction")
    first = result["removed"].where(ranked).mean("sample") if "sample" in result["removed"].dims else result["removed"]
    others = in_view[ranked.values].sum(axis=1).mean() - first
    rounded = [counts.values.round(1) for counts in (first, others)]
    whole = all((counts == np.floor(counts)).all() for counts in rounded)
    return tuple(counts.astype(int) if whole else counts for counts in rounded)


def _randomization(subject: Subject) -> Result:
    method, statistic = subject.settings["method"], "median share that is left"
    sentence = (
        f"What “{method}” shows depends on the learned weights: at most half of it is left when they are shuffled."
    )
    if subject.untestable:
        return None, [_claim("randomization", sentence, statistic, subject.untestable)]
    settings = subject.chosen(*_OF_ATTRIBUTE, "layers", "level", "seed")
    result = parameter_randomization(subject.model, subject.x, verbose=0, **settings)
    found: dict[str, Any] = {
        **{key: result.attrs[key] for key in ("tolerance", "draws", "samples")},
        "median_kept": as_float(result["median_kept"].item()),
        "interval": bounds(result["interval"].values),
        "distance": result["distance"].values.tolist(),
        "chance": result["null"].mean("relabeling").values.tolist(),
        "p_value": result["p_value"].item(),
        "p_opposite": result["p_opposite"].item(),
    }
    if found["median_kept"] is None:
        reason = "The attribution is the same for all features, so nothing can be left of it."
        return found, [_claim("randomization", sentence, statistic, reason)]
    verdict, reason = "undetermined", f"The interval includes {found['tolerance']:g}."
    low, high = found["interval"]
    if high <= found["tolerance"]:
        verdict, reason = "supported", "A model that was never trained passes, too: this is no proof of faithfulness."
    elif low > found["tolerance"]:
        verdict, reason = "refuted", "The data or the architecture make it look as it does, not the learned weights."
    numbers = (found["median_kept"], found["p_value"], found["interval"], found["p_opposite"])
    return found, [_claim("randomization", sentence, statistic, reason, verdict, *numbers)]


def _seeds(subject: Subject) -> Result:
    sentence = "Models trained in the same way from other seeds agree on the first features more than by chance."
    statistic = "overlap of what is ranked first"
    given = "" if subject.models else "No models from other seeds were given (`models=[...]`)."
    if any(reads_tokens(subject.model, array) for array in named_inputs(subject.x).values()):
        given = "A position holds a different word in each text, so a ranking of positions says nothing about words."
    if untestable := subject.untestable or _one_feature(subject) or given:
        return None, [_claim("seeds", sentence, statistic, untestable)]
    settings = subject.chosen(*_OF_ATTRIBUTE, "seed")
    others = [attribute(other, subject.x, **settings, **subject.running) for other in subject.models]
    result = seed_agreement([subject.attribution, *others], draws=subject.draws, **subject.chosen("level", "seed"))
    of_keys = (result[name].values[subject.keys.kept] for name in ("mean", "spread"))
    statistics = zip(subject.features, *of_keys, strict=True)
    found: dict[str, Any] = {
        "models": subject.digests,
        **{key: result.attrs[key] for key in ("top_k", "draws", "chance")},
        "overlap": result["overlap"].item(),
        "interval": bounds(result["interval"].values),
        "null": result["null"].values.tolist(),
        "p_value": result["p_value"].item(),
        "p_opposite": result["p_opposite"].item(),
        "features": [
            {"feature": feature, "mean": as_float(mean), "spread": as_float(spread)}
            for feature, mean, spread in statistics
        ],
    }
    reason = (
        f"{1 + len(others)} models, compared by the first {found['top_k']} of {len(subject.features)} features in each "
        f"ranking. The overlap by chance is {found['chance']:.2g}."
    )
    numbers = (found["overlap"], found["p_value"], found["interval"], found["p_opposite"])
    return found, [_claim("seeds", sentence, statistic, reason, _against_chance(found, subject), *numbers)]


def _features(subject: Subject) -> Result:
    statistic = "increase of the loss when its values are resampled"

    def claim(name, reason, *found, is_made=True):
        sentence = f"{name}: its attribution is high, and it tells the model something that other features do not."
        claim = _claim(f"feature/{name}", sentence, statistic, reason, *found)
        return {**claim, "feature": name, "is_made": is_made}

    if not isinstance(subject.x, dict | list) and reads_tokens(subject.model, subject.x):
        return None, []  # a position holds another word in each text
    if untestable := _no_features(subject):
        return None, [claim(feature, untestable) for feature in subject.features]
    settings = {**subject.chosen("feature_mask", "special_tokens", "level", "seed"), **subject.clusters}
    with warnings.catch_warnings():  # the page tells of copies
        warnings.filterwarnings("ignore", message=".* samples are exact copies of others")
        result = feature_claims(
            subject.model,
            subject.x,
            subject.y,
            subject.attribution,
            background=subject.background,
            batch_size=subject.batch_size,
            verbose=subject.verbose,
            **settings,
        )
    claims, names = [], set[str]()
    for number, name in enumerate(map(str, result["feature"].values)):
        while name in names:  # as of two groups: “a” with “b + c”, and “a + b” with “c”
            name += " (together)"
        names.add(name)
        found = result.isel(feature=number)
        verdict, reason, is_made = (found[key].item() for key in ("verdict", "reason", "claimed"))
        effect, p_value = as_float(found["effect"].item()), found["p_value"].item()
        numbers = (effect, p_value, bounds(found["interval"].values), found["p_opposite"].item())
        claims.append(claim(name, reason, verdict, *(numbers if effect is not None else ()), is_made=is_made))
    return {key: result.attrs[key] for key in ("margin", "draws", "clusters", "copies")}, claims


def _no_features(subject: Subject) -> str:
    """Why no single feature can be tested, if so."""
    if any(reads_tokens(subject.model, array) for array in named_inputs(subject.x).values()):
        return (
            "The model reads a text. A token cannot be resampled given the rest of its text, and no other feature can "
            "be resampled given a text."
        )
    if subject.settings["target"] is not None and subject.y is not None and subject.y[0].size > 1:
        return (
            "The loss is that of all outputs, but `target` asks for one. Audit a model that has only this output, with "
            "its labels."
        )
    return _no_ranking(subject) or subject.unusable_loss


# By the section of the record that holds what was measured. An audit has the claims in this order.
TESTS: dict[str, Callable[[Subject], Result]] = {
    "controls": _attention,
    "faithfulness": _ranking,
    "randomization": _randomization,
    "seeds": _seeds,
    "features": _features,
}


def judge(claims: list[Claim], level: float) -> None:
    """Adjusts the p-values of all claims together, in both directions; what is not significant then is undetermined.

    Features that are found needed though no claim is made about them are a set of rejections of their own.
    """
    tested = [claim for claim in claims if claim["p_value"] is not None]
    is_made = np.array([claim["is_made"] for claim in tested], bool)
    p_values = np.array([claim["p_value"] for claim in tested])
    adjusted = np.where(is_made, focused_bh(p_values, is_made), focused_bh(p_values, ~is_made))
    against = focused_bh(
        np.array([1 if claim["p_opposite"] is None else claim["p_opposite"] for claim in tested]), is_made
    )
    for claim, p_adjusted, p_against in zip(tested, adjusted, against, strict=True):
        claim["p_adjusted"] = float(p_adjusted)
        is_against = claim["verdict"] == "refuted"
        if claim["verdict"] != "undetermined" and (p_against if is_against else p_adjusted) > level:
            claim["verdict"] = "undetermined"
            which = "the p-value against it" if is_against else "its p-value"
            claim["reason"] += f" But {which}, adjusted for {len(tested)} claims, is above {level:g}."


def as_float(number: float) -> float | None:
    """JSON has no NaN."""
    return float(number) if math.isfinite(number) else None


def bounds(interval: np.ndarray) -> list[float] | None:
    """A pair of numbers, or nothing."""
    return interval.tolist() if np.isfinite(interval).all() else None


def _against_chance(found: dict[str, Any], subject: Subject) -> str:
    """The verdict on a number beside those that come about by chance."""
    if found["p_value"] <= subject.settings["level"]:
        return "supported"
    return "refuted" if found["p_opposite"] <= subject.settings["level"] else "undetermined"


def _one_feature(subject: Subject) -> str:
    return "There is only one feature, so there is nothing to rank." if len(subject.features) < 2 else ""


def _no_ranking(subject: Subject) -> str:
    """Why no feature can be removed, if so."""
    return subject.untestable or _one_feature(subject) or subject.keys.unclear


def measured_skill(
    model: keras.Model,
    x: Any,
    y: np.ndarray | None,
    clusters: np.ndarray,
    settings: dict[str, Any],
    batch_size: Any,
) -> tuple[dict[str, Any] | None, str]:
    """The model's loss beside that of a constant; or why the loss of single samples cannot be computed.

    Raises a `ValueError` for labels that do not fit the loss.
    """
    if y is None:
        return None, "Without labels (`y`), the loss of the model is not known."
    if getattr(model, "loss", None) is None:
        return None, "The model is not compiled with a loss, so it cannot be seen whether it does worse."
    try:
        loss = resolve_loss(model, None)
        outputs, labels = predictions(model, x, batch_size, settings["target"]), y.reshape(len(y), -1)
        compiled_loss(loss, labels, outputs)
    except ValueError as error:  # of several losses, or of a name that Keras does not know
        return None, f"The loss that the model is compiled with cannot be used. {error}"
    check_labels(loss, labels, outputs)
    try:
        loss_values(loss, labels, outputs)
    except Exception as error:  # somebody's own function may raise anything
        return None, f"The loss that the model is compiled with cannot be used. {error}"
    rng = generator(settings["seed"], "skill")
    found = skill_of(loss, labels * 1, outputs, clusters, settings["level"], rng)
    interval = bounds(np.array(found["skill_interval"]))
    return {**{key: as_float(found[key]) for key in found if key != "skill_interval"}, "skill_interval": interval}, ""
