"""How attention of layers that fold axes or hide their kernel is to be read: what users have registered."""

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

_ADAPTERS: WeakKeyDictionary[type, Callable] = WeakKeyDictionary()
_CHANGES = itertools.count()
_latest = next(_CHANGES)


def register(layer_class: type, adapter: Callable | None) -> None:
    """Registers an adapter for a class, in place of an earlier one; `None` removes it."""
    global _latest
    if adapter is None:
        _ADAPTERS.pop(layer_class, None)
    else:
        _ADAPTERS[layer_class] = adapter
    _latest = next(_CHANGES)


def adapter_of(layer: Any) -> Callable | None:
    """The adapter for the layer's class, or for the nearest of those that it derives from."""
    return next((_ADAPTERS[kind] for kind in type(layer).__mro__ if kind in _ADAPTERS), None)


def changes() -> int:
    """A number that is another one after each registration."""
    return _latest
