"""Whatever it is given, the layer does what Keras' own does: outputs, scores, gradients, training with dropout."""

import inspect
from random import Random

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops

from kerasfactory import _backend
from kerasfactory.layers import InterpretableMultiHeadAttention

BACKEND = keras.config.backend()
OFFERED = {*inspect.signature(keras.layers.MultiHeadAttention).parameters, "dtype"}
# In half precision, Keras rounds the logits and the layer does not.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1}
DTYPES = ["float32", "float32", "mixed_float16", "mixed_bfloat16", "bfloat16"]
if BACKEND != "jax":  # which computes in float64 only if it is told to before it starts
    DTYPES.append("float64")
BATCH, D_MODEL, HEADS, STEPS = 3, 4, 2, 2
# Axes between batch and features, of query and of key, and the attention axes.
LENGTHS = [
    ((5,), (5,), None),
    ((5,), (3,), None),
    ((1,), (4,), None),
    ((4,), (1,), None),
    ((3, 4), (3, 2), 2),
    ((3, 4), (3, 4), (-2,)),
    ((3, 4), (2, 4), [1]),
    ((3, 4), (2, 2), (2, 1)),
    ((3, 4), (2, 2), None),
]
# The same examples each time. JAX compiles each of them for more than a second.
few = settings(
    max_examples=8 if BACKEND == "jax" else 60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def make_problem(seed):
    """Arguments of the layer, shapes of its inputs, masks and flags of a call, and a seed for all numbers.

    Drawn independently of each other: few examples, and yet each choice meets each other one.
    """
    random = Random(seed)

    def one_of(*values):
        return random.choice(values)

    queries, keys, attention_axes = one_of(*LENGTHS[: one_of(4, len(LENGTHS))])
    shapes = {"query": (BATCH, *queries, one_of(4, 6))}
    if keys != queries or one_of(True, False):
        shapes["key"] = (BATCH, *keys, one_of(4, 6))
        if one_of(True, False):
            shapes["value"] = (BATCH, *keys, 7)
    arguments = {
        "attention_axes": attention_axes,
        "value_dim": one_of(None, 3),
        "use_bias": one_of(True, False),
        "output_shape": one_of(None, 5, (2, 3)),
        "kernel_regularizer": one_of(None, "l2"),
        "activity_regularizer": one_of(None, "l2"),
        "use_gate": one_of(False, True),
        "seed": one_of(*range(100)),
        "dtype": one_of(*DTYPES),
    }
    masks = {"attention_mask": one_of(None, "of all samples", "of each sample", "of each head")}
    causal = False
    if len(queries) == 1:  # Keras has the following for one axis
        arguments["sliding_window"] = one_of(None, None, 1, 2)
        causal = one_of(False, True)
        # Beside a mask of each head, Keras takes the batch axis of others for the axis of the heads.
        if masks["attention_mask"] != "of each head":
            masks["query_mask"] = one_of(None, "attached")  # it ignores others
            masks |= {name: one_of(None, None, "given", "attached") for name in ("key_mask", "value_mask")}
    return {
        "shapes": shapes,
        "arguments": {name: value for name, value in arguments.items() if value is not None and name in OFFERED},
        "dropout": one_of(0.0, 0.4),
        "masks": {name: kind for name, kind in masks.items() if kind},
        "mask_dtype": one_of("bool", "int32", "float32"),
        "use_causal_mask": causal,
        "training": one_of(False, True),
        "with_scores": one_of(False, True),
        "seed": seed,
    }


def scores_shape(problem):
    """Of the scores: samples and axes that are not attended to; query axes and key axes."""
    query = problem["shapes"]["query"]
    key = problem["shapes"].get("key", query)
    axes = problem["arguments"].get("attention_axes", range(1, len(query) - 1))
    axes = [axis % len(query) for axis in ([axes] if isinstance(axes, int) else axes)]
    free = [query[axis] for axis in range(len(query) - 1) if axis not in axes]
    return free, [shape[axis] for shape in (query, key) for axis in axes]


def make_data(problem):
    """The inputs, the masks to attach to them, and those to give to the call."""
    rng = np.random.default_rng(problem["seed"])
    shapes = problem["shapes"]
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    attached, masks = {}, {}
    free, pairs = scores_shape(problem)
    kinds = {"of all samples": pairs, "of each sample": [*free, *pairs], "of each head": [*free, HEADS, *pairs]}
    for name, kind in problem["masks"].items():
        owner = name.removesuffix("_mask")
        shape = kinds[kind] if kind in kinds else (shapes["query"] if owner == "query" else [BATCH, pairs[-1]])[:2]
        mask = rng.random(shape) < 0.7
        if kind != "attached":
            masks[name] = mask.astype(problem["mask_dtype"])
        elif owner in inputs:
            attached[owner] = mask
    return inputs, attached, masks


class Ours(keras.layers.Layer):
    """A call that is the same for both layers, with one kind of result."""

    def __init__(self, attention):
        super().__init__(dtype=attention.dtype_policy)
        self.attention = attention
        self.built = True

    def call(self, query, key=None, value=None, with_scores=True, **arguments):
        result = self.attention(query, key, value, return_attention_scores=with_scores, **arguments)
        return result if with_scores else (result, self.attention.attention_scores)


class Theirs(Ours):
    def call(self, query, key=None, value=None, with_scores=True, **arguments):
        key = query if key is None else key
        value = key if value is None else value
        # What the layer is to give is what Keras' own gives with scores.
        return self.attention(query, value, key, return_attention_scores=True, **arguments)


def make_layers(problem):
    """The layer and Keras' own, with the same weights."""
    query = problem["shapes"]["query"]
    key = problem["shapes"].get("key", query)
    value = problem["shapes"].get("value", key)
    arguments = {"dropout": problem["dropout"], **problem["arguments"]}
    theirs = keras.layers.MultiHeadAttention(HEADS, D_MODEL, **arguments)
    theirs.build(query, value, key)
    rng = np.random.default_rng(problem["seed"])
    theirs.set_weights([0.5 * rng.standard_normal(weight.shape) for weight in theirs.weights])
    ours = InterpretableMultiHeadAttention(D_MODEL, HEADS, arguments.pop("dropout"), **arguments)
    ours.build(query, key, value)
    ours.set_weights(theirs.get_weights())
    return Ours(ours), Theirs(theirs)


def train(layer, problem):
    """Some steps of gradient descent: what each gives, its gradients, and the weights at the end."""
    dtype = "float64" if layer.compute_dtype == "float64" else "float32"
    inputs, attached, masks = make_data(problem)
    rng = np.random.default_rng(problem["seed"] + 1)
    flags = {name: problem[name] for name in ("with_scores", "use_causal_mask", "training")}

    def loss(tensors, states):
        for name, mask in attached.items():
            _backend.set_keras_mask(tensors["inputs"][name], ops.convert_to_tensor(mask))
        (output, scores), states, losses = layer.stateless_call(
            tensors["weights"],
            states,
            **tensors["inputs"],
            **{name: ops.convert_to_tensor(mask) for name, mask in masks.items()},
            **flags,
            return_losses=True,
        )
        output, scores = ops.cast(output, dtype), ops.cast(scores, dtype)
        total = ops.sum(output * ops.convert_to_tensor(of_output, dtype))
        if problem["with_scores"]:
            total = total + ops.sum(scores * ops.convert_to_tensor(of_scores, dtype))
        total = total + sum(ops.cast(one, dtype) for one in losses)
        return total, ({"output": output, "scores": scores, "loss": total}, states)

    def gradient(tensors, states):
        return _backend.gradient(lambda tensors: loss(tensors, states), tensors)

    if BACKEND == "jax":
        import jax

        gradient = jax.jit(gradient)
    of_output, of_scores = (rng.standard_normal(shape) for shape in output_and_scores_shapes(layer, problem))
    tensors = {
        "inputs": {name: ops.convert_to_tensor(array, dtype) for name, array in inputs.items()},
        "weights": [variable.value for variable in layer.trainable_variables],
    }
    states = [variable.value for variable in layer.non_trainable_variables]
    trace = []
    for _ in range(STEPS):
        gradients, (results, states) = gradient(tensors, states)
        trace.append(results | gradients)
        pairs = zip(tensors["weights"], gradients["weights"], strict=True)
        tensors["weights"] = [weight - 0.05 * ops.cast(one, weight.dtype) for weight, one in pairs]
    trace.append({"weights": tensors["weights"]})
    return keras.tree.map_structure(lambda tensor: ops.convert_to_numpy(ops.cast(tensor, dtype)), trace)


def output_and_scores_shapes(layer, problem):
    query = problem["shapes"]["query"]
    output = problem["arguments"].get("output_shape", query[-1])
    free, pairs = scores_shape(problem)
    return (*query[:-1], *([output] if isinstance(output, int) else output)), (*free, HEADS, *pairs)


def assert_equal(ours, theirs, tolerance):
    pairs = zip(keras.tree.flatten_with_path(ours), keras.tree.flatten_with_path(theirs), strict=True)
    # Some gradients are zero but for what is lost in rounding the others: that of a bias that all keys share.
    atol = tolerance * max(np.abs(other).max() for other in keras.tree.flatten(theirs))
    for (path, one), (_, other) in pairs:
        assert np.isfinite(one).all(), path
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=str(path))


@pytest.mark.filterwarnings("ignore:You are using a softmax over axis:UserWarning")  # of length 1
@given(problem=st.integers(0, 10**6).map(make_problem))
@few
def test_outputs_scores_gradients_and_training(problem):
    ours, theirs = make_layers(problem)
    assert_equal(train(ours, problem), train(theirs, problem), TOLERANCE[ours.compute_dtype])
