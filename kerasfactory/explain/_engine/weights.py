"""Which tensors of a forward pass may be attention weights: results of a softmax, and what is made of them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

_REMEMBERED = 64  # of each kind: what was computed longer ago does not meet values any more


class Softmax(NamedTuple):
    """A tensor that sums to 1 along an axis; `None` if that axis cannot be told any more."""

    path: list[Any]  # the layers whose call it is made in, the outermost first
    result: Any
    axis: int | None
    is_of_features: bool  # the axis is one that a kernel made, such as the units of a dense layer
    long_axes: int  # of the softmax itself, those of another length than 1
    origin: int  # the same for all that is made of one softmax by moving its axes


class _Made(NamedTuple):
    shape: tuple
    by_kernel: set[int]  # the axes that only a kernel has: what is the same for all samples
    of_samples: bool  # both factors differ between samples


class _Product(NamedTuple):
    operands: tuple
    result: Any


class _Sum(NamedTuple):
    shape: tuple  # of what was summed
    axis: int
    result: Any


class Weights:
    """What is remembered of a forward pass. A tensor is the same if it is the same object."""

    def __init__(self):
        self._softmaxes: list[Softmax] = []
        self._made: list[_Made] = []
        self._products: list[_Product] = []
        self._sums: list[_Sum] = []
        self._of_weights: list[Any] = []  # logarithms of weights, and weights with a small constant
        self._origins = itertools.count()
        self._met: set[int] = set()  # origins that values were met with

    def __bool__(self):
        """Whether there are any that have not met values yet."""
        return bool(self._softmaxes)

    def softmax(self, path: list[Any], x: Any, axis: Any, result: Any) -> None:
        """Notes that a result, or what is made of `x` with it, sums to 1 along an axis, which is that of `x`."""
        rank = len(getattr(x, "shape", ()))
        result = result if rank == len(result.shape) and _long(result.shape) == _long(x.shape) else x
        axis = one_axis(axis)
        if isinstance(axis, list | tuple):
            _append(self._softmaxes, Softmax(path, result, None, False, 0, next(self._origins)))
        elif isinstance(axis, int) and rank > 1 and axis % rank > 0:
            made = self._made_like(x)
            of_features = made is not None and _place(axis % rank, x.shape, made.shape) in made.by_kernel
            long_axes = len(_long(result.shape))
            _append(self._softmaxes, Softmax(path, result, axis % rank, of_features, long_axes, next(self._origins)))

    def moved(self, path: list[Any], x: Any, order: Sequence[int] | None, result: Any) -> None:
        """Notes that the axes of `x` were put into another order; without one, that it was reshaped.

        An order may leave axes out, and have -1 for one that is new, or of which a part is taken.
        """
        found = self.of(x, path)
        if found is None or result is x or not (found.result is x or _is_within(path, found.path)):
            return
        axis = found.axis
        if order is not None and axis is not None and axis not in order:
            return
        if axis is not None:
            axis = _reshaped(axis, x.shape, result.shape) if order is None else list(order).index(axis)
        if axis != 0:
            _append(self._softmaxes, found._replace(result=result, axis=axis))

    def of(self, operand: Any, path: list[Any]) -> Softmax | None:
        """The softmax that an operand is the result of, or that something was made of entry by entry in one layer.

        Its axis is that of the operand. A column that is left out (a sink), or an axis of length 1, are no difference.
        """
        shape = tuple(getattr(operand, "shape", ()))
        if self.is_result(operand):
            return next(found for found in reversed(self._softmaxes) if found.result is operand)
        for found in reversed(self._softmaxes):
            before = tuple(found.result.shape)
            if found.origin not in self._met and shape and _is_same_layer(path, found.path):
                if shape in (before, (*before[:-1], before[-1] and before[-1] - 1)):
                    return found
                if found.axis is not None and _long(shape) == _long(before):
                    axis = _place(found.axis, before, shape)
                    return None if axis is None else found._replace(result=operand, axis=axis)
        return None

    def is_result(self, operand: Any) -> bool:
        """Whether an operand itself is the result of a softmax."""
        return any(found.result is operand for found in self._softmaxes)

    def met(self, found: Softmax, operand: Any, surely: bool) -> None:
        """Notes that a softmax has met its values: from now on, no more is taken for made of it that only looks so.

        If it has surely, its result has had its values.
        """
        self._met.add(found.origin)
        if surely:
            self._softmaxes = [one for one in self._softmaxes if one.result is not operand]

    def contracted(self, operands: Sequence[Any], letters: Sequence[str], out: str, result: Any) -> None:
        """Notes which axes of a contraction's result are from a kernel."""
        batch = out[:1]
        kernels = [number for number, of_operand in enumerate(letters) if batch not in of_operand]
        of_kernel = {letter for number in kernels for letter in letters[number]}
        by_kernel = {place for place, letter in enumerate(out) if letter in of_kernel}
        _append(self._made, _Made(tuple(result.shape), by_kernel, not kernels))

    def chosen(self, x: Any, result: Any) -> None:
        """Notes that a result has the largest entries of `x`."""
        made = self._made_like(x)
        if made is not None:
            _append(self._made, made._replace(shape=tuple(result.shape)))

    def is_gate(self, found: Softmax, scores: set[str], values: str, of_values: Any) -> bool:
        """Whether units of a dense layer weigh as many parts of each position: experts, or features of a query.

        Then the weights have no axis of queries beside those of the values, or the values are products of samples, as
        in linear attention.
        """
        if not found.is_of_features:
            return False
        made = self._made_like(of_values)
        return scores <= set(values) or (made is not None and made.of_samples)

    def product(self, operands: tuple, result: Any) -> None:
        """Notes a product, entry by entry."""
        _append(self._products, _Product(operands, result))

    def factors(self, result: Any) -> tuple:
        """What a product is of; nothing, if it is none."""
        return next((one.operands for one in reversed(self._products) if one.result is result), ())

    def sum(self, x: Any, axis: Any, result: Any) -> None:
        """Notes a sum of the same rank as `x`."""
        axis = one_axis(axis)
        if isinstance(axis, int) and len(result.shape) == len(x.shape):
            _append(self._sums, _Sum(tuple(x.shape), axis % len(x.shape), result))

    def shifted(self, x: Any, result: Any) -> None:
        """Notes that a sum got a summand, such as a small constant."""
        for one in self._sums:
            if one.result is x:
                _append(self._sums, one._replace(result=result))
                break
        self.logarithm(x, result)

    def logarithm(self, x: Any, result: Any) -> None:
        """Notes that numbers were made of weights that are no weights any more."""
        if self.is_result(x) or self.is_of_weights(x):
            _append(self._of_weights, result)

    def is_of_weights(self, x: Any) -> bool:
        """Whether something was made of weights alone, and is no weights itself."""
        return any(one is x for one in self._of_weights)

    def axis_of_quotient(self, x: Any, divisor: Any) -> int | None:
        """The axis along which something was summed of which `x` is divided by the sum: a softmax, written out."""
        for one in reversed(self._sums):
            if one.result is divisor and one.shape == tuple(getattr(x, "shape", ())):
                return one.axis
        return None

    def _made_like(self, x: Any) -> _Made | None:
        """The latest contraction with a result of this shape, but for axes of length 1."""
        return next((made for made in reversed(self._made) if _long(made.shape) == _long(x.shape)), None)


def one_axis(axis: Any) -> Any:
    """The axis out of a list of one; what else was given, as it is."""
    return axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis


def _append(remembered: list, entry: Any) -> None:
    remembered.append(entry)
    del remembered[:-_REMEMBERED]


def _long(shape: Sequence) -> list:
    return [size for size in shape if size != 1]


def _place(axis: int, before: Sequence, after: Sequence) -> int | None:
    """Where an axis is in a shape that differs by axes of length 1."""
    if before[axis] == 1:
        return None
    number = len(_long(before[:axis]))
    return [place for place, size in enumerate(after) if size != 1][number]


def _reshaped(axis: int, before: Sequence, after: Sequence) -> int | None:
    """Where an axis is after a tensor was reshaped; `None` if it was split, or it is not known."""
    behind = before[axis + 1 :]
    if None in behind:
        return None
    for place in range(1, len(after)):
        rest = after[place + 1 :]
        if after[place] == before[axis] and None not in rest and math.prod(rest) == math.prod(behind):
            return place
    return None


def _is_within(path: list[Any], other: list[Any]) -> bool:
    """Whether a call is one of those that another call was in."""
    return bool(path) and any(path[-1] is layer for layer in other)


def _is_same_layer(path: list[Any], other: list[Any]) -> bool:
    """The same, or whether two small layers of Keras, such as `Softmax` and `Dot`, were called in one layer."""
    owner, other_owner = (
        [id(layer) for layer in layers if not type(layer).__module__.startswith("keras.src.layers.")][-1:]
        for layers in (path, other)
    )
    return _is_within(path, other) or owner == other_owner
