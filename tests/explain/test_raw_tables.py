"""From a raw table, with categories and missing values, to an audit: the path that the docs give."""

import keras
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

SPECIES = ["Adelie", "Chinstrap", "Gentoo"]


def penguins(rows, seed):
    """Like Palmer's: body and bill tell the species, the island in part, sex and year do not. Some are missing."""
    rng = np.random.default_rng(seed)
    species = rng.integers(3, size=rows)
    table = pd.DataFrame(
        {
            "island": np.where(rng.random(rows) < 0.7, np.array(["Dream", "Dream", "Biscoe"])[species], "Torgersen"),
            "bill_length_mm": np.array([38, 49, 48])[species] + rng.normal(0, 2, rows),
            "body_mass_g": np.array([3700, 3700, 5000])[species] + rng.normal(0, 300, rows),
            "sex": rng.choice(["male", "female"], rows),
            "year": rng.integers(2007, 2010, rows),
        },
        index=[f"penguin {seed}.{row}" for row in range(rows)],
    )
    table.loc[table.index[rng.random(rows) < 0.05], "sex"] = None
    table.loc[table.index[rng.random(rows) < 0.05], "bill_length_mm"] = np.nan
    return table, species


# 20 lines with the imports of what is used in them, as in docs/learn/your-data.md.
def audited(train, y_train, test, y_test):
    numbers, categories, other = ["bill_length_mm", "body_mass_g", "year"], ["island", "sex"], 9
    filled = make_pipeline(StandardScaler(), SimpleImputer(add_indicator=True))
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=other, encoded_missing_value=other)
    parts = (filled, numbers), (codes, categories)
    encoder = make_column_transformer(*parts, verbose_feature_names_out=False).set_output(transform="pandas")
    x_train, x_test = encoder.fit_transform(train), encoder.transform(test)
    names = list(x_train.columns)

    inputs = keras.Input((len(names),))
    tokens = FeatureTokenizer(8, names, dict.fromkeys(categories, other + 1))(inputs)
    attended = InterpretableMultiHeadAttention(8, 2, name="attention")(tokens)
    outputs = keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(attended))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    model.fit(x_train, y_train, epochs=8, verbose=0)

    mask = x_train.columns.str.removeprefix("missingindicator_").factorize()[0]
    return encoder, model, explain.audit(model, x_test, y_test, feature_mask=mask, verbose=0)


@pytest.fixture(scope="module")
def found():
    keras.utils.set_random_seed(0)
    train, y_train = penguins(500, 0)
    test, y_test = penguins(200, 1)
    return test, *audited(train, y_train, test, y_test)


def test_a_raw_table_is_audited_by_the_columns_that_it_came_with(found):
    _, _, _, report = found
    features = report.features
    together = "bill_length_mm + missingindicator_bill_length_mm"
    assert set(features.index) >= {together, "body_mass_g", "year", "island", "sex"}
    assert features.loc[together, "verdict"] in ("supported", "needed, not claimed")
    assert features.loc[["sex", "year"], "verdict"].isin(["supported", "needed, not claimed"]).sum() == 0
    assert report.record["skill"]["skill"] > 0.5


@pytest.mark.backend_independent
def test_what_was_not_seen_in_training_becomes_the_level_for_others(found, tmp_path):
    test, encoder, model, _ = found
    new = test.head(3).assign(island=["Mars", None, "Dream"], bill_length_mm=[40, np.nan, 45])
    encoded = encoder.transform(new)
    assert encoded["island"].tolist()[:2] == [9, 9]
    assert encoded["missingindicator_bill_length_mm"].gt(0).tolist() == [False, True, False]
    attribution = explain.attribute(model, encoded, verbose=0)
    assert attribution["sample"].values.tolist() == new.index.tolist()
    assert attribution["feature"].values.tolist() == list(encoder.get_feature_names_out())
    model.save(tmp_path / "model.keras")
    again = explain.attribute(keras.saving.load_model(tmp_path / "model.keras"), encoded, verbose=0)
    np.testing.assert_allclose(again, attribution, atol=1e-6)
    with pytest.raises(ValueError, match="which is not a number, and these columns hold none either: 'sex'"):
        explain.attribute(model, test.dropna(), verbose=0)


@pytest.mark.backend_independent
def test_columns_of_one_hot_codes_are_one_feature():
    table, _ = penguins(50, 0)
    encoder = make_column_transformer(
        (
            OneHotEncoder(sparse_output=False, feature_name_combiner=lambda column, level: f"{column}={level}"),
            ["island"],
        ),
        ("passthrough", ["year"]),
        verbose_feature_names_out=False,
    ).set_output(transform="pandas")
    names = encoder.fit_transform(table).columns
    mask, features = names.str.replace("=.*", "", regex=True).factorize()
    assert mask.tolist() == [0, 0, 0, 1]
    assert list(features) == ["island", "year"]


@pytest.mark.backend_independent
def test_texts_with_pandas_own_missing_value_are_encoded_after_the_line_in_the_docs():
    table, _ = penguins(50, 0)
    table = table.convert_dtypes(dtype_backend="numpy_nullable")
    codes = OrdinalEncoder(encoded_missing_value=9)
    with pytest.raises(TypeError, match="uniformly strings or numbers"):
        codes.fit_transform(table[["sex"]])
    table = table.astype(object).where(table.notna(), np.nan).infer_objects()
    assert set(codes.fit_transform(table[["sex"]]).ravel()) == {0, 1, 9}
