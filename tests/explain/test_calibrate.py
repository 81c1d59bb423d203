"""Whether `calibrate` counts what it should: on models whose weights are known exactly, and labels that it made."""

import functools
import json
import re

import keras
import numpy as np
import pytest
from keras import layers, ops
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

from kerasfactory import explain
from kerasfactory.explain import _calibrate
from kerasfactory.explain._audit.page import page
from kerasfactory.layers import FeatureTokenizer

calibrate = functools.partial(explain.calibrate, verbose=0)


def exact_trainer(columns, estimator=LinearRegression, activation="linear", loss="mse"):
    """A `train` that sets the weights to those of scikit-learn's linear model: attention is the size of a coefficient.

    Of each token, the first number is the value, with the sign of its coefficient, and the second the key.
    """
    inputs = keras.Input((columns,))
    tokens = FeatureTokenizer(2)(inputs)
    attention = layers.MultiHeadAttention(1, 1, value_dim=1, output_shape=1, use_bias=False)
    attended = attention(ops.ones_like(tokens[:, :1]), tokens)
    model = keras.Model(inputs, layers.Dense(1, activation)(layers.Flatten()(attended)))
    model.compile(loss=loss)

    def train(x, y):
        fitted = estimator().fit(x, y)
        weights = fitted.coef_.reshape(-1)
        size, zero = np.maximum(np.abs(weights), 1e-6), np.zeros(columns)
        value, key = (np.reshape(of_token, (2, 1, 1)) for of_token in ([1.0, 0.0], [0.0, 1.0]))
        of_tokens = [np.stack([np.sign(weights), zero], 1), np.stack([zero, np.log(size)], 1)]
        end = [np.ones((1, 1, 1)), np.full((1, 1), size.sum()), np.reshape(fitted.intercept_, 1)]
        model.set_weights([*of_tokens, key, key, value, *end])
        return model

    return train


@pytest.fixture(scope="module")
def train():
    return exact_trainer(4)


def table(samples=240, columns=4, seed=0):
    """Correlated columns, and an outcome that depends on two of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, columns))
    x[:, 1] = 0.6 * x[:, 0] + 0.8 * x[:, 1]
    return x, x[:, 0] - x[:, 2] + rng.normal(size=samples)


def labels_of(arm, x, y, strength=0.5, classes=False, seed=0, groups=None, block=None, feature_mask=None):
    data = _calibrate._checked_data(x, y, feature_mask, groups, block)
    own = {"strength": strength, "classes": classes}
    return _calibrate._labels(data, arm, own, np.random.default_rng(seed))


@pytest.mark.backend_independent
def test_the_trainer_of_these_tests_is_exact(train):
    x, y = table()
    np.testing.assert_allclose(
        train(x, y).predict(x, verbose=0)[:, 0], LinearRegression().fit(x, y).predict(x), atol=1e-5
    )


def test_on_exact_models_hardly_any_verdict_is_wrong_and_what_is_planted_is_found(train):
    x, y = table()
    result = calibrate(train, x, y, n=8)
    count = result["count"].to_series()
    assert count["permuted: a feature supported"] <= 2
    assert count["planted: another supported"] <= 2
    assert count["planted: it is supported"] == 8
    assert count["planted: it is refuted"] == 0
    assert (result["verdict"] == "supported").all()
    assert len(set(result["planted"].values)) > 1
    assert count["permuted: a feature supported"] == (result["supported"].sel(arm="permuted") > 0).sum()
    assert (result["skill"].sel(arm="permuted") < 0.05).all()
    np.testing.assert_allclose(result.attrs["own_skill"], 2 / 3, atol=0.12)
    assert result.attrs["strength"] == result.attrs["own_skill"]
    assert "found in 8 of 8 (68% to 100%)" in result.attrs["summary"]
    # Wilson 1927, by hand for 8 of 8: from 8 / (8 + z²) to 1.
    found = result["interval"].sel(outcome="planted: it is supported")
    np.testing.assert_allclose(found, [8 / (8 + 1.959964**2), 1], atol=1e-6)


@pytest.mark.backend_independent
@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_a_planted_feature_gives_the_skill_that_was_asked_for(strength):
    x, y = table(4000)
    for seed in range(3):
        planted = labels_of("planted", x, y, strength, seed=seed)
        assert sorted(planted.y) == sorted(y)  # the distribution of the labels is what it was
        column = x[:, planted.planted]
        explained = LinearRegression().fit(column[:, None], planted.y).score(column[:, None], planted.y)
        np.testing.assert_allclose(explained, strength, atol=0.04)
        every = LinearRegression().fit(x, planted.y).coef_
        assert (np.abs(np.delete(every, planted.planted)) < 0.1).all()  # not even those that are correlated with it


@pytest.mark.backend_independent
@pytest.mark.parametrize("rare", [0.5, 0.1])
@pytest.mark.parametrize("one_hot", [False, True])
def test_planted_classes_have_their_shares_and_the_entropy_that_was_asked_for(rare, one_hot):
    x, _ = table(6000)
    y = (np.arange(6000) < rare * 6000).astype(int)
    given = np.eye(2)[1 - y] if one_hot else y
    planted = labels_of("planted", x, given, 0.3, classes=True)
    classes = 1 - planted.y.argmax(axis=1) if one_hot else planted.y
    assert classes.sum() == y.sum()
    column = x[:, [planted.planted]]
    logits = LogisticRegression(C=1e6).fit(column, classes).predict_log_proba(column)
    skill = 1 + logits[np.arange(6000), classes].mean() / -(rare * np.log(rare) + (1 - rare) * np.log(1 - rare))
    np.testing.assert_allclose(skill, 0.3, atol=0.03)


@pytest.mark.backend_independent
def test_a_planted_flag_and_planted_one_hot_columns_decide_labels():
    rng = np.random.default_rng(0)
    kind, y = rng.integers(4, size=2000), rng.normal(size=2000)
    x = np.column_stack([np.eye(4)[kind], np.zeros(2000)])  # a constant column cannot be planted
    planted = labels_of("planted", x, y, 0.5, feature_mask=[0, 0, 0, 0, 1])
    assert planted.planted == 0
    between = np.array([planted.y[kind == number].mean() for number in range(4)])[kind].var()
    np.testing.assert_allclose(between / y.var(), 0.5, atol=0.05)
    flag = (rng.random(2000) < 0.3).astype(float)
    planted = labels_of("planted", np.column_stack([flag, np.zeros(2000)]), y, 0.3)
    between = np.array([planted.y[flag == value].mean() for value in (0, 1)])[flag.astype(int)].var()
    np.testing.assert_allclose(between / y.var(), 0.3, atol=0.05)


@pytest.mark.backend_independent
def test_labels_are_exchanged_by_groups_or_shifted_and_halves_are_of_whole_ones():
    x, y = table(60)
    groups = np.repeat([f"patient {number}" for number in range(20)], 3)
    permuted = labels_of("permuted", x, y, groups=groups).y.reshape(20, 3)
    assert sorted(map(tuple, permuted)) == sorted(map(tuple, y.reshape(20, 3)))
    assert not (permuted == y.reshape(20, 3)).all()
    uneven = np.repeat(np.arange(20), [1, 5] * 10)
    of_groups = labels_of("permuted", x, uneven.astype(float), groups=uneven).y
    assert all(len(set(of_groups[uneven == group])) == 1 for group in range(20))
    for seed in range(20):
        shifted = labels_of("permuted", x, y, block=5, seed=seed).y
        (offset,) = np.flatnonzero(shifted == y[0])
        np.testing.assert_array_equal(shifted, np.roll(y, offset))
        assert 5 <= offset <= 55
    halves = _calibrate._halves(_calibrate._checked_data(x, y, None, groups, None), np.random.default_rng(0))
    assert not set(groups[halves[0]]) & set(groups[halves[1]])
    assert [len(half) for half in halves] == [30, 30]
    first, last = _calibrate._halves(_calibrate._checked_data(x, y, None, None, 7), np.random.default_rng(0))
    np.testing.assert_array_equal(first, np.arange(28))
    np.testing.assert_array_equal(last, np.arange(28, 60))


def smoothed(rng, shape, weight):
    """Series that depend on their past: x[t] = weight * x[t - 1] + noise."""
    series = rng.normal(size=shape)
    for step in range(1, len(series)):
        series[step] = weight * series[step - 1] + (1 - weight**2) ** 0.5 * series[step]
    return series


@pytest.mark.backend_independent
def test_blocks_that_are_too_short_for_a_series_are_found_out():
    rng = np.random.default_rng(0)
    x, y = smoothed(rng, (1600, 3), 0.97), smoothed(rng, 1600, 0.97)
    train = exact_trainer(3)
    wrong = {
        block: calibrate(train, x, y, n=10, block=block)["count"]
        .sel(outcome=["permuted: a feature supported", "permuted: a feature needed, not claimed"])
        .sum()
        for block in (1, 40)
    }
    assert wrong[1] >= 3
    assert wrong[40] <= 1


@pytest.mark.backend_independent
def test_patients_with_several_rows_are_kept_together_where_groups_are_given(train):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5)
    x, y = rng.normal(size=(60, 4))[groups], rng.normal(size=60)[groups]
    x += 0.1 * rng.normal(size=x.shape)
    result = calibrate(train, x, y, n=6, groups=groups, strength=0.7)
    assert result["count"].sel(outcome="permuted: a feature supported") <= 1
    assert result["count"].sel(outcome="planted: it is supported") >= 4


@pytest.mark.backend_independent
def test_a_planted_feature_that_has_a_copy_is_found_with_its_group():
    x, y = table()
    x[:, 3] = x[:, 0] + 0.02 * x[:, 3]
    result = calibrate(exact_trainer(4, Ridge), x, y, n=4, strength=0.5)
    assert result.attrs["strength"] == 0.5
    assert {"0", "3"} & set(result["planted"].values)
    assert (result["verdict"] == "supported").all()
    assert (result["supported"] == 0).all()


@pytest.mark.backend_independent
def test_a_planted_feature_is_found_with_a_group_whose_name_does_not_name_it():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=(240, 1)) + 0.02 * rng.normal(size=(240, 6)), rng.normal(size=240)])
    result = calibrate(exact_trainer(7, Ridge), x, x[:, 0] + rng.normal(size=240), n=6, strength=0.5)
    assert {"3", "4", "5"} & set(result["planted"].values)  # the group is called `0 + 1 + 2 + 3 more`
    assert (result["verdict"] == "supported").all()
    assert (result["supported"].sel(arm="planted") == 0).all()


@pytest.mark.backend_independent
def test_several_classes_with_a_model_that_is_trained_by_keras():
    x, _ = table(160)
    y = np.eye(3)[(x[:, 0] > 0).astype(int) + (x[:, 0] > 1)]
    counts = []

    def train(x, y):
        counts.append(y.sum(axis=0))
        inputs = keras.Input((4,))
        tokens = FeatureTokenizer(4, feature_names=list("abcd"))(inputs)
        attended = layers.MultiHeadAttention(1, 4)(tokens[:, :1], tokens)
        model = keras.Model(inputs, layers.Dense(3, "softmax")(layers.Flatten()(attended)))
        model.compile(keras.optimizers.Adam(0.05), "categorical_crossentropy")
        model.fit(x, y, epochs=1, batch_size=80, verbose=0)
        return model

    result = calibrate(train, x, y, n=1)
    assert result["planted"].item() in "abcd"
    assert np.isfinite(result["skill"]).all()
    assert all(count.sum() == 80 for count in counts)


@pytest.mark.backend_independent
def test_a_binary_outcome_is_handled_as_classes():
    train = exact_trainer(4, LogisticRegression, "sigmoid", "binary_crossentropy")
    x, y = table(300)
    result = calibrate(train, x, y > 0, n=3, strength=0.4)
    assert (result["verdict"] == "supported").all()
    np.testing.assert_allclose(result["skill"].sel(arm="planted").mean(), 0.4, atol=0.12)


@pytest.mark.backend_independent
def test_a_call_that_was_stopped_goes_on_where_it_stopped(train, tmp_path):
    x, y = table(120)
    calls = []

    def counted(x, y, stop=None):
        calls.append(y)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return train(x, y)

    whole = calibrate(train, x, y, n=2)
    store = tmp_path / "calibration.jsonl"
    with pytest.raises(KeyboardInterrupt):
        calibrate(functools.partial(counted, stop=4), x, y, n=2, store=store)
    assert len(store.read_text().splitlines()) == 1 + 3
    calls.clear()
    continued = calibrate(counted, x, y, n=2, store=store)
    assert len(calls) == 2
    assert continued.identical(whole)
    calls.clear()
    assert calibrate(counted, x, y, n=2, store=store).identical(whole)
    assert not calls
    more = calibrate(counted, x, y, n=3, store=store)
    assert len(calls) == 2
    np.testing.assert_array_equal(more["skill"][:, :2], whole["skill"])
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.jsonl"]

    with pytest.raises(ValueError, match=r"differs in: seed\. Choose another `store`"):
        calibrate(train, x, y, n=2, store=store, seed=1)
    with pytest.raises(ValueError, match="differs in: data"):
        calibrate(train, x, -y, n=2, store=store)
    with pytest.raises(ValueError, match=r"\.jsonl"):
        calibrate(train, x, y, store=tmp_path / "calibration.zarr")
    with pytest.raises(FileNotFoundError, match="no folder"):
        calibrate(train, x, y, store=tmp_path / "missing" / "calibration.jsonl")


@pytest.mark.backend_independent
def test_a_stored_calibration_that_was_changed_is_refused_and_a_last_line_that_was_cut_is_made_again(train, tmp_path):
    x, y = table(120)
    store = tmp_path / "calibration.jsonl"
    whole = calibrate(train, x, y, n=1, store=store)
    content = store.read_bytes()
    changed = [
        content.replace(b'"supported": 0', b'"supported": 7', 1),
        content[1:],
        b"{}\n",
        b"\n",
        b"\xff" * 5 + b"\n",
    ]
    changed += [
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in range(0, len(content), 97)
    ]
    for damaged in changed:
        assert damaged != content
        store.write_bytes(damaged)
        with pytest.raises(ValueError, match="not overwritten"):
            calibrate(train, x, y, n=1, store=store)
        assert store.read_bytes() == damaged
    for length in (0, 10, len(content) - 1, len(content) - 30):  # as a kill leaves it
        store.write_bytes(content[:length])
        assert calibrate(train, x, y, n=1, store=store).identical(whole)
        assert store.read_bytes() == content


@pytest.mark.backend_independent
def test_one_call_at_a_time_writes_to_a_stored_calibration_and_none_through_a_link(train, tmp_path):
    x, y = table(120)
    store, other = tmp_path / "calibration.jsonl", tmp_path / "other.txt"

    def while_training(x, y):
        with pytest.raises(RuntimeError, match="Another process or thread is writing"):
            calibrate(train, x, -y, n=1, store=store)
        return train(x, y)

    alone = calibrate(train, x, y, n=1)
    assert calibrate(while_training, x, y, n=1, store=store).identical(alone)
    assert calibrate(train, x, y, n=1, store=store).identical(alone)
    other.write_text("mine")
    link = tmp_path / "link.jsonl"
    link.symlink_to(other)
    with pytest.raises(ValueError, match="is a link"):
        calibrate(train, x, y, n=1, store=link)
    assert other.read_text() == "mine"


@pytest.mark.backend_independent
def test_errors_say_what_to_do(train):
    x, y = table(120)
    with pytest.raises(ValueError, match=r"function of `\(x, y\)`"):
        calibrate(train(x, y), None, y)
    with pytest.raises(ValueError, match=r"Does the function end in `return model`\?") as raised:
        calibrate(lambda x, y: None, x, y)
    assert "own labels" in raised.value.__notes__[0]
    uncompiled = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    with pytest.raises(ValueError, match=re.escape("model.compile(loss=...)")):
        calibrate(lambda x, y: uncompiled, x, y)
    with pytest.raises(ValueError, match="must be a table"):
        calibrate(train, x[:, :, None], y)
    with pytest.raises(ValueError, match="one label for each sample"):
        calibrate(train, x, y[:-1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        calibrate(train, np.where(x > 2, np.nan, x), y)
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate(train, x, y, strength=1)
    with pytest.raises(ValueError, match="leave only one group"):
        calibrate(train, x, y, block=120)
    with pytest.raises(ValueError, match="No feature can be tested on 15 samples"):
        calibrate(train, x[:30], y[:30])
    with pytest.raises(ValueError, match="`n` must be"):
        calibrate(train, x, y, n=0)


@pytest.mark.backend_independent
def test_a_page_shows_the_record_of_a_calibration(train):
    x, y = table(120)
    result = calibrate(train, x, y, n=1)
    record = _calibrate.calibration_record(result)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [one["count"] for one in record["outcomes"]] == result["count"].values.tolist()
    report = explain.audit(train(x, y), x, y, verbose=0)
    assert "How often are such verdicts wrong?" not in page(report.record)
    shown = page(report.record | {"calibration": record})
    assert "How often are such verdicts wrong?" in shown
    assert "On models like yours" in shown
    with pytest.raises(ValueError, match=r"explain\.calibrate"):
        _calibrate.calibration_record({})
