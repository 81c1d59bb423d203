"""How much better a model is than a constant."""

from typing import Any

import numpy as np
from scipy import optimize, special

from kerasfactory.explain._engine.outputs import loss_values
from kerasfactory.explain._engine.statistics import mean_interval

_FOR_CONSTANT = 500  # samples on which the best constant is looked for
_SEARCHED = 3  # outputs: for more, only the constants that minimize common losses are tried


def skill_of(
    loss: Any, y: np.ndarray, outputs: np.ndarray, clusters: np.ndarray, level: float, rng: np.random.Generator
) -> dict[str, Any]:
    r"""The mean loss \(L\), that of the best constant, \(L_0\), the skill \(1 - L / L_0\), and its interval.

    The skill score of Murphy 1988 (https://doi.org/10.1175/1520-0493(1988)116<2417:SSBOTM>2.0.CO;2): 1 is perfect, 0 is
    no better than a constant. For squared errors it is the coefficient of determination.
    The largest share is that of one cluster in \(L_0\).
    """
    own, base = loss_values(loss, y, outputs), _best_constant_losses(loss, y, outputs)
    found = {"loss": float(own.mean()), "base_loss": float(base.mean())}
    if not found["base_loss"] > 0:
        return {**found, "largest_share": np.nan, "skill": np.nan, "skill_interval": [np.nan, np.nan]}
    found["largest_share"] = min(1.0, float(np.bincount(clusters, base).max() / base.sum()))
    ratio = found["loss"] / found["base_loss"]
    # By the delta method, the spread of a ratio of means is that of the mean of these.
    interval, _ = mean_interval(ratio + (own - ratio * base) / found["base_loss"], clusters, level, rng)
    return {**found, "skill": 1 - ratio, "skill_interval": (1 - interval[::-1]).tolist()}


def _best_constant_losses(loss: Any, y: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The loss of each sample, (sample,), under the constant output for which their mean is smallest.

    That constant is found among those that minimize common losses (the labels' mean and median, the shares of classes
    and their logarithms), and from there by Powell's method, on at most 500 samples.
    """
    width = outputs.shape[1]
    candidates = [outputs.mean(axis=0)]
    labels = y
    if y.shape[1] != width and (y == np.floor(y)).all() and y.min() >= 0 and y.max() < width:
        labels = np.eye(width)[y[:, 0].astype(int)]
    if labels.shape[1] == width:
        mean = labels.mean(axis=0)
        candidates += [mean, np.median(labels, axis=0)]
        if labels.min() >= 0 and labels.max() <= 1:
            share = np.clip(mean, 1e-6, 1 - 1e-6)
            candidates += [np.log(share), special.logit(share)]
    few = np.linspace(0, len(y) - 1, min(len(y), _FOR_CONSTANT)).astype(int)

    def mean_loss(constant, chosen=few):
        try:
            return loss_values(loss, y[chosen], np.broadcast_to(constant, (len(chosen), width))).mean()
        except ValueError:  # of an output that the loss does not take
            return np.inf

    best = min(candidates, key=mean_loss)
    if width <= _SEARCHED:
        with np.errstate(invalid="ignore"):
            found = optimize.minimize(mean_loss, best, method="Powell", options={"maxfev": 60, "ftol": 1e-5})
        candidates.append(np.reshape(found.x, width))
    everyone = np.arange(len(y))
    best = min(candidates, key=lambda constant: mean_loss(constant, everyone))
    return loss_values(loss, y, np.broadcast_to(best, outputs.shape))
