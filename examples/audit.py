# %% [markdown] level="advanced"
# # An audit file for a regulated model
#
# **How do you hand over what a model attends to so that somebody else can check it, and sees at once whether a number was changed?**
#
# `explain.audit` writes one file that says what the model is, what was found, and how each finding came out of its test. `explain.verify` computes all of it again. The applications for credit below are
# simulated, so we know what the audit ought to find.

# %%
import json
import tempfile
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from kerasfactory import explain, plot
from kerasfactory.layers import FeatureTokenizer, InterpretableMultiHeadAttention

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Planted truth
#
# Of eight columns, three decide whether a loan defaults: `income`, `debt` and `delays`. `salary` is `income` as another
# system stored it, the same numbers up to a little noise. The other four are noise.

# %%
rng = np.random.default_rng(0)
names = ["income", "salary", "debt", "delays", "age", "requests", "tenure", "region"]
x = rng.normal(size=(3000, 8)).astype("float32")
x[:, 1] = x[:, 0] + 0.05 * x[:, 1]
risk = 2 * x[:, 2] + 2 * x[:, 3] - 2 * x[:, 0]
y = (risk + rng.logistic(size=3000) > 0).astype("float32")
x_train, x_test, y_train, y_test = x[:2600], x[2600:], y[:2600], y[2600:]

inputs = keras.Input((8,))
tokens = FeatureTokenizer(8, feature_names=names)(inputs)
attended = InterpretableMultiHeadAttention(d_model=8, n_head=2, dropout_rate=0.0, name="attention")(tokens)
outputs = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(attended))
model = keras.Model(inputs, outputs, name="credit")
model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
model.fit(x_train, y_train, batch_size=64, epochs=10, verbose=0)
_, accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"Accuracy on 400 new applications: {accuracy:.1f}")

# %% [markdown]
# ## The audit
#
# One call, on data that the model was not trained on. The page opens in any browser, without a network; the same data
# lie beside it as JSON, for programs.

# %%
folder = Path(tempfile.mkdtemp())
page = explain.audit(model, x_test, y_test, folder / "audit.html", batch_size=2048, verbose=0)
record = json.loads((folder / "audit.json").read_text())
print("Files:", ", ".join(sorted(file.name for file in folder.iterdir())))
print("Sections:", ", ".join(record))
for claim in record["claims"]:
    if claim["feature"] is None:
        print(f"{claim['verdict']:13} {claim['claim']}")

# %% [markdown]
# A claim is *supported* only if its p-value still is at most 0.05 when it is adjusted for all claims in the file. It is
# *refuted* if the data speak against it, and *undetermined* if they leave it open. That is a result, too: with four
# samples, all but the first would be undetermined.
#
# ## Which features?
#
# A feature is claimed to matter if its attention is above the mean of all. The test draws its values anew, given the
# other features, and looks whether the model does worse.

# %%
attention = {one["feature"]: one["attribution"] for one in record["attribution"]["features"]}
of_features = {claim["feature"]: claim for claim in record["claims"] if claim["feature"]}
truth = dict.fromkeys(names, "noise") | dict.fromkeys(["income", "debt", "delays"], "decides") | {"salary": "a copy"}
for name in names:
    above = "above the mean" if attention[name] > 1 / 8 else "below the mean"
    print(f"{name:9} planted: {truth[name]:8} attention: {above}   verdict: {of_features[name]['verdict']}")

# %% tags=["cover"] alt="Eight features with the increase of the loss without each, its interval, and its verdict in words."
claims = xr.Dataset(
    {
        "effect": ("feature", [claim["statistic"]["value"] for claim in of_features.values()]),
        "interval": (("feature", "bound"), [claim["interval"] for claim in of_features.values()]),
        "verdict": ("feature", [claim["verdict"] for claim in of_features.values()]),
    },
    {"feature": names, "bound": ["lower", "upper"]},
)
plot.features(claims)
plt.show()

# %% [markdown]
# ## Does it still hold?
#
# `verify` is for whoever receives the file, with the model and the data. It returns what no longer holds, sentence by
# sentence. Nothing is the good answer.

# %%
print(explain.verify(page, model, x_test, y_test, verbose=0))

# %% [markdown]
# Now somebody improves one p-value in the JSON:

# %%
data = folder / "audit.json"
original = data.read_text()
noise = of_features["region"]["p_value"]
data.write_text(original.replace(f'"p_value": {noise}', '"p_value": 0.0001', 1))
for sentence in explain.verify(page, model, x_test, y_test, verbose=0):
    print("-", sentence)
data.write_text(original)

# %% [markdown]
# A checksum finds that. Whoever forges the checksum as well is found out when the number is computed again: `verify` does
# both. And here the model was trained for one more epoch after its audit:

# %%
model.fit(x_train, y_train, batch_size=64, epochs=1, verbose=0)
findings = explain.verify(page, model, x_test, y_test, verbose=0)
print("Findings:", len(findings) > 0)
print("The weights of the model are not those that were audited." in findings)

# %% [markdown]
# ## What the audit says, and what it does not
#
# **It says** that the captured scores are the model's, how much the output depends on them, and for which features the
# high attention is borne out by the model's loss. It marks the copy for what it is: `salary` tells the model nothing that
# `income` does not. The hashes tie all this to these weights and these data.
#
# **It does not say** that the model is good, fair or causal, nor that another training run would give the same features.
# A copy is refuted although a model may rely on it. And the checksums are no signature: they show that a file was changed, not
# who made it.
