# %% [markdown] level="advanced"
# # An audit file for a regulated model
#
# **How do you hand over what a model attends to so that somebody else can check it, and sees at once whether a number was changed?**
#
# `explain.audit` writes one file that says what the model is, what was found, and how each finding came out of its test. `explain.verify` computes all of it again. The applications for credit below are
# simulated, so we know what the audit ought to find.

# %%
import tempfile
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
# Of eight columns, three decide whether a loan is repaid: for an `employee` the `income`, for everybody else the
# `turnover` of the business. `receipts` is `turnover` as another system stored it, the same numbers up to a little noise.
# The other four are noise. The model asks with the token of `employee` which of the others to read.

# %%
rng = np.random.default_rng(0)
names = ["employee", "income", "turnover", "receipts", "age", "requests", "tenure", "region"]
x = rng.normal(size=(4300, 8)).astype("float32")
x[:, 0] = np.sign(x[:, 0])
x[:, 3] = x[:, 2] + 0.02 * x[:, 3]
y = (np.where(x[:, 0] > 0, x[:, 1], x[:, 2]) + 0.2 * rng.logistic(size=4300) > 0).astype("float32")
x_train, x_test, y_train, y_test = x[:4000], x[4000:], y[:4000], y[4000:]

inputs = keras.Input((8,))
tokens = FeatureTokenizer(8, feature_names=names)(inputs)
attended = InterpretableMultiHeadAttention(d_model=8, n_head=1, dropout_rate=0.0, name="attention")(
    tokens[:, :1], tokens
)
outputs = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(attended))
model = keras.Model(inputs, outputs, name="credit")
model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", metrics=["accuracy"])
model.fit(x_train, y_train, batch_size=64, epochs=8, verbose=0)
_, accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"Accuracy on 300 new applications: {accuracy:.1f}")

# %% [markdown]
# ## The audit
#
# One call, on data that the model was not trained on. It writes a page, which opens in any browser without a network, and
# beside it the same data as JSON, for programs. What it returns has the claims as a table.

# %%
folder = Path(tempfile.mkdtemp())
report = explain.audit(model, x_test, y_test, folder / "audit.html", batch_size=4096, verbose=0)
print("Files:", ", ".join(sorted(file.name for file in folder.iterdir())))
for claim in report.claims[report.claims["feature"].isna()].itertuples():
    print(f"{claim.verdict:13} {claim.claim}")

# %% [markdown]
# A claim is *supported* only if its p-value is still at most 0.05 when it is adjusted for all claims in the file. It is
# *refuted* if the data speak against it, and *undetermined* if they leave it open. That is a result, too: one model cannot
# tell what other seeds would do. With fewer samples than claims, only the first claim is tested.
#
# This is the page, as you would hand it over:

# %% tags=["interactive", "nbval-ignore-output"]
report

# %% [markdown]
# ## Which features?
#
# A feature is claimed to matter if its attention is above the mean of all. The test resamples its values given the other
# features, and checks whether the model does worse.

# %%
truth = dict.fromkeys(names, "noise") | dict.fromkeys(names[:3], "decides") | {"receipts": "a copy"}
for name, found in report.features.iterrows():
    above = "above the mean" if found["attribution"] > 1 / 8 else "below the mean"
    print(f"{name:9} planted: {truth[name]:8} attention: {above}   verdict: {found['verdict']}")

# %% [markdown]
# The same test, without an audit around it, is `explain.feature_claims`. `plot.features` draws what it returns:

# %% tags=["cover"] alt="The increase of the loss without each of eight features, with its interval and verdict. Employee, undetermined, and income, supported, lie far above zero; turnover and receipts, refuted, and the four noise columns, undetermined, lie at zero."
attribution = explain.attribute(model, x_test, verbose=0)
ax = plot.features(explain.feature_claims(model, x_test, y_test, attribution, batch_size=4096, verbose=0))
ax.set_xlabel("increase of the loss without the feature, with its interval")
plt.show()

# %% [markdown]
# `income` passes. `turnover` decides as well, and the model attends to it; but its copy says the same, so the model does
# no worse without either, and a statement that it *needs* one of them would be wrong. `employee` makes the largest
# difference of all and gets hardly any attention: the model uses it to ask, and a map shows only what is looked at.
# Attention makes no claim about it, so there is none to support.
#
# ## Does it still hold?
#
# `verify` is for whoever receives the file, with the model and the data. It returns what no longer holds, sentence by
# sentence. Nothing is the good answer.

# %%
print(explain.verify(report, model, x_test, y_test, verbose=0))

# %% [markdown]
# Now somebody turns the refuted claims into supported ones, in the JSON:

# %%
json_file = folder / "audit.json"
json_file.write_text(json_file.read_text().replace('"refuted"', '"supported"'))
for sentence in explain.verify(report, model, x_test, y_test, verbose=0):
    print("-", sentence)

# %% [markdown]
# The checksum finds that, and nothing needs to be computed. Whoever forges the checksums as well is found out when the
# verdicts are computed again. Other weights, another configuration and other data are named, too.
#
# ## What the audit says, and what it does not
#
# **It says** that the captured scores are the model's, that the output depends on them, that it needs the features ranked
# first more than others, that the ranking is in the model's weights, and that of these features only `income` is one that
# the model could not do without.
#
# **It does not say** that `turnover` is of no use, that `employee` does not matter, or that the model is good, fair or
# causal. Whether another training run would attend to the same features is left open here; given
# `models=[...]` from other seeds, [an audit tests that, too](seeds.ipynb). And the checksums are no signature: they show
# that a file was changed, not who made it.
