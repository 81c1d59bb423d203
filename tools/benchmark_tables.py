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
    return f"**{ratio}** ({of['quartiles'][0]:.2f}–{of['quartiles'][1]:.2f})" if bold else ratio


def _layer_speed(result):
    rows = []
    for row in result["rows"]:
        cells = []
        for what in ("train", "predict"):
            of = row[what]
            cells += [_ratio(of["ours"], bold=True), _ratio(of["original"]), _ratio(of["with scores"])]
        rows.append([row["backend"], str(row["length"]), str(row["dropout"]), *cells])
    header = ["backend", "tokens", "dropout", "training step", "0.1.1", "Keras, scores", "prediction", "0.1.1"]
    lines = _rows([*header, "Keras, scores"], *rows)
    floor = ", ".join(f"{milliseconds} ms at {length}" for length, milliseconds in result["floor"].items())
    return [
        *lines,
        "",
        "*0.1.1*: the release of that number on PyPI, which always forms scores. *Keras, scores*: "
        "`return_attention_scores=True`. For scale, the products and exponentials of one sample take NumPy "
        f"{floor} tokens.",
    ]


def _layer_torch(result):
    rows = [
        [str(row["length"]), str(row["dropout"]), _ratio(row["predict"]["ours"], bold=True)]
        + [_ratio(row["predict"][who]) for who in ("torch", "pytorch-forecasting", "original")]
        for row in result["rows"]
        if row["backend"] == "PyTorch"
    ]
    header = ["tokens", "dropout", "ours", "`torch.nn.MultiheadAttention` with weights", "pytorch-forecasting", "0.1.1"]
    return ["Prediction. The peers form scores at every call; ours are unread.", "", *_rows(header, *rows)]


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
    return _rows(["backend", "time of `capture` : original", "peak memory in results"], *rows)


def _layer_import(result):
    rows = []
    for backend in dict.fromkeys(row["backend"] for row in result["import"]):
        of_backend = [row for row in result["import"] if row["backend"] == backend]
        ratios = {who: statistics.median(row[who] / row["keras"] for row in of_backend) for who in ("ours", "original")}
        rows.append([backend, f"**{ratios['ours']:.2f}**", f"{ratios['original']:.2f}"])
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


def _summary(result):
    rows = [
        [
            row["backend"],
            f"{row['length']:,}",
            f"{4 * result['heads'] * row['length'] ** 2 / 1e9:.1f} GB",
            f"**{row['extra_mib']} MiB**",
            f"{row['seconds']:.0f} s",
            f"**{row['ratio']:.1f}**",
        ]
        for row in result["rows"]
    ]
    return _rows(["backend", "tokens", "full scores", "extra memory", "time", "time ÷ floor"], *rows)


def _part(of):
    low, high = of["interval"]
    return f"{of['count']} of {of['of']} ({100 * low:.1f}–{100 * high:.1f} %)"


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
    return _rows([*header, "copies or shortcut that attention puts first", "of them “supported”"], *rows)


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


TABLES = {
    "layer.json speed": _layer_speed,
    "layer.json torch": _layer_torch,
    "layer.json memory": _layer_memory,
    "layer.json capture": _layer_capture,
    "layer.json import": _layer_import,
    "capture.json": _capture,
    "summary.json": _summary,
    "claims.json false": _claims_false,
    "claims.json true": _claims_true,
}
