"""Warnings that point at the line of the user's which led to them."""

import sys
import warnings

_OURS = ("kerasfactory", "keras")  # Keras stands between a callback of ours and the user's `fit`


def warn(message: str) -> None:
    """Issues a `UserWarning` at the innermost line outside this package and Keras."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
