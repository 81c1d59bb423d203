"""One grammar for all public functions: what may be positional, which words there are, and their order."""

import inspect

import pytest

from kerasfactory import plot

# Each keyword, in the order in which signatures list them: what, names, how, running.
ORDER = [
    *("ax", "method", "methods", "target", "query", "layers", "weights", "models", "loss"),
    *("feature_names", "feature_mask"),
    *("removal", "mask_value", "background", "groups", "fractions"),
    *("samples", "columns", "top_k", "map_size", "rows", "vmax"),
    *("draws", "steps", "tolerance", "margin", "level"),
    *("every", "log_dir", "batch_size", "verbose", "store", "seed"),
]

# How many arguments of a function may be positional.
MOST_POSITIONAL = {plot: 1}

# These words have been replaced: by `top_k`, by `level`, and by American spelling.
OLD_WORDS = {"top", "n_top", "confidence", "colour"}

FUNCTIONS = {
    f"{module.__name__.partition('.')[2]}.{name}": (getattr(module, name), most)
    for module, most in MOST_POSITIONAL.items()
    for name in module.__all__
}


def names_of(function, *kinds):
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_what_the_function_is_about_may_be_positional(function):
    function, most = FUNCTIONS[function]
    positional = names_of(function, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert 1 <= len(positional) <= most
    assert not names_of(function, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_keywords_are_known_and_in_one_order(function):
    keywords = names_of(FUNCTIONS[function][0], inspect.Parameter.KEYWORD_ONLY)
    assert set(keywords) <= set(ORDER)
    assert keywords == sorted(keywords, key=ORDER.index)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_parameter_has_an_old_name(function):
    assert not OLD_WORDS & set(inspect.signature(FUNCTIONS[function][0]).parameters)


@pytest.mark.parametrize("name", plot.__all__)
def test_what_returns_one_axes_draws_on_the_axes_it_is_given(name):
    signature = inspect.signature(getattr(plot, name))
    returns_axes = getattr(signature.return_annotation, "__name__", signature.return_annotation) == "Axes"
    assert ("ax" in signature.parameters) == returns_axes
    if returns_axes:
        assert signature.parameters["ax"].default is None
