"""Models with several inputs and outputs: the same verbs, with a dictionary or list of arrays and of masks."""

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer

RNG = np.random.default_rng(0)
PLAN = RNG.normal(size=(60, 3)).astype("float32")
SERIES = RNG.normal(size=(60, 4, 2)).astype("float32")
MASKS = {"plan": np.arange(3), "series": np.arange(3, 7)[:, np.newaxis]}
OF_PLAN, OF_SERIES = np.array([3.0, 0, 1]), np.outer([0, 2, 0, 1], [1, 1])


def linear(as_list=False):
    plan, series = keras.Input((3,), name="plan"), keras.Input((4, 2), name="series")
    parts = [layers.Dense(1, use_bias=False)(part) for part in (plan, layers.Flatten()(series))]
    model = keras.Model([plan, series] if as_list else {"plan": plan, "series": series}, layers.Add()(parts))
    for weight in model.trainable_weights:
        weight.assign(np.reshape(OF_PLAN if weight.shape[0] == 3 else OF_SERIES, (-1, 1)))
    model.compile(loss="mse")
    return model


def merged_attention(inputs, plan, series, outputs=1):
    tokens = layers.Concatenate(axis=1)([FeatureTokenizer(8)(plan), layers.Dense(8)(series)])
    tokens = tokens + layers.MultiHeadAttention(2, 8, name="attention")(tokens, tokens)
    return keras.Model(inputs, layers.Dense(outputs)(layers.Flatten()(tokens)))


@pytest.fixture(scope="module")
def trained():
    """A model of two inputs, and held-out data: the outcome depends on the plan's second number and one time."""
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    x = {"plan": generator.normal(size=(500, 3)), "series": generator.normal(size=(500, 4, 2))}
    x = {name: array.astype("float32") for name, array in x.items()}
    y = x["plan"][:, 1] + x["series"][:, 2, 0] + 0.2 * generator.normal(size=500)
    plan, series = keras.Input((3,), name="plan"), keras.Input((4, 2), name="series")
    model = merged_attention({"plan": plan, "series": series}, plan, series)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit({name: array[:350] for name, array in x.items()}, y[:350], batch_size=50, epochs=15, verbose=0)
    return model, {name: array[350:] for name, array in x.items()}, y[350:]


@pytest.mark.parametrize("as_list", [False, True])
def test_features_of_both_inputs_are_removed_as_one_calculates_by_hand(as_list):
    x = {"plan": PLAN, "series": SERIES}
    settings = {"removal": "mean", "fractions": [1 / 7], "draws": 2, "verbose": 0}
    attribution = RNG.random((60, 7))
    given, masks = (list(part.values()) if as_list else part for part in (x, MASKS))
    result = explain.faithfulness(linear(as_list), given, attribution, feature_mask=masks, **settings)
    parts = [(PLAN - PLAN.mean(axis=0)) * OF_PLAN, ((SERIES - SERIES.mean(axis=0)) * OF_SERIES).sum(axis=2)]
    of_features = np.concatenate(parts, axis=1)
    first = of_features[np.arange(60), attribution.argmax(axis=1)]
    np.testing.assert_allclose(result["comprehensiveness"][:, 0], np.abs(first), atol=1e-4)
    np.testing.assert_allclose(result["sufficiency"][:, 0], np.abs(of_features.sum(axis=1) - first), atol=1e-4)


@pytest.mark.backend_independent
def test_one_input_varies_while_the_other_stays():
    x, model = {"series": SERIES, "plan": PLAN}, linear()
    settings = {"removal": "mask", "fractions": [1.0], "draws": 2, "verbose": 0}
    result = explain.faithfulness(model, x, PLAN, feature_mask={"plan": np.arange(3), "series": -1}, **settings)
    np.testing.assert_allclose(result["comprehensiveness"][:, 0], np.abs(PLAN @ OF_PLAN), atol=1e-4)
    # A feature may have entries in both.
    together = {"plan": [0, 1, 1], "series": np.array([1, 0, 1, -1])}
    result = explain.faithfulness(model, x, PLAN[:, :2], feature_mask=together, **settings)
    kept = (SERIES[:, 3] * OF_SERIES[3]).sum(axis=1)
    own = PLAN @ OF_PLAN + (SERIES * OF_SERIES).sum(axis=(1, 2))
    np.testing.assert_allclose(result["comprehensiveness"][:, 0], np.abs(own - kept), atol=1e-4)


def test_claims_about_features_of_both_inputs_are_those_of_one_table():
    attribution = np.ones((60, 7)) * [3, 2, 0, 0, 3, 0, 0]
    y = PLAN @ OF_PLAN + (SERIES * OF_SERIES).sum(axis=(1, 2))
    x = {"series": SERIES, "plan": PLAN}
    claims = explain.feature_claims(linear(), x, y, attribution, feature_mask=MASKS, verbose=0)
    assert claims["verdict"].values[[0, 1, 4]].tolist() == ["supported", "refuted", "supported"]
    assert set(claims["verdict"].values[[3, 5]]) == {"undetermined"}
    table = keras.Sequential([keras.Input((11,)), layers.Dense(1, use_bias=False)])
    table.set_weights([np.concatenate([OF_PLAN, OF_SERIES.reshape(-1)])[:, np.newaxis]])
    table.compile(loss="mse")
    columns = np.concatenate([PLAN, SERIES.reshape(60, -1)], axis=1)
    numbers = [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    same = explain.feature_claims(table, columns, y, attribution, feature_mask=numbers, verbose=0)
    np.testing.assert_allclose(claims["effect"], same["effect"], rtol=1e-4, atol=1e-5)
    assert (claims["member"].values == same["member"].values).all()


def test_what_reads_attention_takes_what_predict_takes(trained):
    """The numbers are those of a model of one input that is cut in two inside."""
    model, x, y = trained
    columns = np.concatenate([x["plan"], x["series"].reshape(len(y), -1)], axis=1)
    inputs = keras.Input((11,))
    one = merged_attention(inputs, inputs[:, :3], layers.Reshape((4, 2))(inputs[:, 3:]))
    one.set_weights(model.get_weights())
    one.compile(loss="mse")
    pairs = [
        (explain.attribute(model, x, verbose=0), explain.attribute(one, columns, verbose=0)),
        (
            explain.head_importance(model, x, y, verbose=0)["attention"]["ablation"],
            explain.head_importance(one, columns, y, verbose=0)["attention"]["ablation"],
        ),
        *(
            (of_two["change"], of_one["change"])
            for of_two, of_one in [
                [explain.attention_controls(*pair, steps=2, verbose=0) for pair in ((model, x), (one, columns))]
            ]
        ),
    ]
    for of_two, of_one in pairs:
        np.testing.assert_allclose(of_two, of_one, rtol=1e-3, atol=1e-4)


def test_a_loaded_model_of_two_inputs_to_an_audit(trained, tmp_path):
    model, x, y = trained
    model.save(tmp_path / "model.keras")

    model = keras.models.load_model(tmp_path / "model.keras")
    names = ["age", "dose", "pulse", "day 1", "day 2", "day 3", "day 4"]
    masks = {"plan": np.arange(3), "series": np.arange(3, 7)[:, np.newaxis]}
    settings = {"method": "attention_gradient", "feature_names": names, "feature_mask": masks}
    report = explain.audit(model, x, y, tmp_path / "audit.html", **settings, verbose=0)
    findings = explain.verify(report, model, x, y, verbose=0)

    assert findings == []
    needed = report.features["verdict"].isin(["supported", "needed, not claimed"])
    assert needed[needed].index.tolist() == ["dose", "day 3"]
    assert report.record["data"]["shape"] == {"plan": [150, 3], "series": [150, 4, 2]}
    other = {**x, "series": x["series"] + 1}
    assert "The data are not those of the audit." in explain.verify(report, model, other, y, verbose=0)
    shorter = {**x, "series": x["series"][:, :3]}
    assert "Nothing else was checked" in explain.verify(report, model, shorter, y, verbose=0)[0]
    assert "Nothing else was checked" in explain.verify(report, model, x["plan"], y, verbose=0)[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feature_mask": None}, r"several inputs, 'plan', 'series'.*\{'plan': numpy.arange\(3\), 'series': -1\}"),
        (
            {"feature_mask": {"plan": np.arange(3), "serie": -1}},
            "Not there: 'serie'. Missing: 'series'. Did you mean 'series'",
        ),
        ({"feature_mask": {"plan": np.arange(3)}}, "-1 for one that is never changed.*Missing: 'series'"),
        ({"feature_mask": np.arange(3)}, "must be a dictionary as well"),
        (
            {"feature_mask": {**MASKS, "series": np.arange(3, 8)}},
            r"`feature_mask\['series'\]` must have the shape .*\(4, 2\)",
        ),
        ({"feature_mask": {**MASKS, "series": np.arange(4)}}, r"as in `x`.*shape \(60, 7\)"),
        ({"feature_mask": {**MASKS, "series": np.arange(4, 8)}}, "No entry has number 3"),
        ({"x": {"plan": PLAN, "series": SERIES[:50]}}, r"as many samples each.*'series': \(50, 4, 2\)"),
        ({"x": {"plan": PLAN, "series": SERIES.astype(str)}}, r"`x\['series'\]` holds strings"),
        ({"background": {"plan": PLAN, "series": SERIES[:, :2]}}, r"samples like those of `x`.*'series': \(60, 2, 2\)"),
        ({"background": PLAN}, "samples like those of `x`"),
    ],
)
@pytest.mark.backend_independent
def test_bad_input_is_answered_with_the_way_out(changed, message):
    x = {"plan": PLAN, "series": SERIES}
    arguments = {"x": x, "attribution": RNG.random((60, 7)), "feature_mask": MASKS, "verbose": 0} | changed
    with pytest.raises(ValueError, match=message):
        explain.faithfulness(linear(), **arguments)


@pytest.mark.backend_independent
def test_integers_have_no_mean_unless_they_stay():
    x = {"plan": PLAN, "series": (SERIES > 0).astype(int)}
    settings = {"removal": "mean", "draws": 2, "verbose": 0}
    with pytest.raises(ValueError, match=r"`x\['series'\]` are of dtype int64"):
        explain.faithfulness(linear(), x, RNG.random((60, 7)), feature_mask=MASKS, **settings)
    explain.faithfulness(linear(), x, PLAN, feature_mask={"plan": np.arange(3), "series": -1}, **settings)


def test_a_text_beside_a_table_is_tested_by_its_words_and_padding_stays():
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    words, table = keras.Input((6,), dtype="int32", name="words"), keras.Input((2,), name="table")
    tokens = layers.Embedding(31, 8, mask_zero=True)(words)
    attended = layers.MultiHeadAttention(2, 8, name="attention")(tokens, tokens)
    of_text = layers.Dense(1, use_bias=False)(layers.GlobalAveragePooling1D()(attended))
    model = keras.Model({"words": words, "table": table}, of_text + 0 * layers.Dense(1)(table))
    model.compile(loss="mse")
    x = {"words": generator.integers(1, 30, size=(80, 6)), "table": generator.normal(size=(80, 2))}
    x["words"][:, 5:] = 0
    x["words"][::2, 3:] = 0
    x["words"][:, 0] = 30  # the start of a text
    attribution = explain.attribute(model, x, special_tokens=[30], verbose=0)
    assert not attribution["in_view"].values[np.isin(x["words"], [0, 30])].any()
    masks, settings = {"words": np.arange(6), "table": -1}, {"draws": 20, "verbose": 0}
    found = explain.faithfulness(model, x, attribution, feature_mask=masks, **settings)
    alone = explain.faithfulness(keras.Model(words, of_text), x["words"], attribution, **settings)
    np.testing.assert_allclose(found["sufficiency"], alone["sufficiency"], atol=1e-5)  # padding included
    assert found["p_value"] == alone["p_value"]
    report = explain.audit(model, x, x["table"][:, 0], feature_mask=masks, verbose=0)
    assert report.claims.loc["ranking-comprehensiveness", "value"] > 0
    assert report.claims.loc["feature/0", "verdict"] == "undetermined"
    assert "no other feature can be resampled given a text" in report.claims.loc["feature/0", "reason"]
    with pytest.raises(ValueError, match="`x` holds token ids"):
        explain.feature_claims(model, x, x["table"][:, 0], attribution, feature_mask=masks, verbose=0)


def test_one_of_several_outputs_is_chosen_by_its_key():
    plan, series = keras.Input((3,), name="plan"), keras.Input((4, 2), name="series")
    outputs = {"cost": layers.Dense(1, use_bias=False)(plan), "days": layers.Dense(2)(layers.Flatten()(series))}
    model = keras.Model({"plan": plan, "series": series}, outputs)
    x = {"plan": PLAN, "series": SERIES}
    settings = {"feature_mask": MASKS, "removal": "mask", "fractions": [1.0], "draws": 2, "verbose": 0}
    attribution = RNG.random((60, 7))
    cost = explain.faithfulness(model, x, attribution, target="cost", **settings)
    predicted = {name: np.asarray(output) for name, output in model.predict(x, verbose=0).items()}
    np.testing.assert_allclose(cost["comprehensiveness"], np.abs(predicted["cost"]), atol=1e-5)
    days = explain.faithfulness(model, x, attribution, target=("days", 1), **settings)
    np.testing.assert_allclose(days["comprehensiveness"][:, 0], np.abs(predicted["days"][:, 1]), atol=1e-5)
    with pytest.raises(ValueError, match="with `target='cost'`"):
        explain.faithfulness(model, x, attribution, **settings)


@pytest.mark.backend_independent
def test_a_table_among_the_inputs_may_be_a_data_frame():
    x = {"plan": pd.DataFrame(PLAN, columns=["age", "dose", "pulse"]), "series": SERIES}
    settings = {"feature_mask": {"plan": np.arange(3), "series": -1}, "draws": 10, "verbose": 0}
    result = explain.faithfulness(linear(), x, PLAN, **settings)
    same = explain.faithfulness(linear(), {**x, "plan": PLAN}, PLAN, **settings)
    np.testing.assert_array_equal(result["comprehensiveness"], same["comprehensiveness"])


def test_claims_and_audits_take_a_list_of_inputs_of_different_ranks(trained):
    model, x, y = trained
    as_list = keras.Model(list(model.input.values()), model.output)
    as_list.compile(loss="mse")
    masks = [np.arange(3), -1]
    attribution = np.ones((150, 3))
    of_list = explain.feature_claims(as_list, list(x.values()), y, attribution, feature_mask=masks, draws=20, verbose=0)
    of_dictionary = explain.feature_claims(
        model, x, y, attribution, feature_mask={"plan": masks[0], "series": -1}, draws=20, verbose=0
    )
    np.testing.assert_allclose(of_list["effect"], of_dictionary["effect"], atol=1e-6)
    assert explain.audit(as_list, list(x.values()), y, feature_mask=[np.arange(3), np.arange(3, 7)[:, None]], verbose=0)
