"""The benchmark of readings, in short: on data of which the truth is known, what names it and what does not."""

import keras
import numpy as np
import pytest

if keras.config.backend() == "torch":
    from benchmarks import readings

pytestmark = pytest.mark.skipif(keras.config.backend() != "torch", reason="the benchmark runs on PyTorch")


@pytest.fixture
def processes(monkeypatch):
    """Short enough for a test."""
    monkeypatch.setattr(readings, "TRAINING", 200)
    monkeypatch.setattr(readings, "HELD_OUT", 50)
    monkeypatch.setattr(readings, "SHAP_SAMPLES", 10)


@pytest.mark.usefixtures("processes")
def test_readings_that_look_at_the_outcome_find_what_was_planted():
    row = readings.measured("additive", models=2, epochs=15)
    assert row["skill"]["attainable"] > row["skill"]["lowest"] > 0.5
    for reading in ("conditional effect", "permutation importance", "integrated gradients, Captum"):
        assert row["readings"][reading]["auc"] > 0.9, reading
    assert set(readings.METHODS) < set(row["readings"])


@pytest.mark.usefixtures("processes")
def test_in_texts_each_has_its_own_truth_and_padding_is_no_feature(monkeypatch):
    monkeypatch.setattr(readings, "METHODS", ("random", "attention"))
    row = readings.measured("padded text", models=1, epochs=1)
    assert row["true"] is None
    assert {"conditional effect", "permutation importance"}.isdisjoint(row["readings"])
    assert all(0 <= found["auc"] <= 1 for found in row["readings"].values())


@pytest.mark.usefixtures("processes")
def test_the_truth_itself_would_get_everything_and_its_opposite_nothing():
    for name in readings.PROCESSES:
        x, _, truth = readings.PROCESSES[name](np.random.default_rng(0), 50)
        case = readings.Case(None, x, None, truth, None, 0, 0)
        assert readings.scores(truth * np.ones(x.shape), case).tolist() == [1, 1], name
        assert readings.scores(1 - truth * np.ones(x.shape), case).tolist() == [0, 0], name
        assert readings.scores(np.ones(x.shape), case).tolist() == [0.5, 0], name
