"""What the files of this package share."""

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import keras


class Operation(NamedTuple):
    """A function that attention may go through: where it stands, and how its arguments are to be read.

    With the original function and the arguments of a call, `read` returns, for each `kind`:

    - `"softmax"`: the tensor and the axis along which the result, or what is made of it, sums to 1.
    - `"contraction"`: the subscripts of an einsum, its operands, and a function that does the same with others.
    - `"product"`, entry by entry, `"shifted"` (a sum of two), `"quotient"`: both operands.
    - `"total"` (a sum), `"average"`: the tensor, the axis, and a function that does the same with a product of two.
    - `"moved"`: the tensor, and the order of its axes, `None` if it is reshaped; of each part, if there are several.
    - `"logarithm"`: the tensor.
    - `"chosen"`: the tensor of which the largest are taken.
    - `"attention"`: the fused function with the arguments and axes of Keras' own, these arguments by name, and two
      functions, from its output to that of Keras and back; or the reason why it cannot be read so.
    - `"unread"`: the reason why attention in it cannot be read.
    - `"switch"`: what it is to return while it is watched.
    """

    kind: str
    place: Any
    name: str
    read: Callable[..., tuple]


def read_two(original, x1, x2, *others, **options):
    """Both operands."""
    return x1, x2


def read_sum(original, x, axis=None, *others, **options):
    """What is summed, or averaged."""
    return x, axis, lambda one, other: original(one * other, axis, *others, **options)


def read_reshape(original, x, *others, **options):
    """What is reshaped."""
    return x, None


def read_transpose(original, x, axes=None, *others, **options):
    """What is transposed, and the new order of its axes."""
    rank = len(x.shape)
    return x, range(rank)[::-1] if axes is None else [axis % rank for axis in axes]


def read_swap(original, x, axis1, axis2):
    """What is transposed, and the new order of its axes."""
    order = list(range(len(x.shape)))
    order[axis1], order[axis2] = order[axis2], order[axis1]
    return x, order


def read_getitem(original, x, index):
    """What is indexed, and the axes that are left whole: -1 stands for one that is new or has become shorter."""
    parts = index if isinstance(index, tuple) else (index,)
    rest = len(x.shape) - sum(part is not None and part is not Ellipsis for part in parts)
    order: list[int] = []
    axis = 0
    for part in parts:
        if part is Ellipsis:
            order += range(axis, axis + rest)
            axis += rest
        elif part is None:
            order.append(-1)
        else:
            if isinstance(part, slice):
                is_whole = part.start is None and part.stop is None and part.step is None
                order.append(axis if is_whole else -1)
            axis += 1
    return x, [*order, *range(axis, len(x.shape))]


def read_einsum(original, subscripts, *operands, **options):
    """As an einsum, what `einsum` of any library is given."""
    return subscripts, operands, lambda *others: original(subscripts, *others, **options)


def read_matmul(original, x1, x2, **options):
    """As an einsum, what `matmul` of any library is given."""
    return "...XY,...YZ->...XZ", (x1, x2), lambda *others: original(*others, **options)


def missing(name, purpose):
    """The error to raise where an installed library lacks a private name, as a dotted path, that a purpose needs."""
    library = importlib.import_module(name.split(".")[0])
    return ImportError(
        f"{purpose} needs `{name}`, a private name that the installed {library.__name__} {library.__version__} does "
        f"not have. Install an older version of {library.__name__}, or a newer one of kerasfactory."
    )


def read_arithmetic(tensors):
    """The operators of a class of tensors, as a list of `Operation`."""
    kinds = {"__mul__": "product", "__add__": "shifted", "__truediv__": "quotient"}
    operators = [Operation(kind, tensors, name, read_two) for name, kind in kinds.items()]
    return [
        Operation("contraction", tensors, "__matmul__", read_matmul),
        Operation("moved", tensors, "__getitem__", read_getitem),
        *operators,
    ]


def after_fork(function):
    """Has the function called in each process that is forked from this one. Windows has none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def forked(library):
    """What to tell a process that was forked when the library had started."""
    return (
        f"This process was forked after {library} had started. The threads stayed in its parent, so anything that "
        f"{library} computes here, such as `model.predict`, would wait forever. Start processes with "
        '`multiprocessing.get_context("spawn")`, and load the model in them.'
    )


def stateless_predict_step(model, state, data):
    """`model.predict_step(data)` on the values in `state`. TensorFlow and PyTorch would write into the variables."""
    variables = model.trainable_variables + model.non_trainable_variables
    with keras.StatelessScope(zip(variables, [*state[0], *state[1]], strict=True)) as scope:
        outputs = model.predict_step(data)
    return outputs, (state[0], [scope.get_current_value(variable) for variable in model.non_trainable_variables])
