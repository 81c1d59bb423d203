"""The checks that Keras runs on its own layers: config, shapes, dtypes, masks, weights, a training step."""

import inspect

import keras
import numpy as np
import pytest
from keras.src.testing import TestCase

from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

# Older versions of Keras offer fewer arguments, and are asked for those that they have.
OFFERED = set(inspect.signature(keras.layers.MultiHeadAttention).parameters)
QUERY, CROSS = (2, 8, 16), {"query_shape": (2, 8, 16), "key_shape": (2, 4, 16)}

# Arguments of the layer, shapes of its inputs, how many trainable weights it has.
ATTENTION = {
    "self-attention": ({"dropout_rate": 0}, QUERY, 8),
    "dropout": ({"dropout_rate": 0.5, "seed": 1}, QUERY, 8),
    "cross-attention": ({}, CROSS, 8),
    "gate, no bias": ({"value_dim": 4, "use_bias": False, "use_gate": True}, CROSS, 5),
    "two attention axes and a free one": (
        {"attention_axes": (2, 3)},
        {"query_shape": (3, 5, 3, 4, 8), "key_shape": (3, 5, 3, 2, 8)},
        8,
    ),
    "regularizers": ({"kernel_regularizer": "l2", "activity_regularizer": "l1"}, QUERY, 8),
    "bfloat16": ({"dtype": "mixed_bfloat16"}, QUERY, 8),
}
ATTENTION = {name: case for name, case in ATTENTION.items() if set(case[0]) - {"dropout_rate", "dtype"} <= OFFERED}

TABLE = np.array([[0.5, 3, -1.5, 0], [2.0, 0, 0.25, 2], [-1.0, 1, 0.0, 1]], "float32")
TABLES = {
    "numbers": ({}, {"input_shape": (3, 4)}, 2),
    "categories": ({"cardinalities": [4, 3, 5, 2]}, {"input_data": np.zeros((3, 4), "int32")}, 1),
    "both": ({"feature_names": list("abcd"), "cardinalities": {"b": 4, "d": 3}}, {"input_data": TABLE}, 3),
}

# `run_layer_test` trains on an endless generator of one batch.
pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case):
    arguments, shapes, weights = ATTENTION[case]
    query = shapes if isinstance(shapes, tuple) else shapes["query_shape"]
    regularized = "kernel_regularizer" in arguments

    TestCase("run_layer_test").run_layer_test(
        InterpretableMultiHeadAttention,
        {"d_model": 2, "n_head": 2, **arguments},
        input_shape=shapes,
        expected_output_shape=query,
        expected_output_dtype="bfloat16" if "dtype" in arguments else "float32",
        expected_num_trainable_weights=weights,
        expected_num_non_trainable_weights=0,
        expected_num_seed_generators=int(arguments.get("dropout_rate", 0.1) > 0),
        # Of each kernel, and of what each of the four projections gives.
        expected_num_losses=8 if regularized else 0,
        supports_masking=True,
        # It trains what takes one tensor. `test_equal_to_keras.py` trains the others.
        run_training_check=isinstance(shapes, tuple),
    )


def test_attention_with_scores():
    TestCase("run_layer_test").run_layer_test(
        InterpretableMultiHeadAttention,
        {"d_model": 2, "n_head": 3},
        input_shape=CROSS | {"value_shape": (2, 4, 7)},
        call_kwargs={"return_attention_scores": True},
        expected_output_shape=((2, 8, 16), (2, 3, 8, 4)),
        expected_output_dtype=("float32", "float32"),
        supports_masking=True,
        run_training_check=False,
        # Not for several outputs: `compute_output_spec` is then asked for the specification without `call_kwargs`.
        run_mixed_precision_check=False,
    )


@pytest.mark.parametrize("case", TABLES)
def test_tokenizer(case):
    arguments, inputs, weights = TABLES[case]

    TestCase("run_layer_test").run_layer_test(
        FeatureTokenizer,
        {"d_token": 4, **arguments},
        **inputs,
        expected_output_shape=(3, 4, 4),
        expected_output_dtype="float32",
        expected_num_trainable_weights=weights,
        expected_num_non_trainable_weights=0,
        expected_num_seed_generators=0,
        expected_num_losses=0,
        supports_masking=False,
    )
