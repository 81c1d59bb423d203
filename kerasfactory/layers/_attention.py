"""Keras' attention, in the way that is fastest at the moment. The scores are made when somebody asks for them."""

import contextlib
import threading
from collections.abc import Iterator
from inspect import signature
from typing import Any, NamedTuple

import keras
from keras import ops

from kerasfactory import _backend

# Which way is fastest was measured on two CPU cores (docs/benchmarks.md). In short, beside Keras' own layer:
#                     training, no dropout    prediction of a layer with dropout
#   TensorFlow, JAX   heads first             heads first; block by block from 512 x 512 scores for a head
#   PyTorch           heads first up to       fused
#                     128 x 128, then fused
# With dropout in training, all form the scores. On GPUs and TPUs, not measured, it is Keras that chooses.
_BLOCKWISE_FROM = 512 * 512
_NOT_FUSED_UP_TO = 128 * 128
_BLOCK = 64  # queries

# The private names that this file relies on, from their owner: see `kerasfactory/_backend/_keras.py`.
PRIVATE_NAMES = {
    "keras.layers.MultiHeadAttention": (
        "_compute_attention",
        "_compute_attention_mask",
        "_dot_product_equation",
        "_dropout_layer",
        "_flash_attention",
        "_inverse_sqrt_key_dim",
        "_masked_softmax",
        "_softmax",
        # Keras 3.14 has no windows.
        *(["_sliding_window"] if "sliding_window" in signature(keras.layers.MultiHeadAttention).parameters else []),
    )
}

# Of this thread. `latest.call`: what the latest attention computed with, for the layer around it to take.
# `latest.aside`: see `keeping_aside`.
latest = threading.local()


@contextlib.contextmanager
def keeping_aside() -> Iterator[None]:
    """Has layers keep what they know of their calls in this thread in a dictionary, by their `id`, until the end of it.

    Elsewhere, and afterward, a layer's latest call is the one that it was.
    """
    before = getattr(latest, "aside", None)
    latest.aside = dict(before or {})
    try:
        yield
    finally:
        latest.aside = before


class Mask(NamedTuple):
    """Which queries may attend to which keys: where all parts are true, and `causal` and `window` allow it.

    Most masks depend on the query or on the key alone. Kept apart, they stay small. `at` combines them.
    """

    parts: tuple  # boolean tensors of shape (batch, head, query, key), where any axis may be 1
    causal: bool  # whether a query attends to no key after it
    window: int | None  # a query attends to keys at a distance of less than this

    def is_matrix(self) -> bool:
        """Whether a part, or what the parts make together, is as large as the scores of a head."""
        kinds = {part.shape[2:].index(1) if 1 in part.shape[2:] else None for part in self.parts}
        return bool(self.window) or None in kinds or (self.causal and bool(kinds))

    def at(self, rows: Any, keys: Any) -> Any:
        """For the queries number `rows` and all `keys`: a boolean tensor that broadcasts to the scores."""
        allowed = [part if part.shape[2] == 1 else ops.take(part, rows, axis=2) for part in self.parts]
        rows, columns = ops.expand_dims(rows, -1), ops.arange(keys, dtype="int32")
        if self.causal:
            allowed.append((rows >= columns)[None, None])
        if self.window:
            allowed.append((ops.abs(rows - columns) < self.window)[None, None])
        return _all(allowed)


def mask_in_parts(
    query_mask: Any = None,
    value_mask: Any = None,
    key_mask: Any = None,
    attention_mask: Any = None,
    use_causal_mask: bool = False,
    window: int | None = None,
) -> Mask | None:
    """The masks that Keras' attention takes, `(batch, query)`, `(batch, key)` or with a query and a key axis."""
    parts = [ops.cast(mask, "bool")[:, None, None, :] for mask in (value_mask, key_mask) if mask is not None]
    if query_mask is not None:
        parts.append(ops.cast(query_mask, "bool")[:, None, :, None])
    if attention_mask is not None:
        attention_mask = ops.cast(attention_mask, "bool")
        while len(attention_mask.shape) < 4:
            attention_mask = ops.expand_dims(attention_mask, -3)
        parts.append(attention_mask)
    return Mask(tuple(parts), bool(use_causal_mask), window) if parts or use_causal_mask or window else None


@keras.saving.register_keras_serializable(package="kerasfactory.layers")
class Attention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention`, faster. With several attention axes it forms the scores, as Keras does."""

    def _compute_attention_mask(
        self,
        query,
        value,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        use_causal_mask=False,
    ):
        if len(query.shape) > 3:
            return super()._compute_attention_mask(
                query, value, query_mask, value_mask, key_mask, attention_mask, use_causal_mask
            )
        window = getattr(self, "_sliding_window", None)  # Keras 3.14 has none
        return mask_in_parts(query_mask, value_mask, key_mask, attention_mask, use_causal_mask, window)

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        use_causal_mask=False,
    ):
        if len(query.shape) > 4:
            causal = {"use_causal_mask": True} if use_causal_mask else {}  # Keras 3.14 does not know it
            output, scores = super()._compute_attention(query, key, value, attention_mask, training, True, **causal)
            latest.call = (None, scores)
            return output, scores
        if use_causal_mask:
            attention_mask = (attention_mask or Mask((), True, None))._replace(causal=True)
        latest.call = (attention_mask, query, key)

        dropout = self.dropout > 0 and training
        if not return_attention_scores and not dropout:
            lengths = query.shape[1], key.shape[1]
            size = None if None in lengths else lengths[0] * lengths[1]  # a graph of TensorFlow may not know
            is_long = size is not None and size >= _BLOCKWISE_FROM and not training
            is_short = size is not None and size <= _NOT_FUSED_UP_TO
            on_cpu = _backend.on_cpu(query)
            if keras.config.backend() == "torch" and on_cpu and self.compute_dtype != "float64":
                # A fused kernel with an error of 1e-6, in which only the mask can be as large as the scores.
                is_long = is_long and attention_mask is not None and attention_mask.is_matrix()
                fused = not (is_long or (is_short and training))
            else:
                is_long = is_long and on_cpu
                fused = self.dropout == 0 and not on_cpu
            if fused or self._flash_attention:
                return self._fused(query, key, value, attention_mask), None
            if is_long:
                return self._blockwise(query, key, value, attention_mask), None

        scores = self.scores(query, key, attention_mask)
        weights = self._dropout_layer(scores, training=training) if dropout else scores
        return _heads_last(weights @ _heads_first(value)), scores

    def scores_of_inputs(self, query: Any, key: Any, value: Any, **masks: Any) -> Any:
        """The scores of a call that gets these inputs and masks. Nothing else is computed."""
        mask = self._compute_attention_mask(query, value, **masks)
        query, key = _project(self.query_dense, query), _project(self.key_dense, key)
        if len(query.shape) == 4:
            return self.scores(query, key, mask)
        query = ops.multiply(query, ops.cast(self._inverse_sqrt_key_dim, query.dtype))
        return self._masked_softmax(ops.einsum(self._dot_product_equation, key, query), mask)

    def scores(self, query: Any, key: Any, mask: Any) -> Any:
        """Of projected queries and keys, `(batch, position, head, features)`: `(batch, head, query, key)`."""
        mask = None if mask is None else mask.at(ops.arange(ops.shape(query)[1], dtype="int32"), ops.shape(key)[1])
        return self._weights(self._scaled(query), _keys(key), mask)

    def _scaled(self, query: Any) -> Any:
        query = _single(_heads_first(query))
        return ops.multiply(query, ops.cast(self._inverse_sqrt_key_dim, query.dtype))

    # `@` and not `ops.matmul`, which on PyTorch computes float64 in float32.

    def _weights(self, query: Any, key: Any, mask: Any) -> Any:
        # Not by calling the layer, which would round logits to half precision, where they overflow.
        return ops.cast(self._softmax.call(query @ key, mask=mask), self.compute_dtype)

    def _fused(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        def attention(mask=None, is_causal=False):
            return ops.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                scale=self._inverse_sqrt_key_dim,
                is_causal=is_causal,
                flash_attention=self._flash_attention,
            )

        if mask is None:
            return attention()
        if mask.causal and not mask.parts and not mask.window:
            return attention(is_causal=True)
        # Queries that are masked themselves do not need a matrix; and the kernel would give those without any key
        # the mean of all values, where scores give nothing.
        of_queries = [part for part in mask.parts if part.shape[3] == 1]
        rest = mask._replace(parts=tuple(part for part in mask.parts if part.shape[3] != 1))
        of_keys = rest.at(ops.arange(ops.shape(query)[1], dtype="int32"), ops.shape(key)[1])
        sees_keys = of_queries if of_keys is None else [*of_queries, ops.any(of_keys, axis=-1, keepdims=True)]
        return ops.where(_heads_last(_all(sees_keys)), attention(of_keys), 0.0)

    def _blockwise(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        """The scores of some queries at a time. They are used and forgotten: memory grows with the length only."""
        heads, length, keys, size = query.shape[2], query.shape[1], key.shape[1], query.shape[3]
        number = -(-length // _BLOCK)
        query, key, value = self._scaled(query), _keys(key), _heads_first(value)
        query = ops.pad(query, ((0, 0), (0, 0), (0, number * _BLOCK - length), (0, 0)))
        blocks = ops.transpose(ops.reshape(query, (-1, heads, number, _BLOCK, size)), (2, 0, 1, 3, 4))

        def attend(block_and_number):
            block, start = block_and_number
            rows = ops.minimum(start * _BLOCK + ops.arange(_BLOCK, dtype="int32"), length - 1)
            return self._weights(block, key, None if mask is None else mask.at(rows, keys)) @ value

        output = ops.map(attend, (blocks, ops.arange(number, dtype="int32")))  # (number, batch, head, block, features)
        output = ops.transpose(output, (1, 0, 3, 2, 4))
        return ops.reshape(output, (-1, number * _BLOCK, heads, value.shape[-1]))[:, :length]


def _project(dense: Any, tokens: Any) -> Any:
    # Not `dense(tokens)`, which would add its activity regularizer to the loss a second time.
    return (dense.quantized_call if dense.quantization_mode else dense.call)(tokens)


def _heads_first(tensor: Any) -> Any:
    return ops.transpose(tensor, (0, 2, 1, 3))


_heads_last = _heads_first  # the same axes change places


def _keys(key: Any) -> Any:
    return _single(ops.transpose(key, (0, 2, 3, 1)))


def _single(tensor: Any) -> Any:
    """Half precision is for storage: products of queries and keys overflow it, and rows would not add up to 1."""
    half = keras.backend.standardize_dtype(tensor.dtype) in ("float16", "bfloat16")
    return ops.cast(tensor, "float32") if half else tensor


def _all(conditions: Any) -> Any:
    merged = None
    for condition in conditions:
        merged = condition if merged is None else ops.logical_and(merged, condition)
    return merged
