"""Tables of the measurements in benchmarks/: a page says `{{ benchmarks/layer.json speed }}`."""

import json
import statistics
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def table(name: str) -> str:
    """What `name`, a file and possibly a part of it, shows."""
    result = json.loads((FOLDER / name.split()[0]).read_text())
    versions = ", ".join(f"{package} {version.partition('+')[0]}" for package, version in result["versions"].items())
    return "\n".join([*TABLES[name](result), "", f"<small>{result['machine']}; {versions}</small>"])


def _rows(*header_and_rows):
    header, *rows = header_and_rows
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _ratio(of, bold=False):
    ratio = f"{of['ratio']:.2f}"
    low, high = (f"{quartile:.2f}" for quartile in of["quartiles"])
    return f"**{ratio}**&nbsp;<small>({low}–&NoBreak;{high})</small>" if bold else ratio  # in one line


def _by_backend(rows, number):
    """From each backend's name to its numbers."""
    return {
        backend: [number(row) for row in rows if row["backend"] == backend]
        for backend in dict.fromkeys(row["backend"] for row in rows)
    }


def _goals(result):
    """What the layer and its tools must not exceed, and the worst that was measured."""
    speed, summaries = result["rows"], json.loads((FOLDER / "summary.json").read_text())["rows"]

    long = [row for row in speed if row["length"] >= 512 and row["dropout"]]
    torch = [row["train"] for row in result["memory"] if row["backend"] == "PyTorch"]
    goals = [
        ("training step ÷ Keras without scores", 1.05, _by_backend(speed, lambda row: row["train"]["ours"]["ratio"])),
        (
            "prediction ÷ Keras, dropout 0.1, 512 tokens or more",
            1.0,
            _by_backend(long, lambda row: row["predict"]["ours"]["ratio"]),
        ),
        (
            "peak memory of a prediction at 8,192 tokens ÷ Keras",
            0.08,
            _by_backend(result["memory"], lambda row: row["predict"]["ours"] / row["predict"]["plain"]),
        ),
        (
            "peak memory of a training step on PyTorch at 2,048 tokens, dropout 0 ÷ 0.1.1",
            1 / 8,
            {"PyTorch": [train["ours"] / train["original"] for train in torch]},
        ),
        (
            "`capture` of 10,000 samples ÷ 0.1.1",
            0.5,
            _by_backend(result["capture"], lambda row: row["ours"]["seconds"] / row["original"]["seconds"]),
        ),
        (
            "`capture` of 10,000 samples: peak memory ÷ size of the result",
            1.7,
            _by_backend(result["capture"], lambda row: row["ours"]["peak"] / row["ours"]["result"]),
        ),
        *[
            (
                f"`summarize` at {length:,} tokens: MiB above the model",
                limit,
                _by_backend([row for row in summaries if row["length"] == length], lambda row: row["extra_mib"]),
            )
            for length, limit in ((16_384, 100), (65_536, 300))
        ],
        (
            "`summarize` at 16,384 tokens ÷ floor",
            4,
            _by_backend([row for row in summaries if row["length"] == 16_384], lambda row: row["ratio"]),
        ),
        ("`import kerasfactory.layers` ÷ `import keras`", 1.03, _imports(result, "ours")),
    ]
    return _goals_table(goals)


def _goals_table(goals):
    """Whether the worst numbers, by backend, are at most as large as they must be."""
    rows = []
    for what, limit, measured in goals:
        worst = {backend: max(numbers) for backend, numbers in measured.items()}
        holds = all(number <= limit for number in worst.values())
        numbers = ", ".join(f"{backend} {number:.3g}" for backend, number in worst.items())
        rows.append([what, f"{limit:.3g}", numbers, "yes" if holds else "**no**"])
    return _rows(["what", "at most", "worst measured", "holds"], *rows)


def _layer_in_short(result):
    training, prediction = (
        f"{min(ratios):.2f} to {max(ratios):.2f}"
        for ratios in ([row[what]["ours"]["ratio"] for row in result["rows"]] for what in ("train", "predict"))
    )
    return (
        f"**A training step takes {training} times as long as with Keras' layer without scores, and a prediction "
        f"{prediction} times.**"
    )


def _layer_answer(result):
    """In words: the best and the worst beside Keras, and where PyTorch's own layer is faster."""

    def case(row):
        return f"{row['backend']}, {row['length']:,} tokens, dropout {row['dropout']:g}"

    ratios = {
        what: [(row[what]["ours"]["ratio"], name, case(row)) for row in result["rows"]]
        for what, name in (("train", "a training step"), ("predict", "a prediction"))
    }
    everything = [*ratios["train"], *ratios["predict"]]
    slower = [f"{name} on {of} ({ratio:.2f})" for ratio, name, of in everything if ratio > 1]
    lines = [
        f"{_layer_in_short(result)} These are ratios on CPUs. This layer is slower than Keras' in {len(slower)} of "
        f"{len(everything)} cases{': ' if slower else ''}{'; '.join(slower)}."
    ]
    peers = [
        (row["predict"]["torch"]["ratio"], row["predict"]["ours"]["ratio"], case(row))
        for row in result["rows"]
        if "torch" in row["predict"] and row["predict"]["torch"]["ratio"] < row["predict"]["ours"]["ratio"]
    ]
    if peers:
        lines += [
            "",
            "`torch.nn.MultiheadAttention`, which returns weights, predicts faster than this layer in "
            f"{len(peers)} cases: "
            + "; ".join(f"{of} ({theirs:.2f} against {ours:.2f})" for theirs, ours, of in peers)
            + ".",
        ]
    return lines


def _layer_speed(result):
    lines = []
    for what, title in (("train", "A training step"), ("predict", "A prediction")):
        rows = []
        for row in result["rows"]:
            of = row[what]
            ratios = [_ratio(of["ours"], bold=True), _ratio(of["original"]), _ratio(of["with scores"])]
            rows.append([row["backend"], f"{row['length']:,}", str(row["dropout"]), *ratios])
        header = ["backend", "tokens", "dropout", "this layer", "0.1.1", "Keras, scores"]
        lines += [f"**{title}**, time ÷ that of Keras without scores:", "", *_rows(header, *rows), ""]
    floor = ", ".join(f"{milliseconds} ms at {length}" for length, milliseconds in result["floor"].items())
    return [
        *lines,
        "In brackets: quartiles. *0.1.1*: the release of that number on PyPI, which always forms scores. *Keras, "
        "scores*: `return_attention_scores=True`. For scale, the products and exponentials of one sample take NumPy "
        f"{floor} tokens.",
    ]


def _layer_picture(result):
    """The same, drawn: an SVG without colors of its own, small enough for a phone."""
    left, scale, step = 128, 105, 19  # pixels: before the axis, for a ratio of 1, between two lines
    titles = {"train": "Training step", "predict": "Prediction"}
    panels = {(what, dropout): f"{titles[what]}, dropout {dropout:g}" for what in titles for dropout in (0.0, 0.1)}
    top = 34
    marks = [
        '<circle class="ours" cx="6" cy="6" r="5"/><text x="18" y="10">this layer</text>'
        '<circle class="original" cx="116" cy="6" r="4"/><text x="128" y="10">0.1.1</text>'
        '<path class="one" d="M200 -1V13"/><text x="210" y="10">Keras, no scores</text>'
        '<text x="0" y="28">lines: backend and tokens; axis: time ÷ that of Keras</text>'
    ]
    for (what, dropout), title in panels.items():
        rows = [row for row in result["rows"] if row["dropout"] == dropout]
        bottom = top + 30 + step * len(rows)
        marks.append(f'<text class="title" x="0" y="{top + 14}">{title}</text>')
        for ratio in (0, 0.5, 1, 1.5, 2):
            x, kind = left + ratio * scale, "one" if ratio == 1 else "grid"
            marks.append(f'<path class="{kind}" d="M{x} {top + 24}V{bottom}"/>')
            marks.append(f'<text class="tick" x="{x}" y="{bottom + 15}">{ratio:g}</text>')
        for number, row in enumerate(rows):
            y = top + 38 + step * number
            marks.append(f'<text x="0" y="{y + 4}">{row["backend"]} {row["length"]:,}</text>')
            for who, kind, radius in (("original", "original", 4), ("ours", "ours", 5)):
                x = left + row[what][who]["ratio"] * scale
                marks.append(f'<circle class="{kind}" cx="{x:.0f}" cy="{y}" r="{radius}"/>')
        top = bottom + 34
    label = "Ratios to Keras of this layer and of release 0.1.1, by backend and tokens, as in the table."
    return [f'<svg class="chart" viewBox="0 -2 350 {top - 8}" role="img" aria-label="{label}">{"".join(marks)}</svg>']


def _layer_torch(result):
    rows = [
        [str(row["length"]), str(row["dropout"]), _ratio(row["predict"]["ours"], bold=True)]
        + [_ratio(row["predict"][who]) for who in ("torch", "pytorch-forecasting", "original")]
        for row in result["rows"]
        if row["backend"] == "PyTorch"
    ]
    header = ["tokens", "dropout", "ours", "`torch.nn.MultiheadAttention` with weights", "pytorch-forecasting", "0.1.1"]
    return [
        "Times of a prediction ÷ that of Keras without scores. The other layers form scores at every call. Ours does "
        "not, because no one reads them.",
        "",
        *_rows(header, *rows),
    ]


def _layer_memory(result):
    rows = []
    for row in result["memory"]:
        predict, train = row["predict"], row["train"]
        rows.append(
            [
                row["backend"],
                f"**{predict['ours']}** : {predict['plain']} MiB ({predict['ours'] / predict['plain']:.3f})",
                f"**{train['ours']}** : {train['plain']} : {train['original']} MiB",
            ]
        )
    header = [
        "backend",
        "prediction, 8192 tokens, dropout 0.1; ours : Keras",
        "training step, 2048 tokens; ours : Keras : 0.1.1",
    ]
    return ["What a process holds at its peak, above what it held before.", "", *_rows(header, *rows)]


def _layer_capture(result):
    rows = []
    for row in result["capture"]:
        ours, original = row["ours"], row["original"]
        ratio = ours["seconds"] / original["seconds"]
        rows.append(
            [
                row["backend"],
                f"**{ratio:.2f}** ({ours['seconds']:.2f} : {original['seconds']:.2f} s)",
                f"**{ours['peak'] / ours['result']:.2f}** : {original['peak'] / original['result']:.2f}",
            ]
        )
    header = ["backend", "time of `capture` ÷ 0.1.1", "peak memory ÷ size of the result, `capture` : 0.1.1"]
    return _rows(header, *rows)


def _imports(result, who):
    """From each backend's name to the median ratio, alone in a list."""
    return {
        backend: [statistics.median(row[who] / row["keras"] for row in result["import"] if row["backend"] == backend)]
        for backend in dict.fromkeys(row["backend"] for row in result["import"])
    }


def _layer_import(result):
    original = _imports(result, "original")
    rows = [
        [backend, f"**{ratio:.2f}**", f"{original[backend][0]:.2f}"]
        for backend, (ratio,) in _imports(result, "ours").items()
    ]
    header = ["backend", "`import kerasfactory.layers` ÷ `import keras`", "0.1.1"]
    return [*_rows(header, *rows), "", "Medians of five processes each."]


def _capture(result):
    rows = []
    for row in result["rows"]:
        speeds = [
            f"**{row[when]['throughput']:.2f}** ({row[when]['quartiles'][0]:.2f}–{row[when]['quartiles'][1]:.2f}), "
            f"{row[when]['samples_per_second']:,}/s"
            for when in ("first", "later")
        ]
        peaks = [
            f"**{row['capture'][samples]['above'] / row['capture'][samples]['result']:.2f}** "
            f"(by hand {row['by hand'][samples]['above'] / row['by hand'][samples]['result']:.2f})"
            for samples in ("10000", "20000")
        ]
        rows.append([row["backend"], *speeds, *peaks])
    header = ["backend", "throughput, first call", "later calls", "peak memory, 10,000 samples", "20,000 samples"]
    return [
        *_rows(header, *rows),
        "",
        "Throughput is samples a second divided by those of the model by hand: median of paired ratios (quartiles), "
        f"for {result['samples']:,} samples, two layers, 8 heads and 32 tokens, in batches of 256. The first call "
        "compiles. Peak memory is in units of the result; times are those of a process that keeps freed memory.",
    ]


def _capture_foreign(result):
    rows = []
    for row in result["rows"]:
        for name, of_model in row["foreign"].items():
            (_, first, _), (low, middle, high) = of_model["first"], of_model["later"]
            rows.append([row["backend"], name, f"{first:.2f}", f"**{middle:.2f}** ({low:.2f}–{high:.2f})"])
    return _rows(["backend", "model", "first call of each", "later calls"], *rows)


def _summary(result):
    rows = [
        [
            row["backend"],
            f"{row['length']:,}",
            f"{4 * result['heads'] * row['length'] ** 2 / 1e9:.1f}&nbsp;GB",
            f"**{row['extra_mib']}&nbsp;MiB**",
            f"{row['seconds']:.0f}&nbsp;s",
            f"**{row['ratio']:.1f}**",
        ]
        for row in result["rows"]
    ]
    return _rows(["backend", "tokens", "full scores", "extra memory", "time", "time ÷ floor"], *rows)


def _part(of):
    low, high = of["interval"]
    return f"{of['count']}&nbsp;of&nbsp;{of['of']} <small>({100 * low:.1f}–&NoBreak;{100 * high:.1f}%)</small>"


def _claims_false(result):
    rows = [
        [
            row["process"],
            str(row["samples"]),
            f"**{_part(row['false_models'])}**",
            f"**{_part(row['false_claims'])}**",
            _part(row["misleading"]["claimed"]) if "misleading" in row else "",
            str(row["misleading"]["supported"]["count"]) if "misleading" in row else "",
        ]
        for row in result["rows"]
    ]
    header = ["data", "samples", "models with a false “supported”", "false claims that are “supported”"]
    return _rows([*header, "copies or shortcut that attention puts above the mean", "of them “supported”"], *rows)


def _claims_true(result):
    rows = [
        [
            row["process"],
            _part(row["relevant"]["claimed"]),
            f"**{_part(row['relevant']['supported_of_claimed'])}**",
            _part(row["relevant"]["supported"]),
            _part(row["relevant"]["significant"]),
            str(row["relevant"]["refuted_of_claimed"]["count"]),
        ]
        for row in result["rows"]
        if "relevant" in row
    ]
    header = ["data", "true features that attention claims", "of these “supported”", "of all “supported”"]
    return _rows([*header, "significant, claimed or not", "wrongly “refuted”"], *rows)


def _claims_kinds(result):
    """For each kind of data how often verdicts are wrong, and in words where that is shown to be too often."""
    rows = [
        [
            f"**{row['process']}**<br><small>{row['what'].strip()}</small>",
            f"{row['skill']:.2f}",
            f"**{_part(row['false_models'])}**",
            *(_part(row[key]) if key in row else "–" for key in ("false_refuted", "power", "coverage")),
        ]
        for row in result["kinds"]
    ]
    header = ["data", "skill, median", "models with a false “supported”", "true features “refuted”"]
    supported, refuted = (
        ", ".join(
            f"*{row['process']}*" for row in result["kinds"] if key in row and row[key]["interval"][0] > result["level"]
        )
        or "no kind of data"
        for key in ("false_models", "false_refuted")
    )
    return [
        *_rows([*header, "true features found", "intervals that cover"], *rows),
        "",
        f"The whole Wilson interval lies above {100 * result['level']:g}% for a false “supported” on {supported}, and "
        f"for a true feature “refuted” on {refuted}.",
    ]


def _claims_coverage(result):
    rows = [[row["effect"], str(row["samples"]), f"**{_part(row['covered'])}**"] for row in result["coverage"]]
    return _rows(["values of the feature", "samples", "intervals that cover the true effect"], *rows)


def _claims_maps(result):
    known = {True: "true", False: "false", None: "not known"}
    rows = [
        [row["claim"], row["of"], known[row["truth"]], f"**{_part(row['significant'])}**"] for row in result["maps"]
    ]
    return _rows(["claim", "of", "the claim is", "p at most 5%"], *rows)


_READINGS = {
    "attention": "attention, mean",
    "rollout": "rollout",
    "attention_gradient": "attention × gradient",
    "value_norm": "value norms",
    "integrated_gradients": "integrated gradients",
    "integrated gradients, Captum": "the same, by Captum",
    "SHAP": "SHAP",
    "permutation importance": "permutation importance",
    "conditional effect": "conditional effect",
    "random": "random control",
}


def _readings_of(result):
    """The readings that were measured, in the order of the page."""
    return [reading for reading in _READINGS if any(reading in row["readings"] for row in result["rows"])]


def _readings_answer(result):
    """In words and as a picture: how far each reading goes."""

    def between(reading, text=None):
        found = {
            row["process"]: row["readings"][reading]["auc"]
            for row in result["rows"]
            if reading in row["readings"] and text in (None, row["text"])
        }
        worst, best = min(found, key=found.get), max(found, key=found.get)
        is_alone = sum(f"{auc:.2f}" == f"{found[best]:.2f}" for auc in found.values()) == 1
        return f"{found[worst]:.2f} (*{worst}*) to {found[best]:.2f}" + f" (*{best}*)" * is_alone

    rows = result["rows"]
    tables = [row for row in rows if not row["text"]]
    exact = {
        reading: sum(row["readings"][reading]["exact"] * row["models"] for row in tables)
        for reading in ("attention", "permutation importance", "conditional effect")
    }
    of = sum(row["models"] for row in tables)
    return [
        f"**Mean attention often does not.** We trained {sum(row['models'] for row in rows)} small models on "
        f"{len(rows)} kinds of data for which we know what matters. Mean attention ranks the features that matter "
        f"above the others with an AUC from {between('attention')}, where 1 is perfect and 0.5 is guessing. SHAP gets "
        f"from {between('SHAP')}. On tables, permutation importance gets from "
        f"{between('permutation importance', False)}, and our conditional effect from "
        f"{between('conditional effect', False)}. Attention puts exactly the columns that matter on top in "
        f"{exact['attention']:.0f} of {of} models of tables, permutation importance in "
        f"{exact['permutation importance']:.0f}, and the conditional effect in {exact['conditional effect']:.0f}.",
        "",
        _readings_picture(result),
    ]


def _readings_picture(result):
    """A line for each reading, a dot for each kind of data."""
    left, right, low, step = 160, 340, 0.3, 24  # pixels: before and after the axis; its start; between two lines
    readings = _readings_of(result)
    bottom = 10 + step * len(readings)
    marks = []
    for auc in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1):
        x, kind = left + (auc - low) / (1 - low) * (right - left), "one" if auc == 0.5 else "grid"
        marks.append(f'<path class="{kind}" d="M{x:.0f} 4V{bottom}"/>')
        if round(10 * auc) % 2 or auc == 1:
            marks.append(f'<text class="tick" x="{x:.0f}" y="{bottom + 15}">{auc:g}</text>')
    for number, reading in enumerate(readings):
        y = 20 + step * number
        marks.append(f'<text x="0" y="{y + 4}">{_READINGS[reading]}</text>')
        for place, row in enumerate(row for row in result["rows"] if reading in row["readings"]):
            auc = max(low, row["readings"][reading]["auc"])
            x = left + (auc - low) / (1 - low) * (right - left)
            shift = 9 if row["text"] else (-6, -2, 2, 6)[place % 4]
            kind, radius = ("original", 3) if row["text"] else ("ours", 3.5)
            marks.append(f'<circle class="{kind}" cx="{x:.0f}" cy="{y + shift}" r="{radius}"/>')
    axis = "AUC: one dot, one kind of data"
    marks.append(f'<text class="tick" x="{(left + right) // 2}" y="{bottom + 34}">{axis}</text>')
    y, text = bottom + 52, bottom + 56
    marks.append(f'<circle class="ours" cx="6" cy="{y}" r="3.5"/><text x="16" y="{text}">columns of a table</text>')
    marks.append(f'<circle class="original" cx="150" cy="{y}" r="3"/><text x="160" y="{text}">words of texts</text>')
    marks.append(f'<path class="one" d="M274 {y - 7}V{y + 7}"/><text x="282" y="{text}">guessing</text>')
    label = "AUC of each reading in each kind of data, as in the tables."
    size = f'viewBox="0 0 350 {bottom + 62}"'
    return f'<svg class="chart" {size} role="img" aria-label="{label}">{"".join(marks)}</svg>'


def _readings_table(hard, number):
    """The AUCs, or the shares in which exactly the true features are on top, of the easy or the hard data."""

    def lines(result):
        chosen = [row for row in result["rows"] if row["hard"] == hard]
        rows = []
        for reading in _readings_of(result):
            cells = []
            for row in chosen:
                found = row["readings"].get(reading)
                if found is None:
                    cells.append("–")
                    continue
                ends = "–&NoBreak;".join(f"{end:.2f}" for end in found[f"{number}_interval"])
                cells.append(f"**{found[number]:.2f}** <small>({ends})</small>")
            rows.append([_READINGS[reading], *cells])
        return _rows(["reading", *(row["process"] for row in chosen)], *rows)

    return lines


def _readings_models(result):
    rows = [
        [
            f"**{row['process']}**",
            row["what"],
            str(row["models"]),
            f"{row['skill']['median']:.2f} <small>({row['skill']['lowest']:.2f})</small>",
            f"{row['skill']['attainable']:.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["data", "what was planted", "models", "variance explained: median (lowest)", "attainable"]
    return _rows(header, *rows)


_READ = {"complete": "completely", "part": "in part", "none": "not at all"}


def _attending(result):
    """The rows that attend, whether it is counted or said."""
    return [row for row in result["rows"] if row["attention"] or any(of.get("said") for of in row["results"].values())]


def _backbones_caption(result):
    """How many classes are read, where that is least."""
    order = ["silent", *reversed(_READ)]
    classes = [row for row in _attending(result) if "," not in row["row"]]
    least = [
        min((found["result"] for found in row["results"].values() if "result" in found), key=order.index)
        for row in classes
    ]
    named = sum(kind in _READ for kind in least)
    counts = [f"{least.count(kind)} {said}" for kind, said in _READ.items()]
    return [
        f"**{named} of {len(classes)} backbone classes with attention are read, or named with the reason: "
        f"{', '.join(counts)}.**"
    ]


def _backbones(result):
    """A row for each class that attends, and what is said of those that are not read completely."""
    attending = _attending(result)
    usual = {row["row"]: row for row in attending}
    rows, reasons = [], {}
    for row in attending:
        name, _, variant = row["row"].partition(", ")
        if variant and all(
            found.get("result") == usual[name]["results"][run].get("result") for run, found in row["results"].items()
        ):
            continue
        label = _named([name, *result["also"].get(name, [])]) + (f", {variant}" if variant else "")
        errors = [found["error"] for found in row["results"].values() if found.get("error") is not None]
        error = f"{max(errors):.0e}".replace("0e+00", "0").replace("-", "&#8209;") if errors else ""
        rows.append([label, str(row["attention"]), _read(row), error])
        for run, found in row["results"].items():
            for reason in [f"on {run}, {found['failed']}"] if "failed" in found else found["said"]:
                reasons.setdefault(reason, []).append(label)
    rows.sort(key=lambda row: row[0].replace("`", "").lower())
    without = [row["row"] for row in result["rows"] if row not in attending and "," not in row["row"]]
    return [
        *_rows(
            ["backbone", "attends", "read", "error"], *sorted(rows, key=lambda row: row[0].replace("`", "").lower())
        ),
        "",
        *(
            f"- {', '.join(dict.fromkeys(labels))}: {reason.removeprefix('it is a ')}."
            for reason, labels in reasons.items()
        ),
        f"- Without attention, and without a false alarm ({len(without)}): {_named(without)}.",
    ]


def _named(classes):
    return ", ".join(f"`{name.removesuffix('Backbone')}`" for name in classes)


def _read(row):
    """How much is read, in words; if that is not the same on all backends, of each."""
    words = {}
    for run, found in row["results"].items():
        captured = (
            "all" if found.get("captured") == row["attention"] else f"{found.get('captured')} of {row['attention']}"
        )
        known = {
            "complete": captured,
            "part": "in part, the rest is named",
            "none": "none, named",
            None: "does not run",
        }
        if found.get("failed", "").startswith("ModuleNotFoundError"):
            known[None] = "not measured"
        words.setdefault(known.get(found.get("result"), f"**{captured}**"), []).append(run)
    return "; ".join(word if len(words) == 1 else f"{word} on {' and '.join(runs)}" for word, runs in words.items())


def _verbs_goals(result):
    """What an audit must not exceed, and what was measured."""

    def of(samples, number):
        return _by_backend([row for row in result["rows"] if row["samples"] == samples], number)

    def ratio(row):
        return row["audit"][-1] / row["importance"]

    def of_all(measured, number):
        return {backend: [number(found)] for backend, found in measured.items()}

    batches = of_all(result["batches"], lambda found: found["None"] / min(found.values()))
    return _goals_table(
        [
            ("audit of 2,000 × 20 ÷ permutation importance", 3, of(2_000, ratio)),
            ("audit of 10,000 × 30 ÷ permutation importance", 1.7, of(10_000, ratio)),
            (
                "claims about 8,000 × 16, beside the model: CPU seconds",
                4,
                of_all(result["beside"], lambda found: found["seconds"]),
            ),
            ("their peak memory above the data: MiB", 150, of_all(result["beside"], lambda found: found["memory"])),
            ("audit of 200,000 × 20: peak memory above the data, MiB", 500, of(200_000, lambda row: row["memory"])),
            ("audit of 1,000,000 × 30: minutes", 4, of(1_000_000, lambda row: row["wall"] / 60)),
            ("predictions of 30,000 × 30, default size of a batch ÷ best", 1.3, batches),
        ]
    )


def _verbs(result):
    """What an audit costs beside comparable jobs."""
    rows = []
    for row in result["rows"]:
        first, second = row["audit"][0], row["audit"][-1]
        sizes = f"{row['samples']:,}&nbsp;×&nbsp;{row['features']}"
        rows.append(
            [
                row["backend"],
                sizes if row["samples"] == row["tested"] else f"{sizes}<br><small>tested on {row['tested']:,}</small>",
                f"{first:.1f}" if len(row["audit"]) == 1 else f"{first:.1f}, {second:.1f}",
                f"**{second / row['importance']:.2f}**",
                f"{second / row['prediction']:.0f}",
                f"{row['memory']} MiB",
            ]
        )
    header = ["backend", "samples × features", "CPU seconds, first and second call", "÷ permutation importance"]
    peers = [
        f"{row['audit'][-1] / row[key]:.2f} times those of {name} "
        f"({row['backend']}, {row['samples']:,} × {row['features']})"
        for key, name in (("captum", "Captum"), ("shap", "SHAP"))
        for row in result["rows"]
        if key in row
    ]
    return [
        *_rows([*header, "÷ one prediction", "peak memory above the data"], *rows),
        "",
        f"The CPU seconds of an audit's second call are {', '.join(peers[:-1])}, and {peers[-1]}.",
    ]


TABLES = {
    "backbones.json": _backbones,
    "backbones.json caption": _backbones_caption,
    "layer.json answer": _layer_answer,
    "layer.json in short": lambda result: [f"{_layer_in_short(result)} These are ratios on CPUs."],
    "layer.json goals": _goals,
    "layer.json picture": _layer_picture,
    "layer.json speed": _layer_speed,
    "layer.json torch": _layer_torch,
    "layer.json memory": _layer_memory,
    "layer.json capture": _layer_capture,
    "layer.json import": _layer_import,
    "capture.json": _capture,
    "capture.json foreign": _capture_foreign,
    "summary.json": _summary,
    "verbs.json": _verbs,
    "verbs.json goals": _verbs_goals,
    "claims.json false": _claims_false,
    "claims.json true": _claims_true,
    "claims.json kinds": _claims_kinds,
    "claims.json coverage": _claims_coverage,
    "claims.json maps": _claims_maps,
    "readings.json answer": _readings_answer,
    "readings.json easy": _readings_table(False, "auc"),
    "readings.json hard": _readings_table(True, "auc"),
    "readings.json easy exact": _readings_table(False, "exact"),
    "readings.json hard exact": _readings_table(True, "exact"),
    "readings.json models": _readings_models,
}
