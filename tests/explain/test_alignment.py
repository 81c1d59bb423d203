"""Tables, labels and attributions are matched by place: where their labels say another order, that is an error."""

import keras
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

pytestmark = pytest.mark.backend_independent

WEIGHTS = np.array([2.0, 0.0, 0.0, 0.0])
X = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 4)), columns=list("abcd"))
Y = pd.Series(2 * X["a"], name="y")
ATTRIBUTION = xr.DataArray(np.abs(X.to_numpy() * WEIGHTS), {"feature": list("abcd")}, ("sample", "feature"))
SETTINGS = {"verbose": 0}


@pytest.fixture(scope="module")
def linear():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.set_weights([WEIGHTS[:, None], np.zeros(1)])
    model.compile(loss="mse")
    return model


@pytest.fixture(scope="module")
def attending():
    inputs = keras.Input((4,))
    tokens = FeatureTokenizer(4, list("abcd"))(inputs)
    attended = InterpretableMultiHeadAttention(2, 2, name="attention")(tokens)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
    model.compile(loss="mse")
    return model


@pytest.mark.parametrize("attribution", [ATTRIBUTION[:, ::-1], ATTRIBUTION.to_pandas()[list("dcba")]])
def test_features_in_another_order_are_no_attribution_of_these(linear, attribution):
    message = r"`attribution` has the feature labels of `x` in another order.*at place 0 stands 'd', and there 'a'"
    with pytest.raises(ValueError, match=message):
        explain.feature_claims(linear, X, Y, attribution, **SETTINGS)
    with pytest.raises(ValueError, match=message):
        explain.faithfulness(linear, X, attribution, **SETTINGS)
    with pytest.raises(ValueError, match=r"`methods\['two'\]` has the feature labels of `x` in another order"):
        explain.compare(linear, X, methods={"one": ATTRIBUTION, "two": attribution}, **SETTINGS)
    array = (
        attribution.sel(feature=list("abcd")) if isinstance(attribution, xr.DataArray) else attribution[list("abcd")]
    )
    claims = explain.feature_claims(linear, X, Y, array, **SETTINGS)  # as the error says
    assert claims["verdict"].sel(feature="a") == "supported"


def test_columns_in_another_order_are_no_table_for_the_model(attending):
    other = X[list("dcba")]
    message = r"in another order, so the model would mistake one for another.*\['a', 'b', 'c', 'd'\]"
    calls = [
        lambda: explain.faithfulness(attending, other, ATTRIBUTION.values, **SETTINGS),
        lambda: explain.feature_claims(attending, other, Y, ATTRIBUTION.values, **SETTINGS),
        lambda: explain.head_importance(attending, other, Y, **SETTINGS),
        lambda: explain.attention_controls(attending, other, **SETTINGS),
        lambda: explain.attribute(attending, other, **SETTINGS),
        lambda: explain.audit(attending, other, **SETTINGS),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"`background` must have the columns of `x`, in the same order"):
        explain.faithfulness(attending, X, ATTRIBUTION, background=other, **SETTINGS)
    assert explain.faithfulness(attending, X, ATTRIBUTION, background=other[X.columns], draws=2, **SETTINGS)


def test_labels_of_other_rows_are_no_labels_of_these(attending):
    shuffled = Y.sample(frac=1, random_state=0)
    for call in (
        lambda y: explain.audit(attending, X, y, **SETTINGS),
        lambda y: explain.feature_claims(attending, X, y, ATTRIBUTION, **SETTINGS),
        lambda y: explain.head_importance(attending, X, y, **SETTINGS),
    ):
        with pytest.raises(ValueError, match=r"`y` has the sample labels of `x` in another order"):
            call(shuffled)
    assert len(explain.feature_claims(attending, X, shuffled.loc[X.index], ATTRIBUTION, **SETTINGS)["feature"]) == 4
    assert len(explain.feature_claims(attending, X, shuffled.to_numpy(), ATTRIBUTION, **SETTINGS)["feature"]) == 4
