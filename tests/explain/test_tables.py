"""A DataFrame means the same to every function: its numbers go in, its columns and its index come out."""

import decimal
import functools
import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from sklearn.impute import SimpleImputer

from kerasfactory import explain, plot
from kerasfactory.explain import _controls
from kerasfactory.layers import FeatureTokenizer

pytestmark = pytest.mark.backend_independent

COLUMNS = ["age", "pulse", 7]
NAMES = ["age", "pulse", "7"]
SAMPLES = 40


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@functools.cache
def on_table(names=None, class_token=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    tokens = FeatureTokenizer(4, feature_names=names)(inputs)
    if class_token:
        tokens = keras.layers.ZeroPadding1D((1, 0))(tokens)
    attended = keras.layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
    model.compile(loss="mse")
    return model


def table_of(index=None, columns=COLUMNS):
    values = np.random.default_rng(0).normal(size=(SAMPLES, 3))
    index = pd.Index([f"patient {row // 2}" for row in range(SAMPLES)], name="patient") if index is None else index
    return pd.DataFrame(values, index, columns)


TABLE = table_of()
Y = TABLE["age"].to_numpy() + 0.1 * TABLE["pulse"].to_numpy()
VERBS = {
    "capture": lambda model, x: explain.capture(model, x, verbose=0)["attention"],
    "summarize": lambda model, x: explain.summarize(model, x, rows=[1], verbose=0)["attention"],
    "rollout": lambda model, x: explain.rollout(explain.capture(model, x, verbose=0)),
    "head_statistics": lambda model, x: explain.head_statistics(explain.capture(model, x, verbose=0)["attention"]),
    "attribute": lambda model, x: explain.attribute(model, x, verbose=0),
    "integrated_gradients": lambda model, x: explain.attribute(model, x, method="integrated_gradients", verbose=0),
    "attention_gradient": lambda model, x: explain.attribute(model, x, method="attention_gradient", verbose=0),
    "faithfulness": lambda model, x: explain.faithfulness(
        model, x, explain.attribute(model, x, verbose=0), draws=5, background=x, verbose=0
    ),
    "attention_controls": lambda model, x: explain.attention_controls(model, x, Y, draws=2, steps=1, verbose=0),
    "head_importance": lambda model, x: explain.head_importance(model, x, Y, verbose=0)["attention"],
    "parameter_randomization": lambda model, x: explain.parameter_randomization(model, x, draws=2, verbose=0),
    "seed_agreement": lambda model, x: explain.seed_agreement(
        [explain.attribute(model, x, method=method, verbose=0) for method in ("attention", "value_norm")], draws=5
    ),
    "feature_claims": lambda model, x: explain.feature_claims(
        model, x, Y, explain.attribute(model, x, verbose=0), draws=5, verbose=0
    ),
}
# They look like positions, and would be taken for them by whoever looks samples up by their labels.
REVERSED = pd.RangeIndex(SAMPLES - 1, -1, -1)


@pytest.mark.parametrize("verb", VERBS)
def test_the_numbers_are_those_of_an_array_and_the_labels_those_of_the_table(verb):
    table = table_of(REVERSED)
    result, of_array = VERBS[verb](on_table(), table), VERBS[verb](on_table(), table.to_numpy())
    expected = of_array.assign_coords(
        {dim: NAMES for dim in ("query", "key", "feature") if dim in of_array.dims}
        | ({"sample": table.index.rename("sample")} if "sample" in of_array.dims else {})
    )
    if verb == "feature_claims":  # which names groups too
        expected = expected.assign_coords(feature=result["feature"])
        assert result["feature"].values[:3].tolist() == NAMES
    xr.testing.assert_allclose(result.drop_attrs(), expected.drop_attrs(), rtol=1e-4, atol=1e-6)
    if verb in ("capture", "attribute", "faithfulness", "attention_controls"):
        assert result["sample"].values.tolist() == table.index.tolist()


@pytest.mark.parametrize(
    ("index", "labels"),
    [
        (TABLE.index, ["patient 0", "patient 0"]),
        (pd.date_range("2024-01-01", periods=SAMPLES), ["2024-01-01", "2024-01-02"]),
        (pd.date_range("2024-01-01", periods=SAMPLES, tz="Asia/Tokyo"), ["2023-12-31 15:00", "2024-01-01 15:00"]),
        (pd.timedelta_range("1h", periods=SAMPLES, freq="h"), ["1 h", "2 h"]),
        (pd.period_range("2024-01", periods=SAMPLES, freq="M"), ["2024-01", "2024-02"]),
        (pd.CategoricalIndex(["b", "a"] * (SAMPLES // 2)), ["b", "a"]),
        (pd.Index([3, 1] * (SAMPLES // 2), dtype="Int64"), ["3", "1"]),
        (
            pd.MultiIndex.from_product([range(SAMPLES // 2), ["$l$", "$r$"]], names=["head", None]),
            ["(0, '$l$')", "(0, '$r$')"],
        ),
    ],
)
def test_every_index_stays_with_its_rows_and_is_drawn(index, labels):
    scores = explain.capture(on_table(), table_of(index), verbose=0)["attention"]
    assert len(scores.get_index("sample")) == SAMPLES
    fragment = plot.interactive(scores, samples=2)
    assert f'"samples":["{labels[0]}","{labels[1]}"]' in fragment
    assert labels[0].replace("$", r"\$") in plot.heatmap(scores[0]).get_title().replace("\n", " ")
    explain.rollout(scores)
    explain.head_statistics(scores)
    attribution = explain.attribute(on_table(), table_of(index), verbose=0)
    plot.features(attribution)
    assert attribution.isel(sample=[1, 0]).get_index("sample").tolist() == scores.get_index("sample")[[1, 0]].tolist()


def test_levels_of_an_index_are_coordinates():
    index = pd.MultiIndex.from_product([range(SAMPLES // 2), ["l", "r"]], names=["patient", "key"])
    scores = explain.capture(on_table(), table_of(index), verbose=0)["attention"]
    assert scores.sel(patient=3, sample_level_1="r").sizes == {"head": 2, "query": 3, "key": 3}
    np.testing.assert_array_equal(scores.sel(patient=3, sample_level_1="r").squeeze(), scores[7])


def test_samples_that_are_drawn_keep_their_labels(monkeypatch):
    monkeypatch.setattr(_controls, "_SAMPLES", 8)
    result, of_array = (VERBS["attention_controls"](on_table(), x) for x in (TABLE, TABLE.to_numpy()))
    assert result["sample"].values.tolist() == TABLE.index[of_array["sample"].values].tolist()
    np.testing.assert_allclose(result["change"], of_array["change"], rtol=1e-4, atol=1e-6)


def test_names_of_columns_can_be_asked_for_by_every_function():
    model = on_table()
    row = explain.attribute(model, TABLE, query="7", verbose=0)
    np.testing.assert_array_equal(row, explain.attribute(model, TABLE.to_numpy(), query=2, verbose=0))
    uniform = explain.attribute(model, TABLE, method="uniform", special_tokens=["pulse"], verbose=0)
    np.testing.assert_allclose(uniform, np.tile([0.5, 0, 0.5], (SAMPLES, 1)))
    explain.parameter_randomization(model, TABLE, draws=2, special_tokens=["pulse"], verbose=0)


def test_a_function_of_yours_gets_an_array():
    def method(model, x):
        assert type(x) is np.ndarray
        return np.abs(x)

    explain.parameter_randomization(on_table(), TABLE, method=method, draws=2, verbose=0)


def test_which_names_are_used():
    def keys(model, x, **options):
        scores = explain.capture(model, x, verbose=0, **options)["attention"]
        return scores["key"].values.tolist() if "key" in scores.coords else None

    own = ("a", "b", "c")
    assert keys(on_table(own), TABLE) == NAMES
    assert keys(on_table(own), TABLE, feature_names=["x", "y", "z"]) == ["x", "y", "z"]
    assert keys(on_table(own), TABLE.to_numpy()) == list(own)
    assert keys(on_table(), table_of(columns=range(3))) == ["0", "1", "2"]
    assert keys(on_table(), table_of(columns=["a", "a", "b"]), feature_names=["x", "y", "z"]) == ["x", "y", "z"]
    assert keys(on_table(class_token=True), TABLE) is None  # 4 keys, of which no column is the first
    with pytest.raises(ValueError, match="one name for each key"):
        keys(on_table(class_token=True), TABLE, feature_names=NAMES)


NUMBERS = {
    "bool": lambda pulse: pulse > 0,
    "boolean": lambda pulse: (pulse > 0).astype("boolean"),
    "Int64": lambda pulse: (pulse * 9).astype("int").astype("Int64"),
    "Float64": lambda pulse: pulse.astype("Float64"),
    "uint8": lambda pulse: (pulse > 0).astype("uint8"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_all_kinds_of_numbers_are_numbers(kind):
    table = TABLE.assign(pulse=NUMBERS[kind](TABLE["pulse"]))
    same = explain.capture(on_table(), table.astype("float64").to_numpy(), verbose=0)["attention"]
    np.testing.assert_allclose(explain.capture(on_table(), table, verbose=0)["attention"], same, atol=1e-6)


def test_a_table_of_truth_values_and_a_nullable_one_run_through():
    for table in (TABLE > 0, TABLE.convert_dtypes(), TABLE.assign(pulse=TABLE["pulse"] > 0).astype({"age": "Float64"})):
        explain.faithfulness(on_table(), table, np.abs(TABLE), draws=5, verbose=0)


def refusal(table, verb="capture", model=None):
    with pytest.raises(ValueError, match="row") as caught:
        VERBS[verb](on_table() if model is None else model, table)
    return str(caught.value)


BAD_COLUMNS = {
    "str": (["low", "high"], "'low'", lambda pulse: pulse.map({"low": 0, "high": 1})),
    "string": (pd.array(["low", "high"], "string"), "'low'", lambda pulse: pulse.map({"low": 0, "high": 1})),
    "category": (pd.Categorical(["low", "high"]), "'low'", lambda pulse: pulse.cat.codes),
    "date": (pd.to_datetime(["2024-05-01", "2024-05-04"]), "2024-05-01", lambda pulse: (pulse - pulse.iloc[0]).dt.days),
    "NaT": (pd.to_datetime([None, "2024-05-04"]), "2024-05-04", lambda pulse: pulse.dt.day.fillna(0)),
}


@pytest.mark.parametrize("kind", BAD_COLUMNS)
def test_a_column_without_numbers_is_named_with_its_row_and_the_way_out_works(kind):
    values, shown, encoded = BAD_COLUMNS[kind]
    rows = pd.Index([f"patient {row}" for row in range(SAMPLES)])
    table = table_of(rows).assign(pulse=pd.Series(values).take([0, 1] * (SAMPLES // 2)).set_axis(rows))
    message = refusal(table)
    assert message.startswith("Column 'pulse' (")
    assert shown in message.partition("'patient ")[0]
    assert f"in row 'patient {int(kind == 'NaT')}', which is not a number. Encode" in message
    VERBS["capture"](on_table(), table.assign(pulse=encoded(table["pulse"])))


def test_further_columns_without_numbers_are_named():
    assert "hold none either: 'pulse', 7. Encode" in refusal(TABLE.astype("str").map("at {}".format))


MISSING = {
    "NaN": [1.0, np.nan],
    "NA": pd.array([1, None], "Int64"),
    "None": pd.array([True, None], "boolean"),
    "pyarrow": pd.array([0.5, None], "Float64"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_value_is_named_with_its_column_and_row_and_the_ways_out_work(kind):
    rows = pd.Index([f"patient {row}" for row in range(SAMPLES)])
    table = table_of(rows).assign(pulse=pd.Series(MISSING[kind]).take([0, 1] * (SAMPLES // 2)).set_axis(rows))
    message = refusal(table)
    assert message.startswith(
        "Values are missing in 20 of 40 rows, in 'pulse': the first in column 'pulse', row 'patient 1'. Fill them"
    )
    assert VERBS["capture"](on_table(), table.dropna()).sizes["sample"] == SAMPLES // 2
    filled = (
        SimpleImputer(add_indicator=True)
        .set_output(transform="pandas")
        .fit_transform(table.astype("float64").set_axis(NAMES, axis=1))
    )
    assert VERBS["capture"](on_table(), filled.iloc[:, :3]).sizes["sample"] == SAMPLES
    with pytest.warns(UserWarning, match="NaN in 20 of 40"):
        VERBS["capture"](on_table(), table.to_numpy("float64", na_value=np.nan))


@pytest.mark.parametrize("numbers", [[1.5, 2], ["0.12", "3"], [decimal.Decimal("1.5"), 2], pd.Categorical([1, 2])])
def test_numbers_of_other_types_are_named_and_become_numbers_as_said(numbers):
    column = pd.Series(numbers, dtype=None if isinstance(numbers, pd.Categorical) else object)
    table = TABLE.assign(pulse=column.take([0, 1] * (SAMPLES // 2)).set_axis(TABLE.index))
    with pytest.raises(ValueError, match=r"Column 'pulse' holds numbers of the type.*`x.astype\(\{'pulse': float\}\)`"):
        VERBS["capture"](on_table(), table)
    VERBS["capture"](on_table(), table.astype({"pulse": float}))


def test_an_array_of_objects_is_refused_and_becomes_one_of_numbers_as_said():
    objects = TABLE.to_numpy(object)
    for verb in ("capture", "attribute"):
        with pytest.raises(ValueError, match=r"is an array of Python's objects, such as .*`x.astype\('float64'\)`"):
            VERBS[verb](on_table(), objects)
    VERBS["capture"](on_table(), objects.astype("float64"))


@pytest.mark.parametrize("verb", [*VERBS, "audit"])
def test_missing_numbers_of_an_array_are_named_by_every_function(verb):
    x = TABLE.to_numpy().copy()
    x[3, 1] = np.nan
    audit = {"audit": lambda model, x: explain.audit(model, x, Y, verbose=0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, UserWarning), match=r"NaN.* 1 of 40|1 of 40 samples have NaN"):
            (VERBS | audit)[verb](on_table(), x)


@functools.cache
def with_categories():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    tokens = FeatureTokenizer(4, feature_names=["age", "pulse", "sex"], cardinalities={"sex": 3})(inputs)
    attended = keras.layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))
    model.compile(loss="mse")
    return model


@pytest.mark.parametrize("verb", VERBS)
def test_a_category_that_the_model_does_not_know_is_named(verb):
    rows = pd.Index([f"patient {row}" for row in range(SAMPLES)])
    table = table_of(rows, ["age", "pulse", "sex"]).assign(sex=[0, 1, 2, 0] * 10)
    table.iloc[5, 2] = 3
    message = refusal(table, verb, with_categories())
    assert message.startswith(
        "Column 'sex' has 3 categories in the model's `FeatureTokenizer`, the integers from 0 to 2."
    )
    assert "Received 3 in row 'patient 5', and such values in 1 of 40 rows. Leave these rows out." in message
    if verb == "capture":
        assert "in row 5" in refusal(table.to_numpy(), verb, with_categories())
        assert "Received 0.5 in row 'patient 0'" in refusal(table.assign(sex=0.5), verb, with_categories())
        VERBS[verb](with_categories(), table[table["sex"] < 3])


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        (
            None,
            TABLE.assign(age="old"),
            r"'age' \(str\) holds 'old' in row 'patient 0', which is not a number. Encode",
        ),
        (None, table_of(columns=["1", 1, 2]), r"Rename them.*more than once: \['1'\]"),
        (("pulse", "age", "7"), TABLE, r"another order.*into this order: \['pulse', 'age', '7'\]"),
        (None, TABLE[:0], "`x` is empty"),
    ],
)
def test_tables_that_would_be_misread_are_refused(names, table, message):
    for verb in ("capture", "summarize", "attribute"):
        with pytest.raises(ValueError, match=message):
            VERBS[verb](on_table(names), table)


def test_a_store_gives_the_labels_back(tmp_path):
    pytest.importorskip("zarr")
    for _ in range(2):
        stored = explain.capture(on_table(), TABLE, store=tmp_path / "scores.zarr", verbose=0)["attention"]
        xr.testing.assert_allclose(stored, VERBS["capture"](on_table(), TABLE), atol=1e-6)
    with pytest.raises(ValueError, match="differs in: feature_names"):
        explain.capture(on_table(), table_of(columns=["a", "b", "c"]), store=tmp_path / "scores.zarr", verbose=0)


def test_an_audit_names_columns_and_is_verified_with_the_table_or_its_numbers(tmp_path):
    model = on_table()
    report = explain.audit(model, TABLE, Y, tmp_path / "audit.html", verbose=0)
    assert report.record["data"]["feature_names"] == NAMES
    assert report.features.index[:3].tolist() == NAMES
    for x in (TABLE, TABLE.to_numpy()):
        assert explain.verify(report, model, x, Y, verbose=0) == []


def test_a_calibration_names_columns():
    result = explain.calibrate(lambda x, y: on_table(), TABLE, Y, n=2, strength=0.5, verbose=0)
    assert set(result["planted"].values) <= set(NAMES)


def test_names_that_numpy_would_cut_are_refused():
    with pytest.raises(
        ValueError, match=r"must not end in the character NUL, which NumPy drops. Received: \['a\\x00'\]"
    ):
        explain.attribute(on_table(), table_of(columns=["a", "a\0", "c"]), verbose=0)
    with pytest.raises(ValueError, match="NUL"):
        explain.capture(on_table(), TABLE, feature_names=["a", "b", "c\0"], verbose=0)
