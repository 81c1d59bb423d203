"""Checks of arguments that all functions share: what they take, and what they say of the rest."""

import numpy as np
import pytest

from kerasfactory._arguments import checked_level, checked_seed, generator


@pytest.mark.parametrize("seed", [0, 7, np.int64(7), np.uint8(7), 2**40])
def test_a_seed_is_an_integer_and_numpys_integers_are_too(seed):
    assert checked_seed(seed) == seed
    assert type(checked_seed(seed)) is int


@pytest.mark.parametrize("seed", [-1, np.int64(-1), True, False, np.True_, 1.0, "1", None, [1], np.array([1, 2])])
def test_other_seeds_are_refused_wherever_something_is_drawn(seed):
    for check in (checked_seed, lambda seed: generator(seed, "attribute")):
        with pytest.raises(ValueError, match=r"`seed` must be an integer, at least 0\. Received: seed="):
            check(seed)


def test_each_function_draws_from_a_stream_of_its_own():
    draws = {name: generator(3, name).random() for name in ("attribute", "faithfulness")}
    assert draws["attribute"] != draws["faithfulness"]
    assert generator(np.int64(3), "attribute").random() == draws["attribute"]
    assert np.random.default_rng([*b"attribute", 3]).random() == draws["attribute"]


@pytest.mark.parametrize("level", [0.05, 0.499, np.float32(0.1), np.float64(1e-6)])
def test_a_level_is_a_number_between_0_and_a_half(level):
    assert checked_level(level) == level
    assert type(checked_level(level)) is float


@pytest.mark.parametrize("level", [0, 0.5, 0.95, 1, 95, -0.05, np.nan, np.inf, True, False, "0.05", None, [0.05]])
def test_other_levels_are_refused_with_the_way_out(level):
    message = r"(?s)`level` must be a number between 0 and 0\.5\. Received: level=.*`level` is an error level: 0\.05 "
    with pytest.raises(ValueError, match=message):
        checked_level(level)
