"""The claims of an audit: a sentence, a verdict, and the numbers behind it."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

SEED_CLAIM = "Models trained alike from other seeds rank the same features first, more than by chance."


def as_float(number: float) -> float | None:
    """JSON has no NaN."""
    return float(number) if math.isfinite(number) else None


def bounds(interval: np.ndarray) -> list[float] | None:
    """A pair of numbers, or nothing."""
    return interval.tolist() if np.isfinite(interval).all() else None


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


def _by_chance(found: dict[str, Any], level: float) -> str:
    """The verdict on a number beside those that come about by chance."""
    if found["p_value"] <= level:
        return "supported"
    return "refuted" if found["p_opposite"] <= level else "undetermined"


def capture_claim(captured: dict[str, Any]) -> dict[str, Any]:
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


def attention_claims(controls: dict[str, Any] | None, why_not: str, level: float) -> Iterator[dict[str, Any]]:
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


def ranking_claims(ranking: dict[str, Any] | None, why_not: str, method: str, level: float) -> Iterator[dict[str, Any]]:
    said = {
        "comprehensiveness": f"The output needs the features that “{method}” ranks first, more than others.",
        "sufficiency": f"The features that “{method}” ranks first are enough for the output, more than others.",
    }
    for name, claim in said.items():
        if ranking is None:
            yield _claim(claim, f"AOPC {name}", reason=why_not)
            continue
        (found,) = (found for found in ranking["tests"] if found["name"] == name)
        worse = np.sum(np.sign(np.subtract(found["null"], found["observed"])) == (-1 if name[0] == "c" else 1))
        reason = f"It does better than {worse} of {len(found['null'])} rankings that know nothing."
        numbers = (found["aopc"], found["p_value"], found["interval"])
        yield _claim(claim, f"AOPC {name}", *numbers, _by_chance(found, level), reason)


def randomization_claim(found: dict[str, Any] | None, why_not: str, method: str) -> dict[str, Any]:
    claim = (
        f"What “{method}” shows is in the weights of the attention layers: when they are shuffled, at most half of it "
        "is left."
    )
    name = "median share that is left"
    if found is None or found["median_kept"] is None:
        return _claim(claim, name, reason=why_not or "It does not tell one feature from another: nothing can be left.")
    verdict, reason = "undetermined", "The interval does not decide it."
    low, high = found["interval"]
    if high <= found["tolerance"]:
        verdict, reason = "supported", "A model that was never trained passes as well: this is no proof of more."
    elif low > found["tolerance"]:
        verdict, reason = "refuted", "The data, or the form of the model, make it look as it does."
    return _claim(claim, name, found["median_kept"], found["p_value"], found["interval"], verdict, reason)


def seed_claim(found: dict[str, Any] | None, why_not: str, level: float) -> dict[str, Any]:
    name = "overlap of what is ranked first"
    if found is None:
        return _claim(SEED_CLAIM, name, reason=why_not)
    reason = (
        f"{1 + len(found['models'])} models, first {found['top_k']} of {len(found['features'])} features; chance gives "
        f"{found['chance']:.2g}."
    )
    numbers = (found["overlap"], found["p_value"], found["interval"])
    return _claim(SEED_CLAIM, name, *numbers, _by_chance(found, level), reason)


def claims_of_features(found: xr.Dataset | None, why_not: str, features: list[str]) -> Iterator[dict[str, Any]]:
    for number, feature in enumerate(features):
        claim = f"{feature}: its attribution is high, and it tells the model what the other features do not."
        name = "increase of the loss without it"
        if found is None:
            yield _claim(claim, name, reason=why_not, feature=feature)
            continue
        here = found.isel(feature=number)
        verdict, effect = str(here["verdict"].item()), as_float(here["effect"].item())
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
        numbers = (effect, here["p_value"].item(), bounds(here["interval"].values))
        yield _claim(claim, name, *numbers, verdict, reason, feature)


def judge(claims: list[dict[str, Any]], level: float) -> None:
    """Adjusts the p-values for all claims together; what is not significant then is not supported."""
    tested = [claim for claim in claims if claim["p_value"] is not None]
    if tested:
        adjusted = stats.false_discovery_control([claim["p_value"] for claim in tested])
        for claim, p_adjusted in zip(tested, adjusted, strict=True):
            claim["p_adjusted"] = float(p_adjusted)
            if claim["verdict"] == "supported" and p_adjusted > level:
                claim["verdict"] = "undetermined"
                claim["reason"] += f" But adjusted for {len(tested)} claims its p-value is above {level:g}."
