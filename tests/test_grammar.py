"""One grammar for all public functions: what may be positional, which words there are, and their order."""

import inspect
import typing

import pytest
from matplotlib.axes import Axes

from kerasfactory import explain, plot

# Each keyword, in the order in which signatures list them: what, names, how, running.
ORDER = [
    *(
        "ax",
        "y",
        "method",
        "methods",
        "task",
        "target",
        "query",
        "layers",
        "parameters",
        "models",
        "calibration",
        "loss",
    ),
    *("feature_names", "feature_mask", "words", "special_tokens"),
    *("removal", "mask_value", "background", "groups", "block", "max_samples", "fractions"),
    *("samples", "columns", "top_k", "map_size", "rows", "vmax"),
    *("n", "draws", "steps", "strength", "tolerance", "margin", "level"),
    *("statement", "every", "log_dir", "batch_size", "verbose", "store", "seed"),
]

# What functions are about: only this may be positional, in this order.
SUBJECTS = {
    plot: ["scores", "attribution", "images", "history", "statistics", "result"],
    explain: [
        *("layer_class", "adapter", "path", "train", "model", "x", "y"),
        *("attribution", "attributions", "weights", "record", "path"),
        *("height", "width", "size"),
    ],
}

# These words have been replaced: by `top_k`, by `level`, and by American spelling.
OLD_WORDS = {"top", "n_top", "confidence", "colour"}

FUNCTIONS = {
    f"{module.__name__.partition('.')[2]}.{name}": (getattr(module, name), subjects)
    for module, subjects in SUBJECTS.items()
    for name in module.__all__
}


def names_of(function, *kinds):
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_what_the_function_is_about_may_be_positional(function):
    function, subjects = FUNCTIONS[function]
    positional = names_of(function, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert positional
    remaining = iter(subjects)
    assert all(name in remaining for name in positional), f"{positional} are not of {subjects}, in this order"
    assert not names_of(function, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name.startswith("explain.")])
def test_what_runs_a_model_takes_a_batch_size_and_shows_its_progress(function):
    parameters = inspect.signature(FUNCTIONS[function][0]).parameters
    if "model" in parameters:
        assert parameters["batch_size"].default is None
        assert parameters["verbose"].default == "auto"


def test_a_word_has_one_default_wherever_it_is_optional():
    for word, default in {"level": 0.05, "seed": 0, "verbose": "auto", "batch_size": None, "layers": None}.items():
        signatures = [inspect.signature(function).parameters for function, _ in FUNCTIONS.values()]
        assert {parameters[word].default for parameters in signatures if word in parameters} == {default}


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
    returned = typing.get_args(signature.return_annotation) or [signature.return_annotation]  # some also return HTML
    returns_axes = Axes in returned
    assert ("ax" in signature.parameters) == returns_axes
    if returns_axes:
        assert signature.parameters["ax"].default is None
