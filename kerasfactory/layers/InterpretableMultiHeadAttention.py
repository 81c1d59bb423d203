"""Multi-head attention whose scores can be read after every call."""

import difflib
import numbers
import operator
from inspect import signature
from typing import Any

import keras
from keras import ops

from kerasfactory import _backend
from kerasfactory._arguments import positive_integer
from kerasfactory.layers._attention import Attention, latest

# Keras calls these three by other names; everything else it takes is passed on by its own name.
_RENAMED = {"num_heads": "n_head", "key_dim": "d_model", "dropout": "dropout_rate"}
_LAYER_ARGUMENTS = ("name", "dtype", "trainable")
_ATTENTION_ARGUMENTS = tuple(
    name
    for name in signature(keras.layers.MultiHeadAttention.__init__).parameters
    if name not in {"self", "kwargs", *_RENAMED}
)


@keras.saving.register_keras_serializable(package="kerasfactory.layers")
class InterpretableMultiHeadAttention(keras.layers.Layer):
    r"""Multi-head attention that lets you read its attention scores.

    The layer wraps a `keras.layers.MultiHeadAttention` (the attribute `mha`) and gives the outputs that Keras' layer
    gives when it returns scores. It adds `attention_scores`, the weights of the latest call. After an eager call they
    are a tensor. In a functional or `Sequential` model, trained or reloaded, they are a `KerasTensor`, from which
    `keras.Model(model.inputs, layer.attention_scores)` makes a model that predicts scores. They are computed when you
    read them.

    A query whose keys are all masked gets zeros before the output projection. In half precision the scores are
    computed in `float32` and then rounded.

    For head \(h\) with projections \(W^Q_h, W^K_h, W^V_h\) of width `d_model`,

    $$
    A_h = \operatorname{softmax}\!\left(\frac{(Q W^Q_h)(K W^K_h)^\top}{\sqrt{d_\text{model}}}\right)
    $$

    and

    $$
    \text{output} = \operatorname{concat}_h(A_h\, V W^V_h)\, W^O ,
    $$

    and \(A\) is what `attention_scores` holds (Vaswani et al. 2017,
    [*Attention Is All You Need*](https://arxiv.org/abs/1706.03762), sections 3.2.1 and 3.2.2).

    Args:
        d_model: Size of **each head** for query and key, and for value unless `value_dim` is given. A positive integer.
            It is not the width of the model: the output has the width of the query.
        n_head: Number of heads. A positive integer. It need not divide anything.
        dropout_rate: Share of attention scores dropped in training, in `[0, 1)`. The scores you read are
            taken before dropout.
        **kwargs: The arguments below, which are passed on to `keras.layers.MultiHeadAttention`, with whatever else
            the installed Keras offers there. `name`, `dtype` and `trainable` are the layer's own.

    Keyword Args:
        value_dim: Size of each head for value. A positive integer. Defaults to `None`: the size for query and key,
            `d_model`.
        use_bias: Whether the four projections (of query, key, value and output) have biases. Defaults to `True`.
        output_shape: Size of the output beside batch and positions: a positive integer, or a tuple of them. Defaults
            to `None`: that of the query.
        attention_axes: The axes to attend over: an integer, or a tuple of them. Defaults to `None`: all axes between
            the first, the batch, and the last, the features.
        kernel_initializer: How the kernels of the projections start. Defaults to `"glorot_uniform"`.
        bias_initializer: How the biases of the projections start. Defaults to `"zeros"`.
        kernel_regularizer: A penalty on the kernels, which is added to the loss. Defaults to `None`.
        bias_regularizer: A penalty on the biases. Defaults to `None`.
        activity_regularizer: A penalty on what the projections return. Defaults to `None`.
        kernel_constraint: What the kernels are projected to after each step of the optimizer. Defaults to `None`.
        bias_constraint: The same for the biases. Defaults to `None`.
        seed: The seed of the dropout, an integer. Defaults to `None`: a different one each time.
        flash_attention: Whether the output is computed by flash attention. Flash attention does not support dropout.
            Defaults to `None`: where Keras can.
        sliding_window: Keep each query to the keys that lie fewer than this many positions away. A positive integer.
            Defaults to `None`: all keys. Needs Keras 3.15.
        use_gate: Whether a sigmoid of the query is multiplied onto the output of the heads. Defaults to `False`.

    Call arguments:
        - `query`: Tensor of shape `(batch, query, features)`.
        - `key`: Tensor of shape `(batch, key, features)`. The query if not given. Note the order: Keras' layer takes
          `(query, value, key)`.
        - `value`: Tensor of shape `(batch, key, features)`. The key if not given.
        - `query_mask`, `key_mask`, `value_mask`, `attention_mask`, `use_causal_mask`, `training`,
          `return_attention_scores`: as in `keras.layers.MultiHeadAttention`. Masks that Keras attached to the
          tensors are honored.

    Returns:
        tensor: The output, of shape `(batch, query, features of the query)`, or `(batch, query, *output_shape)`. With
            `return_attention_scores=True`, a pair of output and scores.

    Raises:
        ValueError: If an argument is unknown or outside its range; if query, key and value differ in rank or
            batch size, key and value in length, or one of them is empty.

    Example:
        ```python
        import numpy as np

        from kerasfactory.layers import InterpretableMultiHeadAttention

        layer = InterpretableMultiHeadAttention(d_model=64, n_head=8)
        tokens = np.random.default_rng(0).normal(size=(32, 10, 64)).astype("float32")

        output = layer(tokens)
        print(output.shape)
        #> (32, 10, 64)
        print(layer.attention_scores.shape)
        #> (32, 8, 10, 10)
        ```

        `get_config` returns all arguments, and `from_config` makes a new layer of them, with new weights:

        ```python
        from kerasfactory.layers import InterpretableMultiHeadAttention

        layer = InterpretableMultiHeadAttention(d_model=64, n_head=8, value_dim=32)
        copy = InterpretableMultiHeadAttention.from_config(layer.get_config())
        print(copy.get_config() == layer.get_config())
        #> True
        ```
    """

    def __init__(self, d_model: int, n_head: int, dropout_rate: float = 0.1, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in _ATTENTION_ARGUMENTS + _LAYER_ARGUMENTS:
                raise ValueError(_unknown_argument(name, value))
        super().__init__(**{name: kwargs.pop(name) for name in _LAYER_ARGUMENTS if name in kwargs})
        self.supports_masking = True

        self.d_model = positive_integer("d_model", d_model)
        self.n_head = positive_integer("n_head", n_head)
        rate: Any = dropout_rate  # to a type checker a float is not a Real
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= float(rate) < 1:
            raise ValueError(
                "`dropout_rate` must be at least 0 and below 1: it is the share of attention scores to drop in "
                f"training. Received: dropout_rate={dropout_rate!r}"
            )
        self.dropout_rate = float(rate)
        for name in ("value_dim", "sliding_window"):
            if kwargs.get(name) is not None:
                kwargs[name] = positive_integer(name, kwargs[name])
        if kwargs.get("output_shape") is not None:
            kwargs["output_shape"] = _integers("output_shape", kwargs["output_shape"], positive=True)
        if kwargs.get("attention_axes") is not None:
            kwargs["attention_axes"] = _integers("attention_axes", kwargs["attention_axes"])

        # In a `keras.RematScope` this layer is rematerialized as a whole. What is inside need not be, once more.
        with keras.RematScope(mode=None):
            self.mha = Attention(
                num_heads=self.n_head,
                key_dim=self.d_model,
                dropout=self.dropout_rate,
                dtype=self.dtype_policy,
                name="mha",
                **kwargs,
            )
        # Keras' layer forgets or rewrites these two, so the config takes them from here.
        self._flash_attention = kwargs.get("flash_attention")
        self._attention_axes = kwargs.get("attention_axes")

        self._latest = _Latest()

    def build(self, query_shape, key_shape=None, value_shape=None):
        key_shape = key_shape or query_shape
        rank = len(query_shape)
        axes = [axis % rank if -rank <= axis < rank else 0 for axis in self.mha.attention_axes or ()]
        if 0 in axes or rank - 1 in axes or len(set(axes)) < len(axes):
            raise ValueError(
                "`attention_axes` must name different axes between the batch axis, 0, and the feature axis, "
                f"{rank - 1}, of the query. Received: attention_axes={self._attention_axes!r}, "
                f"query of shape {tuple(query_shape)}"
            )
        self.mha.build(query_shape, value_shape or key_shape, key_shape)
        if not self.trainable:  # Keras' layer hands this on only to what it had before it was built: nothing
            self.mha.trainable = False

    def __call__(self, query, key=None, value=None, **kwargs):
        _check_shapes(query, key, value, self.mha.attention_axes)
        if not any(isinstance(x, keras.KerasTensor) for x in (query, key, value)):
            return super().__call__(query, key, value, **kwargs)

        # In a graph the scores are a node of their own, made only if somebody asks for it: the model pays
        # nothing until then, `layer.output` stays one tensor, and Keras, which sizes all calls of a layer by
        # the first, is never shown two kinds of call.
        return_scores = kwargs.pop("return_attention_scores", False)
        output = super().__call__(query, key, value, **kwargs)
        kwargs.pop("training", None)

        def scores():
            with keras.RematScope(mode=None):  # rematerialized, it would lose masks
                return AttentionScores(self)(query, key, value, **kwargs)

        self._keep(_Latest(scores, self._kept().traced))
        return (output, self.attention_scores) if return_scores else output

    def call(
        self,
        query,
        key=None,
        value=None,
        query_mask=None,
        key_mask=None,
        value_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        result, kept = self._attend(
            query,
            key,
            value,
            query_mask=query_mask,
            key_mask=key_mask,
            value_mask=value_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )
        self._remember(*kept)
        return result

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # Backends trace or refuse arguments that are not tensors, so only tensors go in and out. What the scores are
        # made of comes out with the result, and is remembered here: the call runs again when gradients are computed.
        arguments = signature(self.call).bind(*args, **kwargs).arguments
        tensors = {name: argument for name, argument in arguments.items() if ops.is_tensor(argument)}
        masks = []

        def attend(*values):
            for tensor, value in zip(tensors.values(), values, strict=True):
                _backend.set_keras_mask(value, _backend.get_keras_mask(tensor))
            result, (mask, kept) = self._attend(**{**arguments, **dict(zip(tensors, values, strict=True))})
            masks.append(mask)
            return result, kept

        rematerialized = super().rematerialized_call(attend, *args, **kwargs)

        def call(*args, **kwargs):
            result, kept = rematerialized(*tensors.values())
            self._remember(masks[0], kept)
            return result

        return call

    def _attend(self, query, key=None, value=None, **kwargs):
        """The result of a call, and what its scores can be made of: the mask without its tensors, and all tensors."""
        key = query if key is None else key
        value = key if value is None else value
        # Keras' layer takes the masks off its inputs. They are the caller's, who may use them again.
        attached_masks = [(tensor, _backend.get_keras_mask(tensor)) for tensor in (query, key, value)]
        latest.call = None
        try:
            result = self.mha(query, value, key, **kwargs)
            mask, *tensors = latest.call or (None,)
        finally:
            latest.call = None
            for tensor, attached in attached_masks:
                _backend.set_keras_mask(tensor, attached)
        return result, (mask and mask._replace(parts=()), [*tensors, *(mask.parts if mask else ())])

    def _remember(self, mask, tensors):
        """Keeps what the scores of this call can be made of, whatever becomes of the weights."""
        if not tensors:
            return
        held = [_held(tensor, f"{id(self)}_{number}") for number, tensor in enumerate(tensors)]

        def scores():
            query, *others = [tensor() for tensor in held]
            if not others:
                return query  # several attention axes: these are the scores
            return self.mha.scores(query, others[0], mask and mask._replace(parts=tuple(others[1:])))

        def eager_scores():
            with _backend.outside_traces():
                return _backend.with_numpy_dtype(scores())

        if _backend.concrete(tensors[0]) is None:
            self._keep(_Latest(self._kept().scores, (held[0], scores)))
        else:
            self._keep(_Latest(eager_scores))

    def _keep(self, of_call):
        aside = getattr(latest, "aside", None)
        if aside is None:
            self._latest = of_call
        else:
            aside[id(self)] = of_call

    def _kept(self):
        return (getattr(latest, "aside", None) or {}).get(id(self), self._latest)

    @property
    def attention_scores(self):
        """Attention scores of the latest call, of shape `(batch, head, query, key)`, before dropout.

        Each row (over the last axis) sums to 1. A row whose keys are all masked is 0. With several attention axes,
        the query axes come first, then the key axes.

        | the latest call was | you get |
        |---|---|
        | none: the layer was never called | `None` |
        | eager, as `layer(x)` or `model(x)` | a tensor with that call's scores |
        | the building or loading of a functional or `Sequential` model | a `KerasTensor` of the model's graph |
        | inside your own `tf.function`, `jax.jit` or `jax.grad` | inside: the traced scores; outside: as above |

        Compiled calls (`fit`, `predict`, `evaluate`) do not count, nor does a model that is rematerialized as a whole
        on JAX: you get the scores of the latest call that was not compiled. It is the latest call of all threads. If
        several threads call the layer, each gets its own scores with `return_attention_scores=True`. Calls by `explain`
        do not count.

        Raises:
            RuntimeError: If the layer has only ever been called inside compiled functions, or only inside the `call`
                of a subclassed model that has seen no data yet.
        """
        of_call = self._kept()
        if of_call.traced is not None:
            query, scores = of_call.traced
            if query() is not None and _backend.in_scope(query()):
                return scores()
        if of_call.scores is None and of_call.traced is not None:
            raise RuntimeError(
                f"The scores of layer {self.name!r} are not available: all its calls so far ran inside a compiled "
                "function (such as `fit`, `predict` or `evaluate`), or while Keras worked out the shapes of a model "
                "around it. Tensors cannot be read from either. Do one of these: call the model on some data, "
                "`model(x)`, and then read `attention_scores`; capture the scores of all its attention layers with "
                "`explain.capture(model, x)`; or call the layer with `return_attention_scores=True`, so that the "
                "compiled function returns its scores."
            )
        if callable(of_call.scores):
            of_call.scores = of_call.scores()
        return of_call.scores

    def compute_output_shape(self, query_shape, key_shape=None, value_shape=None):
        key_shape = key_shape or query_shape
        return self.mha.compute_output_shape(query_shape, value_shape or key_shape, key_shape)

    def compute_output_spec(self, query, key=None, value=None, **kwargs):
        key = query if key is None else key
        value = key if value is None else value
        shape = self.compute_output_shape(query.shape, key.shape, value.shape)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self):
        attention = self.mha.get_config()
        return {
            **super().get_config(),
            "d_model": self.d_model,
            "n_head": self.n_head,
            "dropout_rate": self.dropout_rate,
            **{name: attention.get(name) for name in _ATTENTION_ARGUMENTS},
            "flash_attention": self._flash_attention,
            "attention_axes": self._attention_axes,
        }


@keras.saving.register_keras_serializable(package="kerasfactory.layers")
class AttentionScores(keras.layers.Layer):
    """The scores of an attention layer as a node of a graph. `attention_scores` makes it when it is read.

    It needs queries and keys only, and does with them what `keras.layers.MultiHeadAttention` does.
    """

    def __init__(self, attention: InterpretableMultiHeadAttention, **kwargs: Any) -> None:
        super().__init__(dtype=attention.dtype_policy, **kwargs)
        self.attention = attention
        self.supports_masking = True

    def build(self, query_shape, key_shape=None, value_shape=None):
        if not self.attention.built:  # as after loading, when this node comes before the layer's own
            self.attention.build(query_shape, key_shape, value_shape)

    def call(
        self,
        query,
        key=None,
        value=None,
        query_mask=None,
        key_mask=None,
        value_mask=None,
        attention_mask=None,
        use_causal_mask=False,
    ):
        key = query if key is None else key
        value = key if value is None else value
        return self.attention.mha.scores_of_inputs(
            query,
            key,
            value,
            query_mask=_backend.get_keras_mask(query),  # Keras' layer ignores any other
            value_mask=_backend.get_keras_mask(value) if value_mask is None else value_mask,
            key_mask=_backend.get_keras_mask(key) if key_mask is None else key_mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
        )

    def compute_mask(self, inputs, previous_mask):
        return None

    def compute_output_spec(self, query, key=None, value=None, **kwargs):
        key_shape = query.shape if key is None else key.shape
        # Keras' layer has by now turned `attention_axes` into a tuple of positive axes.
        axes = self.attention.mha.attention_axes
        other = [query.shape[axis] for axis in range(len(query.shape) - 1) if axis not in axes]
        queries = [query.shape[axis] for axis in axes]
        keys = [key_shape[axis] for axis in axes]
        return keras.KerasTensor((*other, self.attention.n_head, *queries, *keys), dtype=self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        del config["dtype"]  # is the attention layer's
        return {**config, "attention": keras.saving.serialize_keras_object(self.attention)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "attention": keras.saving.deserialize_keras_object(config["attention"])})


class _Latest:
    """What a layer keeps of its latest calls. Another thread's call is another object: it changes nothing in this one.

    Args:
        scores: The scores of the latest call that was not compiled, or a function that makes them.
        traced: Of the latest call in a function being compiled: a reference to one of its tensors, and what makes the
            scores.
    """

    def __init__(self, scores: Any = None, traced: Any = None):
        self.scores, self.traced = scores, traced


def _held(tensor: Any, name: str) -> Any:
    values = _backend.concrete(tensor)
    return (lambda: values) if values is not None else _backend.weak_reference(tensor, name)


def _integers(name: str, value: Any, positive: bool = False) -> int | list[int] | tuple[int, ...]:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    try:
        checked = tuple(operator.index(number) for number in numbers if not isinstance(number, bool))
    except TypeError:
        checked = ()
    if not checked or len(checked) < len(numbers) or (positive and min(checked) <= 0):
        kind = "a positive integer" if positive else "an integer"
        raise ValueError(f"`{name}` must be {kind} or a tuple of them. Received: {name}={value!r}")
    return type(value)(checked) if isinstance(value, list | tuple) else checked[0]


def _unknown_argument(name: str, value: Any) -> str:
    known = ["d_model", "n_head", "dropout_rate", *_ATTENTION_ARGUMENTS, *_LAYER_ARGUMENTS]
    near = [_RENAMED[name]] if name in _RENAMED else difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"Known arguments: {', '.join(known)}."
    return f"InterpretableMultiHeadAttention has no argument `{name}`. {hint} Received: {name}={value!r}"


def _check_shapes(query: Any, key: Any, value: Any, attention_axes: tuple[int, ...] | None) -> None:
    named = {"query": query, "key": query if key is None else key}
    named["value"] = named["key"] if value is None else value
    for name, tensor in named.items():
        if not hasattr(tensor, "shape"):
            raise ValueError(f"`{name}` must be a tensor or an array. Received: {name} of type {type(tensor).__name__}")
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    received = "Received shapes: " + ", ".join(f"{name}={shape}" for name, shape in shapes.items())
    rank = len(shapes["query"])
    if rank < 3:
        raise ValueError(
            "`query` must have at least three axes, (batch, query, features); for a table of shape (batch, "
            f"features), make one token per feature with `FeatureTokenizer` first. {received}"
        )
    for name, shape in shapes.items():
        if len(shape) != rank:
            raise ValueError(f"`{name}` must have as many axes as `query`, {rank}. {received}")
        if 0 in shape:
            raise ValueError(f"`{name}` is empty: every axis must have at least one entry. {received}")
        if None not in (shape[0], shapes["query"][0]) and shape[0] != shapes["query"][0]:
            raise ValueError(f"`{name}` must have the batch size of `query`, {shapes['query'][0]}. {received}")
    attended = range(1, rank - 1) if attention_axes is None else [axis % rank for axis in attention_axes]
    for axis in range(1, rank - 1):
        query_size, key_size, value_size = (shape[axis] for shape in shapes.values())
        if None not in (key_size, value_size) and key_size != value_size:
            raise ValueError(
                "`key` and `value` must have the same length: each key has one value. (The call order here is "
                f"query, key, value.) {received}"
            )
        if axis not in attended and None not in (query_size, key_size) and query_size != key_size:
            raise ValueError(
                f"`query` and `key` must have the same size on axis {axis}, which is not one of `attention_axes`. "
                f"{received}"
            )
