"""The files of an audit in the hands of others: what was forged or damaged is found, and what is whole is not."""

import copy
import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from keras import layers

import kerasfactory
from kerasfactory import explain
from kerasfactory.explain._audit import audit as _audit
from kerasfactory.explain._audit import file as _file
from kerasfactory.explain._audit import page as _page
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

NAMES = ["decides", "a`b <i>c`d</i>", "NaN_count", "noise\r\u202e"]
RNG = np.random.default_rng(3)
X = RNG.normal(size=(60, 4)).astype("float32")
Y = (2 * X[:, 0] + X[:, 1] > 0).astype("float32")
STATEMENT = {"author": "A. Smith", "intended use": "<b>all</b> patients", "version": "1.4\n(2026)"}


def build(names=NAMES, seed=0, layer="attention", name="planted"):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((len(names),))
    tokens = FeatureTokenizer(4, feature_names=names)(inputs)
    attended = InterpretableMultiHeadAttention(4, 2, dropout_rate=0.0, name=layer)(tokens)
    outputs = layers.Dense(1, activation="sigmoid")(layers.Flatten()(attended))
    model = keras.Model(inputs, outputs, name=name)
    model.compile("adam", "binary_crossentropy")
    return model


def calibration():
    """As `calibrate` returns it."""
    outcomes = ["permuted: a feature supported", "planted: it is supported"]
    found = {"count": [0, 15], "share": [0.0, 0.75]}
    attributes = {"summary": "On models like yours, it was wrong in 0 of 20.", "n": 20, "strength": 0.3}
    return xr.Dataset(
        {name: ("outcome", values) for name, values in found.items()}
        | {"interval": (("outcome", "bound"), [[0.0, 0.16], [0.53, 0.89]])},
        {"outcome": outcomes, "bound": ["lower", "upper"]},
        attributes | {"own_skill": None, "method": "attention", "level": 0.05, "seed": 0},
    )


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def given():
    """All that an audit can be made with."""
    return {
        "models": [build(seed=1)],
        "calibration": calibration(),
        "background": X[:50],
        "groups": np.arange(60) // 2,
        "statement": STATEMENT,
    }


@pytest.fixture(scope="module")
def written(model, given, tmp_path_factory):
    """An audit in which nothing is missing."""
    return explain.audit(model, X, Y, tmp_path_factory.mktemp("audit") / "audit.html", **given, verbose=0).path


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """An audit of too few samples to test anything."""
    return explain.audit(model, X[:5], path=tmp_path_factory.mktemp("audit") / "audit.html", verbose=0).path


@pytest.fixture(scope="module")
def made_again(model, given, written):
    settings = data(written)["settings"]
    return _audit._record(model, X, Y, given["background"], given["groups"], given["models"], settings, None, 0)


@pytest.fixture
def computed_once(model, given, made_again, monkeypatch):
    """Makes `verify` quick: what it computes for the settings of the audit is computed once."""
    monkeypatch.setattr(_audit, "_record", lambda *_: copy.deepcopy(made_again))
    return functools.partial(explain.verify, model=model, x=X, y=Y, **given, verbose=0)


def data(path):
    return json.loads(Path(path).with_suffix(".json").read_text())


def leaves(value, path=()):
    if isinstance(value, dict | list) and value:
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, (*path, key))
    else:
        yield path, value


def findings(verify, file):
    """What `verify` says; that a file says nothing of an audit any more is the only error."""
    try:
        return verify(file)
    except ValueError as error:
        return ["no audit"] if "is not an audit made by `explain.audit`, or it is damaged" in str(error) else []


def at(record, path):
    for key in path:
        record = record[key]
    return record


def forge(record, folder, suffixes=(".html", ".json"), shown=None, rehash=True):
    """Writes a changed record with its checksum and its page, as any forger can; returns one of the files."""
    record = {key: value for key, value in record.items() if key != "checksum"} | {"checksum": record.get("checksum")}
    if rehash:
        record["checksum"] = _file._checksum(record)
    text = json.dumps(record, indent=1) + "\n"
    for file in folder.glob("audit.*"):
        file.unlink()
    for suffix in suffixes:
        content = text
        if suffix == ".html":
            content = _page.with_data(_page.page(record) if shown is None else shown, text)
        (folder / f"audit{suffix}").write_bytes(content.encode())
    return folder / f"audit{suffixes[0]}"


# --- What is whole ---------------------------------------------------------------------------------------------------


@pytest.mark.backend_independent
def test_with_all_that_it_was_made_with_an_audit_is_verified(model, given, written):
    record = data(written)
    assert [key for key, value in record.items() if value is None] == []
    assert explain.verify(written, model, X, Y, **given, verbose=0) == []


@pytest.mark.backend_independent
def test_what_was_not_given_is_named_with_what_to_give(computed_once, written):
    assert computed_once(written, calibration=None, statement=None) == [
        "The audit has a calibration, which was not checked: give it, `calibration=...`.",
        "The audit has a statement, which was not checked: give it, `statement=...`.",
    ]
    for name in ("background", "groups"):
        assert computed_once(written, **{name: None}) == [
            f"The audit was made with {name}: give them, `{name}=...`. Nothing was compared."
        ]


HOSTILE = [
    *(
        "NaN",
        "NaN_count",
        "Infinity",
        "-Infinity",
        "null",
        "true",
        "1e999",
        "-0",
        "0x10",
        "weight\r",
        "a\r\nb",
        "a\nb",
        "\t",
    ),
    *(
        "",
        " ",
        "\x00a",
        "\x1b[2J",
        "\x7f",
        "\x85",
        "\u2028",
        "\u2029",
        "\ufeff",
        "\u200b",
        "\u200d",
        "\u202eevil",
        "\u2066x",
    ),
    *(
        "\ud800",
        "\udfff",
        "\ud83d\ude00",
        "\U0001f600",
        "e\u0301",
        "\u00e9",
        "\u0661\u0662",
        "\uffff",
        "\ufdd0",
        "n" * 300,
    ),
    *(
        "</script>",
        "<script>alert(1)</script>",
        '<script type="application/json" id="audit">',
        "<!--",
        "-->",
        "]]>",
        "</td>",
    ),
    *(
        '<meta http-equiv="refresh" content="0;url=//x">',
        "<style>*{display:none}</style>",
        "<b>",
        "&lt;",
        "&amp;",
        "&#0;",
    ),
    *(
        '"',
        "'",
        "\\",
        "\\u003c",
        "\\n",
        '\\"',
        "`",
        "`a`",
        "``",
        "{0}",
        "%s",
        "%",
        "$x$",
        "$",
        "_",
        "__proto__",
        "constructor",
    ),
    *("/", "a/p_value", "feature/a", "capture", "claims", "../..", "a + b", ", ", "=1+1", "'; DROP TABLE", "id", "<td"),
    *(
        "better than 1 of 220 rankings",
        "supported",
        "refuted",
        "needed, not claimed",
        "But its p-value, adjusted for 12 claims",
        "p_value",
    ),
    *("nan", "1_000", "0.5", "checksum", "kerasfactory.audit/3", "\U000e0041"),
]
# Of five layers, and of five models: half a surrogate pair is no name of a layer to JAX.
WITHOUT_RULES = ["NaN", "</script>", "\r", "&amp;", "\u202e", "`a` <b>", "n" * 300, '"', "\x1b[2J", "\ud800"]
FOR_TENSORFLOW = ["NaN", "null", "credit->risk", "0", "..", "n" * 300, "true", "A", "feature", "1e999"]


@pytest.mark.parametrize("number", range(5))
def test_an_untouched_audit_is_verified_whatever_things_are_called(number, tmp_path):
    """100 names: five times 18 of features, one of a layer and one of the model."""
    free = FOR_TENSORFLOW if keras.config.backend() == "tensorflow" else WITHOUT_RULES
    names = HOSTILE[number::5]
    assert len(set(names)) == 18
    model = build(names, layer=free[number].replace("/", "|"), name=free[-1 - number].replace("/", "|"))
    x = np.random.default_rng(0).normal(size=(4, len(names)))
    path = explain.audit(model, x, path=tmp_path / "audit.html", verbose=0).path
    assert explain.verify(path, model, x, verbose=0) == []
    text = path.read_bytes().decode()
    assert text.count("<script") == text.count("</script>") == 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", text)
    assert [json.loads(json.dumps(name)) for name in names] == data(path)["data"]["feature_names"]


@pytest.mark.backend_independent
def test_backticks_in_names_make_no_markup(written):
    text = written.read_text()
    assert "<code>" not in text
    assert "a`b &lt;i&gt;c`d&lt;/i&gt;" in text


@pytest.mark.backend_independent
def test_a_loss_that_no_constant_has_leaves_the_skill_open(model, tmp_path):
    model = build()
    model.compile(loss="mse")
    report = explain.audit(model, X[:30], np.zeros(30), tmp_path / "audit.html", verbose=0)
    assert report.record["skill"]["largest_share"] is None
    assert explain.verify(report, model, X[:30], np.zeros(30), verbose=0) == []


@pytest.mark.backend_independent
def test_an_output_may_be_asked_for_by_its_number(tmp_path):
    model = build()
    model = keras.Model(model.input, layers.Dense(3, "softmax")(model.layers[-2].output))
    asked = {"task": "classification", "target": np.int64(1), "path": tmp_path / "audit.html", "verbose": 0}
    assert explain.audit(model, X[:20], **asked).record["faithfulness"]["target"] == 1
    report = explain.audit(model, X[:5], method="attention_gradient", **asked)
    assert report.record["attribution"]["target"] == 1
    assert explain.verify(report, model, X[:5], verbose=0) == []


@pytest.mark.backend_independent
def test_two_groups_of_one_name_are_two_claims(tmp_path):
    names, x = ["a", "b + c", "a + b", "c"], X[:40, [0, 0, 1, 1]]
    report = explain.audit(build(names), x, Y[:40], tmp_path / "audit.html", verbose=0)
    assert report.features.index.tolist() == [*names, "a + b + c", "a + b + c (together)"]


@pytest.mark.backend_independent
def test_nulls_that_differ_by_rounding_are_drawn():
    drawn = _page._histogram([0.1, np.nextafter(0.1, 1)], 0.1, "nearly equal")
    assert drawn.count("<rect") == 2
    assert _page._histogram([0.5] * 3, 0.5, "equal").count("<rect") == 1


# --- What the author states ------------------------------------------------------------------------------------------


@pytest.mark.backend_independent
def test_a_statement_is_shown_as_the_authors_word_and_is_under_the_checksum(computed_once, written):
    text, record = written.read_text(), data(written)
    assert record["statement"] == STATEMENT
    (section,) = re.findall("<section>\n<h2>Statement</h2>.*?</section>", text, re.DOTALL)
    assert "The author of this audit states this. No computation checks it" in section
    assert "&lt;b&gt;all&lt;/b&gt; patients" in section
    assert "1.4\\n(2026)" in section
    other = {**STATEMENT, "author": "B. Smith"}
    assert computed_once(written, statement=other) == ["In “statement”, author was A. Smith and is now B. Smith."]
    turned = dict(reversed(STATEMENT.items()))
    assert computed_once(written, statement=turned) == ["In “statement”, the order was another."]


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "statement",
    [
        {},
        "A. Smith",
        {"author": 7},
        {7: "A. Smith"},
        {"": "A. Smith"},
        {"author": None},
        {"author": {"name": "A. Smith"}},
        {"a" * 101: "A. Smith"},
        {"author": "a" * 10_001},
        {str(number): "" for number in range(51)},
    ],
    ids=["empty", "text", "number", "number as name", "no name", "null", "nested", "long name", "long text", "many"],
)
def test_statements_of_another_kind_are_refused(model, written, statement):
    for call in (explain.audit, functools.partial(explain.verify, written)):
        with pytest.raises(ValueError, match=r"`statement` must be a dictionary with 50 entries at most.*Received"):
            call(model, X, statement=statement, verbose=0)


@pytest.mark.backend_independent
def test_a_calibration_is_compared(model, computed_once, written):
    other = calibration()
    other["count"][0] = 3
    assert computed_once(written, calibration=other) == ["In “calibration”, outcomes/0/count was 0 and is now 3."]
    other.attrs["mine"] = "better"
    with pytest.raises(ValueError, match=r"`calibration` must be what `explain.calibrate` returned\. .*keys summary"):
        explain.audit(model, X, calibration=other, verbose=0)


# --- What is damaged, or made to harm --------------------------------------------------------------------------------


def damaged(text, record):
    """Files that readers of JSON fail at, or do not agree on."""
    deep = "[" * 100_000 + "]" * 100_000
    yield "too large", b" " * (_file._MOST_BYTES - len(text) + 1) + text.encode()
    yield "no UTF-8", text.encode().replace(b"planted", b"pl\xffnted")
    yield "UTF-16", b"\xff\xfe" + text.encode()
    yield "half of it", text.encode()[: len(text) // 2]
    yield "trailing", text.encode() + b"{}"
    for name, value in {
        "NaN": "NaN",
        "Infinity": "-Infinity",
        "1e999": "1e999",
        "many digits": "9" * 100_000,
        "nested": deep,
        "nested, but not too deep to be read": "[" * 400 + "]" * 400,
    }.items():
        yield name, text.replace('"level": 0.05', f'"level": {value}', 1).encode()
    yield "a key twice", text.replace('"level": 0.05', '"level": 0.05,\n "level": 0.05', 1).encode()


@pytest.mark.backend_independent
@pytest.mark.parametrize("suffix", [".html", ".json"])
def test_damaged_files_are_findings(model, small, tmp_path, suffix):
    text = small.with_suffix(suffix).read_text()
    for name, content in damaged(text, data(small)):
        assert content != text.encode(), name
        (tmp_path / f"audit{suffix}").write_bytes(content)
        if (name, suffix) == ("trailing", ".html"):
            expected = "audit.html does not show what its data say."
        else:
            expected = f"audit{suffix} is damaged: "
        (found,) = explain.verify(tmp_path / f"audit{suffix}", model, X[:5])
        assert found.startswith(expected), name
        assert len(found) < 600


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("level", 1e-12, "level"),
        ("level", 0.5, "level"),
        ("level", 5e-324, "level"),
        ("tolerance", 0.0, "tolerance"),
        ("tolerance", 1e300, "tolerance"),
        ("seed", -1, "seed"),
        ("seed", 2**70, "seed"),
        ("batch_size", 0, "batch_size"),
        ("batch_size", 10**12, "batch_size"),
        ("block", 2**40, "block"),
        ("method", "best", "method"),
        ("task", "guess", "task"),
        ("target", 99, "target"),
        ("target", [], "target"),
        ("layers", [], "layers"),
        ("layers", ["nowhere"], "nowhere"),
        ("feature_names", ["one"], "feature_names"),
        ("feature_mask", [[[[[[[[[0]]]]]]]]], "feature_mask"),
        ("feature_mask", [0, 1, 2, 10**9], "feature_mask"),
        ("special_tokens", [2.5], "special_tokens"),
    ],
)
def test_settings_without_sense_or_end_are_refused_by_audit_and_are_findings_of_verify(
    model, written, given, tmp_path, setting, value, said
):
    with pytest.raises(ValueError, match=said):
        explain.audit(
            model, X, Y, groups=given["groups"] if setting != "block" else None, verbose=0, **{setting: value}
        )
    record = data(written)
    record["settings"][setting] = value
    found = explain.verify(forge(record, tmp_path), model, X, Y, **given, verbose=0)
    assert len(found) == (1 if "cannot be made again" in found[0] else 2)  # or both files are no audit's
    assert all(said in sentence for sentence in found)


# --- What is forged --------------------------------------------------------------------------------------------------


@pytest.mark.backend_independent
def test_a_page_with_other_versions_and_forged_verdicts_is_found(model, small, tmp_path):
    record = data(small)
    record["environment"]["kerasfactory"] = "0.1.9"
    shown = _page.page(record).replace('class="undetermined">undetermined', 'class="supported">supported')
    assert ">undetermined</span>" not in shown
    (found,) = explain.verify(forge(record, tmp_path, shown=shown), model, X[:5], verbose=0)
    assert found.startswith(
        f"This page cannot be checked with kerasfactory {kerasfactory.__version__}: the audit was made with "
        "kerasfactory 0.1.9."
    )


@pytest.mark.backend_independent
def test_findings_cannot_write_to_the_terminal(computed_once, written, tmp_path):
    record = data(written)
    record["claims"][0]["claim"] = "\x1b[2JAll holds.\u202e" + "!" * 100_000
    (found,) = computed_once(forge(record, tmp_path))
    assert "\\x1b[2JAll holds.\\u202e" in found
    assert "\x1b" not in found
    assert len(found) < 2000


@pytest.mark.backend_independent
def test_numbers_may_move_by_rounding_and_no_further(computed_once, written, tmp_path):
    record, by_id = data(written), {claim["id"]: number for number, claim in enumerate(data(written)["claims"])}
    ranking = by_id["ranking-comprehensiveness"]
    count, draws = map(int, re.search(r"better than (\d+) of (\d+)", record["claims"][ranking]["reason"]).groups())
    p_value = record["claims"][ranking]["p_value"]
    for path, moved, is_rounding in [
        (("attribution", "features", 0, "attribution"), lambda value: value * 1.0005, True),
        (("attribution", "features", 0, "attribution"), lambda value: value * 1.01, False),
        (("claims", ranking, "p_value"), lambda value: value + 0.001, True),
        (("claims", ranking, "p_value"), lambda value: abs(value - 0.03), False),
        (("claims", ranking, "reason"), lambda text: text.replace(f"than {count}", f"than {count - 1}"), True),
        (("claims", ranking, "reason"), lambda text: text.replace(f"than {count}", f"than {count - 9}"), False),
        (("claims", ranking, "reason"), lambda text: text.replace(f"of {draws}", f"of {draws + 1}"), False),
        (("claims", ranking, "reason"), lambda text: text.replace(f"than {count}", f"than 0{count - 1}"), False),
    ]:
        forged = copy.deepcopy(record)
        at(forged, path[:-1])[path[-1]] = moved(at(record, path))
        assert (computed_once(forge(forged, tmp_path)) == []) == is_rounding, path
    assert p_value > 0.002


@pytest.mark.backend_independent
def test_a_small_p_value_cannot_be_made_much_smaller():
    rest = {"claims": [], "skill": None, "faithfulness": None, "attribution": {"features": []}}
    before, now = ({**rest, "controls": [{"p_value": value}]} for value in (1e-4, 0.019))
    assert _file.differences(before, now, 1e-5) == ["In “controls”, 0/p_value was 0.0001 and is now 0.019."]


def moved(value, rng):
    """Another value of the same kind, further away than rounding."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + int(rng.choice([1, 2, 1000]))
    if isinstance(value, float):
        return value * 1.5 + 0.1 if abs(value) > 1 else value - 0.1 if value > 0.5 else value + 0.1
    if isinstance(value, str):
        place = int(rng.integers(len(value) + 1))
        signs = ["!", "\u202e", "\u200b", "<b>", " ", "0", "\r"]
        other = value[:place] + str(rng.choice(signs)) + value[place + (rng.random() < 0.5) :]
        return other if other != value else value + "!"
    return rng.choice([0.5, 1]).item() if value is None else "not empty"


def reshaped(record, path, rng):
    """The record with the entries of a container added to, removed, repeated or in another order; changes it."""
    container = at(record, path)
    way = rng.choice(["more", "fewer", "turned"])
    if isinstance(container, dict):
        entries = list(container.items())
        container.clear()
        entries = {"more": [*entries, ("note", "approved")], "fewer": entries[1:], "turned": entries[::-1]}[way]
        container.update(entries)
    else:
        container[:] = {"more": [*container, container[0]], "fewer": container[1:], "turned": container[::-1]}[way]


def containers(value, path=()):
    if isinstance(value, dict | list) and value:
        yield path
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from containers(entry, (*path, key))


def forged_records(record, count, rng):
    """Records that say something else than the audit. Other settings are another audit, and have their own test."""
    skipped = ("settings", "checksum")
    ends = [path for path, _ in leaves(record) if path[0] not in skipped]
    inner = [path for path in containers(record) if path[:1] not in [(name,) for name in skipped]]
    few = [path for path in ends if path[-2:-1] not in [("null",), ("distance",), ("chance",)]]
    for number in range(count):
        forged = copy.deepcopy(record)
        if number % 3 == 2:
            path = inner[rng.integers(len(inner))]
            reshaped(forged, path, rng)
        else:
            path = (few, ends)[number % 2][rng.integers(len((few, ends)[number % 2]))]
            at(forged, path[:-1])[path[-1]] = moved(at(forged, path), rng)
        if json.dumps(forged) != json.dumps(record):  # as a list of equal numbers that is turned
            yield path, forged


def shown_by(record, otherwise):
    """The page that a forger renders of a record, if it can be rendered."""
    try:
        return _page.page(record)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeWarning):
        return otherwise


@pytest.mark.backend_independent
@pytest.mark.parametrize("rehash", [True, False], ids=["with new checksums", "with the old ones"])
@pytest.mark.parametrize("suffixes", [(".html",), (".json",), (".html", ".json"), (".json", ".html")], ids="".join)
def test_no_forged_record_is_verified(computed_once, written, tmp_path, rehash, suffixes):
    record, page = data(written), _page.page(data(written))
    rng, tried = np.random.default_rng([rehash, len(suffixes), len(suffixes[0]), suffixes[0] == ".html"]), 0
    for path, forged in forged_records(record, 75 if rehash else 25, rng):
        file = forge(forged, tmp_path, suffixes, shown=shown_by(forged, page), rehash=rehash)
        assert findings(computed_once, file), path
        tried += 1
    assert tried > (60 if rehash else 20)


@pytest.mark.backend_independent
def test_one_honest_file_does_not_hide_a_forged_one(computed_once, written, tmp_path):
    rng = np.random.default_rng(5)
    for honest, other in ((".html", ".json"), (".json", ".html")):
        for path, forged in forged_records(data(written), 20, rng):
            forge(forged, tmp_path, (other,), shown=shown_by(forged, _page.page(data(written))))
            shutil.copy(written.with_suffix(honest), tmp_path / f"audit{honest}")
            assert computed_once(tmp_path / f"audit{honest}"), path


ADDED = [
    "<script>document.title='x'</script>",
    "<p>All claims are supported.</p>",
    "<style>.refuted{display:none}</style>",
    "<!-- -->",
    " ",
    "\r",
    "\u200b",
    "\u202e",
    '<base href="https://example.com">',
    '<meta http-equiv="refresh" content="0;url=https://example.com">',
    '<img src="https://example.com/x.png">',
    '<script type="application/json" id="audit">{}</script>',
    '<iframe srcdoc="approved"></iframe>',
    "</main>",
]


def forged_pages(text, count, rng):
    """Pages that show something else than the data in them say."""
    tags = [match.span() for match in re.finditer("<[^>]*>", text)]
    shown = [place for match in re.finditer(">([^<]+)<", text) for place in range(*match.span(1))]
    for number in range(count):
        start, end = tags[rng.integers(len(tags))]
        way = number % 5
        if way == 0:
            yield "added", text[:end] + ADDED[number // 5 % len(ADDED)] + text[end:]
        elif way == 1:
            yield "a tag removed", text[:start] + text[end:]
        elif way == 2:
            yield "within a tag", text[: end - 1] + ' onclick="x()"' + text[end - 1 :]
        else:
            place = int(rng.choice(shown))
            yield "a sign", text[:place] + chr(ord(text[place]) ^ int(rng.choice([1, 2, 32]))) + text[place + 1 :]
    yield "verdicts", text.replace("undetermined</span>", "supported</span>")
    yield "policy", re.sub("<meta http-equiv.*>\n", "", text)
    yield "weaker policy", text.replace("default-src 'none'", "default-src *")
    yield "line ends", text.replace("\n", "\r\n")
    yield "mark of order", "\ufeff" + text
    yield "after the end", text + "\n"
    yield "capitals", text.replace("<body>", "<BODY>")
    yield "entity", text.replace("Audit of planted", "Audit of pl&#97;nted")
    yield "data twice", text.replace("</body>", text[text.index("<script") :])


@pytest.mark.backend_independent
def test_no_forged_page_is_verified(computed_once, written, tmp_path):
    text, rng, ways = written.read_bytes().decode(), np.random.default_rng(7), []
    for number, (way, forged) in enumerate(forged_pages(text, 200, rng)):
        assert forged != text, way
        (tmp_path / "audit.html").write_bytes(forged.encode())
        (tmp_path / "audit.json").unlink(missing_ok=True)
        if number % 2:
            shutil.copy(written.with_suffix(".json"), tmp_path / "audit.json")
        assert findings(computed_once, tmp_path / "audit.html"), way
        ways.append(way)
    assert len(ways) > 200


@pytest.mark.backend_independent
@pytest.mark.parametrize("suffix", [".html", ".json"])
def test_no_flipped_bit_is_verified(computed_once, written, tmp_path, suffix):
    content, rng = written.with_suffix(suffix).read_bytes(), np.random.default_rng(11)
    for place in rng.choice(len(content), 60, replace=False):
        forged = bytearray(content)
        forged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / f"audit{suffix}").write_bytes(forged)
        assert findings(computed_once, tmp_path / f"audit{suffix}"), place


def test_what_is_forged_with_everything_that_belongs_to_it_is_found_by_computing_it(model, small, tmp_path):
    rng = np.random.default_rng(13)
    for path, forged in forged_records(data(small), 24, rng):
        file = forge(forged, tmp_path, shown=shown_by(forged, _page.page(data(small))))
        assert findings(functools.partial(explain.verify, model=model, x=X[:5], verbose=0), file), path


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("method", "value_norm"),
        ("task", "regression"),
        ("target", 0),
        ("layers", ["attention"]),
        ("feature_names", ["a", "b", "c", "d"]),
        ("feature_mask", [0, 1, 2, 3]),
        ("special_tokens", [NAMES[0]]),
        ("block", 2),
        ("tolerance", 0.5),
        ("level", 0.4),
        ("batch_size", 2),
        ("seed", 1),
    ],
)
def test_other_settings_are_verified_only_if_an_audit_with_them_is_the_same_file(
    model, small, tmp_path, setting, value
):
    record = data(small)
    record["settings"][setting] = value
    file = forge(record, tmp_path)
    if explain.verify(file, model, X[:5], verbose=0) == []:
        honest = explain.audit(model, X[:5], path=tmp_path / "honest.html", verbose=0, **{setting: value}).path
        assert honest.read_bytes() == file.read_bytes()


# --- Signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.backend_independent
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_lines_for_openssl_sign_the_page_and_find_a_changed_byte(small, tmp_path):
    page = (Path(__file__).parents[2] / "docs/learn/signed-audits.md").read_text()
    section = page[page.index("### With openssl") : page.index("### With minisign")]
    *before, check = re.findall("```bash\n(.*?)```", section, re.DOTALL)
    assert len(before) == 2
    run = functools.partial(subprocess.run, shell=True, cwd=tmp_path, capture_output=True, text=True)
    shutil.copy(small, tmp_path / "audit.html")
    for lines in before:
        result = run(f"set -e\n{lines}")
        assert result.returncode == 0, result.stderr
    result = run(check)
    assert (result.returncode, result.stdout.strip()) == (0, "Verified OK")

    content = bytearray(small.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "audit.html").write_bytes(content)
    result = run(check)
    assert (result.returncode, result.stdout.strip()) == (1, "Verification failure")


def test_numbers_of_a_small_unit_are_compared_in_that_unit(tmp_path):
    model = build()
    small = keras.Model(model.input, layers.Rescaling(1e-4)(model.output))
    small.compile(loss="mse")
    y = small.predict(X, verbose=0) + 1e-5 * RNG.normal(size=(60, 1))
    path = explain.audit(small, X, y, tmp_path / "audit.html", verbose=0).path
    assert explain.verify(path, small, X, y, verbose=0) == []
    record = json.loads(path.with_suffix(".json").read_text())
    assert 0 < record["skill"]["base_loss"] < 1e-8

    def forge(change):
        forged = copy.deepcopy(record)
        change(forged)
        forged["checksum"] = _file._checksum(forged)
        for file in (path, path.with_suffix(".json")):
            file.write_bytes(_file._content(forged, file.suffix))
        return explain.verify(path, small, X, y, verbose=0)

    def of_feature(forged):
        (claim, *_) = (claim for claim in forged["claims"] if claim["feature"] is not None)
        claim["statistic"]["value"] = -9e-6

    def of_ranking(forged):
        forged["faithfulness"]["tests"][0]["observed"] += 9e-6

    assert "claims" in forge(of_feature)[0]
    assert "skill" in forge(lambda forged: forged["skill"].update(base_loss=9e-6))[0]
    assert "faithfulness" in forge(of_ranking)[0]


def test_a_table_whose_columns_have_other_names_is_found(tmp_path):
    inputs = keras.Input((4,))
    tokens = FeatureTokenizer(4)(inputs)
    attended = layers.MultiHeadAttention(1, 2)(tokens, tokens)
    plain = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(attended)))
    names = ["age", "pulse", "weight", "height"]
    path = explain.audit(plain, X, feature_names=names[::-1], path=tmp_path / "audit.html", verbose=0).path
    assert explain.verify(path, plain, pd.DataFrame(X, columns=names[::-1]), verbose=0) == []
    (finding,) = explain.verify(path, plain, pd.DataFrame(X, columns=names), verbose=0)
    assert "other names, or another order" in finding
