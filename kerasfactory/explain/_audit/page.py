"""An audit as a page: one HTML file that needs nothing else, for people, with the data in it, for programs."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kerasfactory._text import as_html
from kerasfactory.explain._audit.schema import SCHEMA

_BEFORE_DATA, _AFTER_DATA = '<script type="application/json" id="audit">', "</script>"

_TOO_GOOD = 0.98  # a skill above it is suspicious
_NEEDED = "needed, not claimed"
_NOT_TESTED = "<p>Not tested: see the claims.</p>\n"
_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --faint: #595959; --line: #d4d4d4; --bar: #5b88c4;
  --supported: #0b5d2a; --refuted: #a01414; --undetermined: #6a4a00; --needed: #1d4f8f }
@media (prefers-color-scheme: dark) { :root { --text: #ececec; --page: #151515; --faint: #b0b0b0; --line: #444444;
  --bar: #6f9fe0; --supported: #7fd79c; --refuted: #ff9a9a; --undetermined: #e6c463; --needed: #9cc4f5 } }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; box-sizing: border-box }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere }
figure { margin: 1rem 0 }
figcaption, .note { color: var(--faint) }
figcaption { margin-top: .4rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line) }
td { font-variant-numeric: tabular-nums }
td.long { min-width: 8rem }
td.drawn { min-width: 5rem; width: 22% }
small { color: var(--faint) }
td.value { width: 75%; overflow-wrap: anywhere; font-family: ui-monospace, monospace }
svg { display: block; width: 100%; height: 1.5rem }
svg.tall { height: 8rem }
rect { fill: var(--bar) }
line { stroke: var(--text); stroke-width: 2; vector-effect: non-scaling-stroke }
line.zero { stroke: var(--line); stroke-width: 1 }
.supported, .refuted, .undetermined, .needed { font-weight: 700 }
.supported { color: var(--supported) } .refuted { color: var(--refuted) } .undetermined { color: var(--undetermined) }
.needed { color: var(--needed) }
/* On a phone a row of many cells is a block, and each of its cells a line with its heading. */
@media (max-width: 40rem) {
  .wide, .wide tbody, .wide tr { display: block }
  .wide thead { display: none }
  .wide tr { padding: .6rem 0; border-bottom: 1px solid var(--line) }
  .wide td { display: flow-root; width: auto; padding: 0 0 0 8rem; border: 0 }
  .wide td::before { float: left; width: 7.5rem; margin-left: -8rem; color: var(--faint); content: attr(data-head) }
  .wide td:first-child { padding-left: 0; font-weight: 600; overflow-wrap: anywhere }
  .wide small { font-weight: 400 }
  .wide td:first-child::before, .wide td.drawn::before { content: none }
}
"""


def page(record: dict[str, Any]) -> str:
    """The audit as HTML, without its data: the same for the same record."""
    title = as_html(f"Audit of {record['model']['name']}")
    sections = (
        _claims,
        _features,
        _controls,
        _faithfulness,
        _randomization,
        _seeds,
        _calibration,
        _capture,
        _statement,
        _model,
        _data,
        _environment,
        _settings,
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="generator" content="{SCHEMA}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{"".join(section(record) for section in sections)}</main>
{_BEFORE_DATA}{_AFTER_DATA}
</body>
</html>
"""


def verdict_counts(record: dict[str, Any]) -> str:
    verdicts = [claim["verdict"] for claim in record["claims"]]
    counted = ["supported", "refuted", "undetermined", *([_NEEDED] if _NEEDED in verdicts else [])]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in counted)


def with_data(page: str, text: str) -> str:
    """The page with the data, JSON in which no tag can begin, in it."""
    before, tag, after = page.rpartition(_BEFORE_DATA)
    return before + tag + text.replace("<", "\\u003c") + after


def data_of(text: str) -> str:
    """The data in a page, or what stands in their place: whoever reads them renders the page again and compares it."""
    return text.rpartition(_BEFORE_DATA)[2].partition(_AFTER_DATA)[0]


def _section(title: str, note: str, *content: str) -> str:
    paragraph = f'<p class="note">{as_html(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{as_html(title)}</h2>\n{paragraph}{''.join(content)}</section>\n"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A figure that can be scrolled with the keyboard, where it is wider than the window."""
    head = "".join(f'<th scope="col">{as_html(head)}</th>' for head in heads)
    cells = [  # with their headings, for where there is no room for a row of these
        [cell.replace("<td", f'<td data-head="{as_html(head)}"', 1) for head, cell in zip(heads, row, strict=True)]
        for row in rows
    ]
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in cells)
    caption, wide = as_html(caption), ' class="wide"' if len(heads) > 2 else ""
    return (
        f'<figure>\n<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n<table{wide}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
        f"<figcaption>{caption}</figcaption>\n</figure>\n"
    )


def _claims(record: dict[str, Any]) -> str:
    claims = record["claims"]
    rows = [
        [
            _cell(claim["claim"], "long", claim["reason"]),
            _verdict(claim["verdict"]),
            _cell(
                _number(claim["statistic"]["value"]),
                "",
                "; ".join(filter(None, [claim["statistic"]["name"], _interval(claim["interval"])])),
            ),
            _p_values(claim),
        ]
        for claim in claims
        if claim["feature"] is None
    ]
    needed = [claim["feature"] for claim in claims if claim["verdict"] == _NEEDED]
    missed = (
        f" The model needs features that the attribution does not rank high: {', '.join(needed)}." if needed else ""
    )
    return _section(
        "Claims",
        f"{len(claims)} claims, {len(claims) - len(rows)} of them about features: {verdict_counts(record)}.{missed}",
        f'<p class="note">{as_html(_skill(record["skill"]))}</p>\n',
        _table("The claims about the model, and the numbers behind them", ["Claim", "Verdict", "Statistic", "p"], rows),
        _assumptions(record),
    )


def _skill(skill: dict[str, Any] | None) -> str:
    if skill is None or skill["skill"] is None:
        return "The model's skill is not known. Computing it takes labels, and a compiled loss whose value is above 0."
    interval = f" ({_interval(skill['skill_interval'])})" if skill["skill_interval"] else ""
    said = (
        f"The model's loss is {_number(skill['loss'])}. The best constant has a loss of {_number(skill['base_loss'])}. "
        f"The skill, 1 minus their ratio, is {_number(skill['skill'])}{interval}."
    )
    if skill["skill_interval"] is None or skill["skill_interval"][0] <= 0:
        return f"{said} The model is not shown to do better than a constant, so no claim about a feature is refuted."
    if skill["skill"] > _TOO_GOOD:
        return (
            f"{said} So high a skill is suspicious: the model may have been trained on these samples. If it was, no "
            "verdict holds."
        )
    return said


_OF_MASK = (
    "`feature_mask` says which entries belong to which feature. All entries of a feature are removed together, and "
    "entries of no feature stay. The keys of the attention are the features, in the same order."
)


def _assumptions(record: dict[str, Any]) -> str:
    """What the verdicts assume, beside them."""
    settings, level, features = record["settings"], record["settings"]["level"], record["features"] or {}
    if record["data"]["groups"]:
        independent = "The given groups of samples are independent of each other."
    elif settings["block"]:
        independent = f"Blocks of {settings['block']} consecutive samples are independent of each other."
    else:
        independent = (
            "The samples are independent of each other. Rows of one patient, of one day or of one series are not: such "
            "samples need groups or blocks."
        )
    if copies := features.get("copies"):
        independent += f" {copies} samples are exact copies of others."
    shape, tested = record["data"]["shape"], record["data"]["tested"]
    samples = (next(iter(shape.values())) if isinstance(shape, dict) else shape)[0]
    if tested < samples:
        independent += (
            f" The claims are tested on {tested:,} of the {samples:,} samples, drawn at random. The intervals show "
            "how exact the results are. The attribution and the skill are computed on all samples."
        )
    assumed = [
        "The model was not trained on these samples. If it was, no verdict holds, and this file cannot show it.",
        independent,
        "The values that are drawn for a feature are plausible, given the sample's other values. If a classifier can "
        "tell the drawn values from the real ones, the verdict is undetermined. No such check finds every flaw.",
        *([_OF_MASK] if settings["feature_mask"] is not None else []),
        "To test a ranking, features are replaced with their values in other samples, whatever the values of the "
        "features that stay. The model may never have seen such combinations.",
        f"At most {level:.0%} of the supported claims are expected to be wrong, and at most {level:.0%} of the refuted "
        "ones. For this, the p-values are adjusted for all claims together (Focused Benjamini–Hochberg). Each interval "
        f"has a coverage of {1 - level:.0%}.",
        "A verdict is about this model and these data. It does not say what causes the outcome.",
    ]
    entries = "".join(f"<li>{as_html(text)}</li>\n" for text in assumed)
    return f"<h3>What the verdicts assume</h3>\n<ul>\n{entries}</ul>\n"


def _features(record: dict[str, Any]) -> str:
    found, claims = record["attribution"]["features"], _by_id(record)
    bars = _bars([(one["feature"], one["attribution"], one["interval"]) for one in found])
    ranked = sorted(zip(found, bars, strict=True), key=lambda pair: -pair[0]["attribution"])
    alone = {one["feature"] for one in found}
    together = [claim for claim in claims.values() if claim["feature"] is not None and claim["feature"] not in alone]
    is_tested = any(claim["feature"] is not None for claim in claims.values())
    sizes = " of its absolute values" if record["attribution"]["method"] == "integrated_gradients" else ""
    rows = []
    for one, bar in ranked:
        shown = _cell(_number(one["attribution"]), "", _interval(one["interval"]))
        verdict, *numbers = _tested(claims.get(f"feature/{one['feature']}"))
        row = [verdict, bar, shown, *numbers] if is_tested else [bar, shown]
        rows.append([_cell(one["feature"], "long"), *row])
    if not is_tested:
        return _section(
            "Features",
            f"The attribution to each position by “{record['attribution']['method']}”, as a mean over the "
            f"samples{sizes}. Nothing is claimed about positions, because a position holds a different word in each "
            "text.",
            _table(
                "The mean attribution to each position, with its interval",
                ["Position", "Attribution (bar)", "Attribution"],
                rows,
            ),
        )
    heads = ["Feature", "Verdict", "Attribution (bar)", "Attribution", "Increase of the loss", "p"]
    parts = [
        _table(
            "The mean attribution to each feature, how much the loss rises when its values are resampled, and the "
            "intervals of both",
            heads,
            rows,
        )
    ]
    if together:
        caption = (
            "Features that are tested together, because the data cannot tell which of them the model needs, or because "
            "a feature mask joins them"
        )
        rows = [[_cell(claim["feature"], "long"), *_tested(claim)] for claim in together]
        parts.append(_table(caption, ["Features", "Verdict", "Increase of the loss", "p"], rows))
    return _section(
        "Features",
        f"The attribution to each feature by “{record['attribution']['method']}”, as a mean over the samples{sizes}, "
        "and whether it can be believed. The claim about a feature is that its attribution is high, and that it tells "
        "the model something that the other features do not. If the model needs a feature that is not ranked high, the "
        "verdict is “needed, not claimed”.",
        *parts,
    )


def _tested(claim: dict[str, Any] | None) -> list[str]:
    """The cells of a claim about a feature: verdict, effect, p-values."""
    if claim is None:
        return [_cell("tested together with others"), _cell("–"), _cell("–")]
    effect = _cell(_number(claim["statistic"]["value"]), "", _interval(claim["interval"]))
    return [_verdict(claim["verdict"], claim["reason"]), effect, _p_values(claim)]


def _controls(record: dict[str, Any]) -> str:
    title = "Does attention matter?"
    note = (
        "The model runs with its attention replaced: every key gets the same weight (uniform), or the model's own "
        "weights are assigned to the keys at random (permuted). This table shows whether the output changes. Whether "
        "the model also does worse is another question. That needs labels, and the answer is among the claims."
    )
    controls, claims = record["controls"], _by_id(record)
    if controls is None:
        return _section(title, note, _NOT_TESTED)
    found = controls["controls"]
    bars = _bars([(one["control"], one["share"], one["interval"]) for one in found])
    rows = []
    for one, bar in zip(found, bars, strict=True):
        claim = claims.get(f"attention-{one['control']}")
        rows.append(
            [
                _cell(one["control"]),
                bar,
                _cell(_number(one["share"]), "", _interval(one["interval"])),
                _cell(_number(one["median_change"])),
                _cell(_number(one["median_distance"])),
                _verdict(claim["verdict"]) if claim else _cell("no claim"),
            ]
        )
    caption = (
        f"Share of {controls['samples']} samples whose output changes by more than {controls['tolerance']:g} when the "
        f"attention is replaced, and the median change. Changes are {controls['change']}"
    )
    return _section(
        title,
        note,
        _table(
            caption,
            ["Attention", "Share (bar)", "Share", "Median change", "Distance of the scores (JSD)", "Claim"],
            rows,
        ),
    )


def _faithfulness(record: dict[str, Any]) -> str:
    title = "Is the ranking faithful?"
    note = (
        "Comprehensiveness is the change of the output when the features that are ranked first are removed. It should "
        "be large. Sufficiency is the change when all other features are removed. It should be small. AOPC is the mean "
        "of these changes over several numbers of removed features. Each histogram shows the same ranking with its "
        "features relabeled at random, which knows nothing about the model. Here every removed feature takes its value "
        "from one background sample, so the line can differ a little from the AOPC in the table of claims."
    )
    ranking, claims, parts = record["faithfulness"], _by_id(record), []
    if ranking is None:
        return _section(title, note, _NOT_TESTED)
    note += f" Removal: {ranking['removal']}. Background: {ranking['background']}."
    for found in ranking["tests"]:
        null, observed, verdict = found["null"], found["observed"], claims[f"ranking-{found['name']}"]["verdict"]
        caption = (
            f"Histogram of the AOPC {found['name']} of {len(null)} rankings that know nothing, from "
            f"{_number(min(null))} to {_number(max(null))}. The line at {_number(observed)} is the ranking of the "
            "attribution"
        )
        counts = dict(sorted(zip(found["removed"], found["mean_change"], strict=True)))  # two fractions may be one
        changes = "; ".join(f"{removed}: {_number(change)}" for removed, change in counts.items())
        below = f"Change of the output for each number of removed features: {changes}."
        heading = f"<h3>{as_html(found['name'].capitalize())}</h3>\n"
        parts.append(heading + _null_figure(null, observed, caption, verdict, below))
    return _section(title, note, *parts)


def _randomization(record: dict[str, Any]) -> str:
    title = "Does the attribution depend on the learned weights?"
    note = (
        "The weights of the attention layers are shuffled, and the attribution is computed again. The table shows its "
        "distance from the attribution of the trained model (mean total variation). It also shows the distance that "
        "relabeling the features at random gives. What is left is 1 minus the ratio of the two: 1 if the attribution "
        "stays the same, and 0 if it is no nearer than one with relabeled features."
    )
    found = record["randomization"]
    if found is None:
        return _section(title, note, _NOT_TESTED)
    means = [("shuffled weights", np.mean(found["distance"])), ("relabeled features", np.mean(found["chance"]))]
    bars = _bars([(name, float(mean), None) for name, mean in means])
    verdict = _verdict(_by_id(record)["randomization"]["verdict"])
    left = _cell(_number(found["median_kept"]), "", _interval(found["interval"])), verdict
    table = _table(
        f"The attribution after {found['draws']} shuffles of the weights of the attention layers, for "
        f"{found['samples']} samples",
        ["Attribution", "Distance (bar)", "Distance", "What is left (median)", "Claim"],
        [
            [_cell(name), bar, _cell(_number(mean)), *cells]
            for (name, mean), bar, cells in zip(means, bars, (left, (_cell("by chance: 0"), _cell("–"))), strict=True)
        ],
    )
    return _section(title, note, table)


def _seeds(record: dict[str, Any]) -> str:
    title = "Do models from other seeds agree?"
    note = (
        "Models that were trained in the same way from other seeds attribute the same samples. The overlap is the "
        "share of the first-ranked features that two models have in common, as a mean over all pairs of models."
    )
    found, claim = record["seeds"], _by_id(record)["seeds"]
    if found is None:
        return _section(title, note, f"<p>Not tested. {as_html(claim['reason'])}</p>\n")
    models = 1 + len(found["models"])
    first = "feature" if found["top_k"] == 1 else f"{found['top_k']} features"
    caption = (
        f"Histogram of the overlap of the first {first} in {found['draws']} sets of {models} random rankings, from "
        f"{_number(min(found['null']))} to {_number(max(found['null']))}. The line at {_number(found['overlap'])} is "
        "the overlap of the models"
    )
    in_view = [one for one in found["features"] if None not in (one["mean"], one["spread"])]
    ranked = sorted(in_view, key=lambda one: -one["mean"])
    ends = [(one["feature"], one["mean"], [one["mean"] - one["spread"], one["mean"] + one["spread"]]) for one in ranked]
    table = _table(
        f"The share of the attribution that each feature gets: mean and standard deviation over {models} models",
        ["Feature", "Share (bar)", "Mean", "Standard deviation"],
        [
            [_cell(one["feature"], "long"), bar, _cell(_number(one["mean"])), _cell(_number(one["spread"]))]
            for one, bar in zip(ranked, _bars(ends), strict=True)
        ],
    )
    return _section(title, note, _null_figure(found["null"], found["overlap"], caption, claim["verdict"]) + table)


def _calibration(record: dict[str, Any]) -> str:
    found = record["calibration"]
    if found is None:
        return ""
    note = (
        "The verdicts on features were checked on models that the same function trained on the same x, with labels "
        "whose truth is known. With permuted labels, samples get each other's labels, so no feature says anything "
        "about them. With a planted feature, the labels follow that one feature, which allows a skill of "
        f"{_number(found['strength'])}."
    )
    outcomes = found["outcomes"]
    bars = _bars([(one["outcome"], one["share"], one["interval"]) for one in outcomes])
    rows = [
        [
            _cell(one["outcome"], "long"),
            bar,
            _cell(f"{one['count']} of {found['n']}"),
            _cell(_number(one["share"]), "", _interval(one["interval"])),
        ]
        for one, bar in zip(outcomes, bars, strict=True)
    ]
    caption = f"How many of the {found['n']} models of each kind had each outcome, with Wilson intervals"
    return _section(
        "How often are such verdicts wrong?",
        note,
        f"<p>{as_html(found['summary'])}</p>\n",
        _table(caption, ["Outcome", "Share (bar)", "Models", "Share"], rows),
    )


def _capture(record: dict[str, Any]) -> str:
    captured, keys = record["capture"], ("layer", "class", "heads", "masks")
    rows = [
        [*(_cell(str(layer[key])) for key in keys), _cell(_number(layer["recomposition_error"]))]
        for layer in captured["layers"]
    ]
    return _section(
        "Is the capture exact?",
        f"With and without observation, the outputs differ by {_number(captured['prediction_difference'])}, relative "
        f"to the largest output. This difference and each recomposition error may be at most "
        f"{captured['tolerance']:g}. " + (" ".join(captured["not_captured"]) or "Every attention layer was captured."),
        _table(
            "The attention layers, and how far the output of each differs from the one that is computed again from the "
            "captured scores",
            ["Layer", "Class", "Heads", "Masks", "Recomposition error"],
            rows,
        ),
    )


def _statement(record: dict[str, Any]) -> str:
    if record["statement"] is None:
        return ""
    rows = [[_cell(name), _cell(text, "value")] for name, text in record["statement"].items()]
    return _section(
        "Statement",
        "The author of this audit states this. No computation checks it, but the checksum covers it.",
        _table("What the author of this audit states", ["What", "Statement"], rows),
    )


def _model(record: dict[str, Any]) -> str:
    return _section("Model", "Hashes are SHA-256.", _facts("What was audited", record["model"]))


def _data(record: dict[str, Any]) -> str:
    return _section(
        "Data", "The data themselves are not in this file.", _facts("What it was audited on", record["data"])
    )


def _environment(record: dict[str, Any]) -> str:
    return _section("Environment", "", _facts("What computed it", record["environment"]))


def _settings(record: dict[str, Any]) -> str:
    return _section(
        "How to check this file",
        "explain.verify(path, model, x, y) computes everything again and says what no longer holds. It needs only this "
        "file or the JSON file beside it, the model and the data. If the audit was made with more, such as groups, "
        "verify asks for it. A checksum is not a signature: sign this file to show who made it.",
        _facts("How it was made", {**record["settings"], **(record["features"] or {})}),
    )


def _by_id(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {claim["id"]: claim for claim in record["claims"]}


def _facts(caption: str, facts: dict[str, Any]) -> str:
    rows = [[_cell(name.replace("_", " ")), _fact(value)] for name, value in facts.items()]
    return _table(caption, ["What", "Value"], rows)


def _fact(value: Any) -> str:
    """Names may hold commas, and be many."""
    if not isinstance(value, list) or len(value) <= 8:
        return _cell(_text(value), "value")
    entries = "<br>".join(as_html(_text(entry)) for entry in value)
    return f'<td class="value"><details><summary>{len(value)} entries</summary>{entries}</details></td>'


def _cell(text: str, kind: str = "", below: str = "") -> str:
    small = f"<br><small>{as_html(below)}</small>" if below else ""
    return f'<td class="{kind}">{as_html(text)}{small}</td>' if kind else f"<td>{as_html(text)}{small}</td>"


def _verdict(verdict: str, reason: str = "") -> str:
    return f"<td>{_span(verdict)}{f'<br><small>{as_html(reason)}</small>' if reason else ''}</td>"


def _span(verdict: str) -> str:
    return f'<span class="{verdict.partition(",")[0]}">{verdict}</span>'


def _p_values(claim: dict[str, Any]) -> str:
    adjusted = claim["p_adjusted"]
    return _cell(_number(claim["p_value"]), "", "" if adjusted is None else f"adjusted {_number(adjusted)}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return _number(value) if value is None or isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else " to ".join(map(_number, bounds))


def _bars(rows: Sequence[tuple[str, float, Sequence[float] | None]]) -> list[str]:
    """For each named value with its interval a cell with a bar, all on one scale from 0."""
    ends = [0.0, *(value for _, value, _ in rows), *(bound for _, _, bounds in rows for bound in bounds or ())]
    low, high = min(ends), max(ends)

    def at(value):
        return round(100 * (value - low) / ((high - low) or 1), 2)

    cells = []
    for name, value, bounds in rows:
        label = f"{name}: {_number(value)}" + (f", interval {_interval(bounds)}" if bounds else "")
        whisker = f'<line x1="{at(bounds[0])}" x2="{at(bounds[1])}" y1="5" y2="5"/>' if bounds else ""
        cells.append(
            f'<td class="drawn"><svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
            f'aria-label="{as_html(label)}"><rect x="{min(at(0), at(value))}" y="2" '
            f'width="{abs(at(value) - at(0)):.2f}" height="6"/>{whisker}</svg></td>'
        )
    return cells


def _histogram(null: Sequence[float], observed: float, label: str) -> str:
    """How often values as in `null` came about, and a line at the observed one."""
    low, high = min(*null, observed), max(*null, observed)
    at = np.array([(value - low) / ((high - low) or 1) for value in null])
    counts = np.bincount(np.minimum(40 * at, 39).astype(int), minlength=40)
    width = 100 / len(counts)
    bars = "".join(
        f'<rect x="{number * width}" y="{100 - 96 * count / counts.max():.1f}" width="{width}" '
        f'height="{96 * count / counts.max():.1f}"/>'
        for number, count in enumerate(counts)
        if count
    )
    x = round(100 * (observed - low) / ((high - low) or 1), 2)
    return (
        f'<svg class="tall" viewBox="-1 0 102 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{as_html(label)}">{bars}<line x1="{x}" x2="{x}" y1="0" y2="100"/></svg>'
    )


def _null_figure(null: Sequence[float], observed: float, caption: str, verdict: str, below: str = "") -> str:
    below = f" {as_html(below)}" if below else ""
    return (
        f"<figure>\n{_histogram(null, observed, f'{caption}: {verdict}')}\n"
        f"<figcaption>{as_html(caption)}: {_span(verdict)}.{below}</figcaption>\n</figure>\n"
    )
