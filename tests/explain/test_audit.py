"""An audit says what holds, and `verify` what no longer does."""

import html
import json
import os
import platform
import re
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers

import kerasfactory
from kerasfactory import explain
from kerasfactory.explain._audit import audit as _audit
from kerasfactory.explain._audit import claims as _audit_claims
from kerasfactory.explain._audit import file as _audit_file
from kerasfactory.explain._audit import page as _page
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

NAMES = ["decides", "helps", "noise", "more noise"]
RNG = np.random.default_rng(3)
X = RNG.normal(size=(200, 4)).astype("float32")
Y = (2 * X[:, 0] + X[:, 1] > 0).astype("float32")


def build(names=NAMES, width=8):
    inputs = keras.Input((len(names),))
    tokens = FeatureTokenizer(width, feature_names=names)(inputs)
    attended = InterpretableMultiHeadAttention(4, 2, dropout_rate=0.0, name="attention")(tokens)
    outputs = layers.Dense(1, activation="sigmoid")(layers.Flatten()(attended))
    model = keras.Model(inputs, outputs, name="planted")
    model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy")
    return model


def trained(seed):
    keras.utils.set_random_seed(seed)
    model = build()
    model.fit(X, Y, batch_size=100, epochs=30, verbose=0)
    return model


@pytest.fixture(scope="module")
def model():
    return trained(0)


@pytest.fixture(scope="module")
def others():
    return [trained(1), trained(2)]


@pytest.fixture(scope="module")
def report(model, others, tmp_path_factory):
    return explain.audit(model, X, Y, tmp_path_factory.mktemp("audit") / "audit.html", models=others, verbose=0)


@pytest.fixture(scope="module")
def written(report):
    return report.path


@pytest.fixture
def copied(written, tmp_path):
    """A copy of the audit, to be tampered with."""
    for file in (written, written.with_suffix(".json")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / written.name


def data(path):
    return json.loads(Path(path).with_suffix(".json").read_text())


def by_id(record):
    return {claim["id"]: claim for claim in record["claims"]}


def leaves(value, path=()):
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, (*path, key))
    else:
        yield path, value


def changed(record, path, value):
    """The record with another value at a path; the rest is shared."""
    if not path:
        return value
    copy = dict(record) if isinstance(record, dict) else list(record)
    copy[path[0]] = changed(record[path[0]], path[1:], value)
    return copy


def test_an_audit_says_what_was_audited_and_how_each_claim_came_out(model, written):
    record = data(written)
    assert written.name == "audit.html"
    assert {"model", "data", "environment", "capture", "claims"} <= set(record)
    assert record["model"]["parameters"] == model.count_params()
    assert record["data"]["feature_names"] == NAMES
    assert record["data"]["shape"] == [200, 4]
    assert record["environment"]["backend"].startswith(keras.config.backend())
    assert record["capture"]["layers"][0]["layer"] == "attention"
    assert record["capture"]["layers"][0]["recomposition_error"] < 1e-5
    for claim in record["claims"]:
        assert {"claim", "verdict", "statistic", "p_value", "interval", "reason"} <= set(claim)
        assert claim["verdict"] in ("supported", "refuted", "undetermined")
        assert claim["reason"]
    assert by_id(record)["capture"]["verdict"] == "supported"
    by_feature = {claim["feature"]: claim for claim in record["claims"] if claim["feature"]}
    assert list(by_feature) == NAMES
    assert by_feature["noise"]["verdict"] != "supported"
    assert by_feature["more noise"]["verdict"] != "supported"


def test_weights_are_shuffled_and_other_seeds_are_asked(model, others, written):
    record = data(written)
    shuffled, seeds = (by_id(record)[name] for name in ("randomization", "seeds"))
    expected = explain.parameter_randomization(model, X, verbose=0)
    assert shuffled["statistic"]["value"] == pytest.approx(expected["median_kept"].item(), abs=1e-5)
    assert (shuffled["verdict"] == "supported") == (shuffled["interval"][1] <= 0.5)
    of_models = [explain.attribute(one, X, verbose=0) for one in (model, *others)]
    assert seeds["statistic"]["value"] == explain.seed_agreement(of_models)["overlap"].item()
    assert len(record["seeds"]["models"]) == 2
    # Three models that choose one of four: by chance all are of one mind in 1 of 16 cases.
    assert seeds["verdict"] == "undetermined"
    assert record["seeds"]["p_value"] > 0.04


@pytest.mark.backend_independent
def test_a_claim_is_found_by_its_id(written):
    assert list(by_id(data(written))) == [
        "capture",
        "attention-uniform",
        "attention-permuted",
        "attention-loss",
        "ranking-comprehensiveness",
        "ranking-sufficiency",
        "randomization",
        "seeds",
        *(f"feature/{name}" for name in NAMES),
    ]


@pytest.mark.backend_independent
def test_rankings_are_tested_as_by_faithfulness(model, written):
    record = data(written)
    attribution = explain.attribute(model, X, verbose=0)
    draws = 12 - 1  # claims that a test decides
    expected = explain.faithfulness(model, X, attribution, draws=max(200, 20 * draws), verbose=0)
    for name, suffix in (("comprehensiveness", ""), ("sufficiency", "_sufficiency")):
        claim = by_id(record)[f"ranking-{name}"]
        assert claim["statistic"] == {"name": f"AOPC {name}", "value": pytest.approx(expected[f"aopc_{name}"].item())}
        assert claim["p_value"] == pytest.approx(expected[f"p_value{suffix}"].item())
        assert claim["interval"] == pytest.approx(expected[f"interval{suffix}"].values.tolist())
    assert record["faithfulness"]["tests"][1]["removed"] == (4 - expected["removed"].values).tolist()


@pytest.mark.backend_independent
def test_the_report_is_a_table_of_claims_and_one_of_features(report):
    record = data(report)
    assert list(report.claims.index) == list(by_id(record))
    assert report.claims.index.name == "id"
    for name, claim in by_id(record).items():
        row = report.claims.loc[name]
        assert {key: row[key] for key in ("claim", "verdict", "reason")} == {
            key: claim[key] for key in ("claim", "verdict", "reason")
        }
        assert row["statistic"] == claim["statistic"]["name"]
        assert pd.isna(row["feature"]) if claim["feature"] is None else row["feature"] == claim["feature"]
        lower, upper = claim["interval"] or (None, None)
        numbers = [claim["statistic"]["value"], lower, upper, claim["p_value"], claim["p_adjusted"]]
        shown = row[["value", "lower", "upper", "p_value", "p_adjusted"]].astype(float)
        np.testing.assert_array_equal(shown, np.array(numbers, float))

    assert report.features.index.name == "feature"
    assert report.features.index.tolist() == NAMES
    for found in record["attribution"]["features"]:
        row, claim = report.features.loc[found["feature"]], by_id(record)[f"feature/{found['feature']}"]
        assert row["attribution"] == found["attribution"]
        assert [row["attribution_lower"], row["attribution_upper"]] == found["interval"]
        assert [row["effect_lower"], row["effect_upper"]] == claim["interval"]
        assert row["effect"] == claim["statistic"]["value"]
        assert [row["p_value"], row["p_adjusted"]] == [claim["p_value"], claim["p_adjusted"]]
        assert row["verdict"] == claim["verdict"]
    assert {key: value for key, value in record.items() if key not in ("page", "checksum")} == report.record


@pytest.mark.backend_independent
def test_the_report_can_be_used_as_the_path_of_its_page(model, others, report):
    assert report.path == Path(report) == Path(os.fspath(report))
    with open(report) as file:
        assert file.readline() == "<!DOCTYPE html>\n"
    assert explain.verify(report, model, X, Y, models=others, batch_size=64, verbose=0) == []
    verdicts = report.claims["verdict"].value_counts()
    assert repr(report) == str(report)
    assert repr(report) == (
        f"<Audit of planted: {verdicts['supported']} supported, {verdicts.get('refuted', 0)} refuted, "
        f"{verdicts['undetermined']} undetermined, in audit.html>"
    )


@pytest.mark.backend_independent
def test_without_a_path_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = explain.audit(model, X[:5], Y[:5], verbose=0)
    assert not list(tmp_path.iterdir())
    assert report.path is None
    assert report.claims["verdict"].tolist() == ["supported", *["undetermined"] * 11]
    assert report.features[["effect", "p_value"]].isna().all(axis=None)
    assert repr(report) == "<Audit of planted: 1 supported, 0 refuted, 11 undetermined>"
    assert "1 supported, 0 refuted, 11 undetermined" in report._repr_html_()
    for used in (os.fspath, open, lambda path: explain.verify(path, model, X[:5])):
        with pytest.raises(ValueError, match=r'not written to a file.*path="audit\.html"'):
            used(report)


@pytest.mark.backend_independent
def test_a_notebook_shows_the_page_in_a_box_where_nothing_runs(report):
    shown = report._repr_html_()
    assert "\n" not in shown
    title, sandbox, source = re.fullmatch(
        r'<div><iframe title="([^"]*)" sandbox="([^"]*)" style="[^"]*" srcdoc="([^"]*)"></iframe></div>', shown
    ).groups()
    assert (title, sandbox) == ("Audit of planted", "")
    assert html.unescape(source) == _page.page(report.record)


@pytest.mark.backend_independent
def test_a_feature_may_have_the_name_of_a_number_in_the_file():
    claim = {
        "id": "feature/a/p_value",
        "claim": "a",
        "feature": "a",
        "verdict": "supported",
        "statistic": {"value": 0.1},
    }
    before = {"claims": [claim], "skill": None, "faithfulness": None, "attribution": {"features": []}}
    now = changed(before, ("claims", 0, "statistic", "value"), 0.11)
    found = _audit_file.differences(before, now, 1e-5)
    assert found == ["In “claims”, feature/a/p_value/statistic/value was 0.1 and is now 0.11."]


@pytest.mark.backend_independent
def test_p_values_are_adjusted_for_all_claims_together(written):
    tested = [claim for claim in data(written)["claims"] if claim["p_value"] is not None]
    assert len(tested) > len(NAMES)
    assert {claim["is_made"] for claim in tested} == {True, False}
    for is_made in (True, False):  # each is in focus by itself, beside all that is tested
        ranked = sorted((c for c in tested if c["is_made"] == is_made), key=lambda claim: claim["p_value"])
        for rank, claim in enumerate(ranked):
            by_hand = min(len(tested) / (later + 1) * ranked[later]["p_value"] for later in range(rank, len(ranked)))
            assert claim["p_adjusted"] == pytest.approx(min(by_hand, 1))
            assert claim["verdict"] in ("undetermined", "refuted") or claim["p_adjusted"] <= 0.05


@pytest.mark.backend_independent
def test_what_is_refuted_is_adjusted_for_all_claims_too():
    def claim(verdict, p_value, p_opposite, is_made=True):
        return {"verdict": verdict, "p_value": p_value, "p_opposite": p_opposite, "is_made": is_made, "reason": "."}

    claims = [claim("refuted", 1.0, p) for p in (0.001, 0.01, 0.04)] + [claim("undetermined", 0.5, 0.5)] * 5
    claims += [claim("needed, not claimed", 0.02, 1.0, is_made=False)]
    _audit_claims.judge(claims, 0.05)
    assert [one["verdict"] for one in claims[:3]] == ["refuted", "refuted", "undetermined"]  # 9 / 3 * 0.04 > 0.05
    assert claims[-1]["verdict"] == "undetermined"  # 9 / 1 * 0.02
    assert claims[-1]["p_adjusted"] == pytest.approx(0.18)


def test_the_same_audit_is_the_same_file(model, others, written, tmp_path):
    again = explain.audit(model, X, Y, tmp_path / "audit.html", models=others, verbose=0).path
    for suffix in (".html", ".json"):
        assert again.with_suffix(suffix).read_bytes() == written.with_suffix(suffix).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["audit.html", "audit.json"]


@pytest.mark.backend_independent
def test_an_audit_tells_nothing_of_the_machine(written):
    for suffix in (".html", ".json"):
        text = written.with_suffix(suffix).read_text()
        for private in (platform.node(), os.getcwd(), os.path.expanduser("~")):
            assert private == "/" or private not in text
        assert not re.search(r"20\d\d-[01]\d|\d\d:\d\d", re.sub(r"[0-9a-f]{64}", "", text))  # no date and no time


def test_what_holds_is_verified_for_the_loaded_model(model, others, written, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert explain.verify(written.with_suffix(".json"), loaded, X, Y, models=others, verbose=0) == []


@pytest.mark.backend_independent
def test_what_was_not_checked_is_a_finding(model, written, monkeypatch):
    version = np.__version__
    monkeypatch.setattr(np, "__version__", "9.9.9")
    found = explain.verify(written, model, X, verbose=0)
    assert len(found) == 3
    assert f"cannot be checked with numpy 9.9.9: the audit was made with numpy {version}" in found[0]
    assert "the claims about the loss and about single features were not checked" in found[1]
    assert "claim about models from other seeds was not checked" in found[2]


@pytest.mark.backend_independent
def test_claims_that_are_not_checked_are_still_judged_with_the_others(model, others, tmp_path, monkeypatch):
    """Beside one more small p-value a claim can be supported that is not without it."""
    made = _audit._record

    def with_p_values(model, x, y, background, groups, models, *settings):
        record = made(model, x, y, background, groups, models, *settings)
        of_seeds = by_id(record)["seeds"]
        for claim in record["claims"]:
            if claim["p_value"] is not None:
                claim["p_value"], claim["verdict"], claim["is_made"] = 0.9, "undetermined", True
        tested = [claim for claim in record["claims"] if claim["p_value"] is not None and claim is not of_seeds]
        for claim, p_value in zip(tested, (0.001, 0.001, 0.001, 0.022), strict=False):
            claim["p_value"], claim["verdict"] = p_value, "supported"
        if models:
            of_seeds["p_value"], of_seeds["verdict"] = 0.001, "supported"
        return record

    monkeypatch.setattr(_audit, "_record", with_p_values)
    path = explain.audit(model, X, Y, tmp_path / "audit.html", models=others, verbose=0)
    supported = [claim for claim in data(path)["claims"] if claim["verdict"] == "supported"]
    assert len(supported) == 6  # the capture, and five: 11 / 5 * 0.022 is less than 0.05, and 10 / 4 * 0.022 is not
    (found,) = explain.verify(path, model, X, Y, verbose=0)
    assert "models from other seeds was not checked" in found


def test_other_weights_configurations_data_labels_and_seeds_are_noticed(model, others, written):
    other = keras.Model.from_config(model.get_config() | {"name": "renamed"})
    other.set_weights([weight + 0.3 for weight in model.get_weights()])
    other.compile(loss="binary_crossentropy")
    found = explain.verify(written, other, X, Y, models=others, verbose=0)
    assert "The weights of the model are not those that were audited." in found
    assert "The configuration of the model is not the one that was audited." in found
    assert "In “model”, name was planted and is now renamed." in found
    assert any(re.match(r"In “attribution”, features/0/attribution was .* and is now", one) for one in found)

    moved, flipped = X.copy(), Y.copy()
    moved[17, 2] += 1e-3
    flipped[5] = 1 - flipped[5]
    found = explain.verify(written, model, moved, flipped, models=others[:1], verbose=0)
    assert {
        "The data are not those of the audit.",
        "The labels are not those of the audit.",
        "The models from other seeds are not those of the audit.",
    } <= set(found)
    assert not any("weights of the model" in one for one in found)
    (found,) = explain.verify(written, model, X[:, :3], Y, verbose=0)
    assert "a sample has shape [3], and had [4]" in found


@pytest.mark.backend_independent
def test_every_number_that_is_changed_in_the_data_is_noticed(model, copied):
    record = data(copied)
    numbers = [(path, leaf) for path, leaf in leaves(record) if isinstance(leaf, int | float)]
    assert len(numbers) > 100
    json_file, page = copied.with_suffix(".json"), copied.read_text()
    before = json_file.read_text()
    for path, number in numbers:
        other = number + 1 if isinstance(number, int) else float(np.nextafter(number, 2))
        json_file.write_text(json.dumps(changed(record, path, other), indent=1) + "\n")
        findings = explain.verify(json_file, model, X, Y)
        assert any("audit.json were changed" in sentence for sentence in findings), path
        assert any("audit.html and audit.json differ" in sentence for sentence in findings), path
    json_file.write_text(before)

    rng = np.random.default_rng(0)
    for position in rng.choice([match.start() for match in re.finditer(r"[0-9]", page)], 100, replace=False):
        digit = str((int(page[position]) + 1) % 10)
        copied.write_text(page[:position] + digit + page[position + 1 :])
        try:
            findings = explain.verify(copied, model, X, Y)
        except ValueError as error:  # no JSON any more, or another schema
            findings = [str(error)]
        assert findings, page[position - 40 : position + 40]


@pytest.mark.backend_independent
def test_a_number_changed_with_its_checksums_is_noticed_by_computing_it_again(model, others, copied):
    record = data(copied)
    claim = by_id(record)["feature/noise"]
    claim["verdict"], claim["p_value"], claim["statistic"]["value"] = "supported", 1e-4, 0.3
    _audit_file.save(record, copied, copied.with_suffix(".json"))
    findings = explain.verify(copied, model, X, Y, models=others, verbose=0)
    assert any("noise" in sentence and "was supported and is now" in sentence for sentence in findings)
    assert any("statistic/value was 0.3" in sentence for sentence in findings)


@pytest.mark.backend_independent
def test_a_page_that_does_not_show_its_data_is_noticed(model, copied):
    copied.write_text(copied.read_text().replace(">supported<", ">proven<"))
    assert explain.verify(copied, model, X, Y) == ["audit.html does not show what its data say."]


@pytest.mark.backend_independent
@pytest.mark.parametrize("suffix", [".html", ".json"])
def test_one_file_alone_is_enough(model, others, copied, suffix):
    (other,) = {".html", ".json"} - {suffix}
    copied.with_suffix(other).unlink()
    assert explain.verify(copied.with_suffix(suffix), model, X, Y, models=others, verbose=0) == []
    copied.with_suffix(suffix).write_text("{}")
    with pytest.raises(ValueError, match=rf"audit\{suffix} is not an audit"):
        explain.verify(copied.with_suffix(suffix), model, X, Y)


@pytest.mark.backend_independent
def test_files_that_are_not_audits_are_neither_read_nor_overwritten(model, copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.html"):
        explain.verify(tmp_path / "nothing.html", model, X)
    with pytest.raises(ValueError, match=r"must end in \.html"):
        explain.audit(model, X, Y, tmp_path / "audit.pdf")
    with pytest.raises(FileNotFoundError, match="no folder"):
        explain.audit(model, X, Y, tmp_path / "missing" / "audit.html")
    for version in (2, 99):
        other = re.sub(r"audit/\d+", f"audit/{version}", copied.with_suffix(".json").read_text())
        (tmp_path / "other.json").write_text(other)
        (found,) = explain.verify(tmp_path / "other.json", model, X)
        assert f"other.json cannot be checked with kerasfactory {kerasfactory.__version__}, which reads" in found
        assert f"it is kerasfactory.audit/{version}. Verify it with the version that made it" in found
    for name in ("page.html", "page.json"):
        foreign = tmp_path / name
        foreign.write_text("<h1>mine</h1>")
        with pytest.raises(ValueError, match=f"{name} is not an audit"):
            explain.verify(foreign, model, X)
        with pytest.raises(FileExistsError, match=f"{name} exists and is not an audit"):
            explain.audit(model, X, Y, tmp_path / "page.html")
        assert foreign.read_text() == "<h1>mine</h1>"
        foreign.unlink()


@pytest.mark.backend_independent
def test_what_cannot_be_written_leaves_what_was_there(copied, monkeypatch):
    before = copied.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        _audit_file.save({**data(copied), "skill": None}, copied, copied.with_suffix(".json"))
    assert copied.read_bytes() == before
    assert sorted(file.name for file in copied.parent.iterdir()) == ["audit.html", "audit.json"]


@pytest.mark.backend_independent
def test_bad_input_is_refused(model, tmp_path):
    path = tmp_path / "audit.html"
    gap = X.copy()
    gap[[4, 9], 1] = np.nan
    with pytest.raises(ValueError, match=r"2 of 200 samples have NaN .* number 4"):
        explain.audit(model, gap, Y, path)
    with pytest.raises(ValueError, match=r"one label for each sample in `x`, 200\. Received: 199"):
        explain.audit(model, X, Y[:-1], path)
    with pytest.raises(ValueError, match=r"`y` must hold finite numbers"):
        explain.audit(model, X, np.where(X[:, 0] > 2, np.nan, Y), path)
    with pytest.raises(ValueError, match="Expected the following keys"):
        explain.audit(model, {"x": X}, Y, path)
    with pytest.raises(ValueError, match="at least one sample"):
        explain.audit(model, X[:0], Y[:0], path)
    with pytest.raises(ValueError, match="`background` must hold samples like those of `x`"):
        explain.audit(model, X, Y, path, background=X[:, :2])
    with pytest.raises(ValueError, match="`level` must be a number between 0 and 0"):
        explain.audit(model, X, Y, path, level=95)
    with pytest.raises(ValueError, match="`models` must be a list"):
        explain.audit(model, X, Y, path, models=model)
    with pytest.raises(ValueError, match="a copy would agree with itself"):
        explain.audit(model, X, Y, path, models=[model])
    assert not list(tmp_path.iterdir())


@pytest.mark.backend_independent
@pytest.mark.parametrize("samples", [1, 7])
def test_more_claims_than_samples_decide_nothing(model, tmp_path, samples):
    record = data(explain.audit(model, X[:samples], Y[:samples], tmp_path / "audit.html", verbose=0))
    claims = by_id(record)
    first, others = claims.pop("capture"), claims.values()
    assert first["verdict"] == "supported"
    assert {claim["verdict"] for claim in others} == {"undetermined"}
    assert {claim["p_value"] for claim in others} == {None}
    assert all("fewer than the" in claim["reason"] for claim in others)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("whole", "tested", "clusters"),
    [({"block": 5}, 110, 22), ({"groups": np.repeat(np.arange(40), 5)}, 110, 22), ({}, 100, 100)],
)
def test_claims_are_tested_on_some_samples_and_what_belongs_together_stays_so(model, tmp_path, whole, tested, clusters):
    page = tmp_path / "audit.html"
    record = data(explain.audit(model, X, Y[:, None], path=page, max_samples=110, **whole, verbose=0).path)
    assert (record["data"]["tested"], record["features"]["clusters"]) == (tested, clusters)  # else runs of 100
    attribution = explain.attribute(model, X, verbose=0).values.mean(axis=0)
    np.testing.assert_allclose(
        [one["attribution"] for one in record["attribution"]["features"]], attribution, rtol=1e-4
    )
    assert f"The claims are tested on {tested} of the 200 samples, drawn at random" in page.read_text()
    given = {"groups": whole["groups"]} if "groups" in whole else {}
    assert explain.verify(page, model, X, Y[:, None], **given, verbose=0) == []


@pytest.mark.backend_independent
def test_a_constant_feature_and_missing_labels_leave_claims_undetermined(model, tmp_path):
    constant = X[:100].copy()
    constant[:, 2] = 0.5
    record = data(explain.audit(model, constant, Y[:100], tmp_path / "audit.html", verbose=0))
    claim = by_id(record)["feature/noise"]
    assert (claim["verdict"], claim["p_value"]) == ("undetermined", None)
    assert "constant" in claim["reason"]

    record = data(explain.audit(model, X[:30], path=tmp_path / "audit.html", verbose=0))
    about = [claim for claim in record["claims"] if claim["feature"]]
    assert {claim["verdict"] for claim in about} == {"undetermined"}
    assert all("Without labels" in claim["reason"] for claim in about)
    assert record["data"]["labels"] is None


@pytest.mark.backend_independent
def test_names_are_text_and_nothing_else(tmp_path):
    names = ["</script><script>alert(1)</script>", '<!-- & "quoted"', "ä\u2028 \\u003c", "d"]
    model = build(names)
    # Among the signs that TensorFlow takes in a model's name, `>` alone is one of HTML's.
    report = explain.audit(keras.Model(model.input, model.output, name="credit->risk"), X[:30], verbose=0)
    shown = report._repr_html_()
    assert shown.startswith('<div><iframe title="Audit of credit-&gt;risk" sandbox=""')
    assert shown.count("<") == shown.count(">") == 4
    assert report.features.index.tolist() == names
    path = explain.audit(model, X[:30], path=tmp_path / "audit.html", verbose=0).path
    text = path.read_text()
    assert text.count("<script") == text.count("</script>") == 1
    assert "alert(1)" in text
    assert "<!--" not in text
    assert json.loads(re.search(r"<script[^>]*>(.*)</script>", text, re.DOTALL)[1]) == data(path)
    assert data(path)["data"]["feature_names"] == names


def test_the_model_stays_as_it_was_and_progress_is_shown(model, tmp_path, monkeypatch, capsys):
    weights = model.get_weights()
    before = [dict(vars(layer)) for layer in model._flatten_layers()]
    x = X[:30].copy()
    bar, told = keras.utils.Progbar.update, []  # of which it shows some each second
    monkeypatch.setattr(
        keras.utils.Progbar,
        "update",
        lambda self, *args, **options: told.append((self, args[0])) or bar(self, *args, **options),
    )
    explain.audit(model, x, Y[:30], tmp_path / "audit.html", verbose=1)
    assert [dict(vars(layer)) for layer in model._flatten_layers()] == before
    assert all(map(np.array_equal, weights, model.get_weights()))
    np.testing.assert_array_equal(x, X[:30])
    assert "100/100" in capsys.readouterr().out
    (_,) = {id(bar) for bar, _ in told if bar.verbose}  # one bar, for all parts
    reached = [percent for bar, percent in told if bar.verbose]
    assert reached == sorted(reached)
    assert len(set(reached)) > 8  # for few samples it leaps


@pytest.mark.backend_independent
def test_numbers_of_numpy_are_settings_too(model, tmp_path):
    report = explain.audit(
        model, X[:5], Y[:5], tmp_path / "audit.html", batch_size=np.int64(16), seed=np.int64(1), verbose=0
    )
    assert data(report)["settings"]["seed"] == 1
    assert explain.verify(report, model, X[:5], Y[:5], verbose=0) == []


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_names": {"a", "b", "c", "d"}}, "`feature_names` must be a list of strings"),
        ({"feature_names": "abcd"}, "`feature_names` must be a list of strings"),
        ({"models": None}, "`models` must be a list"),
        ({"path": "audit.txt"}, r"`path` must end in \.html; the JSON file goes beside it"),
    ],
)
def test_arguments_of_another_kind_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        explain.audit(model, X, Y, verbose=0, **arguments)


@pytest.mark.backend_independent
def test_reasons_hold_no_address_of_memory(tmp_path):
    def scalar(y, outputs):
        return keras.ops.mean((y - outputs) ** 2)

    model = build(NAMES)
    model.compile(loss=scalar)
    report = explain.audit(model, X[:30], Y[:30], verbose=0)
    (reason,) = set(report.claims["reason"][report.claims["feature"].notna()])
    assert "loss=scalar" in reason
    assert "0x" not in reason
