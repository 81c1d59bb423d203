"""What `explain` puts into the layers of a model for a forward pass, and how it is taken out again.

Other threads may be using the model, or training it. What stands in front of a layer's methods lets their calls
through, and what they write into the layers stays.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from kerasfactory import _backend

# One forward pass at a time: what stands in front of methods is put there, and taken away, in turn.
_LOCK = threading.RLock()
_NOTHING = object()
_PUT: list[tuple[dict[str, Any], str, Any, Any]] = []  # attributes, a name in them, what was put there, what was before


def alone() -> Any:
    """A context that only one thread is in: no other has a forward pass of ours in it."""
    return _LOCK


def stand_in(layer: Any, **methods: Callable) -> None:
    """Puts functions in the place of a layer's methods, for calls in this thread, until the end of `undone`."""
    thread = threading.get_ident()

    def in_this_thread(method, own):
        @functools.wraps(own)
        def either(*args, **kwargs):
            return (method if threading.get_ident() == thread else own)(*args, **kwargs)

        return either

    for name, method in methods.items():
        _put(layer, name, in_this_thread(method, getattr(layer, name)))


def twin(layer: Any, **attributes: Any) -> Any:
    """A layer that shares all with this one, but has other values of those attributes that this one has."""
    other = object.__new__(type(layer))
    own = dict(layer.__dict__)
    other.__dict__.update(own | {name: value for name, value in attributes.items() if name in own})
    return other


@contextlib.contextmanager
def undone(layers: Sequence[Any], hook: str) -> Iterator[None]:
    """Takes out of the layers what this thread has put into them, and what their methods have written.

    The `hook` is the layers' method for `(name, value)` that is called before an attribute is set.
    """
    with alone():
        start = len(_PUT)
        written = [_Written(layer, hook) for layer in layers]
        try:
            yield
        finally:
            _take_away(start)
            for one in written:
                one.take_back()


def _put(layer: Any, name: str, method: Callable) -> None:
    # Straight into the dictionary: Keras and PyTorch would take note of an attribute that is set.
    _PUT.append((layer.__dict__, name, method, layer.__dict__.get(name, _NOTHING)))
    layer.__dict__[name] = method


def _take_away(start: int) -> None:
    while len(_PUT) > start:
        attributes, name, put, before = _PUT.pop()
        if attributes.get(name) is put:
            _restore(attributes, name, before)


def _begin_in_child() -> None:
    """The thread that had a forward pass when this process was forked is not in it."""
    global _LOCK
    _LOCK = threading.RLock()
    _take_away(0)


_backend.after_fork(_begin_in_child)


def _restore(attributes: dict[str, Any], name: str, before: Any) -> None:
    if before is _NOTHING:
        attributes.pop(name, None)
    else:
        attributes[name] = before


class _Written:
    """Which attributes of a layer this thread sets, and what they were before."""

    def __init__(self, layer: Any, hook: str):
        self._layer = layer
        self._start = dict(layer.__dict__)
        self._own: dict[str, Any] = {}  # attributes that this thread was the last to set, and their values before that
        self._set: set[str] = set()  # by any thread
        own_hook, thread, attributes = getattr(layer, hook), threading.get_ident(), layer.__dict__

        def noting(name, value):
            self._set.add(name)
            if threading.get_ident() != thread:
                self._own.pop(name, None)
            elif name not in self._own:
                self._own[name] = attributes.get(name, _NOTHING)
            return own_hook(name, value)

        _put(layer, hook, noting)

    def take_back(self):
        attributes = self._layer.__dict__
        for name, before in self._own.items():
            _restore(attributes, name, before)
        # What was not set but written straight into the dictionary, as `functools.cached_property` does.
        now = dict(attributes)
        for name in now.keys() | self._start.keys():
            before = self._start.get(name, _NOTHING)
            if now.get(name, _NOTHING) is not before and name not in self._set and self._is_by_the_way(name):
                _restore(attributes, name, before)

    def _is_by_the_way(self, name):
        """Another thread may be setting attributes of a model, such as its compiled functions, at this very moment."""
        of_class = getattr(type(self._layer), name, None)
        return not isinstance(self._layer, keras.Model) or isinstance(of_class, functools.cached_property)
