"""Tests and intervals that several verbs use, beside values that are computed in another way."""

import numpy as np
import pytest

from kerasfactory.explain._engine.statistics import clusters_of, sum_at_most_zero

pytestmark = pytest.mark.backend_independent


def exact(values):
    """The chance that a sum is at most 0 to which each term adds one of its integers, (value, term), all alike."""
    chances, lowest = np.ones(1), 0
    for term in values.T:
        of_term = np.bincount(term - term.min()) / len(term)
        chances, lowest = np.convolve(chances, of_term), lowest + term.min()
    return chances[: max(0, 1 - lowest)].sum()


@pytest.mark.parametrize("shift", [0, 10, 40, 150, -40])
@pytest.mark.parametrize("terms", [50, 300])
def test_a_sum_of_random_terms_is_at_most_zero_as_often_as_is_exact(terms, shift):
    generator = np.random.default_rng(terms + shift)
    values = np.round(200 * generator.standard_t(4, size=(6, terms))).astype(int)
    values[1:] += shift
    values -= values[0]  # the first is the sample's own: 0
    assert sum_at_most_zero(values.astype("float64")) == pytest.approx(exact(values), rel=0.03, abs=1e-9)


def test_the_smallest_sum_and_the_middle_have_their_chances():
    losses = np.random.default_rng(0).exponential(size=(6, 60))
    losses[0] = 0  # never larger than what is drawn
    assert sum_at_most_zero(losses) == pytest.approx((1 / 6) ** 60, rel=1e-3)
    assert sum_at_most_zero(-losses) == pytest.approx(1)
    symmetric = np.random.default_rng(0).normal(size=(1, 60)) * np.array([[1], [-1]])
    assert sum_at_most_zero(symmetric) == pytest.approx(0.5, abs=1e-6)


def test_groups_are_numbered_in_their_order_whatever_they_are_called():
    expected = [0, 1, 0, 2, 1]
    for labels in (["a", "b", "a", "c", "b"], ["z", "b", "z", "a", "b"], [9, 3, 9, 5, 3]):
        assert clusters_of(5, labels, None).tolist() == expected
