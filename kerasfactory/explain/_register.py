"""Telling `explain` how attention of a class of layers is to be read."""

from collections.abc import Callable
from typing import Any

import keras

from kerasfactory.explain._engine.adapters import register


def register_attention(layer_class: type[keras.layers.Layer], adapter: Callable[..., Any] | None) -> None:
    r"""Tells `explain` how to read the attention of a class of layers that folds axes or hides its kernel.

    Most attention is read without this (see `capture`). Two kinds of layers need an adapter, which is a function that
    you write:

    - A layer that **folds axes into the batch**: windows of an image, blocks of a sequence, heads. Its scores are read,
      but only the layer knows what its first axis consists of. The adapter splits this axis.
    - A layer that **hides its kernel**: it attends by a function that `explain` cannot observe, such as one written in
      CUDA or Pallas. The adapter computes the scores again, from the arguments of the layer.

    The adapter is called as `adapter(layer, scores, *args, **kwargs)` for each attention in a call of the layer, while
    the model runs or is traced:

    - `layer`: the layer that is called, with its weights.
    - `scores`: what was seen in the call, a tensor (batch, head, query, key), or with further axes between batch and
      head; `None` if nothing was seen.
    - `*args, **kwargs`: what the layer's `call` got.

    It returns scores (batch, head, query, key), or with further axes between batch and head: `(batch, axis, head,
    query, key)`. If the layer hides its kernel, it may return a pair of these scores and the output that they give.
    `recomposition_error` then compares that output with the layer's own. The comparison shows that the adapter is right
    only if you compute the output from the scores that you return: multiply these with the values, and do not call the
    kernel. If scores were seen, it compares the output that these give, as for every other layer.

    The adapter must use `keras.ops`, because it may be compiled. It must not keep anything that it gets, and it must
    return scores of the same samples as the layer's input, in their order.

    Args:
        layer_class: A subclass of `keras.layers.Layer`. The adapter also applies to subclasses, unless a subclass,
            or a class between the two, has its own. The class may be a block that has the attention layer in it: what
            was seen anywhere within its call is adapted, and named by the block.
        adapter: The function, in place of an earlier one; `None` removes it.

    Raises:
        ValueError: If `layer_class` is not a subclass of `keras.layers.Layer`, or `adapter` is not a function. What
            runs a model raises it if the adapter returns anything but scores of at least 4 axes; and
            `recomposition_error`, if there is nothing to compare: the adapter returns no output, and no scores were
            seen.

    Example:
        A layer that attends within windows of 4 positions, and folds the windows into the batch:

        ```python
        import keras
        import numpy as np
        from keras import ops

        from kerasfactory import explain


        class InWindows(keras.layers.Layer):
            def call(self, x):
                windows = ops.reshape(x, (-1, 4, x.shape[-1]))
                weights = ops.softmax(ops.matmul(windows, ops.swapaxes(windows, 1, 2)))
                return ops.reshape(ops.matmul(weights, windows), (-1, *x.shape[1:]))


        def by_window(layer, scores, x):
            return ops.reshape(scores, (-1, x.shape[1] // 4, *scores.shape[1:]))


        inputs = keras.Input((12, 8))
        model = keras.Model(inputs, InWindows(name="in_windows")(inputs))
        x = np.random.default_rng(0).normal(size=(5, 12, 8))
        print(explain.capture(model, x, verbose=0)["in_windows"].sizes)
        #> Frozen({'sequence': 15, 'head': 1, 'query': 4, 'key': 4})

        explain.register_attention(InWindows, by_window)
        print(explain.capture(model, x, verbose=0)["in_windows"].sizes)
        #> Frozen({'sample': 5, 'axis_2': 3, 'head': 1, 'query': 4, 'key': 4})
        ```
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        hint = " Give its class, not a layer." if isinstance(layer_class, keras.layers.Layer) else ""
        raise ValueError(
            f"`layer_class` must be a subclass of keras.layers.Layer.{hint} Received: layer_class={layer_class!r}"
        )
    if adapter is not None and not callable(adapter):
        raise ValueError(
            "`adapter` must be a function `adapter(layer, scores, *args, **kwargs)`, or None to remove the one that is "
            f"registered. Received: adapter={adapter!r}"
        )
    register(layer_class, adapter)
