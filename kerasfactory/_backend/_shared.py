"""What the files of this package share."""

import importlib
import os

import keras


def missing(name, purpose):
    """The error to raise where an installed library lacks a private name, as a dotted path, that a purpose needs."""
    library = importlib.import_module(name.split(".")[0])
    return ImportError(
        f"{purpose} needs `{name}`, a private name that the installed {library.__name__} {library.__version__} does "
        f"not have. Install an older version of {library.__name__}, or a newer one of kerasfactory."
    )


def after_fork(function):
    """Has the function called in each process that is forked from this one. Windows has none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def forked(library):
    """What to tell a process that was forked when the library had started."""
    return (
        f"This process was forked when {library} had started, whose threads only its parent has: anything that "
        f"{library} computes here would wait for ever, `model.predict` too. Start processes with "
        '`multiprocessing.get_context("spawn")`, and load the model in them.'
    )


def stateless_predict_step(model, state, data):
    """`model.predict_step(data)` on the values in `state`. TensorFlow and PyTorch would write into the variables."""
    variables = model.trainable_variables + model.non_trainable_variables
    with keras.StatelessScope(zip(variables, [*state[0], *state[1]], strict=True)) as scope:
        outputs = model.predict_step(data)
    return outputs, (state[0], [scope.get_current_value(variable) for variable in model.non_trainable_variables])
