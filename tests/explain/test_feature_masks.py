"""Features that are sets of entries, as patches of pictures are; and keys that are no features, as class tokens are."""

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers, ops

from kerasfactory import explain
from kerasfactory.layers import FeatureTokenizer

RNG = np.random.default_rng(0)
PICTURES = RNG.normal(size=(40, 4, 6, 3)).astype("float32")
SERIES = RNG.normal(size=(300, 4, 3)).astype("float32")
PATCHES = np.array([[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2)


@keras.saving.register_keras_serializable("test_feature_masks")
class ClassToken(layers.Layer):
    """Puts a learned token before the others."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="normal", name="token")

    def call(self, tokens):
        return ops.concatenate([ops.repeat(self.token, ops.shape(tokens)[0], axis=0), tokens], axis=1)

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] + 1, shape[2])


def linear(shape, kernel):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layers.Dense(1, use_bias=False)(layers.Flatten()(inputs)))
    model.set_weights([np.reshape(kernel, (-1, 1))])
    model.compile(loss="mse")
    return model


def decided_by_class_token(inputs, tokens, outputs=1, activation="sigmoid"):
    tokens = ClassToken()(tokens)
    attended = layers.MultiHeadAttention(2, 8, name="attention")(tokens, tokens)
    return keras.Model(inputs, layers.Dense(outputs, activation=activation)((tokens + attended)[:, 0]))


@pytest.mark.backend_independent
def test_patches_are_numbered_row_by_row():
    np.testing.assert_array_equal(explain.patches(4, 6, 2), PATCHES)
    for size in ((4, 3), [4, 3], np.array([4, 3])):
        np.testing.assert_array_equal(explain.patches(4, 6, size), [[0, 0, 0, 1, 1, 1]] * 4)
    np.testing.assert_array_equal(explain.patches(4, 6, np.int64(2)), PATCHES)
    assert explain.patches(4, 6, (1, 1)).tolist() == np.arange(24).reshape(4, 6).tolist()
    with pytest.raises(ValueError, match=r"do not fill a picture of 4 x 6.*\[1, 2, 4\].*\[1, 2, 3, 6\].*size=3"):
        explain.patches(4, 6, 3)
    with pytest.raises(ValueError, match=r"`size` must be one number, or \(rows, columns\)"):
        explain.patches(4, 6, (1, 2, 3))
    for wrong in ((0, 6, 1), (4, -6, 1), (4, 6, 1.5)):
        with pytest.raises(ValueError, match="must be a positive integer"):
            explain.patches(*wrong)


@pytest.mark.parametrize("removal", ["mean", "marginal"])
def test_a_patch_is_removed_with_all_its_channels(removal):
    kernel = RNG.normal(size=(4, 6, 3))
    background = RNG.normal(size=(1 if removal == "marginal" else 9, 4, 6, 3)).astype("float32")
    attribution = RNG.random((40, 6))
    result = explain.faithfulness(
        linear((4, 6, 3), kernel),
        PICTURES,
        attribution,
        feature_mask=PATCHES,
        removal=removal,
        background=background,
        fractions=[1 / 6],
        draws=2,
        verbose=0,
    )
    parts = (PICTURES - background.mean(axis=0)) * kernel  # what each entry adds to the output, less its replacement
    of_patches = np.stack([parts[:, patch == PATCHES].sum(axis=(1, 2)) for patch in range(6)], axis=1)
    first = of_patches[np.arange(40), attribution.argmax(axis=1)]
    np.testing.assert_allclose(result["comprehensiveness"][:, 0], np.abs(first), atol=1e-4)
    np.testing.assert_allclose(result["sufficiency"][:, 0], np.abs(of_patches.sum(axis=1) - first), atol=1e-4)


def blurring(size, deviation):
    """The matrix of a Gaussian blur along an axis, which the picture continues mirrored."""
    steps = np.arange(-4 * deviation, 4 * deviation + 1)
    weights = np.exp(-((steps / deviation) ** 2) / 2)
    mirrored = np.r_[np.arange(size), np.arange(size)[::-1]]
    matrix = np.zeros((size, size))
    for place in range(size):
        np.add.at(matrix[place], mirrored[(place + steps) % (2 * size)], weights / weights.sum())
    return matrix


@pytest.mark.backend_independent
def test_a_blurred_patch_is_that_of_the_same_picture():
    kernel, attribution = RNG.normal(size=(4, 6, 3)), RNG.random((40, 6))
    settings = {"feature_mask": PATCHES, "removal": "blur", "fractions": [1 / 6], "draws": 2, "verbose": 0}
    result = explain.faithfulness(linear((4, 6, 3), kernel), PICTURES, attribution, **settings)
    blurred = np.einsum("ij,njkc,lk->nilc", blurring(4, 2), PICTURES, blurring(6, 2))  # patches are 2 x 2
    parts = (PICTURES - blurred) * kernel
    of_patches = np.stack([parts[:, patch == PATCHES].sum(axis=(1, 2)) for patch in range(6)], axis=1)
    first = of_patches[np.arange(40), attribution.argmax(axis=1)]
    np.testing.assert_allclose(result["comprehensiveness"][:, 0], np.abs(first), atol=1e-4)
    table = RNG.normal(size=(40, 6)).astype("float32")
    with pytest.raises(ValueError, match=r"is for pictures.*float32 of shape"):
        explain.faithfulness(linear((6,), RNG.normal(size=6)), table, attribution, removal="blur", verbose=0)
    with pytest.raises(ValueError, match='`background` is not used with `removal="blur"`'):
        explain.faithfulness(linear((4, 6, 3), kernel), PICTURES, attribution, background=PICTURES, **settings)


@pytest.mark.backend_independent
def test_a_mask_may_lack_the_last_axes_or_have_them_with_size_1():
    model, attribution = linear((4, 6, 3), RNG.normal(size=(4, 6, 3))), RNG.random((40, 6))
    masks = [PATCHES, PATCHES[..., None], np.broadcast_to(PATCHES[..., None], (4, 6, 3)), PATCHES.tolist()]
    settings = {"draws": 20, "verbose": 0}
    results = [explain.faithfulness(model, PICTURES, attribution, feature_mask=mask, **settings) for mask in masks]
    for result in results[1:]:
        xr.testing.assert_identical(result, results[0])


@pytest.mark.parametrize(
    ("mask", "advice", "message"),
    [
        (PATCHES[:, :4], PATCHES, r"shape of one sample, \(4, 6, 3\), .*Received: shape \(4, 4\)"),
        (PATCHES.T, PATCHES, r"Received: shape \(6, 4\)"),
        (np.arange(3), np.broadcast_to(np.arange(3), (4, 6, 3)), r"`numpy.broadcast_to\(mask, \(4, 6, 3\)\)`"),
        (PATCHES / 2, PATCHES, "hold integers.*dtype float64"),
        (PATCHES > 2, (PATCHES > 2).astype(int), "hold integers.*dtype bool"),
        (PATCHES * 2, np.unique(PATCHES * 2, return_inverse=True)[1].reshape(4, 6), "No entry has number 1.*unique"),
        (PATCHES + 1, PATCHES, "No entry has number 0"),
        (np.full((4, 6), -1), PATCHES, "No entry has number 0"),
        ({"image": PATCHES}, PATCHES, r"`x` is one array.*\['image'\]"),
        ([[0, 1], [2]], PATCHES, "`feature_mask` must have the shape"),
        (None, explain.patches(4, 6, 2), r"axes of pictures.*`explain.patches\(height, width, size\)`"),
    ],
)
@pytest.mark.backend_independent
def test_a_wrong_mask_gets_an_error_whose_advice_works(mask, advice, message):
    model = linear((4, 6, 3), np.ones((4, 6, 3)))
    right, attribution = np.asarray(advice), RNG.random((40, 6))
    with pytest.raises(ValueError, match=message):
        explain.faithfulness(model, PICTURES, attribution, feature_mask=mask, verbose=0)
    with pytest.raises(ValueError, match=message):
        explain.feature_claims(model, PICTURES, np.zeros(40), attribution, feature_mask=mask, verbose=0)
    explain.faithfulness(model, PICTURES, RNG.random((40, right.max() + 1)), feature_mask=right, draws=2, verbose=0)


@pytest.mark.backend_independent
def test_a_mask_that_fits_the_first_and_the_last_axes_is_refused():
    x = RNG.normal(size=(30, 4, 4)).astype("float32")
    model, settings = linear((4, 4), np.ones((4, 4))), {"draws": 2, "verbose": 0}
    with pytest.raises(ValueError, match=r"first axes of a sample, \(4, 4\), and of its last.*newaxis"):
        explain.faithfulness(model, x, x[..., 0], feature_mask=np.arange(4), **settings)
    for mask in (np.arange(4)[..., np.newaxis], np.broadcast_to(np.arange(4), (4, 4))):
        explain.faithfulness(model, x, x[..., 0], feature_mask=mask, **settings)


@pytest.mark.backend_independent
def test_an_attribution_to_another_number_of_features_is_refused():
    with pytest.raises(ValueError, match=r"\(40, 6\) as in `x`.*shape \(40, 7\), x of shape \(40, 4, 6, 3\)"):
        explain.faithfulness(
            linear((4, 6, 3), np.ones((4, 6, 3))), PICTURES, RNG.random((40, 7)), feature_mask=PATCHES, verbose=0
        )


def test_which_variable_matters_at_which_time():
    """The entries of a series are columns of a table: the same verdicts, and the same numbers."""
    kernel = np.zeros((4, 3))
    kernel[1, 0], kernel[3, 2] = 2, 1
    mask, decoy = np.arange(12).reshape(4, 3), 5
    attribution = np.tile(np.where(np.isin(np.arange(12), [3, 11, decoy]), 0.3, 0.01), (300, 1))
    y = (SERIES * kernel).sum(axis=(1, 2)) + 0.3 * RNG.normal(size=300)
    claims = explain.feature_claims(linear((4, 3), kernel), SERIES, y, attribution, feature_mask=mask, verbose=0)
    supported = claims["feature"].values[claims["verdict"].values == "supported"]
    assert supported.tolist() == [mask[1, 0], mask[3, 2]]
    assert claims["verdict"].values[decoy] == "refuted"
    flat = SERIES.reshape(300, 12)
    table = explain.feature_claims(linear((12,), kernel), flat, y, attribution, feature_mask=np.arange(12), verbose=0)
    np.testing.assert_allclose(claims["effect"], table["effect"], rtol=1e-4, atol=1e-6)
    assert (claims["verdict"] == table["verdict"]).all()


@pytest.mark.backend_independent
def test_variables_and_times_are_features_together():
    kernel = np.zeros((4, 3))
    kernel[1, 0] = kernel[3, 0] = 1
    y = (SERIES * kernel).sum(axis=(1, 2))
    model, settings = linear((4, 3), kernel), {"draws": 3, "verbose": 0}
    mask = np.broadcast_to(np.arange(3), (4, 3))
    by_variable = explain.feature_claims(model, SERIES, y, np.ones((300, 3)) * [2, 1, 0], feature_mask=mask, **settings)
    assert by_variable["verdict"].values.tolist() == ["supported", "undetermined", "undetermined"]
    assert by_variable["member"].values[0].tolist() == [True, False, False] * 4
    by_time = explain.feature_claims(model, SERIES, y, np.ones((300, 4)) * [0, 2, 0, 2], **settings)
    assert by_time["verdict"].values.tolist() == ["undetermined", "supported", "undetermined", "supported"]
    without = explain.feature_claims(
        model, SERIES, y, np.ones((300, 2)) * [2, 0], feature_mask=np.where(mask == 2, -1, mask), **settings
    )
    assert without["verdict"].values.tolist() == ["supported", "undetermined"]


@pytest.mark.backend_independent
def test_what_cannot_be_drawn_is_undetermined_and_says_why():
    pictures = RNG.normal(size=(300, 10, 10, 3)).astype("float32")
    model, mask = linear((10, 10, 3), np.ones((10, 10, 3))), explain.patches(10, 10, 5)
    attribution = np.ones((300, 4)) * [4, 1, 1, 1]
    claims = explain.feature_claims(
        model, pictures, pictures.sum(axis=(1, 2, 3)), attribution, feature_mask=mask, verbose=0
    )
    assert set(claims["verdict"].values) == {"undetermined"}
    assert "A sample has 300 entries" in claims["reason"].values[0]

    padded = SERIES.copy()
    padded[::3, 3] = 0
    in_view = np.ones((300, 4), bool)
    in_view[::3, 3] = False
    attribution = xr.DataArray(
        np.ones((300, 4)) * [0, 2, 0, 2], {"in_view": (("sample", "feature"), in_view)}, ("sample", "feature")
    )
    model = linear((4, 3), np.ones((4, 3)))
    claims = explain.feature_claims(model, padded, padded.sum(axis=(1, 2)), attribution, verbose=0)
    assert claims["verdict"].values[[1, 3]].tolist() == ["supported", "undetermined"]
    assert claims["reason"].values[3] == "It is padding in some samples: no value can be drawn for it there."


def vision_transformer():
    """Pictures with one bright or dark patch, somewhere: its sign is the class."""
    keras.utils.set_random_seed(1)
    generator = np.random.default_rng(1)
    images = generator.normal(size=(600, 6, 6, 1)).astype("float32") * 0.3
    where, label = generator.integers(9, size=600), generator.integers(2, size=600)
    images += ((explain.patches(6, 6, 2) == where[:, None, None]) * (4 * label - 2)[:, None, None])[..., None]
    inputs = keras.Input((6, 6, 1))
    tokens = layers.Reshape((9, 16))(layers.Conv2D(16, 2, 2)(inputs))
    model = decided_by_class_token(inputs, tokens)
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
    model.fit(images[:400], label[:400], batch_size=50, epochs=6, verbose=0)
    return model, images[400:], label[400:], where[400:]


def test_a_vision_transformer_is_laid_over_its_pictures_and_audited(tmp_path):
    model, images, label, where = vision_transformer()

    mask = explain.patches(6, 6, 2)
    names = ["[CLS]", *map(str, range(9))]
    settings = {"method": "value_norm", "query": "[CLS]", "feature_names": names, "special_tokens": ["[CLS]"]}
    attribution = explain.attribute(model, images, **settings, verbose=0)
    overlay = attribution[:, 1:].values[:, mask]  # (sample, height, width)

    brightest = overlay[:, ::2, ::2].reshape(len(images), 9).argmax(axis=1)
    assert (brightest == where).mean() > 0.9
    assert not attribution["in_view"].sel(feature="[CLS]").any()
    found = explain.faithfulness(model, images, attribution, feature_mask=mask, verbose=0)
    assert found["p_value"] < 0.05
    noise = [
        explain.attribute(model, images, **settings | {"method": "random", "seed": seed}, verbose=0)
        for seed in range(3, 6)
    ]
    found = [explain.faithfulness(model, images, one, feature_mask=mask, draws=50, verbose=0) for one in noise]
    assert np.median([one["p_value"].item() for one in found]) > 0.05

    report = explain.audit(model, images, label, tmp_path / "audit.html", **settings, feature_mask=mask, verbose=0)
    assert report.features.index.tolist() == names[1:]
    assert report.claims.loc["ranking-comprehensiveness", "verdict"] == "supported"
    assert "feature/[CLS]" not in report.claims.index
    assert report.record["settings"]["query"] == "[CLS]"
    assert explain.verify(report, model, images, label, verbose=0) == []


@pytest.fixture(scope="module")
def table_with_class_token():
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")
    y = x[:, 1] + 0.2 * np.random.default_rng(1).normal(size=400)
    inputs = keras.Input((4,))
    model = decided_by_class_token(inputs, FeatureTokenizer(8)(inputs), activation=None)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(x[:300], y[:300], batch_size=50, epochs=12, verbose=0)
    return model, x[300:], y[300:]


def test_a_table_behind_a_class_token_is_audited_without_a_claim_about_the_token(table_with_class_token, tmp_path):
    model, x, y = table_with_class_token
    names = ["[CLS]", "age", "dose", "pulse", "weight"]
    settings = {"method": "attention_gradient", "query": 0, "feature_names": names, "special_tokens": ["[CLS]"]}
    other = keras.models.clone_model(model)
    other.set_weights([weight * 1.001 for weight in model.get_weights()])
    report = explain.audit(model, x, y, tmp_path / "a.html", models=[other], **settings, verbose=0)
    assert report.features.index.tolist() == names[1:]
    assert report.claims.loc["feature/dose", "verdict"] == "supported"
    assert not report.features.drop("dose")["verdict"].isin(["supported", "needed, not claimed"]).any()
    assert report.claims.loc[["ranking-comprehensiveness", "randomization", "seeds"], "value"].notna().all()
    assert explain.verify(report, model, x, y, models=[other], verbose=0) == []


@pytest.mark.backend_independent
def test_keys_that_are_not_in_the_data_are_refused_until_they_are_named(table_with_class_token):
    model, x, y = table_with_class_token
    unnamed = explain.attribute(model, x, verbose=0)
    for verb, labels in ((explain.faithfulness, ()), (explain.feature_claims, (y,))):
        with pytest.raises(ValueError, match=r"\(100, 4\) as in `x`.*class token.*special_tokens=\[\"\[CLS\]\"\]"):
            verb(model, x, *labels, unnamed, verbose=0)
        with pytest.raises(ValueError, match="They have no names: give `feature_names`"):
            verb(model, x, *labels, unnamed, special_tokens=["[CLS]"], verbose=0)
    named = explain.attribute(model, x, feature_names=["[CLS]", *"abcd"], verbose=0)
    with pytest.raises(ValueError, match=r"no feature: '\[CLZ\]'. Did you mean '\[CLS\]'"):
        explain.faithfulness(model, x, named, special_tokens=["[CLZ]"], verbose=0)
    given = explain.faithfulness(model, x, named, special_tokens=["[CLS]"], draws=20, verbose=0)
    dropped = explain.faithfulness(model, x, named.values[:, 1:], draws=20, verbose=0)
    np.testing.assert_array_equal(given["comprehensiveness"], dropped["comprehensiveness"])
    assert given["p_value"] == dropped["p_value"]
    report = explain.audit(model, x, y, feature_names=["[CLS]", *"abcd"], verbose=0)
    assert "class token" in report.claims.loc["ranking-sufficiency", "reason"]
    with pytest.raises(ValueError, match=r"`feature_names` must hold one name for each key.* 5 keys"):
        explain.audit(model, x, y, feature_names=list("abcd"), verbose=0)
