"""Generated text: what each step of `generate` attended to, and the same from one pass over what was generated."""

import contextlib
import warnings

import keras
import numpy as np
import pytest

from benchmarks import backbones
from kerasfactory import explain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of KerasHub itself and what it imports
    import keras_hub

pytestmark = pytest.mark.filterwarnings("ignore:.*(copy=False failed|without specifying `device_type`)")
BACKEND = keras.config.backend()
# Attention by Keras' fused function, by a layer of Keras, and by a softmax. What the backends change, one can show.
FAMILIES = ["Llama", "GPT2", "Gemma"] if BACKEND == "torch" else ["Llama"]
LAYERS = 1 if BACKEND == "jax" else 2
LENGTHS, LENGTH = [2, 3], 5  # of the prompts, and with what is generated


class Generating(keras.Model):
    """A model whose forward pass is all of `generate`: `explain` watches what `call` does."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model

    def call(self, prompt):
        return self.language_model.generate_step(dict(prompt), stop_token_ids=None)["token_ids"]


def language_model(family):
    backbone = backbones.backbone(f"{family}Backbone", num_layers=LAYERS)
    model = getattr(keras_hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:  # with the weights that they begin with, these models attend uniformly
        variable.assign(generator.normal(size=variable.shape, scale=0.5))
    model.compile(sampler="greedy")
    return model


def prompts():
    allowed = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
    tokens = np.random.default_rng(0).integers(1, backbones.VOCABULARY, allowed.shape)
    return {"token_ids": np.where(allowed, tokens, 0), "padding_mask": allowed.astype("int32")}


def by_layer(scores):
    """A model that generates may go round its backbone: then the paths to the layers are shorter."""
    return {"/".join(name.split("/")[-2:]): array for name, array in scores.items()}


def stepwise():
    """What is needed beside `run_eagerly`: JAX compiles loops in any case."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.disable_jit()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_each_step_are_rows_of_one_pass_over_what_was_generated(family):
    model = language_model(family)
    written = model.generate(prompts(), stop_token_ids=None)
    assert np.asarray(written["padding_mask"]).all()
    forced = by_layer(explain.capture(model, written, verbose=0))
    generating = Generating(model)
    generating.compile(run_eagerly=True)
    with stepwise():
        steps = by_layer(explain.capture(generating, prompts(), verbose=0))
    # The first call reads the prompts, and each of the others one token: the last one of the shortest prompt, and on.
    first = min(LENGTHS) - 1
    queries = range(first, LENGTH - 1)
    assert sorted(steps) == sorted(f"{name}#{call}" for name in forced for call in range(1, len(queries) + 2))
    for name, of_layer in forced.items():
        assert not np.triu(of_layer.values, 1).any()
        assert np.ptp(of_layer.values[..., first, : first + 1], axis=-1).max() > 0.1
        np.testing.assert_allclose(steps[f"{name}#1"][:, :, :first], of_layer[:, :, :first], atol=1e-5)
        for call, query in enumerate(queries, start=2):
            seen = steps[f"{name}#{call}"]
            assert seen.shape == (2, 2, 1, LENGTH)
            assert seen.attrs["prediction_difference"] < 1e-5
            np.testing.assert_allclose(seen[:, :, 0], of_layer[:, :, query], atol=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch runs the loop step by step")
def test_what_stays_in_a_compiled_loop_is_named():
    model = Generating(language_model("Llama"))
    if BACKEND == "jax":
        with pytest.warns(UserWarning, match="self_attention: its scores stay inside a loop"):
            scores = explain.capture(model, prompts(), verbose=0)
        assert [array.attrs["call"] for array in scores.values()] == [1] * LAYERS  # which reads the prompts
        return
    # TensorFlow runs the first batch step by step, and compiles for the others.
    with pytest.raises(RuntimeError, match=r"The scores of .*/self_attention stay inside a compiled loop"):
        explain.capture(model, prompts(), batch_size=1, verbose=0)
