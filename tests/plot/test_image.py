"""Attributions stand on the pixels of their features, and no feature is taken for another."""

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt

from kerasfactory import plot

pytestmark = pytest.mark.backend_independent

MASK = np.arange(6).reshape(2, 3).repeat(4, axis=0).repeat(4, axis=1)  # six patches of 4 by 4 pixels
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 17, (3, 8, 12))


@pytest.fixture(autouse=True)
def headless():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def attribution_of(features=6, **coords):
    values = np.random.default_rng(1).dirichlet(np.ones(features), 3)
    return xr.DataArray(values, coords, ["sample", "feature"], "rollout")


def overlay(ax):
    return np.ma.filled(ax.images[1].get_array().astype(float), np.nan)


def test_each_pixel_has_the_color_of_its_feature_over_the_gray_picture(tmp_path):
    attribution = attribution_of(sample=["predicted 3", "8", "1"])
    figure = plot.image(attribution, IMAGES, feature_mask=MASK)
    for number, ax in enumerate(figure.axes[:3]):
        np.testing.assert_allclose(overlay(ax), attribution.values[number][MASK])
        gray = np.asarray(ax.images[0].get_array())
        assert np.corrcoef(gray.ravel(), IMAGES[number].ravel())[0, 1] == pytest.approx(1)
        assert ax.images[1].get_clim() == pytest.approx((0, float(attribution.max())), rel=1e-5)
    assert [ax.get_title() for ax in figure.axes[:3]] == ["predicted 3", "8", "1"]
    assert figure.get_suptitle() == "rollout"
    for name in ("picture.png", "picture.svg"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_shares_have_one_hue_and_signed_values_two_and_both_let_the_picture_through():
    shares = plot.image(attribution_of(), IMAGES, feature_mask=MASK).axes[0].images[1]
    signed = plot.image(attribution_of() - 0.2, IMAGES, feature_mask=MASK).axes[0].images[1]
    assert signed.get_clim()[0] == -signed.get_clim()[1]
    for image, values in ((shares, [0, 0.5, 1]), (signed, [0.5, 0.75, 1])):
        np.testing.assert_allclose(image.cmap(values)[:, 3], [0, 0.45, 0.9], atol=0.01)
    red, _, blue, opacity = signed.cmap(0.0)
    assert red > blue
    assert opacity == pytest.approx(0.9)
    red, _, blue, _ = shares.cmap(1.0)
    assert blue > red


def test_pixels_of_no_feature_stay_gray_and_do_not_set_the_scale():
    mask = np.where(MASK == 2, -1, np.where(MASK > 2, MASK - 1, MASK))
    attribution = attribution_of(5)
    ax = plot.image(attribution, IMAGES, feature_mask=mask).axes[0]
    assert (np.isnan(overlay(ax)) == (mask == -1)).all()
    np.testing.assert_allclose(overlay(ax)[mask >= 0], attribution.values[0][mask[mask >= 0]])


def test_class_tokens_are_left_out_if_the_mask_counts_them_or_the_attribution_names_them():
    in_view = np.ones((3, 7), bool)
    in_view[:, 0] = False
    named = attribution_of(7, in_view=(("sample", "feature"), in_view))
    named[:, 0] = 5  # would set the scale
    for attribution, mask in ((named, MASK), (named, MASK + 1), (named.drop_vars("in_view"), MASK + 1)):
        ax = plot.image(attribution, IMAGES, feature_mask=mask).axes[0]
        np.testing.assert_allclose(overlay(ax), named.values[0][MASK + 1])
        assert ax.images[1].get_clim()[1] == pytest.approx(float(named[:, 1:].max()), rel=1e-5)


def test_a_class_token_that_nothing_names_is_not_taken_for_a_patch():
    attribution = attribution_of(7)
    with pytest.raises(ValueError, match=r"7 features, and a mask of 6 .*special_tokens=\[0\].*isel\(feature="):
        plot.image(attribution, IMAGES, feature_mask=MASK)
    ax = plot.image(attribution.isel(feature=slice(1, None)), IMAGES, feature_mask=MASK).axes[0]
    np.testing.assert_allclose(overlay(ax), attribution.values[0][MASK + 1])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_may_have_channels(channels):
    colors = RNG.random((3, 8, 12, channels)).astype("float32")
    mask = MASK[..., None].repeat(channels, axis=2)  # as long as the channels of a pixel belong together
    gray = np.asarray(plot.image(attribution_of(), colors, feature_mask=mask).axes[0].images[0].get_array())
    expected = colors[0, ..., 0] if channels == 1 else colors[0, ..., :3] @ (0.2126, 0.7152, 0.0722)
    assert np.corrcoef(gray.ravel(), expected.ravel())[0, 1] == pytest.approx(1)


def test_one_picture_is_drawn_on_given_axes_or_shared_by_all_samples():
    figure, axes = plt.subplots(1, 2)
    attribution = attribution_of()
    for one in (attribution[1], attribution[1:2]):
        assert plot.image(one, IMAGES[1], feature_mask=MASK, ax=axes[1]) is axes[1]
    np.testing.assert_allclose(overlay(axes[1]), attribution.values[1][MASK])
    assert not axes[0].images
    assert plt.get_fignums() == [figure.number]
    assert len(plot.image(attribution, IMAGES[0], feature_mask=MASK).axes) == 4


def test_without_a_mask_each_pixel_is_a_feature():
    attribution = attribution_of(96)
    np.testing.assert_allclose(overlay(plot.image(attribution, IMAGES).axes[2]), attribution.values[2].reshape(8, 12))
    colors = RNG.random((3, 8, 12, 3))
    assert overlay(plot.image(attribution, colors).axes[0]).shape == (8, 12)


def test_many_samples_are_cut_and_the_figure_says_so():
    figure = plot.image(attribution_of(), IMAGES, feature_mask=MASK, samples=2)
    assert len(figure.axes) == 3
    assert figure.get_suptitle() == "rollout, 2 of 3 samples"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.image(attribution_of().values, IMAGES), "Received: ndarray"),
        (lambda: plot.image(attribution_of().rename(feature="key"), IMAGES), r"dimensions \('sample', 'key'\)"),
        (lambda: plot.image(attribution_of()[:0], IMAGES), "must not be empty"),
        (lambda: plot.image(attribution_of() * np.nan, IMAGES, feature_mask=MASK), "`attribution` must be finite"),
        (lambda: plot.image(attribution_of(), IMAGES * np.nan, feature_mask=MASK), "`images` must be finite"),
        (lambda: plot.image(attribution_of(), IMAGES.astype(str), feature_mask=MASK), "must be numbers"),
        (lambda: plot.image(attribution_of(), IMAGES), r"not as many features as pixels.*explain\.patches.*6 features"),
        (lambda: plot.image(attribution_of(), IMAGES, feature_mask=MASK.T), r"height and width.*\(12, 8\).*moveaxis"),
        (lambda: plot.image(attribution_of(), IMAGES, feature_mask=MASK / 2), "must be integers.*float64"),
        (lambda: plot.image(attribution_of(), IMAGES, feature_mask=MASK * 0 - 1), "must be integers"),
        (lambda: plot.image(attribution_of(), IMAGES[:2], feature_mask=MASK), "as many as the samples.*: 3"),
        (lambda: plot.image(attribution_of(5), IMAGES, feature_mask=MASK), "5 features, and a mask of 6"),
        (
            lambda: plot.image(attribution_of(), IMAGES, feature_mask=MASK, ax=plt.gca()),
            r"one picture.*attribution\[0\]",
        ),
        (lambda: plot.image(attribution_of(), IMAGES, feature_mask=MASK, samples=0), "`samples` must be"),
        (lambda: plot.image(attribution_of(), IMAGES, feature_mask=MASK, columns=0), "`columns` must be"),
        (lambda: plot.image(attribution_of(), IMAGES, feature_mask=MASK, vmax=-1), "`vmax` must be"),
    ],
)
def test_what_cannot_be_laid_over_pictures_is_refused(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_channels_in_front_are_moved_to_the_end_as_advised():
    colors = RNG.random((3, 3, 8, 12))
    with pytest.raises(ValueError, match=r"np\.moveaxis\(images, 1, -1\)"):
        plot.image(attribution_of(), colors[:, :, :, :11], feature_mask=MASK)
    plot.image(attribution_of(), np.moveaxis(colors, 1, -1), feature_mask=MASK)
