"""Texts: their words as names that differ by sample, word pieces, and the words of a corpus."""

import collections

import keras
import numpy as np
import pytest
import xarray as xr
from keras import layers

from kerasfactory import explain

VOCABULARY = ["", "[UNK]", "[CLS]", "bad", "good", *(f"word{number}" for number in range(10))]
NAMES = {"feature_names": VOCABULARY.__getitem__, "verbose": 0}
LENGTH = 6


def texts(samples, seed):
    """Ids in which one of two words says the label, wherever it stands, and the labels."""
    rng = np.random.default_rng(seed)
    ids, labels = np.zeros((samples, LENGTH), "int32"), rng.integers(0, 2, samples)
    for row, label in zip(ids, labels, strict=True):
        size = rng.integers(3, LENGTH + 1)
        row[:size] = [2, *rng.choice(np.arange(5, 15), size - 1)]
        row[rng.integers(1, size)] = 3 + label
    return ids, labels


def model_of_texts(mask_zero=True):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH,), dtype="int32")
    tokens = layers.Embedding(len(VOCABULARY), 8, mask_zero=mask_zero)(inputs)
    attended = layers.MultiHeadAttention(1, 8, name="attention")(tokens, tokens)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(attended)))
    model.compile(keras.optimizers.Adam(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.fixture(scope="module")
def trained():
    model = model_of_texts()
    model.fit(*texts(256, 0), batch_size=256, epochs=20, verbose=0)
    ids, labels = texts(40, 1)
    assert (model.predict(ids, verbose=0).argmax(axis=1) == labels).mean() > 0.97
    return model, ids, labels


def words_of(ids):
    return [[VOCABULARY[number] for number in row] for row in ids]


def test_words_go_along_with_scores_attributions_and_summaries(trained):
    model, ids, _ = trained
    ids = ids[:5]
    expected = words_of(ids)
    called = collections.Counter()

    def name_of(number):
        called[number] += 1
        return VOCABULARY[number]

    scores = explain.capture(model, ids, feature_names=name_of, verbose=0)["attention"]
    assert called == collections.Counter(np.unique(ids).tolist())  # once each
    summary = explain.summarize(model, ids, **NAMES)["attention"]
    for result in (scores, summary):
        for axis in ("query", "key"):
            assert result[f"{axis}_token"].dims == ("sample", axis)
            assert result[f"{axis}_token"].values.tolist() == expected
    attribution = explain.attribute(model, ids, **NAMES)
    assert attribution["feature_token"].dims == ("sample", "feature")
    assert attribution["feature_token"].values.tolist() == expected
    np.testing.assert_array_equal(attribution["in_view"], ids != 0)
    assert (attribution.values[ids == 0] == 0).all()
    assert explain.rollout(scores)["key_token"].values.tolist() == expected


def test_the_words_may_be_an_array_lists_a_function_or_come_in_batches(trained):
    model, ids, _ = trained
    ids = ids[:5]
    without = explain.attribute(model, ids, verbose=0)
    ragged = [[word for word in row if word] for row in words_of(ids)]
    assert len(set(map(len, ragged))) > 1
    for names in (np.array(words_of(ids)), words_of(ids), ragged):
        found = explain.attribute(model, ids, feature_names=names, verbose=0)
        assert found["feature_token"].values.tolist() == words_of(ids)
        np.testing.assert_array_equal(found, without)
    for method in ("attention", "integrated_gradients"):
        batches = (ids[start : start + 2] for start in (0, 2, 4))
        found = explain.attribute(model, batches, method=method, target=0, **NAMES)
        assert found["feature_token"].values.tolist() == words_of(ids)


def test_the_ids_may_be_the_token_ids_of_a_dictionary():
    inputs = {name: keras.Input((LENGTH,), dtype="int32", name=name) for name in ("token_ids", "padding_mask")}
    tokens = layers.Embedding(len(VOCABULARY), 8)(inputs["token_ids"])
    in_view = layers.Reshape((1, LENGTH))(inputs["padding_mask"])
    attended = layers.MultiHeadAttention(1, 8)(tokens, tokens, attention_mask=in_view)
    model = keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(attended)))
    ids = texts(4, 4)[0]
    x = {"token_ids": ids, "padding_mask": (ids != 0).astype("int32")}
    attribution = explain.attribute(model, x, special_tokens=[2], **NAMES)
    assert attribution["feature_token"].values.tolist() == words_of(ids)
    np.testing.assert_array_equal(attribution["in_view"], ids > 2)


def test_words_of_what_is_stored_are_those_of_the_call(trained, tmp_path):
    pytest.importorskip("zarr")
    model, ids, _ = trained
    ids = ids[:6]

    def batches():
        return (ids[start : start + 2] for start in (0, 2, 4))

    for x in (ids, batches()):
        scores = explain.capture(model, x, store=tmp_path / "scores.zarr", **NAMES)["attention"]
        assert scores["key_token"].values.tolist() == words_of(ids)


def test_the_words_that_decide_are_found_and_the_others_are_not(trained):
    model, ids, _ = trained
    attribution = explain.attribute(model, ids, method="integrated_gradients", special_tokens=["[CLS]"], **NAMES)
    tokens = explain.by_token(attribution)
    assert set(tokens["token"].values[:2]) == {"good", "bad"}
    assert "[CLS]" not in tokens["token"]
    assert "" not in tokens["token"]
    assert tokens["share"].sel(token=["good", "bad"]).sum() == 1
    by_hand = [attribution.values[row, ids[row] == 4] for row in np.flatnonzero((ids == 4).any(axis=1))]
    assert tokens["count"].sel(token="good") == len(by_hand)
    np.testing.assert_allclose(tokens["mean"].sel(token="good"), np.mean(by_hand), rtol=1e-5)
    # Padding and the class token are no words; the ranking is one of words, wherever they stand.
    tested = explain.faithfulness(model, ids, attribution, fractions=[0.2], draws=39, verbose=0)
    assert tested["p_value"] <= 2 / 40  # one of twelve words at random is the right one now and then
    assert tested["p_value_sufficiency"] <= 2 / 40
    p_values = []
    for seed in range(3):
        noise = explain.attribute(model, ids, method="random", special_tokens=["[CLS]"], seed=seed, **NAMES)
        tested = explain.faithfulness(model, ids, noise, fractions=[0.2], draws=19, verbose=0)
        p_values.append(tested["p_value"].item())
    assert np.median(p_values) > 0.05


@pytest.mark.backend_independent
def test_weights_of_words_that_know_nothing_pass_no_more_often_than_chance_allows(trained):
    model, ids, _ = trained
    attribution = explain.attribute(model, ids, special_tokens=["[CLS]"], **NAMES)
    p_values = []
    for seed in range(10):
        weights = np.random.default_rng(seed).random(ids.max() + 1)  # one for each word, in all texts
        noise = attribution.copy(data=np.where(attribution["in_view"], weights[ids], 0))
        tested = explain.faithfulness(model, ids, noise, fractions=[0.2], draws=39, verbose=0)
        p_values.append([tested[name].item() for name in ("p_value", "p_value_sufficiency", "p_opposite")])
    assert (np.mean(np.array(p_values) <= 0.05, axis=0) <= 0.2).all()  # against 0.3 to 0.5 if positions are relabeled


def test_an_audit_of_texts_claims_nothing_about_positions(trained, tmp_path):
    model, ids, labels = (trained[0], trained[1][:24], trained[2][:24])
    arguments = {"special_tokens": ["[CLS]"], "path": tmp_path / "audit.html", "verbose": 0}
    report = explain.audit(model, ids, labels, feature_names=words_of(ids), **arguments)
    assert report.claims["feature"].isna().all()
    assert report.claims["p_value"].notna().sum() >= 6
    assert "says nothing about words" in report.claims.loc["seeds", "reason"]
    assert report.record["settings"]["special_tokens"] == [2]
    assert report.features.index.tolist() == [str(position) for position in range(LENGTH)]
    written = report.path.read_text() + report.path.with_suffix(".json").read_text()
    assert "Nothing is claimed about positions" in written
    assert "word3" not in written
    assert explain.verify(report, model, ids, labels, verbose=0) == []


def test_words_among_special_tokens_need_ids_of_their_own(trained):
    model, ids, labels = trained
    names = words_of(ids)
    names[0][0] = "first"  # has the id of [CLS]
    with pytest.raises(ValueError, match=r"must have ids that no other words have. Give the ids themselves"):
        explain.audit(model, ids, labels, feature_names=names, special_tokens=["[CLS]"], verbose=0)
    attribution = explain.attribute(model, ids, special_tokens=["[CLS]"], **NAMES)
    with pytest.raises(ValueError, match=r"those of `background` are not known. Give the ids of these tokens to"):
        explain.faithfulness(model, ids, attribution, background=ids[::-1], verbose=0)
    attribution = explain.attribute(model, ids, special_tokens=[2], **NAMES)
    assert explain.faithfulness(model, ids, attribution, background=ids[::-1], draws=9, verbose=0)["p_value"] <= 1


def test_padding_that_the_model_sees_keeps_its_weight_and_is_told():
    model, (ids, _) = model_of_texts(mask_zero=False), texts(4, 2)
    message = r"is in view in \d of 4 samples, the first of them number \d. It keeps its weight"
    for function in (explain.capture, explain.summarize, explain.attribute):
        with pytest.warns(UserWarning, match=message):
            found = function(model, ids, **NAMES)
    assert (found.values[ids == 0] > 0).all()
    hidden = explain.attribute(model, ids, special_tokens=[""], **NAMES)  # as the message says: without a warning
    np.testing.assert_array_equal(hidden["in_view"], ids != 0)
    np.testing.assert_array_equal(hidden, found)


def test_words_that_stand_elsewhere_than_their_ids_are_told():
    model, (ids, _) = model_of_texts(), texts(4, 2)
    padded_in_front = np.array([np.r_[row[row == 0], row[row != 0]] for row in ids])
    ragged = [[word for word in row if word] for row in words_of(ids)]
    with pytest.warns(UserWarning, match="the words stand at other positions than their ids"):
        explain.attribute(model, padded_in_front, feature_names=ragged, verbose=0)
    explain.attribute(model, padded_in_front, **NAMES)


IDS = texts(3, 3)[0]
WORDS = words_of(IDS)


@pytest.mark.parametrize(
    ("x", "names", "message"),
    [
        (IDS, WORDS[:2], "must hold a row for each sample in `x`, 3. Received 2 rows"),
        (IDS, [*WORDS[:2], [*WORDS[2], "more"]], "attends over 6 keys.*Received 7 words for each sample"),
        (IDS, np.array(WORDS)[:, :5], "attends over 6 keys.*Received 5 words for each sample. Where padding"),
        (IDS, [*WORDS[:2], "text"], "Row 2 holds 'text' of type str"),
        (IDS, [*WORDS[:2], ["a", None]], "Row 2 holds None of type NoneType"),
        (IDS, IDS, "Row 0 holds .*2.* of type int32"),
        (
            IDS,
            VOCABULARY[:5].__getitem__,
            "For the id 5 it raised IndexError: list index out of range. Check that it",
        ),
        (IDS, dict(enumerate(VOCABULARY[:5])).get, "For the id 5 it returned None. Check that it belongs"),
        (IDS - 1, VOCABULARY.__getitem__, "`x` holds the id -1. Ids of tokens count from 0"),
        (IDS.astype("float32"), VOCABULARY.__getitem__, r"Convert ids that are floats with `x.astype\(int\)`"),
        (iter([IDS]), WORDS, "of each sample need `x` as arrays. For batches, give a function from ids"),
        (IDS, ["a", "b"], "attends over 6 keys.*Received 2 names"),
        (IDS, ["a"] * 6, "must differ from each other"),
    ],
)
def test_what_does_not_fit_is_refused(x, names, message):
    with pytest.raises(ValueError, match=message):
        explain.attribute(model_of_texts(), x, feature_names=names, verbose=0)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="Strings are inputs of TensorFlow's models only")
def test_a_model_of_strings_is_explained_behind_its_vectorizer():
    sentences = np.array(["the film was good", "a bad day", "good and not bad", "we saw a bad film"] * 5)
    labels = np.array([1, 0, 1, 0] * 5)
    vectorize = layers.TextVectorization(output_sequence_length=6, name="words")
    vectorize.adapt(sentences)
    inputs = keras.Input((), dtype="string")
    tokens = layers.Embedding(vectorize.vocabulary_size(), 8, mask_zero=True)(vectorize(inputs))
    attended = layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    outputs = layers.Dense(1, activation="sigmoid")(layers.GlobalAveragePooling1D()(attended))
    model = keras.Model(inputs, outputs)
    model.compile(loss="binary_crossentropy")

    advice = r"`x` holds strings\. .*If it has a `keras\.layers\.TextVectorization`, explain the part behind it"
    with pytest.raises(ValueError, match=advice):
        explain.faithfulness(model, sentences, np.ones((20, 6)), verbose=0)
    with pytest.raises(ValueError, match=advice):
        explain.audit(model, sentences, labels, verbose=0)
    with pytest.raises(ValueError, match=advice):
        explain.attribute(model, sentences, feature_names=vectorize.get_vocabulary().__getitem__, verbose=0)
    with pytest.raises(ValueError, match=advice):
        explain.capture(model, sentences.tolist(), verbose=0)

    vectorize = model.get_layer("words")
    rest = keras.Model(vectorize.output, model.outputs)
    rest.compile(loss="binary_crossentropy")
    x = keras.ops.convert_to_numpy(vectorize(sentences))
    attribution = explain.attribute(rest, x, feature_names=vectorize.get_vocabulary().__getitem__, verbose=0)
    np.testing.assert_array_equal(attribution, explain.attribute(model, sentences, verbose=0))
    assert attribution["feature_token"].values[0].tolist() == ["the", "film", "was", "good", "", ""]
    assert explain.faithfulness(rest, x, attribution, draws=9, verbose=0).sizes["sample"] == 20


def attributed(pieces, values=None, in_view=None, **more):
    dims = ("sample", "feature")
    values = np.random.default_rng(5).random((len(pieces), len(pieces[0]))) if values is None else values
    coordinates = {"feature_token": (dims, pieces)} | ({} if in_view is None else {"in_view": (dims, in_view)})
    return xr.DataArray(values, coordinates | more, dims, attrs={"method": "attention"})


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["[CLS]", "un", "##believ", "##able", "##", "film"], ["[CLS]", "unbelievable", "##", "film"]),
        (["▁The", "▁film", "s", "▁", "いい", "."], ["The", "films", "いい."]),
        (["The", "Ġcaf", "Ã©", "Ġ", "Ġ×¢", "×Ļ"], ["The", "café", "Ġ", "עי"]),
    ],
)
def test_pieces_become_words_with_their_weight(pieces, words):
    weights = np.random.default_rng(5).random((2, len(pieces)))
    weights[1, 1:] = 0
    attribution = attributed([pieces, ["one", *[""] * (len(pieces) - 1)]], weights)
    merged = explain.merge(attribution)
    assert merged["feature_token"].values.tolist() == [words, ["one", *[""] * (len(words) - 1)]]
    assert merged["in_view"].values[1].tolist() == [True, *[False] * (len(words) - 1)]
    np.testing.assert_allclose(merged.sum("feature"), weights.sum(axis=1), rtol=1e-12)
    assert merged.attrs == attribution.attrs


@pytest.mark.backend_independent
def test_what_is_out_of_view_is_merged_with_nothing():
    in_view = np.array([[False, True, True, True, False, False]])
    values = np.array([[0.5, 1.0, 2.0, 4.0, 8.0, 0.0]])
    attribution = attributed([["<s>", "▁film", "s", ".", "</s>", ""]], values, in_view, sample=["one"])
    merged = explain.merge(attribution)
    assert merged["feature_token"].values.tolist() == [["<s>", "films.", "</s>"]]
    assert merged.values.tolist() == [[0.5, 7.0, 8.0]]
    assert merged["in_view"].values.tolist() == [[False, True, False]]
    assert merged["sample"].values.tolist() == ["one"]
    assert explain.by_token(merged)["token"].values.tolist() == ["films."]


@pytest.mark.backend_independent
def test_words_may_be_numbered():
    attribution = attributed([["a", "b", "c", "d"], ["e", "f", "g", "h"]], np.arange(8.0).reshape(2, 4))
    merged = explain.merge(attribution, words=np.array([[7, 3, 7, -1], [-1, -1, 0, 0]]))
    assert merged["feature_token"].values.tolist() == [["ac", "b", "d"], ["e", "f", "gh"]]
    assert merged.values.tolist() == [[2.0, 1.0, 3.0], [4.0, 5.0, 13.0]]


@pytest.mark.backend_independent
def test_words_are_not_guessed():
    plain, both = attributed([["a", "b"]]), attributed([["▁a", "##b"]])
    with pytest.raises(ValueError, match=r'they have: none. Say which is meant, as with `words="##"`, or give the'):
        explain.merge(plain)
    with pytest.raises(ValueError, match=r"they have: '##', '▁'. Say which is meant"):
        explain.merge(both)
    assert explain.merge(both, words="##")["feature_token"].values.tolist() == [["▁ab"]]
    assert explain.merge(plain, words=[[1, 1]])["feature_token"].values.tolist() == [["ab"]]
    with pytest.raises(ValueError, match="`words` must be one of '##', '▁', 'Ġ', or an array"):
        explain.merge(plain, words="@@")
    for words in ([[1]], [[1.0, 1.0]], [[-2, 0]]):
        with pytest.raises(ValueError, match=r"must hold the number of a word, or -1, for each token, \(1, 2\)"):
            explain.merge(plain, words=words)
    for function in (explain.merge, explain.by_token):
        with pytest.raises(ValueError, match=r"has no words.*Give `feature_names` to `explain.attribute`"):
            function(plain.drop_vars("feature_token"))
        with pytest.raises(ValueError, match="must be a DataArray with the dimensions"):
            function(plain.values)
    with pytest.raises(ValueError, match="no word in view"):
        explain.by_token(attributed([["a", "b"]], in_view=[[False, False]]))


@pytest.mark.backend_independent
def test_tokens_of_texts_of_different_length_compare_as_multiples_of_the_uniform_share():
    words = [["short", "a", "", ""], ["long", "a", "a", "a"]]
    in_view = np.array([[True, True, False, False], [True] * 4])
    attribution = attributed(words, in_view / in_view.sum(axis=1, keepdims=True), in_view)
    assert explain.by_token(attribution)["mean"].sel(token=["short", "long"]).values.tolist() == [0.5, 0.25]
    multiples = explain.by_token(attribution * attribution["in_view"].sum("feature"))
    assert multiples["mean"].values.tolist() == [1, 1, 1]
    assert multiples["count"].sel(token="a") == 4
    assert multiples["share"].sel(token="a") == 1


@pytest.mark.backend_independent
def test_ids_that_the_model_does_not_know_are_named(trained):
    model, ids, labels = trained
    other = ids.copy()
    other[3, 1] = len(VOCABULARY)
    attribution = explain.attribute(model, ids, verbose=0)
    message = rf"ids from 0 to {len(VOCABULARY) - 1}. Received {len(VOCABULARY)} at \(3, 1\), and such ids in 1 of 40"
    for call in (
        lambda: explain.attribute(model, other, verbose=0),
        lambda: explain.capture(model, other, verbose=0),
        lambda: explain.faithfulness(model, other, attribution, verbose=0),
        lambda: explain.faithfulness(model, ids, attribution, background=other, verbose=0),
        lambda: explain.audit(model, other, labels, verbose=0),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"Received -1 at \(0, 0\)"):
        explain.faithfulness(model, ids, attribution, removal="mask", mask_value=-1, verbose=0)
    with pytest.raises(ValueError, match="must be a whole number for an `x` of integers"):
        explain.faithfulness(model, ids, attribution, removal="mask", mask_value=1.5, verbose=0)


@pytest.mark.backend_independent
def test_special_words_need_not_occur(trained):
    model, ids, _ = trained
    full = ids[(ids != 0).all(axis=1)]
    attribution = explain.attribute(model, full, special_tokens=["", "[CLS]", "[UNK]"], **NAMES)
    np.testing.assert_array_equal(attribution["in_view"], full != 2)
    explain.faithfulness(model, full, attribution, draws=2, verbose=0)


@pytest.mark.backend_independent
def test_words_without_a_number_are_told_and_are_in_no_mean():
    words = {"feature_token": (("sample", "feature"), [["good", "film"], ["good", "film"]])}
    attribution = xr.DataArray([[np.nan, 0.25], [0.5, 0.75]], words, ("sample", "feature"))
    with pytest.warns(UserWarning, match="NaN at 1 words, the first of them 'good'"):
        tokens = explain.by_token(attribution)
    assert tokens["mean"].sel(token=["good", "film"]).values.tolist() == [0.5, 0.5]


@pytest.mark.backend_independent  # JAX and PyTorch have no tensors of strings at all
def test_strings_for_a_model_of_ids_are_refused_before_the_backend_does_it():
    model = model_of_texts()
    with pytest.raises(ValueError, match=r"`x` holds strings\. Where the model takes numbers, give what it was"):
        explain.capture(model, np.array([["a"] * 6] * 3), verbose=0)
