"""The claims of an audit: how each is tested, the sentence, the verdict and the numbers behind it.

A new claim is a new function in `TESTS`, or one more claim from a function that is there. No other file lists them.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import xarray as xr
from scipy import stats

from kerasfactory.explain._attribution import attribute
from kerasfactory.explain._capture import capture, recomposition_error
from kerasfactory.explain._claims import feature_claims
from kerasfactory.explain._controls import attention_controls
from kerasfactory.explain._engine.observe import rounding_of
from kerasfactory.explain._engine.outputs import (
    NoSpreadError,
    check_labels,
    compiled_loss,
    loss_values,
    predictions,
    resolve_loss,
)
from kerasfactory.explain._faithfulness import faithfulness
from kerasfactory.explain._sanity import parameter_randomization, seed_agreement

_EXACT = 1e-4  # the largest error of an exact capture, relative; in half precision it is that of its rounding

Claim = dict[str, Any]
Result = tuple[dict[str, Any] | None, list[Claim]]  # what was measured, as JSON, and the claims that it decides


class Subject(NamedTuple):
    """What is audited, and with which settings."""

    model: keras.Model
    x: np.ndarray  # (sample, feature, ...)
    y: np.ndarray | None  # (sample, ...)
    background: np.ndarray | None  # (row, feature, ...)
    models: Sequence[keras.Model]  # from other seeds
    digests: list[str]  # of their weights
    attribution: xr.DataArray  # (sample, feature)
    settings: dict[str, Any]  # those of the record
    batch_size: int | None  # that it runs with
    draws: int  # of the nulls
    unusable_loss: str  # why the loss of single samples cannot be computed, or ""
    untestable: str  # why no claim can be tested, or ""

    @property
    def features(self) -> list[str]:
        names = self.attribution.coords.get("feature", range(self.attribution.sizes["feature"]))
        return [str(name) for name in np.asarray(names)]

    @property
    def running(self) -> dict[str, Any]:
        return {**self.chosen("layers"), "batch_size": self.batch_size, "verbose": 0}

    def chosen(self, *names: str) -> dict[str, Any]:
        return {name: self.settings[name] for name in names}


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
        "interval": interval,
        "reason": reason,
    }


def exact_capture(subject: Subject) -> tuple[dict[str, Any], list[Claim]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = capture(subject.model, subject.x[: subject.batch_size or 32], **subject.running)
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
        verdict, reason = "undetermined", " ".join(found["not_captured"]) or "An error is not a number."
    else:
        exact = worst <= found["tolerance"]
        verdict = "supported" if exact else "refuted"
        reason = f"It is {'at most' if exact else 'above'} {found['tolerance']:g}, the largest that rounding makes."
    sentence = "The captured scores are those that the model uses, and capturing them changes nothing."
    return found, [_claim("capture", sentence, "largest relative error", reason, verdict, worst)]


def _attention(subject: Subject) -> Result:
    sentences = {
        "uniform": "The output depends on where the model attends: it changes if all keys get the same weight.",
        "permuted": "The output depends on which key gets which weight: it changes if they are dealt out at random.",
    }
    worse = "The model does worse without its attention: its loss is larger if all keys get the same weight."
    statistics = {**dict.fromkeys(sentences, "share of rows whose output changes"), "loss": "increase of the loss"}

    def untested(reason):
        said = {**sentences, "loss": worse}
        return None, [_claim(f"attention-{name}", said[name], statistics[name], reason) for name in said]

    if subject.untestable:
        return untested(subject.untestable)
    no_loss = _no_loss_of_attention(subject)
    settings = subject.chosen("layers", "level", "seed")
    labels = None if no_loss else subject.y
    try:
        result = attention_controls(
            subject.model, subject.x, labels, batch_size=subject.batch_size, verbose=0, **settings
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
    measured = {key: result.attrs[key] for key in ("change", "tolerance", "smallest_share", "draws", "steps")}
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
        return "supported", f"It changes {changed} in more than {least:.0%} of the rows."
    if control["mean_change"] > tolerance:
        reason = f"It is not shown to change {changed} in {least:.0%} of the rows, but its mean change is larger."
        return "undetermined", f"{reason} A few rows decide."
    if control["p_opposite"] <= level:
        return "refuted", f"It changes {changed} in less than {least:.0%} of the rows, and its mean change is smaller."
    return "undetermined", f"The rows are too few to tell whether it changes {changed} in {least:.0%} of them."


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
    verdict, reason = "undetermined", f"The interval does not decide whether it is at most {most}."
    if found["p_opposite"] <= level:
        verdict, reason = "refuted", f"It is at most {most}."
    elif found["p_value"] <= level and found["interval"] and found["interval"][0] > 0:
        verdict, reason = "supported", "The interval lies above 0."
    numbers = (found["increase"], found["p_value"], found["interval"])
    return found, _claim(
        "attention-loss", sentence, statistic, reason, verdict, *numbers, p_opposite=found["p_opposite"]
    )


def _no_loss_of_attention(subject: Subject) -> str:
    """Why the loss without the model's attention cannot be computed, if so."""
    if subject.y is None:
        return "Without labels, `y`, there is no telling what the model does worse."
    if getattr(subject.model, "loss", None) is None:
        return "The model is not compiled with a loss: there is no telling what it does worse."
    return subject.unusable_loss


def _ranking(subject: Subject) -> Result:
    method, count = subject.settings["method"], len(subject.features)
    sentences = {
        "comprehensiveness": f"The output needs the features that “{method}” ranks first, more than others.",
        "sufficiency": f"The features that “{method}” ranks first are enough for the output, more than others.",
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
        verbose=0,
        **subject.chosen("level", "seed"),
    )
    tests, claims, counts = [], [], result["removed"].values
    for name, suffix, removed in (("comprehensiveness", "", counts), ("sufficiency", "_sufficiency", count - counts)):
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
        worse = round((1 - found["p_value"]) * (1 + subject.draws))
        reason = f"It does better than {worse} of {subject.draws} rankings that know nothing."
        numbers = (found["aopc"], found["p_value"], found["interval"])
        verdict = _against_chance(found, subject)
        claims.append(_claim(f"ranking-{name}", sentences[name], f"AOPC {name}", reason, verdict, *numbers))
    keys = ("removal", "background", "change", "target", "draws", "null_samples")
    return {**{key: result.attrs[key] for key in keys}, "tests": tests}, claims


def _randomization(subject: Subject) -> Result:
    method, statistic = subject.settings["method"], "median share that is left"
    sentence = (
        f"What “{method}” shows is in the weights of the attention layers: when they are shuffled, at most half of it "
        "is left."
    )
    if subject.untestable:
        return None, [_claim("randomization", sentence, statistic, subject.untestable)]
    settings = subject.chosen("method", "layers", "level", "seed")
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
        reason = "It does not tell one feature from another: nothing can be left."
        return found, [_claim("randomization", sentence, statistic, reason)]
    verdict, reason = "undetermined", "The interval does not decide it."
    low, high = found["interval"]
    if high <= found["tolerance"]:
        verdict, reason = "supported", "A model that was never trained passes as well: this is no proof of more."
    elif low > found["tolerance"]:
        verdict, reason = "refuted", "The data, or the form of the model, make it look as it does."
    numbers = (found["median_kept"], found["p_value"], found["interval"])
    return found, [_claim("randomization", sentence, statistic, reason, verdict, *numbers)]


def _seeds(subject: Subject) -> Result:
    sentence = "Models trained alike from other seeds rank the same features first, more than by chance."
    statistic = "overlap of what is ranked first"
    given = "" if subject.models else "No models from other seeds were given, `models=[...]`."
    if untestable := subject.untestable or _one_feature(subject) or given:
        return None, [_claim("seeds", sentence, statistic, untestable)]
    settings = subject.chosen("method", "feature_names", "seed")
    others = [attribute(other, subject.x, **settings, **subject.running) for other in subject.models]
    result = seed_agreement([subject.attribution, *others], draws=subject.draws, **subject.chosen("level", "seed"))
    statistics = zip(subject.features, result["mean"].values, result["spread"].values, strict=True)
    found: dict[str, Any] = {
        "models": subject.digests,
        **{key: result.attrs[key] for key in ("top_k", "draws", "chance")},
        "overlap": result["overlap"].item(),
        "interval": bounds(result["interval"].values),
        "null": result["null"].values.tolist(),
        "p_value": result["p_value"].item(),
        "p_opposite": result["p_opposite"].item(),
        "features": [
            {"feature": feature, "mean": float(mean), "spread": float(spread)} for feature, mean, spread in statistics
        ],
    }
    reason = (
        f"{1 + len(others)} models, first {found['top_k']} of {len(subject.features)} features; chance gives "
        f"{found['chance']:.2g}."
    )
    numbers = (found["overlap"], found["p_value"], found["interval"])
    return found, [_claim("seeds", sentence, statistic, reason, _against_chance(found, subject), *numbers)]


def _features(subject: Subject) -> Result:
    sentence = "{}: its attribution is high, and it tells the model what the other features do not."
    statistic = "increase of the loss without it"

    def claim(feature, reason, *found):
        claim = _claim(f"feature/{feature}", sentence.format(feature), statistic, reason, *found)
        return {**claim, "feature": feature}

    no_table = (
        "" if subject.x.ndim == 2 else "Claims about single features are tested for tables, (sample, feature), alone."
    )
    if untestable := _no_ranking(subject) or no_table or subject.unusable_loss:
        return None, [claim(feature, untestable) for feature in subject.features]
    given = (subject.model, subject.x, subject.y, subject.attribution)
    settings = {**subject.chosen("level", "seed"), "batch_size": subject.batch_size}
    result = feature_claims(*given, background=subject.background, verbose=0, **settings)
    claims, mean = [], result["attribution"].mean()
    for number, feature in enumerate(subject.features):
        found = result.isel(feature=number)
        verdict, effect = str(found["verdict"].item()), as_float(found["effect"].item())
        if effect is None:
            claims.append(claim(feature, "It cannot be tested: it is constant, or there are too few samples."))
            continue
        if verdict == "supported":
            reason = "The loss is larger when its values are resampled, given the others."
        elif verdict == "refuted":
            reason = (
                f"At most {result.attrs['margin']:.0%} of the base loss: the others say the same, or it says nothing."
            )
        elif found["attribution"] <= mean:
            reason = "Its attribution is not above the mean of all: it is not claimed to be high."
        else:
            reason = "The test neither finds an increase nor rules one out."
        numbers = (effect, found["p_value"].item(), bounds(found["interval"].values))
        claims.append(claim(feature, reason, verdict, *numbers))
    return {key: result.attrs[key] for key in ("base_loss", "loss", "margin", "draws")}, claims


# By the section of the record that holds what was measured. An audit has the claims in this order.
TESTS: dict[str, Callable[[Subject], Result]] = {
    "controls": _attention,
    "faithfulness": _ranking,
    "randomization": _randomization,
    "seeds": _seeds,
    "features": _features,
}


def judge(claims: list[Claim], level: float) -> None:
    """Adjusts the p-values for all claims together; what is not significant then is not supported."""
    tested = [claim for claim in claims if claim["p_value"] is not None]
    if tested:
        adjusted = stats.false_discovery_control([claim["p_value"] for claim in tested])
        for claim, p_adjusted in zip(tested, adjusted, strict=True):
            claim["p_adjusted"] = float(p_adjusted)
            if claim["verdict"] == "supported" and p_adjusted > level:
                claim["verdict"] = "undetermined"
                claim["reason"] += f" But adjusted for {len(tested)} claims its p-value is above {level:g}."


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
    return "There is one feature: nothing to rank." if len(subject.features) < 2 else ""


def _no_ranking(subject: Subject) -> str:
    """Why no feature can be removed, if so."""
    keys, entries = len(subject.features), subject.x.shape[1]
    unclear = (
        f"The attribution is to {keys} keys, and axis 1 of `x` has {entries} entries: there is no telling which of "
        "them to remove."
    )
    return subject.untestable or _one_feature(subject) or (unclear if keys != entries else "")


def unusable_loss(model: keras.Model, x: np.ndarray, y: np.ndarray | None, batch_size: int | None) -> str:
    """Why the loss of single samples cannot be computed, if so. Raises a `ValueError` for labels that do not fit it."""
    if y is None:
        return "Without labels, `y`, there is no telling what the feature says about the outcome."
    if getattr(model, "loss", None) is None:
        return "The model is not compiled with a loss: there is no telling what is worse without the feature."
    try:
        loss = resolve_loss(model, None)
    except ValueError as error:
        return f"The loss that the model is compiled with cannot be used. {error}"
    outputs, labels = predictions(model, x, batch_size), y.reshape(len(y), -1)
    try:
        compiled_loss(loss, labels, outputs)
    except ValueError as error:  # of a name that Keras does not know
        return f"The loss that the model is compiled with cannot be used. {error}"
    check_labels(loss, labels, outputs)
    try:
        loss_values(loss, labels, outputs)
    except Exception as error:  # somebody's own function may raise anything
        return f"The loss that the model is compiled with cannot be used. {error}"
    return ""
