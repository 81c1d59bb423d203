# %% [markdown] level="advanced" data="table"
# # An audit file for a regulated model
#
# **How do you hand over what a model attends to, so that someone else can check it, and can see whether a number was
# changed?**
#
# One call writes a page and a JSON file with 17 verdicts: 9 are supported, 0 refuted, 7 undetermined, and 1 feature is
# needed, but not claimed. After the verdicts in the JSON file are changed, the check reports the broken checksum and 7
# entries that differ.
#
# `explain.audit` says what the model is, what was found, and what the test of each finding gave. `explain.verify`
# computes all of it again. The credit applications below are simulated, so we know what the audit ought to find.

# %%
import tempfile
import textwrap
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

from kerasfactory import explain, plot
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Planted truth
#
# Of eight columns, three decide whether a loan is repaid. For an `employee`, it is the `income`. For everyone else, it
# is the `turnover` of the business. `receipts` is `turnover` as another system stored it: the same numbers with a
# little noise. The other four columns are noise. The query of the model is the token of `employee`, which chooses which
# of the others to read.

# %%
rng = np.random.default_rng(0)
names = ["employee", "income", "turnover", "receipts"]
names += ["age", "requests", "tenure", "region"]
x = rng.normal(size=(4300, 8)).astype("float32")
x[:, 0] = np.sign(x[:, 0])
x[:, 3] = x[:, 2] + 0.02 * x[:, 3]
y = (
    np.where(x[:, 0] > 0, x[:, 1], x[:, 2]) + 0.2 * rng.logistic(size=4300) > 0
).astype("float32")
x_train, x_test, y_train, y_test = x[:4000], x[4000:], y[:4000], y[4000:]

inputs = keras.Input((8,))
tokens = FeatureTokenizer(8, feature_names=names)(inputs)
attended = InterpretableMultiHeadAttention(
    8, n_head=1, dropout_rate=0.0, name="attention"
)(tokens[:, :1], tokens)
outputs = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(attended))
model = keras.Model(inputs, outputs, name="credit")
model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", metrics=["accuracy"])
model.fit(x_train, y_train, batch_size=64, epochs=8, verbose=0)
_, accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"Accuracy on 300 new applications: {accuracy:.1f}")

# %% [markdown]
# ## The audit
#
# The audit is one call, on data that the model was not trained on. It writes a page, which opens in any browser without
# a network, and a JSON file with the same data for programs. It returns a report that has the claims as a table.

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
report = explain.audit(
    model, x_test, y_test, folder / "audit.html", batch_size=4096, verbose=0
)
print("Files:", ", ".join(sorted(file.name for file in folder.iterdir())))
for claim in report.claims[report.claims["feature"].isna()].itertuples():
    line = f"{claim.verdict}: {claim.claim}"
    print(textwrap.fill(line, 60, subsequent_indent="    "))

# %% tags=["cover"] alt="Four bars: of 17 claims, 9 are supported, 0 refuted, 7 undetermined, and 1 is a feature that is needed, but not claimed."
counts = report.claims["verdict"].value_counts()
verdicts = {
    "supported": "#0072b2",
    "refuted": "#d55e00",
    "undetermined": "gray",
    "needed, not claimed": "#009e73",
}
number = [counts.get(verdict, 0) for verdict in verdicts]
print(f"Claims: {len(report.claims)}")
for verdict, count in zip(verdicts, number, strict=True):
    print(f"    {verdict}: {count}")

fig, ax = plt.subplots(figsize=(4.9, 2.6), layout="constrained")
bars = ax.barh(list(verdicts), number, color=verdicts.values())
ax.bar_label(bars, fontsize=12, padding=4)
ax.set_xticks([])
ax.set_xlim(0, 1.15 * max(number))
ax.set_title(f"{len(report.claims)} claims about the model")
ax.invert_yaxis()
plt.show()

# %% [markdown]
# A claim with a p-value is *supported* only if that p-value, adjusted for all claims in the file, is at most 0.05. The
# first claim has none: it is checked exactly, up to rounding. A claim is *refuted* if the data speak against it, and
# *undetermined* if they do not decide. Undetermined is a result, too: one model cannot show what other seeds would do.
# With fewer samples than claims, only the first claim is tested.
#
# A verdict on a model that has learned nothing is worth nothing. The audit therefore states the skill: 1 minus the
# ratio of the model's loss to that of the best constant prediction. 0 is no better than a constant, and 1 is perfect.

# %%
skill = report.record["skill"]
low, high = skill["skill_interval"]
print(f"Skill: {skill['skill']:.2f} ({low:.2f} to {high:.2f})")

# %% [markdown]
# This is the page, as you would hand it over. It says what the verdicts assume. The first assumption is that the model
# was not trained on these rows. The page cannot show that.

# %% tags=["interactive", "nbval-ignore-output"]
report

# %% [markdown]
# ## Which features?
#
# A feature is claimed to matter if its attention is above the mean of all features. The test resamples its values given
# the other features, and checks whether the model does worse. Columns that nearly determine each other are tested one
# by one, and together as well.

# %%
truth = (
    dict.fromkeys(names, "noise")
    | dict.fromkeys(names[:3], "decides")
    | {"receipts": "a copy"}
)
found = report.features
print(f"mean attention: {found['attribution'][names].mean():.3f}\n")
print(f"{'column':9}{'planted':9}{'attention':11}verdict")
for name in names:
    attention, verdict = found.loc[name, ["attribution", "verdict"]]
    print(f"{name:9}{truth[name]:9}{attention:<11.2f}{verdict}")
for name in found.index.difference(names):
    print(f"together, {name}: {found.loc[name, 'verdict']}")

# %% [markdown]
# The same test, without an audit around it, is `explain.feature_claims`. `plot.features` draws what it returns, with
# intervals:

# %% alt="The increase of the loss without each of eight features and one pair, with its interval and verdict. Turnover + receipts, supported, employee, needed but not claimed, and income, supported, lie far above zero. Turnover and receipts one by one and the four noise columns, all undetermined, lie at zero."
attribution = explain.attribute(model, x_test, verbose=0)
ax = plot.features(
    explain.feature_claims(
        model, x_test, y_test, attribution, batch_size=4096, verbose=0
    )
)
ax.set_xlabel("increase of the loss without it")
plt.show()

# %% [markdown]
# - `income` is *supported*: it gets more attention than the mean, and it tells the model what the other columns do not.
# - `turnover` decides as well, but its copy says the same. The model hardly does worse without one of the two. So both
#   are *undetermined*: it would be wrong to say that the model needs `turnover`. Without the pair it does much worse,
#   so the pair is *supported*: at least one of the two matters, and the data cannot tell which.
# - `employee` is *needed, not claimed*. It makes a large difference, but gets less attention than the mean. The model
#   uses it as the query, and a map shows only the keys that are looked at.
# - The four noise columns are *undetermined*: their attention is below the mean, so nothing is claimed about them.
#
# ## Does it still hold?
#
# `verify` is for the person who receives the file, the model and the data. It returns a list of sentences that say what
# no longer holds. An empty list means that everything holds.

# %%
print(explain.verify(report, model, x_test, y_test, verbose=0))

# %% [markdown]
# Now we turn the undetermined claims into supported ones, in the JSON file:

# %%
json_file = folder / "audit.json"
json_file.write_text(json_file.read_text().replace('"undetermined"', '"supported"'))
for sentence in explain.verify(report, model, x_test, y_test, verbose=0):
    print(textwrap.fill(f"- {sentence}", 60, subsequent_indent="  "))
temporary.cleanup()

# %% [markdown]
# The checksum shows the change before anything is computed. If someone forges the checksums as well, the verdicts
# differ when `verify` computes them again. If someone changes what the page shows, it differs when `verify` renders it
# again from its data. `verify` also reports changed weights, a changed configuration, changed data and different
# package versions, and it names what was not given and could not be checked. The page is enough for all this, because
# it contains its data.
#
# ## What it says, and what it does not
#
# **It says** that the captured scores are the model's, that the output depends on them, and that the model does worse
# without its attention. It says that the output depends on the features ranked first more than on others, and that the
# ranking depends on the learned weights. And it says that the model needs `income`, one of `turnover` and `receipts`,
# and `employee`, which attention does not put first.
#
# **It does not say** which of `turnover` and `receipts` the model needs, or that the model is good, fair or causal. It
# assumes that these rows are new to the model and independent of each other. Rows of one patient or of one day are not
# independent, and `groups=` tells the audit so. Whether another training run would attend to the same features is left
# open here: with `models=[...]` from other seeds, [an audit tests that, too](seeds.ipynb).
# [`explain.calibrate`](calibrate.ipynb) counts how often such verdicts are wrong on models like yours. And the
# checksums are not a signature: they show that a file was changed, not who made it. [Sign an
# audit](../learn/signed-audits.md) shows how to sign the page, and what a signature proves that `verify` does not.
#
# For many rows, see [An audit of more rows than you can test](audit_many_rows.ipynb).
#
# **Use your own data:** replace `model`, `x_test` and `y_test` in the call of `explain.audit`, and the path of the
# file. The data must be new to the model. `truth` is for data whose answer is known.
