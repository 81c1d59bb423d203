import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops

import kerasfactory.layers
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

NAMES = ["age", "region", "income", "plan"]
CARDINALITIES = {"region": 4, "plan": 3}
# Two numerical columns, with two categorical ones between and after them.
TABLE = np.array([[0.5, 3, -1.5, 0], [2.0, 0, 0.25, 2], [-1.0, 1, 0.0, 1]], "float32")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tokenizer():
    return FeatureTokenizer(8, feature_names=NAMES, cardinalities=CARDINALITIES)


def weights(tokenizer):
    """The weights by name, as NumPy arrays."""
    return {weight.name: ops.convert_to_numpy(weight) for weight in tokenizer.weights}


# The interface


def test_package_exports_the_class_and_its_signature():
    parameters = inspect.signature(FeatureTokenizer).parameters

    assert "FeatureTokenizer" in kerasfactory.layers.__all__
    assert list(parameters) == ["d_token", "feature_names", "cardinalities", "kwargs"]
    assert parameters["feature_names"].default is None
    assert parameters["cardinalities"].default is None


@pytest.mark.parametrize("d_token", [1, 8, np.int64(5)])
def test_every_column_becomes_one_token(rng, d_token):
    tokens = FeatureTokenizer(d_token)(rng.standard_normal((5, 3), dtype="float32"))

    assert tokens.shape == (5, 3, d_token)
    assert keras.backend.standardize_dtype(tokens.dtype) == "float32"


# Tokens


def test_a_numerical_token_is_the_value_times_a_vector_plus_a_vector(rng):
    tokenizer = FeatureTokenizer(8)
    x = rng.standard_normal((5, 3), dtype="float32")

    tokens = ops.convert_to_numpy(tokenizer(x))

    learned = weights(tokenizer)
    assert set(learned) == {"kernel", "bias"}
    assert learned["kernel"].shape == learned["bias"].shape == (3, 8)
    for row in range(5):
        for feature in range(3):
            expected = x[row, feature] * learned["kernel"][feature] + learned["bias"][feature]
            assert np.allclose(tokens[row, feature], expected, atol=1e-6)


def test_a_categorical_token_is_the_embedding_of_its_category():
    tokenizer = FeatureTokenizer(8, cardinalities=[2, 3])
    x = np.array([[0, 0], [1, 1], [0, 2], [1, 0]])

    tokens = ops.convert_to_numpy(tokenizer(x))

    learned = weights(tokenizer)
    assert set(learned) == {"embeddings"}
    # One table holds the two categories of the first column, then the three of the second.
    assert learned["embeddings"].shape == (5, 8)
    assert np.array_equal(tokens[:, 0], learned["embeddings"][[0, 1, 0, 1]])
    assert np.array_equal(tokens[:, 1], learned["embeddings"][[2, 3, 4, 2]])
    assert len(np.unique(learned["embeddings"], axis=0)) == 5


def test_tokens_come_in_the_order_of_the_columns(tokenizer):
    tokens = ops.convert_to_numpy(tokenizer(TABLE))

    learned = weights(tokenizer)
    age, region, income, plan = TABLE.T
    region, plan = region.astype(int), plan.astype(int)
    assert np.allclose(tokens[:, 0], age[:, None] * learned["kernel"][0] + learned["bias"][0], atol=1e-6)
    assert np.array_equal(tokens[:, 1], learned["embeddings"][region])
    assert np.allclose(tokens[:, 2], income[:, None] * learned["kernel"][1] + learned["bias"][1], atol=1e-6)
    assert np.array_equal(tokens[:, 3], learned["embeddings"][4 + plan])


@pytest.mark.parametrize("column", range(4))
def test_a_column_changes_its_own_token_only(tokenizer, column):
    changed = TABLE.copy()
    changed[:, column] = (changed[:, column] + 1) % 3

    before, after = ops.convert_to_numpy(tokenizer(TABLE)), ops.convert_to_numpy(tokenizer(changed))

    differs = np.any(before != after, axis=(0, 2))
    assert list(np.flatnonzero(differs)) == [column]


@pytest.mark.parametrize(
    ("feature_names", "cardinalities"),
    [
        (NAMES, {"plan": 3, "region": 4}),
        (NAMES, {3: 3, 1: 4}),
        (NAMES, [None, 4, None, 3]),
        (None, {3: 3, 1: 4}),
        (None, {"3": 3, "1": 4}),
        (None, [None, 4, None, 3]),
        (None, (None, np.int64(4), None, np.int32(3))),
        (np.array(NAMES), {"region": 4, "plan": 3}),
        (tuple(NAMES), {np.int64(1): 4, np.int64(3): 3}),
    ],
    ids=str,
)
def test_every_way_to_give_cardinalities_means_the_same(tokenizer, feature_names, cardinalities):
    other = FeatureTokenizer(8, feature_names, cardinalities)
    other.build(TABLE.shape)
    tokenizer.build(TABLE.shape)

    other.set_weights(tokenizer.get_weights())

    assert np.array_equal(ops.convert_to_numpy(other(TABLE)), ops.convert_to_numpy(tokenizer(TABLE)))
    json.dumps(other.get_config())


@pytest.mark.parametrize("cardinalities", [None, {}, [None, None, None, None]])
def test_columns_are_numerical_unless_said_otherwise(cardinalities):
    tokenizer = FeatureTokenizer(8, NAMES, cardinalities)

    tokenizer(TABLE)

    assert set(weights(tokenizer)) == {"kernel", "bias"}


# Numbers of all kinds


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int8", "uint8"])
def test_inputs_may_have_any_numeric_dtype(tokenizer, dtype):
    table = np.abs(np.trunc(TABLE))

    tokens = tokenizer(table.astype(dtype))

    assert keras.backend.standardize_dtype(tokens.dtype) == "float32"
    assert np.array_equal(ops.convert_to_numpy(tokens), ops.convert_to_numpy(tokenizer(table)))


def test_inputs_may_be_boolean():
    tokenizer = FeatureTokenizer(8, cardinalities={1: 2})
    table = np.array([[True, False], [False, True]])

    tokens = ops.convert_to_numpy(tokenizer(table))

    assert np.array_equal(tokens, ops.convert_to_numpy(tokenizer(table.astype("float32"))))


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["layer", "functional", "sequential"])
def test_low_precision_keeps_categories_apart(dtype, kind):
    # float16 rounds 2049 to 2048, bfloat16 4999 to 4992.
    table = np.array([[2048, 0.3], [2049, -1.7], [4998, 2.2], [4999, 0.0]], "float32")
    tokenizer = FeatureTokenizer(8, cardinalities=[5000, None], dtype=dtype)
    inputs = keras.Input((2,))
    model = {
        "layer": tokenizer,
        "functional": keras.Model(inputs, tokenizer(inputs)),
        "sequential": keras.Sequential([keras.Input((2,)), tokenizer]),
    }[kind]

    tokens = model(table)

    learned = weights(tokenizer)
    assert keras.backend.standardize_dtype(tokens.dtype) == tokenizer.compute_dtype
    assert {weight.dtype for weight in tokenizer.weights} == {"float32"}
    tokens = ops.convert_to_numpy(ops.cast(tokens, "float32"))
    # The result is rounded to the compute dtype, by half a unit in its last place at most, and nothing before it.
    rounding = {"mixed_float16": 2.0**-11, "mixed_bfloat16": 2.0**-8}[dtype]
    categorical = learned["embeddings"][[2048, 2049, 4998, 4999]]
    numerical = table[:, 1:] * learned["kernel"] + learned["bias"]
    assert np.allclose(tokens[:, 0], categorical, rtol=rounding, atol=1e-6)
    assert np.allclose(tokens[:, 1], numerical, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("category", [-1, 3, 1.5, -0.5, 1e9, float("nan"), float("inf"), float("-inf")])
def test_a_category_that_does_not_exist_becomes_nan(category):
    tokenizer = FeatureTokenizer(8, cardinalities=[None, 3, 2])

    tokens = ops.convert_to_numpy(tokenizer(np.array([[0.5, category, 1], [0.5, 2, 0]], "float32")))

    missing = np.isnan(tokens)
    assert np.all(missing[0, 1])
    missing[0, 1] = False
    assert not np.any(missing)


@pytest.mark.parametrize("category", [-1, 3, 2**31 - 1, -(2**31)])
def test_an_integer_category_that_does_not_exist_becomes_nan(category):
    tokenizer = FeatureTokenizer(8, cardinalities=[3])

    tokens = ops.convert_to_numpy(tokenizer(np.array([[category], [2]], "int32")))

    assert np.all(np.isnan(tokens[0]))
    assert not np.any(np.isnan(tokens[1]))


def test_a_missing_number_becomes_a_nan_token_of_its_own(tokenizer):
    table = TABLE.copy()
    table[1, 2] = np.nan

    missing = np.isnan(ops.convert_to_numpy(tokenizer(table)))

    assert np.all(missing[1, 2])
    assert np.count_nonzero(missing) == 8


# Weights


@pytest.mark.parametrize("d_token", [1, 4, 64])
def test_weights_start_uniform_between_plus_and_minus_one_over_the_root_of_d_token(d_token):
    tokenizer = FeatureTokenizer(d_token, cardinalities={0: 400})
    tokenizer.build((None, 401))

    for weight in weights(tokenizer).values():
        assert weight.shape == (400, d_token)
        scaled = weight * d_token**0.5
        assert np.all(np.abs(scaled) <= 1 + 1e-6)
        # A uniform distribution has the mean 0 and the variance 1/3; these are wide bounds for 400 draws.
        assert abs(scaled.mean()) < 0.2
        assert 0.25 < scaled.var() < 0.42


def test_weights_differ_from_each_other_and_follow_the_seed():
    tokenizers = [FeatureTokenizer(8, cardinalities={0: 3}) for _ in range(3)]

    for seed, tokenizer in zip((0, 0, 1), tokenizers, strict=True):
        keras.utils.set_random_seed(seed)
        tokenizer.build((None, 4))

    same, again, other = (weights(tokenizer) for tokenizer in tokenizers)
    for name in ("kernel", "bias", "embeddings"):
        assert np.array_equal(same[name], again[name])
        assert not np.any(same[name] == other[name])
    assert not np.any(same["kernel"] == same["bias"])


def test_training_moves_the_weights_of_what_it_saw():
    table = np.array([[0.5, 0], [-1.5, 2], [1.0, 0]], "float32")
    tokenizer = FeatureTokenizer(4, cardinalities={1: 3})
    model = keras.Sequential([keras.Input((2,)), tokenizer])
    before = weights(tokenizer)
    model.compile("sgd", "mse")

    model.fit(table, np.ones((3, 2, 4)), verbose=0)

    after = weights(tokenizer)
    assert np.all(before["kernel"] != after["kernel"])
    assert np.all(before["bias"] != after["bias"])
    assert list(np.any(before["embeddings"] != after["embeddings"], axis=1)) == [True, False, True]


def test_a_category_that_does_not_exist_leaves_no_gradient_behind():
    # The token is NaN; its gradient must not spoil the embeddings of the categories that do exist.
    tokenizer = FeatureTokenizer(4, cardinalities=[3])
    inputs = keras.Input((1,))
    tokens = tokenizer(inputs)
    model = keras.Model(inputs, ops.where(ops.isnan(tokens), 0.0, tokens))
    model.compile("sgd", "mse")

    model.fit(np.array([[7.0], [1.0]]), np.ones((2, 1, 4)), verbose=0)

    assert not np.any(np.isnan(weights(tokenizer)["embeddings"]))


# Models


@pytest.mark.parametrize(
    "cardinalities", [None, CARDINALITIES, [2, 4, 2, 3]], ids=["numerical", "mixed", "categorical"]
)
@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_a_model_keeps_names_and_tokens_through_a_file(tmp_path, cardinalities, kind):
    table = np.array([[1, 3, 0, 0], [0, 0, 1, 2]], "float32")
    tokenizer = FeatureTokenizer(8, NAMES, cardinalities, name="tokens")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, tokenizer(inputs)) if kind == "functional" else keras.Sequential([inputs, tokenizer])

    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")

    tokens = ops.convert_to_numpy(tokenizer(table))
    assert model.output_shape == reloaded.output_shape == (None, 4, 8)
    assert np.allclose(model.predict(table, verbose=0), tokens, atol=1e-6)
    assert np.allclose(reloaded.predict(table, verbose=0), tokens, atol=1e-6)
    assert reloaded.get_layer("tokens").feature_names == NAMES
    assert reloaded.get_layer("tokens").get_config() == tokenizer.get_config()


def test_cardinalities_by_index_survive_a_file(tmp_path):
    model = keras.Sequential([keras.Input((4,)), FeatureTokenizer(8, cardinalities={1: 4, 3: 3})])

    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")

    assert reloaded.layers[0].get_config() == model.layers[0].get_config()
    assert np.array_equal(ops.convert_to_numpy(reloaded(TABLE)), ops.convert_to_numpy(model(TABLE)))


def test_shapes_are_static_without_a_batch_size(tokenizer):
    inputs = keras.Input((4,))

    tokens = tokenizer(inputs)

    assert tokens.shape == (None, 4, 8)
    assert tokens.dtype == "float32"
    assert tokenizer.compute_output_shape((None, 4)) == (None, 4, 8)
    assert tokenizer.compute_output_shape((3, 4)) == (3, 4, 8)


def test_a_sequential_model_may_learn_its_width_from_the_data():
    model = keras.Sequential([FeatureTokenizer(8, cardinalities={1: 4, 3: 3}), keras.layers.Flatten()])

    assert model.predict(TABLE, verbose=0).shape == (3, 32)


def test_attention_over_tokens_is_attention_over_features(tokenizer):
    attention = InterpretableMultiHeadAttention(d_model=4, n_head=2)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, attention(tokenizer(inputs)))

    scores = keras.Model(model.inputs, attention.attention_scores).predict(TABLE, verbose=0)

    assert scores.shape == (3, 2, 4, 4)
    attention(tokenizer(TABLE))
    assert np.allclose(scores, attention.attention_scores, atol=1e-6)


# Config


@pytest.mark.parametrize(
    ("feature_names", "cardinalities"),
    [
        (None, None),
        (NAMES, None),
        (NAMES, CARDINALITIES),
        (NAMES, [None, 4, None, 3]),
        (None, {1: 4, 3: 3}),
        (None, [None, 4, None, 3]),
        (["0", "1", "2", "3"], {"1": 4}),
    ],
    ids=str,
)
def test_config_holds_every_argument(feature_names, cardinalities):
    tokenizer = FeatureTokenizer(8, feature_names, cardinalities, name="tokens", dtype="mixed_float16", trainable=False)
    config = tokenizer.get_config()
    as_json = json.dumps(config)

    clone = FeatureTokenizer.from_config(config)

    assert set(config) == {"name", "dtype", "trainable", "d_token", "feature_names", "cardinalities"}
    assert clone.get_config() == config
    assert FeatureTokenizer.from_config(json.loads(as_json)).get_config() == config
    assert json.dumps(config) == as_json
    assert (clone.name, clone.trainable, clone.dtype_policy.name) == ("tokens", False, "mixed_float16")
    assert (clone.d_token, clone.feature_names) == (8, feature_names)


def test_the_config_is_a_copy(tokenizer):
    config = tokenizer.get_config()
    config["feature_names"].append("height")
    config["cardinalities"]["age"] = 2

    assert tokenizer.get_config()["feature_names"] == NAMES
    assert tokenizer.get_config()["cardinalities"] == CARDINALITIES


def test_arguments_are_not_kept_by_reference():
    names, cardinalities = list(NAMES), dict(CARDINALITIES)
    tokenizer = FeatureTokenizer(8, names, cardinalities)
    names.append("height")
    cardinalities["age"] = 2

    assert tokenizer(TABLE).shape == (3, 4, 8)
    assert set(weights(tokenizer)) == {"kernel", "bias", "embeddings"}
    assert tokenizer.get_config()["cardinalities"] == CARDINALITIES


def test_the_class_is_registered_under_the_package():
    name = "kerasfactory.layers>FeatureTokenizer"

    assert keras.saving.get_registered_name(FeatureTokenizer) == name
    assert keras.saving.get_registered_object(name) is FeatureTokenizer


# Errors


@pytest.mark.parametrize("d_token", [0, -1, 2.0, "8", None, True, float("nan")])
def test_a_wrong_d_token_is_named_with_its_value(d_token):
    with pytest.raises(ValueError, match="`d_token` must be a positive integer") as error:
        FeatureTokenizer(d_token)

    assert f"Received: d_token={d_token!r}" in str(error.value)


@pytest.mark.parametrize("feature_names", ["age", [], (), [1, 2], ["age", None], ["age", "age"], 5, True])
def test_wrong_feature_names_are_named_with_their_value(feature_names):
    with pytest.raises(ValueError, match="`feature_names`") as error:
        FeatureTokenizer(8, feature_names)

    repeated = feature_names == ["age", "age"]
    assert ("more than once: ['age']" if repeated else f"Received: {feature_names!r}") in str(error.value)


@pytest.mark.parametrize(
    ("feature_names", "cardinalities", "received"),
    [
        (NAMES, {"regoin": 4}, "'regoin'"),
        (NAMES, {4: 3}, "4"),
        (NAMES, {-1: 3}, "-1"),
        (NAMES, {"region": 0}, "cardinalities['region']=0"),
        (NAMES, {"region": -2}, "cardinalities['region']=-2"),
        (NAMES, {"region": 2.5}, "cardinalities['region']=2.5"),
        (NAMES, {"region": True}, "cardinalities['region']=True"),
        (NAMES, {"region": None}, "cardinalities['region']=None"),
        (NAMES, [None, 4], "cardinalities=[None, 4]"),
        (NAMES, [None, 4, None, 3, 2], "cardinalities=[None, 4, None, 3, 2]"),
        (NAMES, [], "cardinalities=[]"),
        (NAMES, 5, "5"),
        (None, {"region": 4}, "'region'"),
        (None, {-1: 4}, "-1"),
        (None, {1.5: 4}, "1.5"),
        (None, {True: 4}, "True"),
        (None, {1: 0}, "cardinalities[1]=0"),
        (None, [None, "4"], "cardinalities[1]='4'"),
        (None, 5, "5"),
        (None, "four", "f"),
    ],
    ids=str,
)
def test_wrong_cardinalities_are_named_with_their_value(feature_names, cardinalities, received):
    with pytest.raises(ValueError, match="`cardinalities") as error:
        FeatureTokenizer(8, feature_names, cardinalities)

    assert received in str(error.value).split("Received: ")[1]


@pytest.mark.parametrize("cardinalities", [{4: 3}, [None, None, None, None, 3], [None, 4]], ids=str)
def test_cardinalities_must_fit_the_columns_of_the_inputs(cardinalities):
    with pytest.raises(ValueError, match="`cardinalities`") as error:
        FeatureTokenizer(8, cardinalities=cardinalities)(TABLE)

    assert "(3, 4)" in str(error.value)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 1), (3, 0), ()])
@pytest.mark.parametrize("symbolic", [False, True])
def test_inputs_that_are_no_table_are_named_with_their_shape(tokenizer, shape, symbolic):
    with pytest.raises(ValueError, match=r"shape \(batch, feature\)") as error:
        tokenizer(keras.KerasTensor(shape) if symbolic else np.zeros(shape))

    assert f"Received: shape={shape}" in str(error.value)


def test_the_number_of_columns_must_be_known(tokenizer):
    with pytest.raises(ValueError, match=r"Received: shape=\(None, None\)"):
        tokenizer(keras.Input((None,)))


@pytest.mark.parametrize("built", [False, True])
def test_inputs_must_have_one_column_per_name(tokenizer, built):
    if built:
        tokenizer(TABLE)

    with pytest.raises(ValueError, match="one column per feature name, 4") as error:
        tokenizer(TABLE[:, :3])

    assert "age, region, income, plan" in str(error.value)
    assert "Received: shape=(3, 3)" in str(error.value)


def test_inputs_must_keep_the_number_of_columns_without_names():
    tokenizer = FeatureTokenizer(8)
    tokenizer(TABLE)

    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        tokenizer(np.zeros((3, 5)))


def test_an_unknown_argument_is_refused_by_name():
    with pytest.raises(ValueError, match="cardinalties"):
        FeatureTokenizer(8, cardinalties={0: 3})


# Numbers of 64 bits, which JAX does not have unless it is told to.

if keras.config.backend() != "jax":

    def test_float64_is_exact():
        tokenizer = FeatureTokenizer(8, cardinalities={1: 3}, dtype="float64")
        table = np.array([[1 / 3, 2], [1e-9, 0]])

        tokens = tokenizer(table)

        learned = weights(tokenizer)
        assert keras.backend.standardize_dtype(tokens.dtype) == "float64"
        expected = table[:, :1] * learned["kernel"][0] + learned["bias"][0]
        assert np.allclose(ops.convert_to_numpy(tokens)[:, 0], expected, rtol=1e-15, atol=1e-15)

    @pytest.mark.parametrize("category", [2**31, 2**32, 2**32 + 1, -(2**32)])
    def test_a_long_integer_that_is_no_category_becomes_nan(category):
        tokenizer = FeatureTokenizer(8, cardinalities=[3])

        tokens = ops.convert_to_numpy(tokenizer(np.array([[category], [2]], "int64")))

        assert np.all(np.isnan(tokens[0]))
        assert not np.any(np.isnan(tokens[1]))


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 2049), ("bfloat16", 257)])
def test_half_precision_inputs_must_be_able_to_hold_every_category(dtype, largest):
    column = ops.cast([[0], [largest - 1]], dtype)

    assert FeatureTokenizer(8, cardinalities={0: largest})(column).shape == (2, 1, 8)
    with pytest.raises(ValueError, match=f"more than {largest} categories"):
        FeatureTokenizer(8, cardinalities={0: largest + 1})(column)


def test_a_column_has_one_cardinality():
    with pytest.raises(ValueError, match="column 'a' twice"):
        FeatureTokenizer(8, ["a", "b"], {0: 2, "a": 3})


def test_names_come_in_an_order():
    with pytest.raises(ValueError, match="must be a list of strings"):
        FeatureTokenizer(8, {"a", "b"})
