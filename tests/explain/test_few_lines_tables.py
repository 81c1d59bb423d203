"""A table with categories and missing values becomes an audit in 25 lines, in which the planted truth is found."""

import inspect

import keras
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder, StandardScaler

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

pytestmark = pytest.mark.backend_independent


# With the imports above that it uses, as a reader types it.
def program(table, y, train):
    numbers, categories, other = ["pulse", "noise"], ["smoker", "region"], 9
    filled = make_pipeline(StandardScaler(), SimpleImputer(add_indicator=True))
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=other, encoded_missing_value=other)
    encoder = make_column_transformer((filled, numbers), (codes, categories), verbose_feature_names_out=False)
    encoder.set_output(transform="pandas").fit(table[:train])
    x, x_test = encoder.transform(table[:train]), encoder.transform(table[train:])

    inputs = keras.Input((x.shape[1],))
    tokens = FeatureTokenizer(8, list(x.columns), dict.fromkeys(categories, other + 1))(inputs)
    attended = InterpretableMultiHeadAttention(8, 2, name="attention")(tokens)
    outputs = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(attended))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy")
    model.fit(x, y[:train], epochs=10, verbose=0)

    mask = x.columns.str.removeprefix("missingindicator_").factorize()[0]
    return explain.audit(model, x_test, y[train:, None], feature_mask=mask, verbose=0)


IMPORTS = 7  # keras, five names of scikit-learn in four lines, and two lines of this package


def patients(rows):
    """Ill is who smokes, has a fast pulse, or has a pulse that was not measured; region and noise say nothing."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "pulse": rng.normal(70, 10, rows),
            "noise": rng.normal(size=rows),
            "smoker": rng.choice(["no", "yes"], rows),
            "region": rng.choice(["north", "south", "west"], rows),
        }
    )
    unmeasured = rng.random(rows) < 0.15
    ill = (table["smoker"] == "yes") | (table["pulse"] > 78) | unmeasured
    table.loc[unmeasured, "pulse"] = np.nan
    table.loc[rng.random(rows) < 0.05, ["noise"]] = np.nan
    table.loc[rng.random(rows) < 0.05, ["region"]] = np.nan
    return table, ill.to_numpy()


@pytest.fixture(scope="module")
def report():
    keras.utils.set_random_seed(0)
    return program(*patients(600), 400)


def test_the_planted_columns_are_found_and_the_others_are_not(report):
    verdicts = report.features["verdict"]
    needed = verdicts[verdicts.isin(["supported", "needed, not claimed"])].index
    assert set(needed) == {"pulse + missingindicator_pulse", "smoker"}
    assert report.record["skill"]["skill"] > 0.4


def test_the_capture_is_exact(report):
    assert report.claims.loc["capture", "verdict"] == "supported"


def test_it_takes_25_lines():
    lines = [line.strip() for line in inspect.getsource(program).splitlines()[1:]]
    count = sum(bool(line) and not line.startswith("#") for line in lines)
    assert count + IMPORTS <= 25
