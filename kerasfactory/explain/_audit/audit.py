"""An audit of a model's attention: claims, each with its verdict and evidence, in a file that can be checked."""

import importlib
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import scipy
import xarray as xr
from keras import ops, tree

import kerasfactory
from kerasfactory import _backend
from kerasfactory._arguments import (
    checked_level,
    checked_names,
    checked_seed,
    generator,
    hint_at_codes,
    positive_integer,
)
from kerasfactory._text import visible
from kerasfactory.explain._attribution import attribute
from kerasfactory.explain._audit.claims import TESTS, Subject, bounds, exact_capture, judge, keys_of, measured_skill
from kerasfactory.explain._audit.file import (
    ABSOLUTE,
    differences,
    files_of,
    hash_of_json,
    hashed,
    intact,
    is_audit,
    plain,
    save,
)
from kerasfactory.explain._audit.report import Audit
from kerasfactory.explain._audit.schema import CALIBRATION, SCHEMA, SETTINGS, STATEMENT, problem
from kerasfactory.explain._calibrate import calibration_record
from kerasfactory.explain._engine.data import (
    PartOfBar,
    check_no_texts,
    input_arrays,
    like_samples_of,
    named_inputs,
    progress_bar,
    samples_in,
    shape_of,
)
from kerasfactory.explain._engine.features import sizes_of
from kerasfactory.explain._engine.labels import given_labels
from kerasfactory.explain._engine.observe import rounding_of
from kerasfactory.explain._engine.outputs import checked_task
from kerasfactory.explain._engine.statistics import clusters_of, mean_interval
from kerasfactory.explain._engine.store import digest_of
from kerasfactory.explain._engine.tables import check_aligned, check_table, in_arrays
from kerasfactory.explain._engine.texts import Words, differ_by_sample
from kerasfactory.explain._engine.view import ids_of

_DRAWS, _MOST_DRAWS = 200, 100_000
_PARTS = {"controls": 5, "faithfulness": 40, "randomization": 5, "seeds": 5, "features": 40}  # % of the time, about
_RUN = 100  # samples that are drawn together
_LONGEST_FINDING = 4000  # characters: it may hold what a forger wrote


def audit(
    model: keras.Model,
    x: Any,
    y: Any = None,
    path: str | os.PathLike[str] | None = None,
    *,
    method: str = "attention",
    task: str | None = None,
    target: int | str | tuple[int | str, ...] | None = None,
    query: int | str | None = None,
    layers: str | Sequence[str] | None = None,
    models: Sequence[keras.Model] = (),
    calibration: xr.Dataset | None = None,
    feature_names: Sequence[str] | Sequence[Sequence[str]] | np.ndarray | Callable[[int], str] | None = None,
    feature_mask: Any = None,
    special_tokens: Sequence[int | str] | None = None,
    background: Any = None,
    groups: Any = None,
    block: int | None = None,
    max_samples: int = 20_000,
    tolerance: float = 0.02,
    level: float = 0.05,
    statement: dict[str, str] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    seed: int = 0,
) -> Audit:
    r"""Tests claims about a model's attention, and returns their verdicts in a form that others can check.

    **The first assumption is yours: the model was not trained on `x`.** On rows that it was trained on, everything that
    it has learned by heart seems to matter, and no verdict below holds. The file cannot show whether the rows are new
    to the model. A skill near 1 raises the suspicion that they are not, and the page says so.

    The result gives the claims as a table and as a page. Each claim has a verdict, `supported`, `refuted` or
    `undetermined`, and the numbers behind it. With `path`, two files are written: the page, which opens in any browser
    without a network, and a JSON file with the same data. They also say what the model is, and on which data and with
    which versions it was audited. These are the claims:

    - **The capture is exact** (`capture`): the `recomposition_error` of each layer, and the outputs with and without
      observation, differ by rounding.
    - **Its attention changes its output** (`attention-uniform`, `attention-permuted`): in more than 2% of the rows the
      output changes by more than `tolerance` times its spread if all keys get the same weight, and if the weights are
      assigned to the keys at random, as in `attention_controls`.
    - **It does worse without its attention** (`attention-loss`): the loss is larger if all keys get the same weight.
    - **The ranking is faithful** (`ranking-comprehensiveness`, `ranking-sufficiency`): the two tests of `faithfulness`,
      against the same ranking with the features in view of each sample relabeled at random.
    - **The attribution is in the weights** (`randomization`): at most half of it is left when the weights of the
      attention layers are shuffled, as in `parameter_randomization`.
    - **Other seeds agree** (`seeds`): the models in `models`, trained in the same way from other seeds, rank the same
      features first, more than by chance, as in `seed_agreement`.
    - **Each feature** (`feature/NAME`) whose attribution is above the mean tells the model what the other features do
      not, as in `feature_claims`. A feature that the model needs and that the attribution does not put above the mean
      is `needed, not claimed`. Columns that determine each other are also tested together (`feature/A + B`). This needs
      `y`, a compiled loss and samples of at most 256 numbers, or a table. Nothing is claimed about positions of texts,
      because a position holds another word in each text. If a model reads a text and other inputs, its features are
      undetermined.

    With `y` and a loss, the audit also states the model's **skill**, 1 minus its loss divided by that of the best
    constant. A model without skill cannot get worse without a feature, so nothing is refuted about its features.

    All p-values but the first claim's are adjusted together, by Focused Benjamini–Hochberg (Katsevich, Sabatti &
    Bogomolov 2023, [*Filtering the Rejection Set*](https://doi.org/10.1080/01621459.2021.1920958)): with \(m\), the
    number of all tests, and in focus the features that are claimed,

    $$
    \tilde p_j = \min_{t \ge p_j} \frac{m \, t}{\#\{i \text{ in focus}: p_i \le t\}} .
    $$

    A claim is supported only if its adjusted p-value is at most `level`. It is refuted if the data speak against it,
    and that p-value is adjusted in the same way. The data speak against a claim if an effect, a share of rows or what
    is left lies below the tolerance or the margin, or if a ranking does worse than a share \(1 - \text{level}\) of
    those that know nothing. A claim is undetermined if the data leave it open or if it cannot be tested, and the reason
    is given. With fewer samples than claims, no test is made.

    **The verdicts also assume** that samples are independent, or that `groups` or `block` says which are not. They
    assume that the values that are drawn for a feature fit the other values of the sample, which a classifier tries to
    disprove. And a ranking is tested by removal, so the model gets inputs that it may never have seen. The page says
    all this beside the verdicts.

    The same call writes the same files. They contain only what is computed and what you state (`statement`): no time,
    host or path, and not the data. Weights, configuration, data and labels are there as SHA-256. A checksum shows
    damage. `verify` computes everything again, so it finds a forged number even if its checksum is right. Only a
    signature says who made the file: see [Sign an audit][signed-audits].

    Args:
        model: A `keras.Model`, as for `capture`, with one output of shape (sample,) or (sample, output).
        x: Held-out data, an array of finite numbers with the features along axis 1: (sample, feature), (sample,
            position, channel) or token ids, (sample, position). Or a DataFrame, whose columns name the features. With
            `feature_mask`, arrays of any shape, or a dictionary or list of them for a model with several inputs.
        y: Labels, one for each sample, in the form that the model's loss takes. Without them, and without a loss of
            single samples to compute, claims about single features are undetermined.
        path: The page to write, `*.html`. The data go beside it, `*.json`. An earlier audit is overwritten; other files
            are not. Without it, nothing is written.
        method: The method of the attribution, as for `attribute`.
        task: What the outputs mean: `"classification"`, `"multilabel"` or `"regression"`. The compiled loss says so if
            it is one of Keras and this is not given. Nothing is guessed from values.
        target: Which of several outputs is meant, as for `attribute` and `faithfulness`.
        query: The position or name of one query, as for `attribute`: that of a class token, if the model reads its
            answer from it.
        layers: Names of the layers, as for `capture`.
        models: The same model trained from other seeds, two or more if possible. Without them the claim about other
            seeds is undetermined.
        calibration: What `calibrate` returned for models like this one: how often verdicts on features are wrong. The
            page shows it. `verify` compares it with the one that you pass, and does not compute it again.
        feature_names: Names of the features, as for `capture`. Words of texts are data, so the file holds none: only
            those in `special_tokens` are used, as ids.
        feature_mask: Which feature each entry of a sample belongs to, as for `faithfulness`: what is removed and
            claimed together. The features are the keys of the attention, in their order, without `special_tokens`, or
            groups of the columns of a table.
        special_tokens: Token ids, names or words of what is no feature, as for `attribute`. Tokens that
            the model adds itself, such as a class token, have no claim.
        background: Samples like `x` to draw values of removed features from; `x` itself if not given.
        groups: Labels of the samples, (sample,), such as the patients that they are from: samples of one group depend
            on each other. The file holds a hash of them.
        block: The length of runs of a series, in samples, that depend on each other. Not with `groups`.
        max_samples: How many samples the claims are tested on, at most. If there are more, some are drawn: whole groups
            or blocks that fit, or else runs of 100 samples, which still show if neighbors depend on each other. The
            attribution, the exactness of the capture and the skill are those of all samples.
        tolerance: The largest change of the output that counts as none, relative to its spread, and the largest
            increase of the loss without attention, relative to the loss. Above 0.
        level: The error level of all tests, between 0 and 0.5. Intervals cover 1 - `level`. A test makes
            (number of claims ÷ `level`) draws. If that is more than 100,000, `level` is refused.
        statement: What you state and no computation can check, such as who made the audit and when, what the model is
            for, and its version: a dictionary of texts, which the page shows as yours. 50 entries at most.
        batch_size: Samples in a batch, as for `capture`.
        verbose: 0 for silence, 1 for a progress bar with the time left, 2 for one line; `"auto"` as for
            `capture`.
        seed: The seed of all that is drawn.

    Returns:
        Audit: The tables `claims` and `features`, the `path` of the page, and the page itself in a notebook. The JSON
            file has the keys `schema`, `settings`, `model`, `data`, `environment`, `capture`, `attribution`,
            `skill`, `controls`, `faithfulness`, `randomization`, `seeds`, `features`, `claims`, `calibration`,
            `statement` and `checksum`. Each claim has `id`, `claim` (a sentence), `feature` (or null), `verdict`,
            `statistic` (`name`, `value`), `p_value`, `p_opposite` (that the claim is false), `p_adjusted`, `is_made`
            (false for a feature that is not ranked high), `interval` (two bounds) and `reason`. What was not tested is
            null.

    Raises:
        ValueError: If `x`, `y` or `background` hold NaN or no numbers or do not fit each other; if `path` does not end
            in `.html`, or another argument is out of range; if the page would be larger than
            32 MiB; if two of `model` and `models` are copies; and as `attribute`, `faithfulness` and
            `recomposition_error`.
        FileExistsError: If one of the files exists and is not an audit.
        FileNotFoundError: If their folder does not exist.

    Warns:
        UserWarning: As `capture`.

    Example:
        ```python
        import tempfile
        from pathlib import Path

        import keras
        import numpy as np

        from kerasfactory import explain
        from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

        inputs = keras.Input((3,))
        tokens = FeatureTokenizer(8, feature_names=["age", "pulse", "weight"])(inputs)
        attended = InterpretableMultiHeadAttention(4, 2, name="attention")(tokens)
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(attended)))

        x = np.random.default_rng(0).normal(size=(60, 3))
        path = Path(tempfile.mkdtemp()) / "audit.html"
        report = explain.audit(model, x, path=path, verbose=0)

        print(report.claims.loc["capture", "verdict"])
        #> supported
        print(report.features.index.tolist())
        #> ['age', 'pulse', 'weight']
        print(explain.verify(report, model, x, verbose=0))
        #> []
        ```
    """
    files = None if path is None else _writable(path)
    checked_level(level)
    if differ_by_sample(feature_names):  # the file holds no data, and names positions by their numbers
        words, feature_names = Words(x, feature_names), None
        special_tokens = None if special_tokens is None else ids_of(special_tokens, x, words)
    settings = {
        "method": method,
        "task": checked_task(task),
        "target": target,
        "query": query,
        "layers": [layers] if isinstance(layers, str) else layers and list(layers),
        "feature_names": None if feature_names is None else checked_names(feature_names),
        "feature_mask": None if feature_mask is None else _as_lists(feature_mask),
        "special_tokens": None if special_tokens is None else list(special_tokens),
        "block": None if block is None else positive_integer("block", block),
        "max_samples": positive_integer("max_samples", max_samples),
        "tolerance": float(tolerance),
        "level": float(level),
        "batch_size": None if batch_size is None else positive_integer("batch_size", batch_size),
        "seed": checked_seed(seed),
    }
    settings = _checked_settings(settings)
    given = _given(calibration, statement)
    record = plain(_record(model, x, y, background, groups, models, settings, batch_size, verbose)) | given
    judge(record["claims"], level)
    if files is None:
        return Audit(record)
    save(record, *files)
    return Audit(record, files[0])


def verify(
    path: str | os.PathLike[str],
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    models: Sequence[keras.Model] = (),
    calibration: xr.Dataset | None = None,
    background: Any = None,
    groups: Any = None,
    statement: dict[str, str] | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
) -> list[str]:
    """Computes an audit again, and returns a list of what no longer holds or was not checked.

    One file alone, the page or the JSON, is enough. If both are there, both are checked, and must agree.

    1. **The file.** Its data must be what an audit may hold, and have the checksum with which they were written. The
       page is rendered again from them, and must be the same, byte for byte. If it is not, `verify` says so, and
       computes nothing.
    2. **What it says.** The audit is made again, for this model and these data, with the settings that the file names.
       Hashes, names, verdicts and sentences must be the same. Numbers may differ by 0.001 of their value, or by 1e-5
       if that is more (by 0.02 in half precision), and p-values by 0.02, small ones by less: by 0.002 and half of the
       larger. Other processors and backends round otherwise, and may differ by more.
    3. **What cannot be checked** is in the list, too: labels, models, a calibration or a statement that the audit was
       made with and that you do not pass, and other versions of Python, Keras, the backend or a library.

    `verify` cannot see who made the file. The file that `audit` writes for this model and these data with other
    settings is an audit as well, and so is one in which numbers were changed by less than rounding may change them.
    Only a signature tells such files from yours: see [Sign an audit][signed-audits].

    Args:
        path: What `audit` returned, or the path of its page or of its JSON file. The other is looked for beside it.
        model: The model that should be the audited one.
        x: The data that should be those of the audit, as for `audit`.
        y: The labels, if the audit was made with labels. Without them the claims about single features and about the
            loss are not checked.
        models: The models from other seeds, if the audit was made with such. Without them the claim about other seeds
            is not checked.
        calibration: What `calibrate` returned, if the audit was made with it.
        background: The background data, if the audit was made with such. Without them nothing is compared.
        groups: The labels of what belongs together, if the audit was made with such. Without them nothing is compared.
        statement: What the author states, if the audit has a statement: the same texts, in the same order.
        batch_size: Samples in a batch; as in the audit, if not given. A different one is not a finding, because what is
            drawn at random does not depend on it.
        verbose: As for `audit`.

    Returns:
        list[str]: A sentence for each thing that does not hold or was not checked: a changed, damaged or forged file,
            other weights, another configuration, other data, labels or models, other verdicts, other numbers, other
            versions, and what was not given. Empty if all holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an audit at all, or an audit that was not written; if `x`, `y` or `background` are not
            as for `audit`; if `calibration` or `statement` are not.

    Example:
        ```python
        import tempfile
        from pathlib import Path

        import keras
        import numpy as np

        from kerasfactory import explain

        inputs = keras.Input((4, 8))
        attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
        attended = attention(inputs, inputs)
        pooled = keras.layers.GlobalAveragePooling1D()(attended)
        model = keras.Model(inputs, keras.layers.Dense(1)(pooled))

        x = np.random.default_rng(0).normal(size=(60, 4, 8))
        path = Path(tempfile.mkdtemp()) / "audit.html"
        report = explain.audit(model, x, path=path, verbose=0)

        x[3, 0, 0] = 0
        print(explain.verify(report, model, x, verbose=0)[0])
        #> The data are not those of the audit.
        ```
    """
    given = _given(calibration, statement)
    columns = given_labels(x, None).columns
    check_aligned(x=x, y=y, groups=groups)
    x, y, background = _checked(x, y, background)
    record, findings = intact(files_of(path), Path(path))
    if not findings:
        named = record["data"]["feature_names"]
        if columns and len(columns) == len(named) and columns != named:
            findings = ["The columns of `x` have other names, or another order, than the features of the audit."]
        findings += _compared(record, model, x, y, background, groups, models, given, batch_size, verbose)
    return [visible(finding[:_LONGEST_FINDING]) for finding in findings]


def _compared(
    record: dict[str, Any],
    model: Any,
    x: Any,
    y: np.ndarray | None,
    background: Any,
    groups: Any,
    models: Any,
    given: dict[str, Any],
    batch_size: int | None,
    verbose: Any,
) -> list[str]:
    """What is made again differs in, and what was not made again."""
    data, settings = record["data"], record["settings"]
    shape, before = (_of_sample(of) for of in (plain(shape_of(x)), data["shape"]))
    if shape != before:
        return [
            f"The data are not those of the audit: a sample has shape {shape}, and had {before}. Nothing else was "
            "checked."
        ]
    needed = {"background": background, "groups": groups}
    if missing := [name for name, value in needed.items() if data[name] and value is None]:
        return [f"The audit was made with {name}: give them, `{name}=...`. Nothing was compared." for name in missing]
    batch_size = settings["batch_size"] if batch_size is None else batch_size
    try:
        now = plain(_record(model, x, y, background, groups, models, settings, batch_size, verbose))
    except ValueError as error:
        return [f"The audit cannot be made again with its settings, for this model and these data: {error}"]

    findings, unchecked = _of_versions(record["environment"], now.pop("environment")), set()
    if data["labels"] and y is None:
        now["data"]["labels"] = data["labels"]
        now |= {section: record[section] for section in ("features", "skill")}
        if now["controls"] and record["controls"]:
            now["controls"]["loss"] = record["controls"]["loss"]
        unchecked |= {"attention-loss"} | {claim["id"] for claim in record["claims"] if claim["feature"] is not None}
        findings.append("Without labels, `y`, the claims about the loss and about single features were not checked.")
    if record["seeds"] and not models:
        now["seeds"] = record["seeds"]
        unchecked |= {"seeds"}
        findings.append("Without `models`, the claim about models from other seeds was not checked.")
    for name, value in given.items():
        now[name] = record[name] if value is None else value
        if record[name] and value is None:
            findings.append(f"The audit has a {name}, which was not checked: give it, `{name}=...`.")
    now["claims"] = _with_unchecked(now["claims"], record["claims"], unchecked)
    judge(now["claims"], settings["level"])
    return differences(record, now, max(ABSOLUTE, rounding_of(model))) + findings


def _of_sample(shape: Any) -> Any:
    return {name: of_input[1:] for name, of_input in shape.items()} if isinstance(shape, dict) else shape[1:]


def _as_lists(feature_mask: Any) -> Any:
    if isinstance(feature_mask, dict):
        return {str(key): np.asarray(mask).tolist() for key, mask in feature_mask.items()}
    is_list = isinstance(feature_mask, list | tuple)
    return [np.asarray(mask).tolist() for mask in feature_mask] if is_list else np.asarray(feature_mask).tolist()


def _checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as `verify` reads them, which takes no others."""
    for name, value in settings.items():
        try:
            wrong = problem(plain(value), SETTINGS[name], f"`{name}`")
        except (TypeError, ValueError):
            wrong = f"`{name}` must be numbers or texts, and lists of them"
        if wrong:
            raise ValueError(f"{wrong}. Received: {name}={value!r}")
    return plain(settings)


def _with_unchecked(
    claims: list[dict[str, Any]], before: list[dict[str, Any]], unchecked: set[str]
) -> list[dict[str, Any]]:
    """The claims, those that were not checked as they were before: all of them are judged together."""
    kept = [dict(claim) for claim in before if claim["id"] in unchecked]
    claims = [claim for claim in claims if claim["id"] not in unchecked] + kept
    if not unchecked:
        return claims
    order = {claim["id"]: number for number, claim in enumerate(before)}
    return sorted(claims, key=lambda claim: order.get(claim["id"], len(order)))


def _of_versions(before: dict[str, str], now: dict[str, str]) -> list[str]:
    changed = [name for name in now if before[name] != now[name]]
    if not changed:
        return []
    installed, recorded = (", ".join(f"{name} {found[name]}" for name in changed) for found in (now, before))
    return [
        f"This page cannot be checked with {installed}: the audit was made with {recorded}. The other findings were "
        "computed with the installed versions."
    ]


def _given(calibration: Any, statement: Any) -> dict[str, Any]:
    """What an audit shows and does not compute, as JSON."""
    found = None
    if calibration is not None:
        found = plain(calibration_record(calibration))
        found = {key: found[key] for key in CALIBRATION if key in found} | found  # attributes have no order
        if wrong := problem(found, CALIBRATION, "Its record"):
            raise ValueError(f"`calibration` must be what `explain.calibrate` returned. {wrong}.")
    if statement is not None and not STATEMENT.fits(statement):
        raise ValueError(
            f"`statement` must be {STATEMENT.said}, such as {{'author': 'Jo Smith', 'date': '2026-05-04'}}. Received: "
            f"statement={statement!r}"
        )
    return {"calibration": found, "statement": plain(statement)}


def _writable(path: Any) -> tuple[Path, Path]:
    """The page and the data beside it, where nothing else is overwritten."""
    if Path(path).suffix != ".html":
        raise ValueError(f"`path` must end in .html; the JSON file goes beside it. Received: path={str(path)!r}")
    files = files_of(path)
    for file in files:
        if file.exists() and not is_audit(file):
            raise FileExistsError(f"{file} exists and is not an audit: it is not overwritten. Choose another `path`.")
    if not files[0].parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(files[0].parent)!r} to write the audit into.")
    return files


def _record(
    model: Any,
    x: Any,
    y: Any,
    background: Any,
    groups: Any,
    models: Any,
    settings: dict[str, Any],
    batch_size: int | None,
    verbose: Any,
) -> dict[str, Any]:
    """What an audit says, as JSON; its claims are still to be judged together."""
    check_table(model, x, background)
    check_aligned(x=x, y=y, groups=groups)
    table, (x, y, background) = x, _checked(x, y, background)
    clusters = clusters_of(samples_in(x), groups, settings["block"])
    tested = _tested(clusters, groups is None and settings["block"] is None, settings)
    settings = settings | {"target": tuple(settings["target"])} if isinstance(settings["target"], list) else settings
    digests = _checked_models(model, models)
    progress = progress_bar(100, verbose, "%")
    names = ("method", "task", "target", "query", "layers", "feature_names", "special_tokens", "seed")
    chosen = {name: settings[name] for name in names}
    labeled = table if isinstance(table, pd.DataFrame) else x
    attribution = attribute(model, labeled, batch_size=batch_size, verbose=0, **chosen)
    if labeled is table and "feature" in attribution.coords:  # so that an array is enough to verify it
        settings = settings | {"feature_names": [str(name) for name in attribution["feature"].values]}
    keys = keys_of(attribution, x, settings["feature_mask"])
    # Before anything that takes long: labels may not fit.
    skill, no_loss = measured_skill(model, x, y, clusters, settings, batch_size)
    rows = (model, x, y, background, groups, models, digests, attribution, keys, settings, batch_size)
    planned = Subject(*rows, draws=_DRAWS, unusable_loss=no_loss, untestable="not tested")
    captured, claims = exact_capture(planned)

    count = sum(len(test(planned)[1]) for test in TESTS.values())
    independent = len(np.unique(clusters[tested]))
    few = (
        ""
        if independent >= count
        else f"{independent} {_what_counts(groups, settings)} are fewer than the {count} claims."
    )
    subject = planned._replace(draws=_DRAWS if few else _draws_for(count, settings["level"]), untestable=few)
    of_tests = subject.of(tested, clusters) if len(tested) < samples_in(x) else subject
    measured, reached = {}, 100 - sum(_PARTS.values())
    for name, test in TESTS.items():
        progress.update(reached)
        part = PartOfBar(progress, reached, reached + _PARTS[name])
        measured[name], found = test(of_tests._replace(verbose=part))
        claims += found
        reached += _PARTS[name]
    progress.update(100)
    return {
        "schema": SCHEMA,
        "settings": settings,
        "model": _model_facts(model),
        "data": {
            "x": hashed(x),
            "shape": shape_of(x),
            "dtype": ", ".join(str(array.dtype) for array in named_inputs(x).values()),
            "feature_names": subject.features,
            "labels": None if y is None else hashed(y),
            "background": None if background is None else hashed(background),
            "groups": None if groups is None else hashed(clusters),
            "tested": len(tested),
        },
        "environment": _environment(),
        "capture": captured,
        "attribution": _attribution_facts(subject, clusters),
        "skill": skill,
        **measured,
        "claims": claims,
    }


def _tested(clusters: np.ndarray, are_single: bool, settings: dict[str, Any]) -> np.ndarray:
    """The numbers of the samples that claims are tested on: all, or those of some clusters, or runs, that fit."""
    most = settings["max_samples"]
    if len(clusters) <= most:
        return np.arange(len(clusters))
    together = np.arange(len(clusters)) // min(_RUN, most) if are_single else clusters
    sizes, kept, total = np.bincount(together), list[int](), 0
    for drawn in generator(settings["seed"], "audit samples").permutation(len(sizes)):
        if total + sizes[drawn] <= most:
            kept.append(drawn)
            total += sizes[drawn]
    if not kept:
        raise ValueError(
            f"`max_samples` must be at least the size of the smallest group or block, {sizes.min()}, which stays "
            f"together. Received: max_samples={most}"
        )
    return np.flatnonzero(np.isin(together, kept))


def _draws_for(count: int, level: float) -> int:
    """So many that one claim alone can be significant after the adjustment."""
    if count / level > _MOST_DRAWS:
        raise ValueError(
            f"`level` must be at least {count / _MOST_DRAWS:.2g} for {count} claims: a test draws {count} / `level` "
            f"times, and {_MOST_DRAWS:,} times at most. Received: level={level!r}. Give a larger one, or fewer "
            "features, with `feature_mask`."
        )
    return max(_DRAWS, math.ceil(count / level))


def _what_counts(groups: Any, settings: dict[str, Any]) -> str:
    return "samples" if groups is None and settings["block"] is None else "groups of samples"


def _checked(x: Any, y: Any, background: Any) -> tuple[Any, np.ndarray | None, Any]:
    x = _inputs("x", x)
    if background is not None:
        background = like_samples_of(x, "background", _inputs("background", background))
    if y is not None:
        y = _array("y", y)
        if len(y) != samples_in(x):
            raise ValueError(f"`y` must hold one label for each sample in `x`, {samples_in(x)}. Received: {len(y)}")
    return x, y, background


def _checked_models(model: Any, models: Any) -> list[str]:
    """The hashes of the weights of models from other seeds."""
    is_list = isinstance(models, list | tuple)
    if not is_list or not all(isinstance(other, keras.Model) for other in models):
        raise ValueError(
            "`models` must be a list of `keras.Model`, the same model trained from other seeds. Received: "
            f"models={models!r}"
        )
    digests = [digest_of(weight.value for weight in other.weights) for other in (model, *models)]
    if len(set(digests)) < len(digests):
        raise ValueError(
            "Some of `model` and `models` have the same weights, and a copy would agree with itself. Leave copies out, "
            "and train each model from its own seed, `keras.utils.set_random_seed`."
        )
    return digests[1:]


def _inputs(name: str, given: Any) -> Any:
    """One array with the features along axis 1, or a dictionary or list of arrays."""
    if isinstance(given, dict | list | tuple):
        return tree.map_structure(lambda array: _finite(name, array), input_arrays(name, given))
    array = _array(name, given)
    if array.ndim < 2:
        raise ValueError(f"`{name}` must have its features along axis 1. Received an array of shape {array.shape}")
    return array


def _array(name: str, given: Any) -> np.ndarray:
    if name != "y":
        check_no_texts(name, given)
    if not hasattr(given, "__array__") and not (name == "y" and isinstance(given, list | tuple)):
        raise ValueError(
            f"`{name}` must be an array with the samples along axis 0. Received: {name} of type {type(given).__name__}"
        )
    array = _backend.as_numpy(given) if ops.is_tensor(given) else np.asarray(in_arrays(given))
    if array.ndim == 0 or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must hold numbers, and at least one sample.{hint_at_codes(array)} Received an array of shape "
            f"{array.shape} and dtype {array.dtype}"
        )
    return _finite(name, array)


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`{name}` must hold finite numbers: {len(bad)} of {len(array)} samples have NaN or infinite values, and "
            f"the first such sample is number {bad[0]}. Fill them as in the training data, or leave these samples out."
        )
    return array


def _attribution_facts(subject: Subject, clusters: np.ndarray) -> dict[str, Any]:
    values = sizes_of(subject.attribution.values[:, subject.keys.kept]).T.astype("float64")
    rng = generator(subject.settings["seed"], "audit")
    intervals, _ = mean_interval(values, clusters, subject.settings["level"], rng)
    return {
        **{key: subject.attribution.attrs[key] for key in ("method", "query", "target")},
        "features": [
            {
                "feature": feature,
                "attribution": float(of_feature.mean()),
                "interval": bounds(interval),
            }
            for feature, of_feature, interval in zip(subject.features, values, intervals, strict=True)
        ],
    }


def _model_facts(model: Any) -> dict[str, Any]:
    try:
        config = json.loads(model.to_json())
        config.pop("compile_config", None)  # how it was trained, which a model may be saved without
        configuration = hash_of_json(config)
    except (NotImplementedError, TypeError):
        configuration = None  # of a subclass that does not say
    return {
        "name": model.name,
        "class": type(model).__name__,
        "parameters": model.count_params(),
        "weights": digest_of(weight.value for weight in model.weights),
        "configuration": configuration,
    }


def _environment() -> dict[str, str]:
    backend = keras.config.backend()
    return {
        "kerasfactory": kerasfactory.__version__,
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": f"{backend} {importlib.import_module(backend).__version__}",
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "xarray": xr.__version__,
    }
