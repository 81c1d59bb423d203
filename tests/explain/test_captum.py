"""The same quantities from Captum, of the same model written by hand in PyTorch, as a function of its scores."""

import keras
import numpy as np
import pytest
from keras import layers

from kerasfactory import explain
from kerasfactory.layers import InterpretableMultiHeadAttention

if keras.config.backend() == "torch":
    import torch
    from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, LayerIntegratedGradients

pytestmark = pytest.mark.skipif(keras.config.backend() != "torch", reason="Captum explains PyTorch's models")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 5, 8)).astype("float32")
Y = RNG.integers(3, size=12)
HEADS = {"first": 2, "second": 3}


@pytest.fixture(scope="module", params=[layers.MultiHeadAttention, InterpretableMultiHeadAttention])
def model(request):
    def attention(name):
        if request.param is InterpretableMultiHeadAttention:
            return InterpretableMultiHeadAttention(4, HEADS[name], name=name)
        return layers.MultiHeadAttention(HEADS[name], 4, name=name)

    inputs = keras.Input((5, 8))
    x = layers.Add()([inputs, attention("first")(inputs, inputs)])
    x = layers.Add()([x, attention("second")(x, x)])
    outputs = layers.Dense(3, activation="softmax", name="classes")(layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, outputs)
    weights = np.random.default_rng(1)
    for variable in model.trainable_variables:  # biases are not to be 0
        variable.assign(weights.normal(scale=0.4, size=variable.shape))
    return model


def by_hand(model, x, given=None):
    """The outputs, and the scores (sample, head, query, key) of both layers, which may be `given`, by name."""
    scores = dict(given or {})
    for name in HEADS:
        weights = [weight.value for weight in model.get_layer(name).weights]
        (query, key, value, output), biases = weights[::2], weights[1::2]
        query, key, value = (
            torch.einsum("spf,fhd->shpd", x, kernel) + bias[:, None]
            for kernel, bias in zip((query, key, value), biases[:3], strict=True)
        )
        if name not in scores:
            scores[name] = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1)
        x = x + torch.einsum("shpd,hdo->spo", scores[name] @ value, output) + biases[3]
    kernel, bias = (weight.value for weight in model.get_layer("classes").weights)
    return torch.softmax(x.mean(1) @ kernel + bias, dim=1), scores


def tensor(array):
    return keras.ops.convert_to_tensor(array)


def gradient_times_scores(model, name, function, target=None):
    """Captum's, of `function(outputs)` by the scores of one layer, from which those of a later one are made."""
    explainer = InputXGradient(lambda scores, x: function(by_hand(model, x, {name: scores})[0]))
    scores = by_hand(model, tensor(X))[1][name].detach().requires_grad_()
    return explainer.attribute(scores, target=target, additional_forward_args=tensor(X)).detach()


def attribute(model, method, **arguments):
    return explain.attribute(model, X, method=method, task="classification", **arguments, batch_size=5, verbose=0)


def predicted(model):
    outputs, _ = by_hand(model, tensor(X))
    return outputs.argmax(1)


def losses(outputs):
    return torch.nn.functional.nll_loss(torch.log(outputs), tensor(Y), reduction="none")


def close(ours, captums):
    np.testing.assert_allclose(ours, captums.detach().cpu().numpy(), rtol=1e-4, atol=1e-6)
    assert np.abs(ours).max() > 0.01


def test_the_model_by_hand_is_the_model(model):
    outputs, scores = by_hand(model, tensor(X))
    close(model.predict(X, verbose=0), outputs)
    for name, captured in explain.capture(model, X, verbose=0).items():
        close(captured.values, scores[name])
    assert len(set(predicted(model).tolist())) > 1


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_attention_gradient_is_input_x_gradient_of_the_scores(names, target, model):
    relevance = identity = torch.eye(5)
    for name in names:
        products = gradient_times_scores(
            model, name, lambda outputs: outputs, predicted(model) if target is None else target
        )
        assert (products < -0.001).any()
        relevance = relevance + products.clamp(min=0).mean(1) @ relevance
    ours = attribute(model, "attention_gradient", target=target, layers=names)
    close(ours, (relevance - identity).mean(1))


@pytest.mark.parametrize("target", [None, 1])
def test_integrated_gradients_are_captums(target, model):
    explainer = IntegratedGradients(lambda x: by_hand(model, x)[0])
    captums = explainer.attribute(
        tensor(X), target=predicted(model) if target is None else target, n_steps=100, method="gausslegendre"
    )
    ours = attribute(model, "integrated_gradients", target=target)
    assert (ours < -0.01).any()
    close(ours, captums.sum(2))


def test_integrated_gradients_of_words_are_captums_of_the_layer_of_their_embeddings():
    keras.utils.set_random_seed(0)
    words = RNG.integers(1, 30, (12, 7))
    words[:6, 4:] = 0
    inputs = keras.Input((7,), dtype="int32")
    embedding = layers.Embedding(30, 8, mask_zero=True, embeddings_initializer="normal")
    x = embedding(inputs)
    for name in HEADS:
        x = layers.LayerNormalization()(
            layers.Add()([x, InterpretableMultiHeadAttention(4, HEADS[name], name=name)(x)])
        )
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    # Captum's baseline is the embedding of the number 0. Ours is 0.
    embedding.embeddings.assign(embedding.get_weights()[0] * (np.arange(30) > 0)[:, None])
    explainer = LayerIntegratedGradients(lambda words: model(words), embedding)
    captums = explainer.attribute(tensor(words), target=2, n_steps=256, method="gausslegendre").sum(2)
    ours = explain.attribute(model, words, method="integrated_gradients", target=2, verbose=0)
    assert (ours.values[words == 0] == 0).all()
    np.testing.assert_allclose(ours, captums.detach().cpu().numpy(), atol=2e-4)  # with other nodes
    assert (np.abs(ours) > 0.1).mean() > 0.5


@pytest.mark.parametrize("labels", [None, Y])
def test_comprehensiveness_and_sufficiency_of_one_feature_are_feature_ablation(labels, model):
    background = RNG.normal(1, size=(20, 5, 8)).astype("float32")
    ablation = FeatureAblation(lambda x: by_hand(model, x)[0])
    for feature in (0, 3):
        result = explain.faithfulness(
            model,
            X,
            np.tile(np.eye(5)[feature], (len(X), 1)),
            y=labels,
            task="classification",
            removal="mean",
            background=background,
            fractions=[1 / 5],
            draws=1,
            verbose=0,
        )
        is_other = torch.arange(5) != feature
        captums = ablation.attribute(
            tensor(X),
            tensor(background.mean(axis=0, keepdims=True)),
            target=predicted(model) if labels is None else tensor(labels),
            feature_mask=is_other.int()[None, :, None].expand(1, 5, 8),
        )
        close(result["comprehensiveness"].values[:, 0], captums[:, feature, 0])
        close(result["sufficiency"].values[:, 0], captums[:, feature - 1, 0])


def test_head_importance_is_feature_ablation_and_input_x_gradient_of_heads(model):
    importance = explain.head_importance(model, X, Y, loss="sparse_categorical_crossentropy", batch_size=5, verbose=0)
    for name, heads in HEADS.items():
        scores = by_hand(model, tensor(X))[1][name].detach()
        ablation = FeatureAblation(lambda scores, x, name=name: losses(by_hand(model, x, {name: scores})[0]))
        of_heads = torch.arange(heads)[None, :, None, None].expand(1, heads, 5, 5)
        fall = ablation.attribute(scores, additional_forward_args=tensor(X), feature_mask=of_heads)[:, :, 0, 0]
        assert (fall > 0.001).any()
        assert (fall < -0.001).any()
        close(importance[name]["ablation"], -fall.mean(0))
        products = gradient_times_scores(model, name, losses)
        close(importance[name]["gradient"], products.sum((2, 3)).abs().mean(0))
