"""Whether claims about features are called true where they are, and not where they are not. Truth is planted."""

import functools
import json
import re

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers
from scipy import signal, stats

from benchmarks import claims as planted
from kerasfactory import explain, plot
from kerasfactory.explain._audit import claims as _claims_of_audit
from kerasfactory.explain._engine.conditional import Sampler, regression, told_apart
from kerasfactory.explain._engine.statistics import mean_interval
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

TABLE = np.random.default_rng(0).normal(size=(60, 3))
feature_claims = functools.partial(explain.feature_claims, verbose=0)


@pytest.fixture(scope="module")
def trained():
    return planted.trainer()


@pytest.fixture(scope="module")
def results(trained):
    """For each process but noise, what is claimed of a model, and the verdicts. More are in `benchmarks`."""
    names = [name for name in planted.PROCESSES if name != "noise"]
    return {name: [planted.claims(trained, name, seed, epochs=15) for seed in (1,)] for name in names}


def linear(weights, loss="mse"):
    inputs = keras.Input((len(weights),))
    model = keras.Model(inputs, layers.Dense(1, use_bias=False)(inputs))
    model.set_weights([np.reshape(weights, (-1, 1))])
    model.compile(loss=loss)
    return model


def claimed_all(x):
    """An attribution that ranks all features but the last high."""
    return np.broadcast_to(np.arange(x.shape[1]) < x.shape[1] - 1, x.shape)


def claims_of_linear(weights=(1.0, 1.0, 0.0), samples=200, x=None, y=None, **arguments):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(samples, len(weights))) if x is None else x
    y = x @ weights + generator.normal(size=len(x)) if y is None else y
    return feature_claims(linear(weights), x, y, claimed_all(x), **arguments)


@pytest.mark.backend_independent
def test_noise_is_not_supported(trained):
    results = []
    for seed in range(20):
        model = trained(planted.noise, seed, epochs=0)  # what it has not learned from noise it need not unlearn
        x, y = planted.noise(np.random.default_rng([seed, 2]), 200, training=False)
        every_one = np.ones((200, 1)) * (np.arange(6) != seed % 6)  # more claims than attention would make
        results.append(feature_claims(model, x.astype("float32"), y, every_one, seed=seed))
    supported = [(result["verdict"] == "supported").any().item() for result in results]
    assert sum(supported) <= 2  # at a level of 5% one is expected, and three happen to one in thirteen at most
    p_values = np.concatenate([result["p_value"].values for result in results])
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.backend_independent
@pytest.mark.parametrize("name", ["additive", "interaction"])
def test_what_matters_is_found_and_supported_where_it_is_claimed(results, name):
    relevant = planted.PROCESSES[name][1]
    for result in results[name]:
        matters = np.isin(np.arange(6), relevant)
        assert (result["p_adjusted"].values[matters] <= 0.05).all()
        assert (result["interval"].sel(bound="lower").values[matters] > 0).all()
        claimed = result["attribution"].values > result["attribution"].values.mean()
        supported = result["verdict"].values == "supported"
        assert (supported == (claimed & matters)).all()
        assert supported.any()


@pytest.mark.backend_independent
def test_copies_are_claimed_and_not_supported(results):
    copies = planted.PROCESSES["redundant copies"][2]
    verdicts = np.stack([result["verdict"].values[:6] for result in results["redundant copies"]])
    assert (verdicts[:, copies] == "undetermined").all()  # one of them matters: which, the data cannot tell
    for result in results["redundant copies"]:
        assert (result["attribution"].values[copies] > 1 / 6).any()
        assert (result["effect"].values[:2] == 0).all()  # each the copy of the other
        assert result["p_adjusted"].values[4] <= 0.05  # which has no copy
        assert result["verdict"].sel(feature="0 + 1 + 2 + 3") == "supported"


def test_a_feature_that_is_named_like_a_group_keeps_its_own_verdict():
    x = np.random.default_rng(0).normal(size=(200, 3))
    x[:, 1] = x[:, 0]
    names = {"feature": ["a", "b", "a + b"]}
    attribution = xr.DataArray(np.tile([0.4, 0.4, 0.2], (200, 1)), names, ("sample", "feature"))
    y = x.sum(axis=1) + np.random.default_rng(1).normal(size=200)
    claims = explain.feature_claims(linear([0.5, 0.5, 1.0]), x, y, attribution, verbose=0)
    assert claims["feature"].values.tolist() == ["a", "b", "a + b", "a + b (together)"]
    assert claims["verdict"].values.tolist() == ["undetermined", "undetermined", "needed, not claimed", "supported"]
    assert "“a + b (together)”" in claims["reason"].values[0]
    of_row = [np.flatnonzero(row).tolist() for row in claims["member"].values]
    assert of_row == [[0], [1], [2], [0, 1]]


@pytest.mark.backend_independent
def test_a_shortcut_is_claimed_and_not_supported_unless_it_holds(trained, results):
    for result in results["shortcut"]:
        assert result["attribution"].values.argmax() == 4
        assert result["verdict"].values[4] != "supported"
        assert result.attrs["loss"] > result.attrs["base_loss"]  # on which the model relies
    model = trained(planted.shortcut, 1, epochs=15)
    x, y = planted.shortcut(np.random.default_rng(5), 400, training=True)
    attribution = np.broadcast_to(np.arange(6) == 4, x.shape)
    assert feature_claims(model, x.astype("float32"), y, attribution)["verdict"].values[4] == "supported"


@pytest.mark.parametrize("separate", [False, True])
def test_the_effect_of_a_feature_in_a_linear_model_is_twice_its_share_that_is_its_own(separate):
    generator = np.random.default_rng(0)
    covariance = np.array([[1, 0.8, 0, 0.3], [0.8, 1, 0, 0], [0, 0, 1, 0], [0.3, 0, 0, 1]])
    x, background = generator.multivariate_normal(np.zeros(4), covariance, size=(2, 4000))
    weights = np.array([1.0, -0.5, 0.8, 0.0])
    y = x @ weights + generator.normal(size=4000)
    settings = {"background": background if separate else None, "seed": 1}  # with 0, the classifier gives a false alarm
    result = feature_claims(linear(weights), x, y, claimed_all(x), **settings)
    own = 1 / np.diag(np.linalg.inv(covariance))  # the variance of each given the others
    np.testing.assert_allclose(result["effect"], 2 * weights**2 * own, rtol=0.1, atol=1e-3)
    np.testing.assert_allclose(result.attrs["base_loss"], y.var(), rtol=1e-4)
    np.testing.assert_allclose(result.attrs["loss"], np.mean((y - x @ weights) ** 2), rtol=1e-4)
    assert list(result["verdict"].values) == ["supported"] * 3 + ["undetermined"]
    assert result["p_value"].values[3] == 1  # the model does not look at it


@pytest.mark.backend_independent
def test_an_effect_of_no_size_is_refuted_and_no_claim_is_no_verdict():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2000, 3))
    weights = np.array([1.0, 0.03, 0.5])
    y = x @ weights + 0.1 * generator.normal(size=2000)
    result = feature_claims(linear(weights), x, y, claimed_all(x))
    assert (result["p_adjusted"] <= 0.05).all()
    assert list(result["verdict"].values) == ["supported", "refuted", "needed, not claimed"]
    equal = feature_claims(linear(weights), x, y, np.full(x.shape, 1 / 3))
    assert list(equal["verdict"].values) == ["needed, not claimed", "undetermined", "needed, not claimed"]


@pytest.mark.backend_independent
def test_an_interval_that_straddles_the_margin_decides_nothing():
    result = claims_of_linear((1.0, 0.2, 0.0), samples=40)
    lower, upper = result["interval"].values[1] / result.attrs["base_loss"]
    assert result["attribution"].values[1] > result["attribution"].values.mean()
    assert result["p_adjusted"].values[1] > 0.05
    assert lower < 0.01 < upper
    assert result["verdict"].values[1] == "undetermined"


@pytest.mark.backend_independent
@pytest.mark.parametrize("feature", range(3))
def test_residuals_for_new_samples_are_those_of_rows_that_the_regression_has_not_seen(feature):
    generator = np.random.default_rng(0)
    rows, x = generator.normal(size=(20, 3)), generator.normal(size=(50, 3))
    for table in (rows, x):
        table[:, 2] = table[:, 0] - 2 * table[:, 1] + 0.01 * table[:, 2]
    column, others = rows[:, feature], np.delete(rows, feature, axis=1)
    everyone = np.arange(20)

    def ridge_regression(ridge, keep, at):
        """Fitted on some rows, an intercept for the mean of all rows included, on which there is no penalty."""
        standard = (others - others.mean(axis=0)) / others.std(axis=0)
        design = np.column_stack([np.ones(len(keep)), standard[keep]])
        ridge = ridge * np.linalg.eigvalsh(standard.T @ standard)[-1]
        weights = np.linalg.solve(design.T @ design + ridge * np.diag([0, 1, 1]), design.T @ column[keep])
        return np.column_stack([np.ones(len(at)), (at - others.mean(axis=0)) / others.std(axis=0)]) @ weights

    errors = {}
    for ridge in np.logspace(-10, 0, 11):
        predicted = [ridge_regression(ridge, everyone[everyone != row], others[[row]])[0] for row in everyone]
        errors[ridge] = column - predicted
    best = min(errors, key=lambda ridge: errors[ridge] @ errors[ridge])
    fit = regression(others, column, rows_are_data=False)
    scale = fit.scale(others)
    np.testing.assert_allclose(fit.residuals * scale, errors[best], rtol=1e-6)
    np.testing.assert_allclose(fit.fitted, column - errors[best], rtol=1e-6)
    at_x = np.delete(x, feature, axis=1)
    np.testing.assert_allclose(fit.at(at_x), ridge_regression(best, everyone, at_x), rtol=1e-6)


def sampler(table, draws=20, clusters=None):
    clusters = np.arange(len(table)) if clusters is None else clusters
    return Sampler(table, table, clusters, clusters, draws, np.random.default_rng(0))


@pytest.mark.backend_independent
def test_draws_are_distributed_as_the_column_given_the_others():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 1000))
    near, product = a + 0.1 * b, a * b + 0.2 * generator.normal(size=1000)
    kind = (generator.normal(size=1000) + a > 0).astype(float) + (a > 0.5)

    def draws(*table, of):
        return sampler(np.column_stack(table)).drawn([of]).values[:, :, 0]

    np.testing.assert_allclose(draws(a, 2 * a + 1, b, of=1), np.tile(2 * a + 1, (20, 1)), atol=1e-6)
    np.testing.assert_allclose(draws(a, b, a - 3 * b, of=0), np.tile(a, (20, 1)), atol=1e-6)
    np.testing.assert_allclose((draws(a, near, of=1) - a).std(), 0.1, rtol=0.05)
    np.testing.assert_allclose((draws(a, b, product, of=2) - a * b).std(), 0.2, rtol=0.1)
    assert np.abs(draws(a, np.tanh(a), of=1) - np.tanh(a)).std() < 0.05
    assert abs(np.corrcoef(draws(a, b, of=1)[0], a)[0, 1]) < 0.1
    drawn = draws(a, kind, of=1)
    assert set(np.unique(drawn)) == {0, 1, 2}
    for low, high in ((-9, -1), (-1, 1), (1, 9)):
        there = (low < a) & (a < high)
        np.testing.assert_allclose(drawn[:, there].mean(), kind[there].mean(), atol=0.1)


@pytest.mark.backend_independent
def test_draws_are_values_that_the_column_could_have():
    generator = np.random.default_rng(0)
    size = np.exp(generator.normal(size=500))
    amount = size * np.exp(0.5 * generator.normal(size=500))
    count = generator.poisson(size * 3)
    part = generator.binomial(count, 0.8)
    flag = generator.random(500) < 0.02
    inflated = np.where(generator.random(500) < 0.4, 0, amount)
    table = np.column_stack([size, amount, count, part, flag, inflated]).astype(float)
    for column in range(6):
        own, drawn = table[:, column], sampler(table).drawn([column]).values[:, :, 0]
        assert own.min() <= drawn.min()
        assert drawn.max() <= own.max()
        if column in (2, 3, 4):
            assert (drawn == np.floor(drawn)).all()
        np.testing.assert_allclose(drawn.mean(), own.mean(), rtol=0.15)
        np.testing.assert_allclose(np.log1p(drawn).std(), np.log1p(own).std(), rtol=0.15)
    drawn = sampler(table).drawn([5]).values[:, :, 0]
    np.testing.assert_allclose((drawn == 0).mean(), 0.4, atol=0.06)


@pytest.mark.backend_independent
def test_columns_that_are_drawn_together_stay_together():
    generator = np.random.default_rng(0)
    kind = generator.integers(4, size=400)
    a = generator.normal(size=400)
    table = np.column_stack([np.eye(4)[kind], a, np.tanh(a), generator.normal(size=400)])
    drawn = sampler(table).drawn([0, 1, 2, 3]).values
    assert (drawn.sum(axis=2) == 1).all()
    np.testing.assert_allclose(drawn.mean(axis=(0, 1)), table[:, :4].mean(axis=0), atol=0.05)
    drawn = sampler(table).drawn([4, 5]).values
    assert np.abs(np.tanh(drawn[:, :, 0]) - drawn[:, :, 1]).max() < 0.05
    assert abs(np.corrcoef(drawn[0, :, 0], a)[0, 1]) < 0.15


@pytest.mark.backend_independent
def test_draws_in_clusters_come_from_one_other_cluster():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(50), 8)
    level = generator.normal(size=50)[clusters]
    table = np.column_stack([level, generator.normal(size=400)])
    drawn = sampler(table, clusters=clusters).drawn([0]).values[0, :, 0].reshape(50, 8)
    assert drawn.std(axis=1).max() < 0.3 * drawn.std()  # a cluster's values remain alike


@pytest.mark.backend_independent
def test_draws_that_are_off_the_data_are_told_from_true_values():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 600))
    table = np.column_stack([a, np.abs(a) + 0.1 * b])
    assert told_apart(sampler(table), generator.permutation(table[:, [1]]), [1], None)
    right = np.abs(a) + 0.1 * generator.normal(size=(20, 600))
    found = [told_apart(sampler(table), draws[:, None], [1], None) for draws in right]
    assert sum(found) <= 1
    patients = np.repeat(np.arange(60), 10)  # whose values are known if some of them are
    table = generator.normal(size=(60, 2))[patients]
    assert not told_apart(sampler(table, clusters=patients), generator.normal(size=(60, 1))[patients], [1], None)


LOSSES = {
    "mse": (1, None, lambda generator: generator.normal(size=50)),
    "binary_crossentropy": (1, "sigmoid", lambda generator: generator.integers(2, size=50)),
    "sparse_categorical_crossentropy": (3, "softmax", lambda generator: generator.integers(3, size=(50, 1))),
    "categorical_crossentropy": (3, "softmax", lambda generator: np.eye(3)[generator.integers(3, size=50)]),
}


@pytest.mark.parametrize("form", ["name", "object", "function"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_models(name, form):
    outputs, activation, labels = LOSSES[name]
    model = keras.Sequential([keras.Input((3,)), layers.Dense(outputs, activation)])
    objects = {
        "mse": keras.losses.MeanSquaredError,
        "binary_crossentropy": keras.losses.BinaryCrossentropy,
        "sparse_categorical_crossentropy": keras.losses.SparseCategoricalCrossentropy,
        "categorical_crossentropy": keras.losses.CategoricalCrossentropy,
    }
    model.compile(loss={"name": name, "object": objects[name](), "function": keras.losses.get(name)}[form])
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(50, 3)).astype("float32"), labels(generator)
    expected = model.evaluate(x, y, verbose=0)
    result = feature_claims(model, x, y, claimed_all(x))
    np.testing.assert_allclose(result.attrs["loss"], expected, rtol=1e-5)
    if "crossentropy" in name:
        with pytest.raises(ValueError, match=r"`y` must hold .* from 0 to .*Received: from .* to 7"):
            feature_claims(model, x, y + 0 * y[:1] + (y == y.max()) * (7 - y.max()), claimed_all(x))


def classifier(loss=None):
    """A model that nobody trained, of three classes, and the cross-entropy of each sample by NumPy."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, "softmax", name="classes")])
    model.compile(loss=loss)
    x, y = TABLE.astype("float32"), np.random.default_rng(1).integers(3, size=60)
    outputs = model.predict(x, verbose=0).astype("float64")
    cross_entropy = [-np.log(outputs[np.arange(60), y]), -np.log(np.bincount(y)[y] / 60)]
    return model, x, y, cross_entropy


WHAT_COMPILE_TAKES = {
    "crossentropy": "crossentropy",
    "ce": "ce",
    "a list of one name": ["sparse_categorical_crossentropy"],
    "a dictionary of one": {"classes": "ce"},
    "a list of one object": [keras.losses.SparseCategoricalCrossentropy(reduction="sum")],
    "a class": keras.losses.SparseCategoricalCrossentropy,
    "a function": lambda y, outputs: (
        -keras.ops.log(keras.ops.take_along_axis(outputs, keras.ops.cast(y, "int32"), axis=1))
    ),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", WHAT_COMPILE_TAKES)
def test_a_loss_is_what_compile_takes_for_one_output(name, compiled):
    loss = WHAT_COMPILE_TAKES[name]
    model, x, y, (own, base) = classifier(loss if compiled else "mse")
    result = feature_claims(model, x, y, claimed_all(x), **({} if compiled else {"loss": loss}))
    np.testing.assert_allclose(result.attrs["loss"], own.mean(), rtol=1e-5)
    np.testing.assert_allclose(result.attrs["base_loss"], base.mean(), rtol=1e-5)
    if name != "a function":  # which may take other labels
        with pytest.raises(ValueError, match=r"`y` must hold integers from 0 to 2\. Received: from 0 to 3"):
            feature_claims(model, x, np.where(y == 2, 3, y), claimed_all(x), **({} if compiled else {"loss": loss}))


def test_categories_as_vectors_choose_the_loss_that_crossentropy_means():
    model, x, y, (own, _) = classifier("crossentropy")
    result = feature_claims(model, x, np.eye(3)[y], claimed_all(x))
    np.testing.assert_allclose(result.attrs["loss"], own.mean(), rtol=1e-5)


def audited(loss, tmp_path, monkeypatch, y=None):
    """What an audit of a small classifier says of single features."""
    monkeypatch.setattr(_claims_of_audit, "attention_controls", functools.partial(explain.attention_controls, steps=1))
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    tokens = FeatureTokenizer(4)(inputs)
    attended = InterpretableMultiHeadAttention(4, 2, dropout_rate=0.0, name="attention")(tokens)
    classes = layers.Dense(3, "softmax", name="classes")(layers.Flatten()(attended))
    model = keras.Model(inputs, classes)
    model.compile(loss=loss)
    y = np.random.default_rng(1).integers(3, size=60) if y is None else y
    explain.audit(model, TABLE.astype("float32"), y, tmp_path / "audit.html", verbose=0)
    record = json.loads((tmp_path / "audit.json").read_text())
    name = "increase of the loss when its values are resampled"
    outputs = model.predict(TABLE.astype("float32"), verbose=0).astype("float64")
    return record["skill"], [claim for claim in record["claims"] if claim["statistic"]["name"] == name], outputs, y


@pytest.mark.parametrize("loss", ["crossentropy", ["sparse_categorical_crossentropy"]])
def test_an_audit_takes_the_loss_that_the_model_is_compiled_with(loss, tmp_path, monkeypatch):
    skill, claims, outputs, y = audited(loss, tmp_path, monkeypatch)
    np.testing.assert_allclose(skill["loss"], -np.log(outputs[np.arange(60), y]).mean(), rtol=1e-5)
    assert all(claim["p_value"] is not None for claim in claims)


def mean_of_all(y, outputs):
    return keras.ops.mean(outputs)


def not_a_number(y, outputs):
    return keras.ops.log(outputs - 1)[:, 0]


def fails(y, outputs):
    raise RuntimeError("as somebody's own function may")


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ({"classes": "mse", "other": "mse"}, "must be one function, of one output"),
        ("nonsense", "Could not interpret loss identifier: nonsense"),
        (mean_of_all, r"not their mean: a number for each sample.*shape \(\)"),
        (not_a_number, "The loss not_a_number is NaN or infinite"),
        (fails, "cannot be used. as somebody's own function may"),
    ],
)
def test_an_audit_says_why_a_loss_decides_nothing_before_it_computes_anything_long(loss, reason, tmp_path, monkeypatch):
    skill, claims, _, _ = audited(loss, tmp_path, monkeypatch)
    assert skill is None
    assert {claim["verdict"] for claim in claims} == {"undetermined"}
    assert all(re.search(reason, claim["reason"]) for claim in claims)
    assert len(claims) == 3


@pytest.mark.backend_independent
def test_an_audit_refuses_labels_that_the_loss_does_not_take_before_it_computes_anything_long(tmp_path, monkeypatch):
    monkeypatch.setattr(_claims_of_audit, "capture", None)
    with pytest.raises(ValueError, match=r"`y` must hold integers from 0 to 2\. Received: from 0 to 3"):
        audited("ce", tmp_path, monkeypatch, y=np.arange(60) % 4)


@pytest.mark.backend_independent
def test_claims_show_progress_and_can_be_drawn(capsys):
    result = claims_of_linear((1.0, 1.0, 0.0), samples=60, verbose=1)
    assert "3/3" in capsys.readouterr().out
    ax = plot.features(result.assign_coords(feature=["age", "pulse", "region"]))
    labels = "; ".join(label.get_text() for label in ax.get_yticklabels())
    assert all(name in labels for name in ("age", "pulse", "region"))


def test_a_loss_of_ones_own_and_names():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(100, 3))
    y = x @ [1.0, 1.0, 0.0]
    attribution = xr.DataArray(
        claimed_all(x).astype(float), dims=("sample", "feature"), coords={"feature": ["age", "pulse", "region"]}
    )
    model, before = linear([1.0, 1.0, 0.0], loss=None), x.copy()
    weights = model.get_weights()[0].copy()
    result = feature_claims(model, x, y, attribution, loss=lambda y, outputs: keras.ops.abs(y - outputs)[:, 0])
    assert result["verdict"].sel(feature="age") == "supported"
    assert result["interval"].dims == ("feature", "bound")
    np.testing.assert_allclose(result.attrs["base_loss"], np.abs(y - np.median(y)).mean(), rtol=1e-5)
    xr.testing.assert_identical(
        result,
        feature_claims(
            model, x, y, attribution, loss=lambda y, outputs: keras.ops.abs(y - outputs)[:, 0], batch_size=100
        ),
    )
    assert (x == before).all()
    assert (model.get_weights()[0] == weights).all()


@pytest.mark.backend_independent
@pytest.mark.parametrize("samples", [1, 2, 19])
def test_few_samples_leave_everything_undetermined(samples):
    result = claims_of_linear(samples=samples)
    assert (result["verdict"] == "undetermined").all()
    assert np.isnan(result["effect"]).all()
    assert (result["p_adjusted"] == 1).all()


@pytest.mark.backend_independent
def test_fewer_samples_than_features_leave_everything_undetermined():
    result = claims_of_linear(np.ones(50), samples=49)
    assert (result["verdict"] == "undetermined").all()
    assert (claims_of_linear(np.ones(50), samples=50)["p_value"] < 1).any()


@pytest.mark.backend_independent
def test_a_constant_feature_is_undetermined_and_the_others_are_not():
    x = np.random.default_rng(0).normal(size=(200, 4))
    x[:, 1] = 3
    result = claims_of_linear(np.array([1.0, 1, 1, 0]), x=x)
    assert list(result["verdict"].values) == ["supported", "undetermined", "supported", "undetermined"]
    assert np.isnan(result["interval"].values[1]).all()
    x[:, 2:] = 3
    assert claims_of_linear(np.array([1.0, 1, 1, 0]), x=x)["verdict"].values[0] == "supported"


WITH_NAN = np.where(np.arange(60)[:, None] == 7, np.nan, TABLE)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": None}, "Give labels, `y`"),
        ({"y": TABLE[:50, 0]}, r"one label for each sample, 60\. Received: shape \(50,\)"),
        ({"y": ["a"] * 60}, r"`y` must hold numbers, .*`pandas\.factorize\(y\)\[0\]` makes numbers"),
        ({"y": WITH_NAN[:, 0]}, "`y` is NaN or infinite in 1 of 60"),
        ({"y": TABLE}, "`y` must hold 1 numbers for each sample. Received: 3"),
        ({"x": WITH_NAN}, "`x` is NaN or infinite in 1 of 60 samples"),
        ({"x": TABLE[:, :, None, None]}, "`x` has the axes of pictures"),
        ({"x": [1, 2]}, "`x` must be an array"),
        (
            {"background": TABLE[:, :2]},
            r"`background` must hold samples like those of `x`\. Received: .* \(60, 2\)",
        ),
        ({"background": WITH_NAN}, "`background` is NaN or infinite"),
        ({"attribution": TABLE[:, :2]}, "`attribution` must have a number for each sample and feature"),
        ({"attribution": WITH_NAN}, "`attribution` is NaN"),
        ({"loss": {"a": "mse", "b": "mse"}}, "The loss must be one function"),
        (
            {"loss": lambda y, outputs: keras.ops.mean(outputs)},
            r"a number for each sample, 60 here. Received: shape \(\)",
        ),
        ({"loss": lambda y, outputs: keras.ops.log(outputs * 0 - 1)}, "The loss <lambda> is NaN"),
        ({"model": linear([1.0, 1, 1], loss=None)}, "The model has no loss. Compile it with one, or give `loss`"),
        ({"model": None}, "The model has no loss"),
        ({"level": 0.7}, "`level` must be a number between 0 and 0.5"),
        ({"margin": -1}, "`margin` must be at least 0"),
        ({"draws": 0}, "`draws` must be a positive integer"),
        ({"verbose": 3}, "`verbose` must be"),
        ({"loss": "square"}, "Could not interpret loss"),
    ],
)
def test_bad_input_gets_a_clear_error(changed, message):
    arguments = {"model": linear([1.0, 1, 1]), "x": TABLE, "y": TABLE[:, 0], "attribution": TABLE}
    with pytest.raises(ValueError, match=message):
        feature_claims(**arguments | changed)


def of_function(function, columns):
    """A model that computes a function of a table, (sample, column), in the form of a column."""
    inputs = keras.Input((columns,))
    model = keras.Model(inputs, layers.Lambda(lambda x: function(x)[:, None], output_shape=(1,))(inputs))
    model.compile(loss="mse")
    return model


def verdicts(model, x, y, claimed, **arguments):
    attribution = np.broadcast_to(np.isin(np.arange(x.shape[1]), claimed).astype(float), x.shape)
    result = feature_claims(model, x.astype("float32"), y, attribution, **arguments)
    return {
        str(name): verdict for name, verdict in zip(result["feature"].values, result["verdict"].values, strict=True)
    }


def part_of_a_count(generator, samples=300):
    """Feature 1 counts a part of what feature 0 counts; the outcome depends on 0, and the model uses both."""
    x = generator.normal(size=(samples, 3))
    x[:, 0] = generator.poisson(np.exp(1.5 + 0.7 * generator.normal(size=samples)))
    x[:, 1] = generator.binomial(x[:, 0].astype(int), 0.8)
    return x, np.log1p(x[:, 0]) + 0.3 * generator.normal(size=samples)


def two_codes(generator, samples=300):
    """Features 0 and 1 are two codes of one category."""
    category, numbers = generator.integers(12, size=samples), np.random.default_rng(7)
    codes, effects = np.stack([numbers.permutation(12), numbers.permutation(12)]), numbers.normal(size=12)
    x = generator.normal(size=(samples, 4))
    x[:, :2] = codes[:, category].T
    return x, effects[category] + 0.5 * generator.normal(size=samples)


@pytest.mark.backend_independent
def test_what_a_count_or_a_code_adds_to_another_is_nothing():
    ops = keras.ops
    counts = of_function(lambda x: 0.3 * ops.log1p(x[:, 0]) + 0.7 * ops.log1p(x[:, 1] / 0.8), 3)
    both = of_function(lambda x: 0.3 * x[:, 0] + 0.7 * x[:, 1], 4)
    for make, model in ((part_of_a_count, counts), (two_codes, both)):
        found = [verdicts(model, *make(np.random.default_rng(seed)), [0, 1], seed=seed) for seed in range(8)]
        assert sum(one["1"] in ("supported", "needed, not claimed") for one in found) <= 1


@pytest.mark.backend_independent
def test_one_hot_columns_are_tested_together_and_none_of_them_is_refuted():
    generator = np.random.default_rng(0)
    kind = generator.integers(4, size=300)
    x = np.column_stack([np.eye(4)[kind], generator.normal(size=(300, 2))])
    y = np.array([0.0, 1.0, 2.0, -1.0])[kind] + 0.3 * generator.normal(size=300)
    model = linear([0.0, 1.0, 2.0, -1.0, 0.0, 0.0])
    noticed = verdicts(model, x, y, [0, 1, 2, 3])
    assert noticed["0 + 1 + 2 + 3"] == "supported"
    assert {noticed[str(column)] for column in range(4)} == {"undetermined"}
    said = verdicts(model, x, y, [0, 1, 2, 3], feature_mask=[0, 0, 0, 0, 1, -1])
    assert said == {"0 + 1 + 2 + 3": "supported", "4": "undetermined"}
    with pytest.raises(ValueError, match=r"shape of one sample, \(6,\).*Received: shape \(2,\)"):
        verdicts(model, x, y, [0], feature_mask=[0, 1])


@pytest.mark.backend_independent
def test_a_constant_error_refutes_no_feature_and_a_shift_of_the_labels_is_no_skill():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 4))
    y = x[:, 0] + 0.8 * x[:, 1] + 0.3 * generator.normal(size=300)
    results = {}
    for bias in (0, 20):
        model = of_function(lambda x, bias=bias: x[:, 0] + 0.8 * x[:, 1] + bias, 4)
        results[bias] = feature_claims(model, x.astype("float32"), y, np.tile([1, 0.9, 0.95, 0], (300, 1)))
        np.testing.assert_allclose(results[bias].attrs["base_loss"], y.var(), rtol=1e-4)  # of the best constant for y
    assert list(results[0]["verdict"].values) == ["supported", "supported", "refuted", "undetermined"]
    assert not (results[20]["verdict"] == "refuted").any()
    assert results[20].attrs["skill"] < 0
    assert "not shown to do better than a constant" in results[20]["reason"].values[2]
    noise = np.mean((y - x[:, 0] - 0.8 * x[:, 1]) ** 2)
    np.testing.assert_allclose(results[0].attrs["skill"], 1 - noise / y.var(), rtol=1e-3)
    lower, upper = results[0].attrs["skill_interval"]
    assert lower < results[0].attrs["skill"] < upper < 1


@pytest.mark.backend_independent
def test_amounts_of_which_the_model_takes_the_logarithm_get_a_verdict():
    generator = np.random.default_rng(0)
    size = generator.normal(size=300)
    x = np.column_stack([np.exp(size), np.exp(size + 0.5 * generator.normal(size=300)), generator.normal(size=300)])
    y = np.log(x[:, 0]) + 0.5 * np.log(x[:, 1]) + 0.2 * generator.normal(size=300)
    model = of_function(lambda x: keras.ops.log(x[:, 0]) + 0.5 * keras.ops.log(x[:, 1]), 3)
    assert list(verdicts(model, x, y, [0, 1]).values()) == ["supported", "supported", "undetermined"]


def autoregressive(generator, samples, columns):
    noise = generator.normal(size=(samples + 50, columns))
    return signal.lfilter([1], [1, -0.9], noise, axis=0)[50:]


@pytest.mark.backend_independent
def test_rows_that_depend_on_each_other_are_noticed_and_exchanged_in_blocks_or_groups():
    model = linear([0.3, 0.2, 0.0])
    for seed in range(6):
        series = autoregressive(np.random.default_rng(seed), 400, 4)
        x, y = series[:, :3], series[:, 3]
        alone = feature_claims(model, x, y, claimed_all(x), seed=seed)
        assert (alone["verdict"] == "undetermined").all()
        assert "have similar losses" in alone["reason"].values[0]
    found = []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        series = autoregressive(generator, 600, 4)
        found.append(verdicts(model, series[:, :3], series[:, 3], [0, 1], block=30, seed=seed))
        patient = np.repeat(np.arange(60), 5)
        x = generator.normal(size=(60, 3))[patient] + 0.2 * generator.normal(size=(300, 3))
        y = generator.normal(size=60)[patient] + 0.2 * generator.normal(size=300)
        found.append(verdicts(model, x, y, [0, 1], groups=patient, seed=seed))
    needed = [any(verdict in ("supported", "needed, not claimed") for verdict in one.values()) for one in found]
    assert sum(needed) <= 4  # of 24: five happen to one in a hundred at a rate of 5 %
    x = generator.normal(size=(60, 3))[patient] + 0.2 * generator.normal(size=(300, 3))
    y = x @ [0.3, 0.2, 0.0] + 0.1 * generator.normal(size=300)
    assert verdicts(model, x, y, [0, 1], groups=patient)["0"] == "supported"
    with pytest.raises(ValueError, match="one label for each of the 300 samples"):
        verdicts(model, x, y, [0], groups=patient[:5])
    with pytest.raises(ValueError, match="Leave one of them out"):
        verdicts(model, x, y, [0], groups=patient, block=5)


@pytest.mark.backend_independent
def test_copies_of_samples_count_once():
    model = linear([0.3, 0.2, 0.0])
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(100, 3)), generator.normal(size=100)
    order = generator.permutation(np.tile(np.arange(100), 4))
    with pytest.warns(UserWarning, match="300 of 400 samples are exact copies of others"):
        result = feature_claims(model, x[order], y[order], claimed_all(x[order]))
    assert (result.attrs["copies"], result.attrs["clusters"]) == (300, 100)
    once = feature_claims(model, x, y, claimed_all(x))
    np.testing.assert_allclose(np.diff(result["interval"]), np.diff(once["interval"]), rtol=0.5)  # and not by half
    few = np.round(x).clip(-1, 1)  # a table in which rows are alike by chance
    assert feature_claims(model, few, y.round(), claimed_all(x)).attrs["clusters"] == 100


@pytest.mark.backend_independent
def test_draws_that_are_off_the_data_decide_nothing():
    """Feature 3 is a wave over feature 0, which no regression here finds, and the model relies on it."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1500, 4))
    x[:, 3] = np.sign(np.sin(6 * x[:, 0])) + 0.05 * x[:, 3]
    y = np.sign(np.sin(6 * x[:, 0])) + 0.3 * generator.normal(size=1500)
    result = feature_claims(
        of_function(lambda x: x[:, 3], 4), x.astype("float32"), y, np.tile([0, 0, 0, 1.0], (1500, 1))
    )
    assert result["p_value"].values[3] <= 0.05
    assert result["verdict"].values[3] == "undetermined"
    assert "do not look like the data" in result["reason"].values[3]


@pytest.mark.backend_independent
def test_token_ids_are_no_columns_of_a_table():
    inputs = keras.Input((6,), dtype="int32")
    embedded = layers.Embedding(20, 4)(inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(embedded)))
    model.compile(loss="mse")
    x = np.random.default_rng(0).integers(20, size=(60, 6))
    with pytest.raises(ValueError, match=r"token ids.*`explain.faithfulness`"):
        feature_claims(model, x, np.zeros(60), np.ones((60, 6)))
    assert explain.faithfulness(model, x, np.ones((60, 6)), draws=5, verbose=0)["p_value"] <= 1


@pytest.mark.backend_independent
@pytest.mark.parametrize("distribution", ["normal", "lognormal", "flag"])
def test_intervals_of_means_cover_them(distribution):
    generator = np.random.default_rng(0)
    draw = {
        "normal": lambda size: generator.normal(size=size),
        "lognormal": lambda size: generator.lognormal(size=size) - np.exp(0.5),
        "flag": lambda size: (generator.random(size) < 0.02) - 0.02,
    }[distribution]
    everyone = np.arange(300)
    intervals, _ = mean_interval(draw((200, 300)), everyone, 0.05, generator)
    covered = ((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)).sum()
    assert covered >= 180
    of_groups, _ = mean_interval(np.repeat(draw((200, 60)), 5, axis=1), everyone // 5, 0.05, generator)
    covered = ((of_groups[:, 0] <= 0) & (of_groups[:, 1] >= 0)).sum()
    assert covered >= 176 or distribution == "flag"  # which is in none of 60 groups in a third of all cases


@pytest.mark.backend_independent
def test_one_absurd_sample_refutes_nothing():
    for seed in range(3):
        generator = np.random.default_rng(seed)
        x = generator.normal(size=(400, 3))
        x[0] *= 1e4  # in another unit, as it were
        y = x[:, 1] + 0.3 * generator.normal(size=400)
        found = feature_claims(linear([0.0, 1.0, 0.0]), x, y, np.tile([0.1, 0.9, 0.1], (400, 1)), seed=seed)
        assert found["verdict"].values[1] != "refuted"
        assert found.attrs["largest_share"] > 0.9


@pytest.mark.backend_independent
def test_missing_groups_are_refused():
    for missing in (None, np.nan):
        groups = [missing, *range(59)]
        with pytest.raises(ValueError, match=r"`groups` has missing labels.*label of its own"):
            feature_claims(linear([1.0, 1, 1]), TABLE, TABLE[:, 0], TABLE, groups=groups)
    own = ["alone", *map(str, range(59))]
    assert feature_claims(linear([1.0, 1, 1]), TABLE, TABLE[:, 0], TABLE, groups=own).attrs["clusters"] == 60
